"""Jobs take free cards, and the processes of one run end together with one sentence."""

import os
import socket
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from modhifi_cli.cli import main
from modhifi_cli.errors import ConfigError
from modhifi_cli.verbs import cards
from tests.conftest import REPOSITORY
from tests.decoders import saved
from tests.evaluation.test_language import TEXT

BESIDE = {"parallel": True, "number": 7}
SETTINGS = {"runtime": {"device": "cuda"}}


def needs_submitit() -> None:
    """Skip where submitit is not installed, without importing it: that closes the log handlers of everybody here."""
    if find_spec("submitit") is None:
        pytest.skip("needs submitit")


@pytest.fixture
def two_cards(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid=f"GPU-{number}"))
    return tmp_path


def device(settings) -> str:
    return settings["runtime"]["device"]


def test_a_job_beside_others_takes_a_card_that_is_free(two_cards):
    with cards.own_card(SETTINGS, BESIDE) as first:
        with cards.own_card(SETTINGS, BESIDE) as second:
            assert [device(first), device(second)] == ["cuda:0", "cuda:1"]
        with cards.own_card(SETTINGS, BESIDE) as third:
            assert device(third) == "cuda:1"
    with cards.own_card(SETTINGS, BESIDE) as fourth:
        assert device(fourth) == "cuda:0"
    assert SETTINGS == {"runtime": {"device": "cuda"}}


def test_a_job_waits_where_no_card_is_free(two_cards, monkeypatch):
    held = [cards.own_card(SETTINGS, BESIDE) for _ in range(2)]
    for one in held:
        one.__enter__()
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) == 3:
            held[1].__exit__(None, None, None)

    monkeypatch.setattr(cards.time, "sleep", sleep)
    with cards.own_card(SETTINGS, BESIDE) as late:
        assert device(late) == "cuda:1" and len(waited) == 3
    held[0].__exit__(None, None, None)


@pytest.mark.parametrize(
    ("asked", "facts"),
    [("cuda", {"parallel": False}), ("cuda:1", BESIDE), ("cpu", BESIDE)],
    ids=["alone", "named", "cpu"],
)
def test_a_device_that_was_chosen_or_need_not_be_stays(two_cards, asked, facts):
    with cards.own_card({"runtime": {"device": asked}}, facts) as kept:
        assert device(kept) == asked


def test_a_folder_of_somebody_else_is_no_place_for_locks(two_cards, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(ConfigError, match="expected a folder of your own for the locks of cards"):
        with cards.own_card(SETTINGS, BESIDE):
            pass


def test_a_helping_process_walks_the_network_in_the_runs_precision(monkeypatch):
    from modhifi_cli.settings import config
    from modhifi_cli.verbs import prune

    walked = []
    monkeypatch.setattr(prune, "_events", lambda model, *rest: walked.append(model) or iter(()))
    prune._follow({**config.steps("prune", ["runtime.dtype=float64", "data.num_samples=8"]), "resume": None})
    assert {parameter.dtype for parameter in walked[0].parameters()} == {torch.float64}


BREAKS = """
import os, sys
from modhifi_cli.engine.flow import Flow
from modhifi_cli.errors import NumericsError
advance = Flow.advance
def broken(flow, layer, number, item):
    if os.environ["RANK"] == "1":
        raise NumericsError("layer 0: this process broke.")
    return advance(flow, layer, number, item)
Flow.advance = broken
from modhifi_cli.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.card
def test_a_process_that_fails_ends_all_with_one_sentence(tmp_path):
    saved(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(TEXT)
    words = [
        "prune", "model=hf", "model.path=dense", "data=text", "data.path=text.txt", "data.sequences=8",
        "data.length=20", "evaluation=[]", "sparsity=0.3", "console=plain",
    ]  # fmt: skip
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    jobs = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", BREAKS, *words],
            cwd=tmp_path,
            env=os.environ | found | {"RANK": str(rank), "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [job.communicate(timeout=500)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [2, 2], told
    errors = [line for text in told for line in text.splitlines() if "rror" in line]
    assert errors == ["error: layer 0: this process broke."], told


def test_a_dry_run_shows_the_script_of_a_slurm_job_and_submits_nothing(tmp_path, monkeypatch, capsys):
    needs_submitit()
    monkeypatch.chdir(tmp_path)
    sweep = ["prune", "-m", "runtime=gpu", "sparsity=0.2,0.4", "dry_run=true"]
    assert main([*sweep, "hydra/launcher=slurm", "hydra.launcher.partition=big", "hydra.launcher.mem_gb=64"]) == 0
    script = capsys.readouterr().out
    assert script.startswith("#!/bin/bash")
    for line in ("partition=big", "mem=64GB", "gpus-per-node=1", "cpus-per-task=8", "time=240", "job-name=modhifi"):
        assert f"#SBATCH --{line}" in script
    assert "submitit.core._submit" in script and not list(tmp_path.iterdir())
    assert main(sweep) == 2
    assert "dry_run=true of a sweep shows the script of a SLURM job; add hydra/launcher=slurm" in capsys.readouterr().err


def test_a_dry_run_leaves_the_log_handlers_of_others_alone(tmp_path):
    needs_submitit()
    program = """
import logging, sys
from modhifi_cli.cli import main

class Closing(logging.StreamHandler):
    def close(self):
        self.stream.close()
        super().close()

log = open("log.txt", "w")
logging.getLogger("other").addHandler(Closing(log))
code = main("prune -m sparsity=0.2 dry_run=true hydra/launcher=slurm".split())
sys.exit(f"exit code {code}, closed {log.closed}")
"""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stderr.strip().endswith("exit code 0, closed False"), done.stderr
