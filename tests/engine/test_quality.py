import numpy as np
import pytest
import torch
from torch import nn

from modhifi_cli.data import procedural
from modhifi_cli.data.sources import ArrayImages
from modhifi_cli.engine.labelling import image_labels
from modhifi_cli.engine.quality import POOR_DISTANCE, Quality, assess
from modhifi_cli.errors import UnsupportedModelError
from modhifi_cli.evaluation.sample import sample_quality
from modhifi_cli.records import Preprocess

PREPROCESS = Preprocess((8, 8), (0.45, 0.45, 0.45), (0.23, 0.23, 0.23))


def images(count=40, seed=0):
    return procedural.draw(count, PREPROCESS, kind="mixture", seed=seed)


def source(pixels) -> ArrayImages:
    return ArrayImages(pixels, None, PREPROCESS, {}, prepared=True)


def quality(model, pixels, batch_size=16) -> Quality:
    return list(assess(model, source(pixels), batch_size=batch_size))[-1]


@pytest.fixture
def trained(tiny_convnet):
    """The tiny network with the statistics of other images of the same kind."""
    for module in tiny_convnet.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    tiny_convnet.train()(next(source(images(300, seed=5)).batches(300))[0])
    return tiny_convnet.eval()


def test_images_like_those_of_the_training_are_near_and_others_far(trained):
    like = quality(trained, images())
    assert like.may_reestimate and like.distance < POOR_DISTANCE / 2
    dark = quality(trained, images() // 8)
    assert not dark.may_reestimate
    assert "look unlike those of the training" in " ".join(dark.warnings)


def test_batchnorm_that_was_folded_into_the_weights_may_not_be_re_estimated(trained):
    for module in trained.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.zero_()
            module.running_var.fill_(1 - module.eps)
    folded = quality(trained, images())
    assert folded.folded and folded.distance is None and not folded.may_reestimate
    assert "folded into the weights" in " ".join(folded.warnings)
    none = quality(nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(216, 4)).eval(), images())
    assert not none.folded and none.may_reestimate


def test_the_distance_is_that_of_mean_and_variance_over_all_rows(trained):
    pixels = images()
    found = quality(trained, pixels, batch_size=7)
    first = trained[1]
    maps = trained[0].requires_grad_(False)(next(source(pixels).batches(40))[0]).double()
    mean, variance = maps.mean((0, 2, 3)), maps.var((0, 2, 3), unbiased=False)
    stored = first.running_var.double() + first.eps
    expected = ((mean - first.running_mean) ** 2 / stored).mean().detach()
    expected = expected + 0.25 * (((variance + first.eps) / stored).log() ** 2).mean()
    assert found.batchnorm["1"] == pytest.approx(float(expected), rel=1e-5)
    assert found.distance == pytest.approx(np.mean(list(found.batchnorm.values())))


def test_effective_rank_counts_independent_channels_and_coverage_those_that_vary():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(256, 3)).eval()
    grey = images()[..., :1].repeat(3, axis=3)
    grey[..., 2] = 9
    layer = quality(model, grey).layers[0]
    assert layer.channels == 3 and layer.coverage == pytest.approx(2 / 3)
    assert layer.effective_rank == pytest.approx(1, abs=1e-3), "two channels that are the same one"
    noise = np.random.default_rng(0).integers(0, 256, (200, 8, 8, 3)).astype(np.uint8)
    assert quality(model, noise).layers[0].effective_rank == pytest.approx(3, abs=0.02)


def test_copies_are_counted_and_warned_of(trained):
    pixels = images()
    assert quality(trained, pixels).twins == 0
    twice = quality(trained, np.concatenate([pixels, pixels[:10]]))
    assert twice.twins == pytest.approx(10 / 50)
    assert "20% of the calibration images are copies of others" in twice.warnings


def test_one_class_alone_is_warned_of(trained):
    with torch.no_grad():
        trained[8].bias[2] += 100
    found = quality(trained, images())
    assert found.classes_seen == 1 and found.balance == 0
    assert any("sees 1 of 5 classes" in text for text in found.warnings)


def test_a_trial_repair_tells_few_images_from_many(randomise_):
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    model = randomise_(nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 4)))
    noise = np.random.default_rng(0).integers(0, 256, (200, 8, 8, 3)).astype(np.uint8)

    def gap(count):
        trial = next(trial for trial in quality(model, noise[:count]).repairs if trial.layer == "2")
        return trial.held_out / trial.fitted

    assert gap(10) > 1.1 * gap(200) and gap(200) == pytest.approx(1, abs=0.15)


def test_the_network_is_left_as_found(trained):
    state = {key: tensor.clone() for key, tensor in trained.state_dict().items()}
    next(assess(trained, source(images())))
    list(assess(trained, source(images())))
    assert all(torch.equal(tensor, state[key]) for key, tensor in trained.state_dict().items())
    assert not any(module._forward_pre_hooks for module in trained.modules())


def test_one_forward_tells_the_page_what_a_forward_of_its_own_would(trained):
    found = quality(trained, images())
    apart = sample_quality(trained, source(images()), device=torch.device("cpu"), batch_size=16)
    assert found.sample == apart and apart["images"] == 40 and 1 <= apart["effective_classes"] <= apart["classes"]
    assert "sample" not in found.to_json()


class OneSizeOnly(nn.Module):
    """As timm's transformers: asserts the size that it was built for."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 5)

    def forward(self, pictures):
        assert pictures.shape[-1] == 224, f"Input height ({pictures.shape[-1]}) doesn't match model (224)."
        return self.layer(pictures.mean((2, 3)))


@pytest.mark.parametrize("look", ["quality", "labels"])
def test_images_of_another_size_than_the_network_was_built_for_are_one_sentence(look):
    message = r"OneSizeOnly does not take an image batch .*doesn't match model \(224\); give the size .*preprocess.size"
    with pytest.raises(UnsupportedModelError, match=message):
        if look == "quality":
            quality(OneSizeOnly(), images(4))
        else:
            list(image_labels(OneSizeOnly(), source(images(4)), batch_size=4))
