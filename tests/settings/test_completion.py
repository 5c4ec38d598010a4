"""What shells offer: verbs, keys, choices; asked as bash does where bash is there."""

import os
import shutil
import subprocess
import sys

import pytest

from modhifi_cli.cli import main
from modhifi_cli.settings import completion, config


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


@pytest.mark.parametrize("shell", ["bash", "zsh"])
@pytest.mark.parametrize(("line", "offered"), [("modhifi pru", "prune"), ("modhifi prune data=fold", "folder")])
def test_a_shell_completes_by_the_script(shell, line, offered, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    if shell == "zsh":
        offered = line.split()[-1].partition("=")[0] + "=" + offered if "=" in line else offered
    command = tmp_path / "modhifi"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m modhifi_cli "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    asked = f"COMP_LINE='{line}' COMP_POINT={len(line)}; _modhifi; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    setup = 'complete() { :; }; autoload() { :; }; bashcompinit() { :; }; compinit() { :; }; eval "$(modhifi completion SHELL)"'
    done = subprocess.run(
        [shell, "-c", f"{setup.replace('SHELL', shell)}\n{asked}"],
        env=os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines() == [offered], done.stderr
