"""Exports: written, run by their own runtime on other batch sizes, equal logits; nothing left where they are not."""

import os

import pytest
import torch
from torch import nn

from modhifi_cli.errors import ConfigError, DataError, NumericsError, UnsupportedModelError
from modhifi_cli.files import exports

EXPORTS = {"onnx": (exports.to_onnx, "model.onnx"), "torch_export": (exports.to_torch_export, "model.pt2")}
EXAMPLE = torch.zeros(1, 3, 8, 8)


def _run(kind, file, images):
    if kind == "torch_export":
        return torch.export.load(file).module()(images)
    import onnxruntime

    session = onnxruntime.InferenceSession(os.fspath(file), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


@pytest.mark.parametrize("kind", EXPORTS)
def test_exported_file_gives_the_logits_of_the_network_at_any_batch_size(tmp_path, tiny_convnet, kind):
    export, name = EXPORTS[kind]
    tiny_convnet.train()

    report = export(tiny_convnet, EXAMPLE, tmp_path)

    assert tiny_convnet.training and all(parameter.requires_grad for parameter in tiny_convnet.parameters())
    assert (report.format, report.path, report.batch) == (kind, tmp_path / name, 3)
    assert report.max_difference <= 1e-4 * report.max_logit and report.max_logit > 0.1
    assert report.bytes == report.path.stat().st_size
    assert [file.name for file in tmp_path.iterdir()] == [name]
    tiny_convnet.eval()
    for batch in (1, 5):
        images = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(_run(kind, report.path, images), tiny_convnet(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", EXPORTS)
def test_option_a_shortcut_can_be_exported(tmp_path, randomise_, kind):
    from modhifi_cli.graph.modules import ChannelPadShortcut

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
            self.shortcut = ChannelPadShortcut(torch.tensor([2, -1, 0, 1]), 3, stride=2)

        def forward(self, images):
            return (self.conv(images) + self.shortcut(images)).mean((2, 3))

    report = EXPORTS[kind][0](randomise_(Block()), EXAMPLE, tmp_path / "block.file")

    assert report.path == tmp_path / "block.file" and report.path.is_file()


def test_weights_of_large_networks_lie_beside_the_onnx_file(tmp_path, tiny_convnet, monkeypatch):
    monkeypatch.setattr(exports, "_LARGEST_SINGLE_FILE", 1)

    report = exports.to_onnx(tiny_convnet, EXAMPLE, tmp_path)

    files = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert set(files) == {"model.onnx", "model.onnx.data"}
    assert report.bytes == sum(files.values())
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(_run("onnx", report.path, images), tiny_convnet(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", EXPORTS)
def test_other_logits_are_refused_and_the_older_file_stays(tmp_path, tiny_convnet, kind):
    export, name = EXPORTS[kind]
    (tmp_path / name).write_bytes(b"older")
    class Drifts(nn.Module):
        """Gives other logits the second time, as a wrong export would."""

        def __init__(self):
            super().__init__()
            self.network, self.shift = tiny_convnet, 0.0

        def forward(self, images):
            self.shift += 1.0
            return self.network(images) + self.shift

    with pytest.raises(NumericsError, match=rf"export.{kind}: expected logits within 0.0001 of the largest \(.*got a"):
        export(Drifts(), EXAMPLE, tmp_path)

    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [(name, b"older")]


@pytest.mark.parametrize("kind", EXPORTS)
def test_not_a_number_is_no_agreement(tmp_path, tiny_convnet, kind):
    with torch.no_grad():
        tiny_convnet[-1].bias[0] = float("nan")

    with pytest.raises(NumericsError, match="got a difference of nan"):
        EXPORTS[kind][0](tiny_convnet, EXAMPLE, tmp_path)


@pytest.mark.parametrize("kind", EXPORTS)
def test_fixed_batch_size_is_refused(tmp_path, tiny_convnet, kind):
    class OnlyTwo(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = tiny_convnet

        def forward(self, images):
            logits = self.network(images)
            return logits.reshape(2, 5) if len(images) == 2 else logits

    with pytest.raises(UnsupportedModelError, match=rf"export.{kind}: expected a network that can be traced .*batch"):
        EXPORTS[kind][0](OnlyTwo(), EXAMPLE, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_network_with_several_outputs_is_refused(tmp_path):
    class Two(nn.Module):
        def forward(self, images):
            return images, images

    with pytest.raises(UnsupportedModelError, match="returns one tensor of logits, got tuple; leave onnx out"):
        exports.to_onnx(Two(), EXAMPLE, tmp_path)


def test_folder_that_cannot_be_written_is_named(tmp_path, tiny_convnet):
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(DataError, match=r"export.torch_export: expected to write .*/model.pt2, got 'File exists';"):
        exports.to_torch_export(tiny_convnet, EXAMPLE, tmp_path / "file" / "model.pt2")


@pytest.mark.parametrize("tolerance", [0, -1.0, "high", True])
def test_tolerance_out_of_range_is_refused(tmp_path, tiny_convnet, tolerance):
    with pytest.raises(ConfigError, match=r"export.onnx.tolerance: expected a number above 0, got"):
        exports.to_onnx(tiny_convnet, EXAMPLE, tmp_path, tolerance=tolerance)
