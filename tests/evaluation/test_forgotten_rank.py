"""Rank and logit of forgotten classes: what is asked of which image, and what is refused."""

import pytest
import torch

from modhifi_cli.errors import ConfigError, DataError, UnsupportedModelError
from modhifi_cli.evaluation import forget_retain
from modhifi_cli.evaluation.forgotten_rank import measure
from modhifi_cli.pages import run, terms

LOGITS = torch.tensor([[5.0, 1, 0, 2], [0, 4, 3, 1], [1, 0, 2, 7], [9, 3, 1, 2]])
LABELS = torch.tensor([1, 1, 3, 0])


@pytest.fixture
def images(listed):
    return listed(LOGITS.view(4, 1, 1, 4), LABELS)


def values(found, model="dense"):
    return {m.name: m.value for m in found if m.model == model}


def test_the_class_is_looked_for_on_its_own_images_and_on_all_others(measured, answers, images):
    found = measured(measure, models={"dense": answers()}, evaluation_data=images, forget_class=1)
    # Own: third of four (1 against 5), first (4 against 3). Others: last (0 against 7), second (3 against 9).
    assert values(found) == {"forgotten_rank": 2.0, "forgotten_gap": -1.5, "others_rank": 3.0, "others_gap": -6.5}
    assert [m.protocol["samples"] for m in found] == [2, 2, 2, 2]
    assert found[0].protocol["first"] == 1 and found[0].protocol["told"] == "2 of 4"


def test_of_several_classes_others_are_asked_about_the_best_and_gaps_are_to_those_that_stay(measured, answers, images):
    found = measured(measure, models={"dense": answers()}, evaluation_data=images, forget_class=[1, 2])
    # Own: 1 − max(5, 2) and 4 − max(0, 1); others: 2 is the best at 2 against 7, 1 at 3 against 9.
    assert values(found) == {"forgotten_rank": 2.0, "forgotten_gap": -0.5, "others_rank": 2.0, "others_gap": -5.5}


def test_agreement_is_that_of_the_other_images_alone(measured, answers, images):
    models = {"dense": answers(), "edited": answers(-1)}
    found = values(measured(measure, models=models, evaluation_data=images, forget_class=1), "edited")
    assert found["others_agreement"] == 0.0
    same = values(
        measured(measure, models={"dense": answers(), "edited": answers(2)}, evaluation_data=images, forget_class=1),
        "edited",
    )
    assert same["others_agreement"] == 100.0 and same["forgotten_gap"] == -3.0


def test_a_class_without_any_image_is_still_looked_for_on_the_others(measured, answers, images):
    found = measured(measure, models={"dense": answers()}, evaluation_data=images, forget_class=2)
    assert set(values(found)) == {"others_rank", "others_gap"}


def test_pages_tell_ranks_in_words_without_a_change_in_percent(measured, answers, images):
    models = {"dense": answers(), "edited": answers(-1)}
    found = measured(measure, models=models, evaluation_data=images, forget_class=1)
    rows = {row.name: row for row in terms.table(found)}
    assert (rows["forgotten_rank"].before, rows["forgotten_rank"].after) == ("2 of 4", "3 of 4")
    assert rows["forgotten_rank"].change == "" and rows["forgotten_gap"].change == "−1.0000"
    assert run.spreads(found) == {}


def test_without_images_nothing_is_measured(measured, answers):
    assert measured(measure, models={"dense": answers()}, forget_class=1) == ()


def test_what_cannot_be_asked_is_refused(measured, answers, images, listed):
    with pytest.raises(ConfigError, match="name the forgotten classes by number"):
        measured(measure, models={"dense": answers()}, evaluation_data=images)
    for odd in ("abc", 1.5, [1.5], True, [[3]], [-1], {"3": 1}):
        for one in (measure, forget_retain.measure):
            with pytest.raises(
                ConfigError, match=r"forget_class: expected a class by its number, such as 3, or several"
            ):
                measured(one, models={"dense": answers()}, evaluation_data=images, forget_class=odd)
    with pytest.raises(ConfigError, match="all 4 classes of 'dense' are named.*name fewer"):
        measured(measure, models={"dense": answers()}, evaluation_data=images, forget_class=[0, 1, 2, 3])
    fewer = {"dense": answers(), "other": torch.nn.Sequential(answers(), torch.nn.Linear(4, 3))}
    with pytest.raises(UnsupportedModelError, match=r"other: forgotten_rank needs as many classes as the first .*\(4\), got 3"):
        measured(measure, models=fewer, evaluation_data=images, forget_class=1)
    with pytest.raises(DataError, match="expected 0 to 3 for the 4 logits of 'dense', got 7"):
        measured(measure, models={"dense": answers()}, evaluation_data=images, forget_class=7)
    with pytest.raises(DataError, match="forgotten_rank needs a label for every image"):
        measured(measure, models={"dense": answers()}, evaluation_data=listed(torch.rand(4, 1, 1, 3)), forget_class=1)
