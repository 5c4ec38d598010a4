"""The command line: help, exit codes, and one sentence for everything a user can get wrong before work begins."""

import os
import re
import signal
import subprocess
import sys
import threading

import pytest

from modhifi_cli import cli
from modhifi_cli.cli import main
from modhifi_cli.errors import DataError
from modhifi_cli.settings import config
from tests.attack.runs import QUICK


def sentence(capsys, *words: str) -> str:
    """The one line that a wrong command prints; its exit code is 2."""
    assert main(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def test_help_imports_neither_torch_nor_hydra_and_answers_within_a_second():
    code = (
        "import sys, time; started = time.process_time()  # others may have the processor meanwhile\n"
        "from modhifi_cli.cli import main\n"
        "assert main(['--help']) == 0 and main(['prune', '--help']) == 0 and main(['list']) == 0\n"
        "assert not {'torch', 'hydra', 'omegaconf'} & set(sys.modules), 'heavy import'\n"
        "assert time.process_time() - started < 1\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "sparsity" in done.stdout


def test_list_explains_the_choices_of_one_group(capsys):
    assert main(["list", "group=compensation"]) == 0
    assert "per_kernel" in capsys.readouterr().out


def test_list_refuses_an_unknown_group(capsys):
    assert "did you mean 'model'" in sentence(capsys, "list", "group=modle")
    assert "console must be rich, plain or json; got 'loud'" in sentence(capsys, "list", "console=loud")


WRONG = {
    "unknown verb": (["prun"], "there is no verb 'prun'; did you mean 'prune'"),
    "an option with dashes": (["prune", "--sparsity=0.4"], "written key=value without dashes, such as sparsity=0.4"),
    "an unknown short option": (["prune", "-x"], "there is no option '-x'"),
    "a bare word": (["prune", "resnet50"], "'resnet50' is no setting; settings are written key=value"),
    "unknown key": (["prune", "sparsty=0.4"], "no key 'sparsty': did you mean 'sparsity'"),
    "unknown group": (["prune", "modle=resnet50"], "no key 'modle': did you mean 'model'"),
    "unknown choice": (["prune", "model=resnet5"], "model=resnet5: there is no such choice; did you mean"),
    "unknown key of a choice": (["prune", "compensation.rigde=1"], "did you mean 'compensation.ridge'"),
    "an added key of a choice": (["prune", "+compensation.rigde=1"], "no key 'rigde': did you mean 'ridge'"),
    "an added key": (["prune", "+sparsty=1"], "no key 'sparsty': did you mean 'sparsity'"),
    "a key of a choice not made": (
        ["prune", "evaluation=[size]", "evaluation.latency.warmup=1"], "make it with evaluation=[…,latency]",
    ),
    "a missing value": (["prune", "data=folder"], "data.path must be given, e.g. data.path=PATH"),
    "a missing run": (["verify"], "run must be given, e.g. run=DIR"),
    "an empty run": (["verify", "run="], "run must be a run folder, or null; got ''."),
    "a run of null": (["verify", "run=null"], "run must be given, e.g. run=DIR"),
    "an empty resume": (["prune", "resume="], "resume must be the folder of an interrupted run, or null; got ''."),
    "a path without a kind": (["prune", "data.path=x"], "e.g. data=folder data.path=FOLDER"),
    "sparsity of 1": (["prune", "sparsity=1"], r"0 <= sparsity < 1 (none with target=max_drop); got 1."),
    "negative sparsity": (["prune", "sparsity=-0.1"], r"0 <= sparsity < 1 (none with target=max_drop); got -0.1."),
    "sparsity that is a word": (["prune", "sparsity=half"], r"0 <= sparsity < 1 (none with target=max_drop); got 'half'."),
    "sparsity that is no number": (["prune", "sparsity=nan"], r"0 <= sparsity < 1 (none with target=max_drop); got nan."),
    "round_to of 0": (["prune", "round_to=0"], "round_to must be a whole number from 1, or auto; got 0."),
    "batchnorm of another kind": (["prune", "batchnorm=maybe"], "batchnorm must be reestimate or stored; got 'maybe'."),
    "exclude that is no list": (["prune", "exclude=fc"], "exclude must be a list of module names"),
    "a batch of nothing": (["prune", "runtime.batch_size=0"], "runtime.batch_size must be a whole number from 1"),
    "an unknown device": (["prune", "runtime.device=tpu"], "runtime.device must be cpu, cuda or cuda:N; got 'tpu'."),
    "values with commas": (["prune", "sparsity=0.1,0.2"], "is a sweep and needs -m"),
    "unreadable grammar": (["prune", "exclude=[a"], "cannot read 'exclude=[a': settings are written key=value"),
    "a target elsewhere": (["prune", "model._target_=os.system"], "must lie under modhifi_cli, or be code of your own named package.module:name; got 'os.system'"),
    "a target that is not": (["prune", "model._target_=modhifi_cli.models.x.y"], "which does not exist"),
    "a group without a choice": (["prune", "data=null"], "a group takes the name of one of its choices"),
    "a mixture of nothing": (["prune", "data=mixed", "data.sources=[]"], "data.sources must be a list such as"),
    "a mixture with an unknown source": (
        ["prune", "data=mixed", "data.sources=[{name: proceduarl}]"], "data.sources[0].name: there is no such choice; did",
    ),
    "a mixture with a source without its path": (
        ["prune", "data=mixed", "data.sources=[{name: folder}]"], "data.sources[0].path must be given: folder needs it.",
    ),
    "a mixture with a misspelt key": (
        ["prune", "data=mixed", "data.sources=[{name: procedural, knd: fractal}]"], "data.sources[0].source has no key 'knd'",
    ),
    "a given network for made data": (["prune", "data=inversion", "+data.making=1"], "data has no key 'making'"),
    "a sweep of info": (["info", "-m", "model=resnet18,resnet34"], "modhifi info runs once"),
    "no such run": (["verify", "run=nowhere"], "run=nowhere: no such folder"),
    "a run of a name too long": (["replay", "run=" + 300 * "x"], "x…: File name too long; give a path that this machine can open"),
    "a folder of a name too long": (["prune", "data=folder", "data.path=" + 300 * "x"], "x…: File name too long; give a path"),
    "a value that points to what it lies in": (["prune", "model.name=${model}"], "modhifi prune: Interpolation to parent node"),
    "a folder of nobody's home": (["prune", "data=folder", "data.path='~nobodyx/y'"], "no folder at ~nobodyx/y"),
    "settings in nobody's home": (["prune", "--config-dir", "~nobodyx"], "~nobodyx"),
    "a choice without its key": (["prune", "~target.images"], "~target.images: modhifi prune needs target.images and cannot do"),
    "a part of a group without its target": (
        ["unlearn", "forget_class=3", "~audit.membership._target_"], "~audit.membership._target_: modhifi unlearn needs",
    ),
    "a measurement without its target": (["prune", "~evaluation.top1._target_"], "~evaluation.top1._target_: modhifi prune"),
    "a choice that is none without its key": (["compare", "~target.auto"], "~target.auto: modhifi compare needs target.auto and"),
    "a flag without its value": (["prune", "--cfg"], "--cfg must be one of job, hydra, all, such as --cfg job; got ''."),
    "a flag without the one it goes with": (["prune", "--resolve"], "--resolve goes with --cfg job, which shows settings instead"),
    "a folder of settings without a name": (["prune", "--config-dir="], "--config-dir needs a value behind it; got ''."),
    "an unknown key of a measurement that is made": (
        ["prune", "evaluation=[top1,latency]", "evaluation.latency.rounds=3"],
        "modhifi prune has no key 'evaluation.latency.rounds': did you mean 'evaluation.latency.runtimes'",
    ),
    "a key of a measurement that is not made": (
        ["prune", "evaluation=[top1]", "evaluation.latency.iterations=9"],
        "evaluation.latency.iterations needs the choice latency, which is not made here",
    ),
    "an operator set below zero": (["prune", "export=[onnx]", "export.onnx.opset=-1"], "export.onnx.opset must be a whole"),
    "an unknown key of list": (["list", "colour=3"], "modhifi list has no key 'colour'; known: console, group."),
    "a kind of network with an unknown target": (["prune", "target.images=speed"], "target.images: there is no target 'speed'; known"),
    "a folder of Hydra's": (["prune", "hydra.run.dir=x"], "hydra.run.dir has no effect: modhifi names folders and logs itself"),
    "a repair towards another network": (
        ["prune", "compensation.reference=both"], "compensation.reference must be 'current', 'dense' or 'auto', got 'both'.",
    ),
    "a repair towards nothing and the dense network": (
        ["prune", "+compensation.towards=zero", "compensation.reference=dense"], "towards=zero is for compensation.reference=current",
    ),
    "an unknown bound": (["unlearn", "forget_class=3", "method=discedit_u", "method.bound=no"], "method.bound must be one of witness, f"),
    "a foretold run with a target for the clock": (
        ["prune", "model=hf", "model.path=x", "dry_run=true", "target=latency"], "dry_run=true counts, and target=latency has to",
    ),
    "a foretold run of images": (["prune", "dry_run=true"], "dry_run=true reads the shapes of language models; for networks that"),
    "an unknown unit of heads": (["prune", "model=hf", "model.path=x", "data=text", "data.path=x", "decoder.unit=head"], "decoder.unit must be"),
    "an unknown component": (
        ["prune", "model=hf", "model.path=x", "data=text", "data.path=x", "components=[head]"], "components must be mlp, attention, experts or several, such as [mlp,attention]",
    ),
    "no such run to resume": (["prune", "resume=nowhere"], "resume=nowhere: no such folder"),
}  # fmt: skip


@pytest.mark.parametrize("words, expected", WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_said_in_one_sentence(capsys, tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    assert expected in sentence(capsys, *words)
    assert not list(tmp_path.iterdir()), "a wrong command leaves nothing behind"


def test_a_device_that_is_not_there_is_named(capsys, tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch finds no graphics card here; use runtime=cpu" in sentence(capsys, "prune", "runtime=gpu")


def test_cfg_shows_what_would_be_used(capsys):
    assert main(["prune", "--cfg", "job", "sparsity=0.25"]) == 0
    assert "sparsity: 0.25" in capsys.readouterr().out


def test_an_output_folder_that_cannot_be_written_is_named(capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    said = sentence(capsys, "prune", f"output_dir={tmp_path / 'file'}", "console=plain")
    assert "cannot be written (Not a directory)" in said
    assert "output_dir=FOLDER" in said


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals come to the main thread")
@pytest.mark.parametrize("swallowed", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_end_is_taken_like_ctrl_c(number, swallowed, monkeypatch, capsys):
    first = signal.signal(number, signal.default_int_handler)  # a shell's background jobs ignore SIGINT
    before = signal.getsignal(number)

    def run(words):
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            if not swallowed:
                raise
            raise DataError("a file cannot be read") from None  # as a library in C makes of it
        raise AssertionError("the signal was not heard")

    monkeypatch.setattr(cli, "_run", run)
    assert cli.main(["prune"]) == cli.INTERRUPTED
    said = capsys.readouterr().err
    assert "interrupted." in said and "cannot be read" not in said
    assert signal.getsignal(number) is before
    signal.signal(number, first)


class Streams:
    """Places for what a command prints that do not take it."""

    @staticmethod
    def full(monkeypatch, name="stdout"):
        monkeypatch.setattr(sys, name, open("/dev/full", "w"))  # noqa: SIM115

    @staticmethod
    def unread(monkeypatch):
        reader, writer = os.pipe()
        os.close(reader)
        monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))


SMALL_RUN = ["prune", *QUICK, "sparsity=0.3"]


@pytest.mark.parametrize("words", [["list"], ["--help"], ["prune", "--cfg", "job"]])
def test_output_that_cannot_be_written_is_one_sentence(words, monkeypatch, capsys):
    Streams.full(monkeypatch)
    assert main(words) == 2
    assert "the output could not be written (No space left on device)" in capsys.readouterr().err


def test_a_run_whose_output_cannot_be_written_is_finished_all_the_same(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    Streams.full(monkeypatch)
    assert main(SMALL_RUN) == 2
    (run,) = (tmp_path / "outputs/prune/embedded").iterdir()
    assert not run.name.endswith(".incomplete")
    assert "error: done, but the output could not be written" in capsys.readouterr().err


def test_an_error_that_nobody_can_be_told_keeps_its_exit_code(monkeypatch):
    Streams.full(monkeypatch, "stderr")
    assert main(["prune", "sparsity=9"]) == 2


@pytest.mark.parametrize("words", [["list"], ["prune", "--cfg", "job"]])
def test_a_closed_pipe_ends_quietly_with_its_own_exit_code(words, monkeypatch, capsys):
    Streams.unread(monkeypatch)
    assert main(words) == 141
    assert capsys.readouterr().err == "nobody reads the output any more.\n"


def test_a_run_that_nobody_listens_to_leaves_no_empty_folder(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    Streams.unread(monkeypatch)
    assert main(SMALL_RUN) == 141
    assert not list((tmp_path / "outputs/prune/embedded").iterdir())
    assert "Nothing was made yet" in capsys.readouterr().err


def test_streams_that_the_shell_has_closed_are_opened_before_a_file_takes_their_number(tmp_path):
    code = "import sys; from modhifi_cli.cli import main; code = main(['list']); open('file', 'w').write(str(code))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    ended = subprocess.run(
        ["/bin/sh", "-c", f'exec {sys.executable} -c "{code}" >&- 2>&-'], cwd=tmp_path, env=environment, check=False
    )
    assert ended.returncode == 0 and (tmp_path / "file").read_text() == "0"


def test_help_offers_only_what_a_verb_reads_and_fits_a_window():
    said = config.verb_help("unlearn")
    for word in ("llama2_7b", "wikitext2", "token_perplexity", "gguf", "preset=", "cifar_compare_resnet20"):
        assert word not in said, word
    assert "cifar_unlearn_resnet20" in said and "class_inversion" in said
    assert "preset=best" in config.verb_help("prune") and "llama2_7b" in config.verb_help("prune")
    lines = config.main_help().splitlines()
    assert all(len(line) <= 110 for line in lines)
    starts = {len(re.match(r"  \w+ +", line)[0]) for line in lines if re.match(r"  \w+ {2,}\w", line)}
    assert len(starts) == 1, "all verbs are told in one column"


def test_info_needs_no_weights(capsys, monkeypatch):
    import torchvision.models._api as hub

    monkeypatch.setattr(hub.WeightsEnum, "get_state_dict", lambda *_, **__: pytest.fail("weights were asked for"))
    assert cli.main(["info", "model=resnet20_cifar", "console=plain"]) == 0
    assert cli.main(["info", "model=resnet18", "console=plain"]) == 0
    assert "11,689,512 parameters" in capsys.readouterr().out
