"""The search for the most compression within a bound, on networks whose drop is known."""

import pytest
import torch

from modhifi_cli.data.parts import Part
from modhifi_cli.engine.max_drop import SMALLEST, DropSearch, Trial, measured_drop, predicted_drop, predicted_share
from modhifi_cli.errors import DataError


def searched(drop_of, *, value=1.0, trials=6, start=None, largest=0.95):
    """Runs a search over a known drop; the trials, and the accepted one or None."""
    search = DropSearch(value, trials, resolution=0.4, largest=largest)
    finished: list[Trial] = []
    while (share := search.next_share(start, finished)) is not None:
        finished.append(Trial(share, drop_of(share)))
    best = search.best(finished)
    return finished, None if best is None else finished[best]


DROPS = {
    "exponential": (lambda s: 0.05 * (2.718 ** (8 * s) - 1), 0.38),
    "square": (lambda s: 10 * s * s, 0.316),
    "step": (lambda s: 0.0 if s < 0.6 else 40.0, 0.6),
    "steep": (lambda s: 100 * s, 0.01),
}


@pytest.mark.parametrize("start", [None, 0.05, 0.9])
@pytest.mark.parametrize("name", ["exponential", "square", "step"])
def test_the_search_comes_near_the_largest_share_within_few_trials(name, start):
    drop_of, truth = DROPS[name]
    finished, best = searched(drop_of, start=start, trials=8)
    assert len(finished) <= 8 and best is not None
    assert best.drop <= 1.0
    assert truth - 0.08 <= best.sparsity <= truth


@pytest.mark.parametrize("trials", [2, 4, 6])
def test_where_nothing_keeps_the_bound_the_smallest_cut_was_tried_last(trials):
    finished, best = searched(DROPS["steep"][0], trials=trials)
    assert best is None and len(finished) <= trials
    assert finished[-1].sparsity == SMALLEST


def test_a_bound_that_everything_keeps_ends_at_the_largest_share():
    finished, best = searched(lambda share: 0.0, largest=0.7)
    assert best.sparsity == pytest.approx(0.7) and len(finished) < 6


def test_the_next_share_follows_from_the_finished_trials_alone():
    finished, _ = searched(DROPS["square"][0])
    search = DropSearch(1.0, 6, resolution=0.4)
    for number, trial in enumerate(finished):
        assert search.next_share(None, finished[:number]) == trial.sparsity


def test_the_drop_is_the_share_of_changed_answers():
    dense = torch.tensor([[2.0, 1.0], [1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    other = torch.tensor([[0.0, 1.0], [1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    assert measured_drop(dense, other) == 25.0
    assert measured_drop(dense, dense) == 0.0


def test_the_predicted_drop_is_what_noise_of_that_size_does():
    """Two classes whose logits differ by m: noise of variance v in both flips the answer with Φ(−m / √(2v))."""
    margin = 2.0
    dense = torch.tensor([[margin, 0.0], [0.0, margin]]).repeat(500, 1)
    spread = (margin / 2) ** 2  # variance of a logit over the images
    impact = 0.8
    flips = torch.special.ndtr(torch.tensor(-margin / (2 * impact * spread) ** 0.5))
    assert predicted_drop(dense, impact) == pytest.approx(100 * float(flips), abs=0.5)
    assert predicted_drop(dense, 0.0) == 0.0


def test_the_predicted_share_is_the_largest_that_keeps_the_bound():
    torch.manual_seed(0)
    dense = torch.randn(400, 10)
    share = predicted_share(dense, lambda s: s * s, 5.0, largest=0.9)
    assert predicted_drop(dense, share**2) <= 5.0 < predicted_drop(dense, (share + 0.02) ** 2)
    assert predicted_share(dense, lambda s: 1e6, 5.0, largest=0.9) == SMALLEST


class Numbered:
    """Images that are their own number."""

    protocol = {"source": "numbers"}

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def batches(self, batch_size):
        numbers = torch.arange(self.count)
        for batch in numbers.split(batch_size):
            yield batch.float()[:, None], batch


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 50])
def test_two_parts_are_all_images_once_in_order_in_whole_batches(batch_size):
    parts = [Part(Numbered(43), share=0.25, held_out=held_out) for held_out in (False, True)]
    seen = []
    for part in parts:
        batches = list(part.batches(batch_size))
        numbers = torch.cat([images for images, _ in batches]).flatten().long()
        assert torch.equal(torch.cat([labels for _, labels in batches]), numbers)
        assert numbers.tolist() == sorted(numbers.tolist()) and len(numbers) == len(part)
        assert all(len(images) == batch_size for images, _ in batches[:-1])
        seen += numbers.tolist()
    assert sorted(seen) == list(range(43))
    assert len(parts[1]) == 10 and "every 4th image" in parts[1].protocol["part"]


def test_too_few_images_to_part_is_one_sentence():
    with pytest.raises(DataError, match="3 calibration images cannot be parted .* give at least 4"):
        Part(Numbered(3), share=0.25, held_out=True)
