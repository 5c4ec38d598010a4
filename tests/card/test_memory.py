"""Memory belongs to the card: limits are a share of its own, peaks are of each job, and a full card is one sentence."""

import functools

import pytest
import torch

import modhifi_cli
from modhifi_cli import load_model
from modhifi_cli.cli import main
from modhifi_cli.engine import image_walk
from modhifi_cli.engine.gathering import Gathering
from modhifi_cli.engine.image_walk import ImageWalk
from modhifi_cli.engine.memory import limit_bytes, peaks, place_of_sums, reset_peaks
from modhifi_cli.engine.prune import prune_
from modhifi_cli.engine.walk import Budget, Recipe
from modhifi_cli.errors import is_out_of_memory
from modhifi_cli.evaluation.visiting import free_memory
from modhifi_cli.files import artifacts
from modhifi_cli.numerics.allocation import Uniform
from modhifi_cli.numerics.compensation import Joint
from modhifi_cli.numerics.schedule import geometric
from modhifi_cli.numerics.scoring import Singleton
from modhifi_cli.numerics.selection import Greedy
from modhifi_cli.records import Edit
from tests.card import pretend
from tests.card.networks import labelled_images, network
from tests.engine.test_both_walks import Images

pytestmark = pretend.COUNTED

RUN = ["data.num_samples=64", "evaluation_data.num_samples=60", "preset=fast", "sparsity=0.3", "console=plain"]
RUN += ["runtime=gpu", "evaluation=[top1]"]
FORGET = ["unlearn", "forget_class=3", "data.num_samples=200", "evaluation_data.num_samples=60", "runtime=gpu"]
FORGET += ["evaluation=[top1]", "audit=none", "console=plain"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def only_run(here):
    (folder,) = (here / "outputs" / "prune").glob("*/*")
    return folder


def test_limits_are_shares_of_what_is_free_where_activations_lie():
    with pretend.card(memory=6e6):
        held = torch.zeros(750_000, device="cuda")
        assert free_memory("cuda") == 3e6
        assert limit_bytes(Gathering(), "cuda") == 5e5
        assert limit_bytes(Gathering(), "cuda", networks=2) == 2.5e5
        assert limit_bytes(Gathering(carry_gigabytes=0.001), "cuda", networks=2) == 5e5
        del held
    assert limit_bytes(Gathering(), "cpu") > 1e6


def test_the_most_that_was_held_is_counted_anew_for_each_job():
    with pretend.card(memory=1e9):
        torch.zeros(1_000_000, device="cuda")
        assert peaks("cuda")["card"] == 4_000_000
        reset_peaks()
        torch.zeros(1_000, device="cuda")
        found = peaks("cuda")
        assert found["card"] == 4_000 and found["card_total"] == 1e9 and found["process"] > 1e7
    assert set(peaks("cpu")) == {"process"}


@pytest.mark.card
def test_a_run_tells_the_memory_of_the_card_on_its_page(here):
    with pretend.card(memory=2e9) as seen:
        assert main(["prune", *RUN]) == 0
        memory = artifacts.read_results(only_run(here))["memory"]
    assert 0 < memory["card"] <= seen.peak and memory["card_total"] == 2e9
    assert "memory of the card" in (only_run(here) / "report.md").read_text()


@pytest.mark.card
def test_a_full_card_is_one_sentence_with_what_helps_and_how_to_go_on(here, capsys):
    with pretend.card(memory=4e5):
        assert main(["prune", *RUN]) == 2
    told = capsys.readouterr()
    (line,) = told.err.strip().splitlines()
    assert line.startswith("error: the memory of cuda is full; runtime.batch_size=128 (now 256) or statistics.")


@pytest.mark.card
def test_a_run_that_met_a_full_card_goes_on_with_smaller_batches(here, capsys, monkeypatch):
    save = artifacts.RunDirectory.save_edit

    def full(run, edit, dense_hash):
        save(run, edit, dense_hash)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pretend.card():
        with monkeypatch.context() as patched:
            patched.setattr(artifacts.RunDirectory, "save_edit", full)
            assert main(["prune", *RUN]) == 2
        said = capsys.readouterr()
        (line,) = said.err.strip().splitlines()
        assert "the memory of cuda is full" in line and "Tried to allocate 2.00 GiB" in line
        assert "once the cause is mended: Go on with: modhifi prune" in said.out and "resume=outputs" in said.out
        words = ["runtime.batch_size=16", "statistics.carry_gigabytes=0", f"resume={only_run(here)}"]
        assert main(["prune", *RUN, *words]) == 0
    assert not only_run(here).name.endswith(".incomplete")


@pytest.mark.card
@pytest.mark.parametrize("verb", ["prune", "unlearn"])
def test_a_run_that_meets_a_full_card_once_goes_on_by_itself_with_smaller_batches(verb, here, capsys, monkeypatch):
    words = [verb, *RUN, "data.num_samples=200"] if verb == "prune" else FORGET
    with pretend.card():
        assert main([*words, "output_dir=whole"]) == 0
    save, failed = artifacts.RunDirectory.save_edit, []

    def full_once(run, edit, dense_hash):
        save(run, edit, dense_hash)
        if not failed:
            failed.append(edit.name)
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(artifacts.RunDirectory, "save_edit", full_once)
    capsys.readouterr()
    with pretend.card():
        assert main([*words, "output_dir=again"]) == 0
    told = capsys.readouterr()
    assert "the memory of cuda was full, so the run goes on with 64 inputs a forward" in told.out and not told.err
    whole, again = (load_model(next((here / name / verb).glob("*/*"))) for name in ("whole", "again"))
    assert {name: one.shape for name, one in whole.state_dict().items()} == {
        name: one.shape for name, one in again.state_dict().items()
    }


@pytest.mark.card
def test_a_measurement_that_fills_the_card_goes_on_with_half_the_batch(here, capsys, monkeypatch):
    from modhifi_cli.evaluation import top1

    measure, asked = top1.measure, []

    @functools.wraps(measure)  # settings may name measurements of the package alone
    def measured(*, batch_size, **given):
        asked.append(batch_size)
        if batch_size > 64:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return measure(batch_size=batch_size, **given)

    monkeypatch.setattr(top1, "measure", measured)
    with pretend.card():
        assert main(["prune", *RUN]) == 0
    assert asked == [256, 128, 64]
    assert "top1: the memory of cuda was full, so it goes on with 64 inputs a forward" in capsys.readouterr().out


@pytest.mark.card
def test_a_run_on_a_card_of_half_the_size_keeps_the_same_and_stays_below_it():
    data = torch.cat([images for images, _ in labelled_images("batchnorm", 1200)])
    model = network("batchnorm")
    with pretend.card() as roomy:
        _, first = modhifi_cli.prune(model.cuda(), data, sparsity=0.3, preset="paper", batch_size=20)
        model.cpu()
    half = roomy.peak / 2
    with pretend.card(memory=half) as tight:
        _, second = modhifi_cli.prune(model.cuda(), data, sparsity=0.3, preset="paper", batch_size=20)
        model.cpu()
    assert 0 < tight.peak <= half
    assert {name: kept.tolist() for name, kept in first.kept.items()} == {
        name: kept.tolist() for name, kept in second.kept.items()
    }


@pytest.mark.parametrize("offload", ["auto", True, False])
def test_activations_that_do_not_fit_the_card_wait_in_pinned_memory_of_the_host(offload):
    data = torch.cat([images for images, _ in labelled_images("batchnorm", 40)])
    recipe = Recipe(Singleton(), Greedy(), Joint(), Uniform(), functools.partial(geometric, iterations=1))

    def kept(gathering, seen):
        model = network("batchnorm").cuda()
        walk = ImageWalk(model, Images(data), batch_size=20, device="cuda", gathering=gathering)
        edits = [event for event in prune_(walk, recipe, Budget(0.3)) if isinstance(event, Edit)]
        model.cpu()
        return [edit.kept.tolist() for edit in edits], seen.pinned

    with pretend.card() as seen:
        roomy, none = kept(Gathering(), seen)
        tight, pinned = kept(Gathering(carry_gigabytes=1e-9, offload=offload), seen)
    assert roomy == tight and none == 0
    assert pinned > data.nbytes if offload else pinned == 0


def test_what_is_no_want_of_memory_stays_a_defect():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


@pytest.mark.card
@pytest.mark.parametrize("preset", ["best", "paper"])
def test_sums_that_find_no_room_on_the_card_are_made_and_solved_by_the_processor(preset, here, monkeypatch):
    words = ["prune", *RUN, f"preset={preset}", "data.num_samples=400"]
    with pretend.card():
        assert main([*words, "output_dir=roomy"]) == 0
    places = []

    def of_wide_layers(features, device, *, beside=0):
        places.append((features, beside))
        return torch.device("cpu") if features > 200 else device

    monkeypatch.setattr(image_walk, "place_of_sums", of_wide_layers)
    with pretend.card() as seen:
        assert main([*words, "output_dir=tight"]) == 0
    assert {features > 200 for features, _ in places} == {True, False}, "some here and some there"
    assert any("gathering.py" in where for where in seen.copies), seen.report()
    roomy, tight = (load_model(next((here / name / "prune").glob("*/*"))) for name in ("roomy", "tight"))
    for name, one in roomy.state_dict().items():
        other = tight.state_dict()[name]
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=lambda told, name=name: f"{name}: {told}")


def test_sums_lie_on_the_card_as_long_as_half_of_it_is_left():
    card = torch.device("cuda")
    with pretend.card(memory=1e6):
        assert place_of_sums(88, card).type == "cuda"  # eight times 62 kB
        assert place_of_sums(89, card).type == "cpu"
        assert place_of_sums(60, card, beside=300_000).type == "cpu"
    assert place_of_sums(10**6, torch.device("cpu")).type == "cpu"
