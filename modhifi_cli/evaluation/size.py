"""How large a network is: parameters, multiply-accumulates of one forward pass, and bytes on disk."""

import json
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from modhifi_cli.evaluation.forward import ready_to_measure
from modhifi_cli.records import ImageSource, Measurement, Progress


def measure(
    *,
    models: Mapping[str, nn.Module],
    evaluation_data: ImageSource | None,
    calibration_data: ImageSource | None,
    example: Tensor,
    device: torch.device,
    batch_size: int,
    progress: Callable[[Progress], None],
) -> tuple[Measurement, ...]:
    """Parameters, MACs for one image, and the size of the safetensors file of every network.

    Args: see `modhifi_cli.evaluation.Measure`; images are not read. The example goes to where the network is.

    Returns:
        ``parameters``, ``macs`` (for one input of the example's shape; a FLOP of the papers' tables is a MAC), and
        ``file_bytes`` per network.
    """
    from modhifi_cli.graph.counting import count

    measurements = []
    for done, (name, model) in enumerate(models.items()):
        progress(Progress("size", name, done, len(models)))
        home = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        # A network in training mode would take the example into its BatchNorm statistics.
        with ready_to_measure({name: model}, home):
            counts = count(model, example.to(home))
        shape = {"input": list(example.shape)}
        measurements += [
            Measurement(name, "parameters", float(counts.parameters), "parameters"),
            Measurement(name, "macs", float(counts.macs), "MACs", shape),
            Measurement(name, "file_bytes", float(safetensors_bytes(model)), "bytes", {"format": "safetensors"}),
        ]
    if models:
        progress(Progress("size", "", len(models), len(models)))
    return tuple(measurements)


def safetensors_bytes(model: nn.Module) -> int:
    """Size of the file that safetensors writes for the network's state, without writing or copying it.

    The file is 8 bytes of length, a JSON header padded to 8 bytes, and the tensors without gaps, those of the widest
    type first. Tensors that share memory (tied weights) are counted once, as they are saved once.

    Args:
        model: The network; its state_dict is measured.

    Returns:
        Bytes.
    """
    seen, tensors = set(), []
    for name, tensor in model.state_dict().items():
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and identity in seen:
            continue
        seen.add(identity)
        tensors.append((name, tensor))
    header, offset = {}, 0
    for name, tensor in sorted(tensors, key=lambda item: (-item[1].element_size(), item[0])):
        end = offset + tensor.numel() * tensor.element_size()
        kind = _SAFETENSORS_NAMES.get(tensor.dtype, "F32")
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + text + -text % 8 + offset


_SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
