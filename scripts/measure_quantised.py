"""What 8-bit weights cost a pruned classifier: accuracy, file size and milliseconds of ONNX Runtime, before and after.

    python scripts/measure_quantised.py RUN TEST.npz [CALIBRATION.npz]

RUN is a run of a network for images, TEST.npz holds `images` (uint8, N x H x W x 3) and `labels`. The ONNX file that
`modhifi export` writes is quantised by onnxruntime (QDQ, 8 bits a weight and channel, activations calibrated on 256
images of CALIBRATION.npz, else on the last ones of TEST.npz, which are then not tested on). One Markdown table is printed.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from modhifi_cli.files import artifacts  # noqa: E402
from modhifi_cli.files.exports.onnx import Onnx  # noqa: E402

CALIBRATED, TESTED, BATCH = 256, 2000, 50


class _Reader:
    """Batches for the quantiser."""

    def __init__(self, images: numpy.ndarray) -> None:
        self._left = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]

    def get_next(self) -> dict[str, numpy.ndarray] | None:
        """The next batch, or None."""
        return {"images": self._left.pop(0)} if self._left else None


def prepared(loaded, images: numpy.ndarray) -> numpy.ndarray:
    """As the network wants them; the images already have its size."""
    mean, std = torch.tensor(loaded.preprocess.mean), torch.tensor(loaded.preprocess.std)
    return ((torch.from_numpy(images).float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous().numpy()


def answers(file: Path, images: numpy.ndarray) -> tuple[numpy.ndarray, float]:
    """Predicted classes, and milliseconds of a batch with one thread (median)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    found, took = [], []
    for start in range(0, len(images), BATCH):
        begun = time.perf_counter()
        found.append(session.run(None, {"images": images[start : start + BATCH]})[0].argmax(1))
        took.append(1000 * (time.perf_counter() - begun))
    return numpy.concatenate(found), float(numpy.median(took))


def main(run: str, test: str, calibration: str | None = None) -> None:
    """Quantise, measure and print."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    loaded = artifacts.load_saved(run)
    tested = numpy.load(test)
    other = numpy.load(calibration)["images"][:CALIBRATED] if calibration else tested["images"][-CALIBRATED:]
    images, labels = prepared(loaded, tested["images"][:TESTED]), tested["labels"][:TESTED]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        example = torch.from_numpy(images[:1])
        whole = Onnx()(loaded, example=example, path=folder / "f32.onnx", facts={}).path
        quant_pre_process(str(whole), str(folder / "ready.onnx"))
        quantize_static(
            str(folder / "ready.onnx"), str(folder / "int8.onnx"), _Reader(prepared(loaded, other)),
            quant_format=QuantFormat.QDQ, per_channel=True, weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8,
        )  # fmt: skip
        print(f"| {loaded.name} | top-1, {len(labels)} images | KB | ms a batch of {BATCH}, one thread |\n|---|---|---|---|")
        for name, file in (("float32", whole), ("int8", folder / "int8.onnx")):
            found, took = answers(file, images)
            print(f"| {name} | {100 * (found == labels).mean():.2f} | {file.stat().st_size / 1e3:.0f} | {took:.1f} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
