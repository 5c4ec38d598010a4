"""What shells offer: verbs, keys, choices; asked as bash does where bash is there."""

import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modhifi_cli.cli import main
from modhifi_cli.settings import completion, config

ROOT = Path(__file__).resolve().parents[2]


def test_the_first_word_is_a_verb():
    assert set(completion.candidates("modhifi ")) >= {*config.verbs(), "list", "completion"}
    assert completion.candidates("modhifi pr") == ["prune"]


def test_keys_are_those_of_the_verb_and_of_the_choice_that_was_typed():
    assert "sparsity=" in completion.candidates("modhifi prune s")
    assert "forget_class=" not in completion.candidates("modhifi prune f")
    assert "data.path=" in completion.candidates("modhifi prune data=folder data.")
    assert "data.path=" not in completion.candidates("modhifi prune data=inversion data.")


def test_a_group_offers_its_choices_and_a_switch_its_two():
    assert completion.candidates("modhifi prune data=fo") == ["data=folder"]
    assert completion.candidates("modhifi prune export=[on") == ["export=[onnx]"]
    assert completion.candidates("modhifi prune check_data=") == ["check_data=false", "check_data=true"]
    assert completion.candidates("modhifi list group=sco") == ["group=scoring"]


def test_a_key_that_takes_a_run_offers_the_newest_and_every_name():
    names = ["20260101-100000_a", "20260102-100000_b"]
    found = completion.candidates("modhifi verify run=", lambda: names)
    assert found == ["run=20260101-100000_a", "run=20260102-100000_b", "run=last"]
    assert completion.candidates("modhifi verify run=la", lambda: names) == ["run=last"]


def test_folders_of_runs_are_read_only_for_a_key_that_takes_a_run():
    def read():
        raise AssertionError("folders were read")

    assert completion.candidates("modhifi prune data=fo", read) == ["data=folder"]
    assert "run=" in completion.candidates("modhifi verify r", read)


def test_what_takes_a_file_is_left_to_the_shell():
    assert completion.candidates("modhifi prune data=folder data.path=") == []
    assert completion.candidates("modhifi nonsense x") == []


def test_an_unknown_shell_is_told_the_known_ones(capsys):
    assert main(["completion", "tcsh"]) == 2
    assert "takes the name of a shell, bash, zsh, fish; got 'tcsh'" in capsys.readouterr().err


def test_the_version_names_the_libraries_and_the_device(capsys):
    assert main(["--version"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("modhifi ") and "torch " in said and "transformers " in said


@pytest.fixture
def path(tmp_path):
    """A PATH on which ``modhifi`` is this source tree's."""
    command = tmp_path / "modhifi"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m modhifi_cli "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    return os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def needed(shell):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")


CASES = [("modhifi pru", "prune"), ("modhifi prune data=fold", "data=folder"), ("modhifi prune batchn", "batchnorm=")]


@pytest.mark.parametrize(("line", "offered"), CASES)
def test_bash_completes_by_the_script(line, offered, path):
    needed("bash")
    asked = f"COMP_LINE='{line}' COMP_POINT={len(line)}; _modhifi; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(
        ["bash", "-c", f'eval "$(modhifi completion bash)"\n{asked}'], env=path, capture_output=True, text=True, check=False
    )
    after_the_sign = offered.partition("=")[2] if "=" in line else offered  # in bash "=" ends a word
    assert done.stdout.splitlines() == [after_the_sign], done.stderr


@pytest.mark.parametrize(("line", "offered"), CASES)
def test_fish_completes_by_the_script(line, offered, path):
    needed("fish")
    asked = f"modhifi completion fish | source; complete -C '{line}'"
    done = subprocess.run(["fish", "-N", "-c", asked], env=path, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [offered], done.stderr


@pytest.mark.parametrize(("line", "offered"), CASES)
def test_zsh_completes_by_the_script(line, offered, path, tmp_path):
    """Its completion works at a prompt only, so a terminal is pretended and the tab key is typed."""
    needed("zsh")
    ours, theirs = os.openpty()
    shell = subprocess.Popen(
        ["zsh", "-f", "-i"], env=path | {"TERM": "dumb", "HOME": str(tmp_path)}, cwd=tmp_path,
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    try:
        os.write(ours, b'eval "$(modhifi completion zsh)"; echo re""ady\n')
        shown = seen(ours, "ready\r")
        os.write(ours, line.encode())
        shown += seen(ours, line.split()[-1])
        os.write(ours, b"\t")
        rest = offered.removeprefix(line.split()[-1])  # zsh shows what it adds
        assert rest in seen(ours, rest), shown
    finally:
        shell.kill()
        shell.wait()
        os.close(ours)
        os.close(theirs)


def seen(terminal, wanted, seconds=60):
    """What a terminal shows until it shows what is wanted, or the time is over."""
    shown, ends = "", time.monotonic() + seconds
    while wanted not in shown and time.monotonic() < ends:
        if select.select([terminal], [], [], 0.2)[0]:
            shown += os.read(terminal, 65536).decode(errors="replace")
    return shown
