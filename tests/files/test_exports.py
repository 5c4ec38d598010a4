"""Exports: written, run by their own runtime on other batch sizes, equal logits; nothing left where they are not."""

import os

import pytest
import torch
from torch import nn

from modhifi_cli.errors import ConfigError, DataError, NumericsError, UnsupportedModelError
from modhifi_cli.files.exports import onnx
from modhifi_cli.files.exports.onnx import Onnx
from modhifi_cli.files.exports.torch_export import TorchExport
from modhifi_cli.files.exports.written import compare
from modhifi_cli.records import LoadedModel, Preprocess

EXPORTS = {"onnx": (Onnx, "model.onnx"), "torch_export": (TorchExport, "model.pt2")}
EXAMPLE = torch.zeros(1, 3, 8, 8)


def export(kind, network, path, facts=None, **settings):
    """Write a network of five classes in one format."""
    preprocess = Preprocess((8, 8), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), resize=10)
    loaded = LoadedModel(network, "tiny", preprocess, {}, "drawn", tuple("abcde"))
    return EXPORTS[kind][0](**settings)(loaded, example=EXAMPLE, path=path, facts=facts or {})


def _run(kind, file, images):
    if kind == "torch_export":
        return torch.export.load(file).module()(images)
    import onnxruntime

    session = onnxruntime.InferenceSession(os.fspath(file), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


@pytest.mark.parametrize("kind", EXPORTS)
def test_exported_file_gives_the_logits_of_the_network_at_any_batch_size(tmp_path, tiny_convnet, kind):
    _, name = EXPORTS[kind]
    tiny_convnet.train()

    report = export(kind, tiny_convnet, tmp_path)

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

    report = export(kind, randomise_(Block()), tmp_path / "block.file")

    assert report.path == tmp_path / "block.file" and report.path.is_file()


def test_weights_of_large_networks_lie_beside_the_onnx_file(tmp_path, tiny_convnet, monkeypatch):
    monkeypatch.setattr(onnx, "_LARGEST_SINGLE_FILE", 1)

    report = export("onnx", tiny_convnet, tmp_path)

    files = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert set(files) == {"model.onnx", "model.onnx.data"}
    assert report.bytes == sum(files.values())
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(_run("onnx", report.path, images), tiny_convnet(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", EXPORTS)
def test_other_logits_are_refused_and_the_older_file_stays(tmp_path, tiny_convnet, kind):
    _, name = EXPORTS[kind]
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
        export(kind, Drifts(), tmp_path)

    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [(name, b"older")]


@pytest.mark.parametrize("kind", EXPORTS)
def test_not_a_number_is_no_agreement(tmp_path, tiny_convnet, kind):
    with torch.no_grad():
        tiny_convnet[-1].bias[0] = float("nan")

    with pytest.raises(NumericsError, match="got a difference of nan"):
        export(kind, tiny_convnet, tmp_path)


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
        export(kind, OnlyTwo(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_network_with_several_outputs_is_refused(tmp_path):
    class Two(nn.Module):
        def forward(self, images):
            return images, images

    with pytest.raises(UnsupportedModelError, match="returns one tensor of logits, got tuple; leave onnx out"):
        export("onnx", Two(), tmp_path)


def test_folder_that_cannot_be_written_is_named(tmp_path, tiny_convnet):
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(DataError, match=r"export.torch_export: expected to write .*/model.pt2, got 'File exists';"):
        export("torch_export", tiny_convnet, tmp_path / "file" / "model.pt2")


@pytest.mark.parametrize("tolerance", [0, -1.0, "high", True])
def test_tolerance_out_of_range_is_refused(tmp_path, tiny_convnet, tolerance):
    with pytest.raises(ConfigError, match=r"export.onnx.tolerance: expected a number above 0, got"):
        export("onnx", tiny_convnet, tmp_path, tolerance=tolerance)


def test_an_onnx_file_says_what_it_is_and_names_its_free_size(tmp_path, tiny_convnet):
    import json

    import onnx as library

    report = export("onnx", tiny_convnet, tmp_path, facts={"sparsity": "0.4", "target": "flops"})

    file = library.load(report.path)
    told = {entry.key: entry.value for entry in file.metadata_props}
    assert (told["model"], told["weights"], told["sparsity"], told["target"]) == ("tiny", "drawn", "0.4", "flops")
    assert json.loads(told["classes"]) == list("abcde")
    preprocess = json.loads(told["preprocess"])
    assert preprocess["mean"] == [0.5, 0.5, 0.5] and preprocess["crop"] == [8, 8] and preprocess["resize"] == 10
    free = [value.type.tensor_type.shape.dim[0].dim_param for value in (*file.graph.input, *file.graph.output)]
    assert free == ["batch", "batch"]


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_openvino_gives_the_same_logits(tmp_path, tiny_convnet, batch):
    openvino = pytest.importorskip("openvino", reason="pip install openvino")
    report = export("onnx", tiny_convnet, tmp_path, runtimes=("onnxruntime", "openvino"))
    assert "openvino" in report.runtime and "onnxruntime" in report.runtime
    images = torch.randn(batch, 3, 8, 8)
    compiled = openvino.Core().compile_model(os.fspath(report.path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = torch.from_numpy(compiled({"images": images.numpy()})["logits"].copy())
    wanted = tiny_convnet(images)
    assert float((found - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())


@pytest.mark.parametrize("runtimes", [(), ("tensorrt",)])
def test_a_runtime_that_cannot_check_is_refused(tmp_path, tiny_convnet, runtimes):
    with pytest.raises(ConfigError, match=r"export.onnx.runtimes: expected some of onnxruntime, openvino, got"):
        export("onnx", tiny_convnet, tmp_path, runtimes=runtimes)


@pytest.mark.parametrize(
    "own, other, agrees", [(1e-4, -1.4e-4, True), (1e-4, -1.6e-4, False), (4e-5, -1.4e-4, False), (0.0, 2e-4, False), (2e-3, 1e-3, False)]
)  # fmt: skip
def test_a_runtime_may_be_as_far_from_float64_as_pytorch_is_where_that_is_more_than_the_tolerance(own, other, agrees):
    truth = torch.tensor([[1.0, -0.5]], dtype=torch.float64)
    expected, found = (truth + torch.tensor([[0.0, off]]) for off in (own, other))

    def compared():
        return compare(found, expected, lambda: truth, kind="onnx", runtime="a runtime", tolerance=1e-4)

    if agrees:
        assert compared() == (pytest.approx(own - other), pytest.approx(1.0))
    else:
        with pytest.raises(NumericsError, match="export.onnx: expected logits within 0.0001 of the largest"):
            compared()
