"""Precision is said: TF32 by a setting and never in sums of the method, half precision for forwards alone."""

import pytest
import torch

from modhifi_cli.cli import main
from modhifi_cli.files import artifacts
from modhifi_cli.numerics.linalg import exact_products
from modhifi_cli.numerics.moments import RowMoments
from tests.card import pretend
from tests.card.test_memory import RUN, here, only_run  # noqa: F401  here is a fixture


def test_sums_of_the_method_are_exact_where_forwards_are_rounded(monkeypatch):
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before, seen = [switch.allow_tf32 for switch in switches], []

    @exact_products
    def look():
        seen.append([switch.allow_tf32 for switch in switches])

    try:
        for switch in switches:
            switch.allow_tf32 = True
        look()
        assert [switch.allow_tf32 for switch in switches] == [True, True]
    finally:
        for switch, was in zip(switches, before, strict=True):
            switch.allow_tf32 = was
    assert seen == [[False, False]] and hasattr(RowMoments.update, "__wrapped__")


@pytest.mark.card
@pytest.mark.parametrize("matmul", ["highest", "high"])
def test_the_setting_decides_whether_forwards_are_rounded_and_the_page_says_so(here, matmul):  # noqa: F811
    with pretend.card():
        assert main(["prune", *RUN, f"runtime.matmul={matmul}"]) == 0
    assert torch.backends.cudnn.allow_tf32 == (matmul == "high")
    assert ("TF32 in float32 forwards" in (only_run(here) / "report.md").read_text()) == (matmul == "high")


@pytest.mark.card
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("preset", ["best", "paper"])
def test_forwards_in_half_precision_give_statistics_in_single(here, dtype, preset):  # noqa: F811
    words = [word for word in RUN if not word.startswith(("preset", "runtime"))]
    assert main(["prune", *words, f"preset={preset}", "runtime=cpu", f"runtime.dtype={dtype}"]) == 0
    results = artifacts.read_results(only_run(here))
    found = {m["model"]: m["value"] for m in results["measurements"] if m["name"] == "top1"}
    assert found["pruned"] > found["dense"] - 25
