"""Fixtures that several rooms share: the folder of real data, and tiny random networks that cost milliseconds."""

import os
from pathlib import Path

import pytest

# One thread: the tests run side by side (pytest-xdist), and tiny matrices are slower on many threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> None:
    """No test reads or fills the user's cache of made calibration data."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True, scope="session")
def own_secret(tmp_path_factory) -> None:
    """Runs of the tests are marked with a secret of their own, not with the user's."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder with real weights and data; the test is skipped where it is absent."""
    named = os.environ.get("MODHIFI_TEST_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set MODHIFI_TEST_DATA to the folder that holds cifar10/ and weights/")
    return folder


@pytest.fixture
def randomise_():
    """Function that fills every parameter and buffer with values of working scale, from a seed.

    Fresh networks have weights of zero, BatchNorms that are the identity and biases of zero; those hide wrong slicing.
    """
    import torch
    from torch import nn

    def fill_(model: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for module in model.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    if isinstance(module, nn.modules.batchnorm._BatchNorm) and name == "weight":
                        parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
                    elif parameter.dim() > 1:
                        fan_in = parameter[0].numel()
                        parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1.5 / fan_in) ** 0.5)
                    else:
                        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                    module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.3)
                    module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
        return model.eval()

    return fill_


@pytest.fixture
def tiny_convnet(randomise_):
    """conv-BN-ReLU-conv-BN-ReLU-pool-linear over ``[batch, 3, 8, 8]``, 6 then 8 channels, 5 classes, random."""
    from torch import nn

    return randomise_(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        )
    )
