"""GGUF, the file of llama.cpp and what is built on it, for decoders of Llama's shape, also with layers of unequal width.

A file of architecture ``llama`` knows one width for all layers. Layers that differ are written as ``deci``, whose keys
``feed_forward_length``, ``attention.head_count`` and ``attention.head_count_kv`` are arrays over the layers and whose
graph is Llama's otherwise; unmodified llama.cpp opens both. Queries and keys are permuted because those two rotate
neighbouring pairs of a head where transformers rotates its halves. Qwen3's even networks have an architecture of their
own. What was written is read back tensor by tensor.
"""

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modhifi_cli.errors import ConfigError, NumericsError, UnsupportedModelError, need_packages
from modhifi_cli.files.exports import gguf_tokens
from modhifi_cli.files.exports.written import ExportReport, Intent, first_line, placed, size_of
from modhifi_cli.graph.decoder import shape_of
from modhifi_cli.records import LoadedModel, TextInput

PACKAGES = ("gguf",)  # of extras; looked for before a run begins
# Setting → (the library's name of the type, values that share a scale, largest error as a share of a block's largest
# value). Half precisions round each value by itself: 2^-11 and 2^-8 of it. Scales are stored in half precision, too.
_TYPES: Mapping[str, tuple[str, int, float]] = {
    "f32": ("F32", 1, 0.0),
    "f16": ("F16", 1, 2**-11),
    "bf16": ("BF16", 1, 2**-8),
    "q8_0": ("Q8_0", 32, 0.6 / 127),
    "q5_0": ("Q5_0", 32, 1.1 / 16),
    "q5_1": ("Q5_1", 32, 1.1 / 31),
    "q4_0": ("Q4_0", 32, 1.1 / 8),
    "q4_1": ("Q4_1", 32, 1.1 / 15),
}
_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "bf16": 32}
_LLAMA_SHAPED = ("llama", "mistral", "qwen2", "phi3")  # RMSNorm, rotary queries and keys, SwiGLU, nothing else
_EVEN_ONLY = ("qwen3",)  # norms of queries and keys, which `deci` does not have
_FAMILIES = (*_LLAMA_SHAPED, *_EVEN_ONLY)


@dataclass(frozen=True)
class Gguf:
    """``model.gguf`` with weights, shapes and tokenizer of a decoder.

    Attributes:
        type: How matrices are stored: ``"f32"``, ``"f16"``, ``"bf16"``, ``"q8_0"``, ``"q5_0"``, ``"q5_1"``, ``"q4_0"``
            or ``"q4_1"``. Norms and biases stay in float32.
        vocabulary: ``"auto"`` writes the network's tokenizer; ``"none"`` none, for programs that hand over token ids.
        pre: llama.cpp's name of how text is split before byte-pair encoding; None recognises it.
    """

    type: str = "f16"
    vocabulary: str = "auto"
    pre: str | None = None
    reads: ClassVar[str] = "tokens"

    def foresee(self, loaded: LoadedModel, intent: Intent) -> None:
        """Refuse what can be known before the run.

        Raises:
            ConfigError: If a setting is wrong, or widths will not fit the type's blocks.
            UnsupportedModelError: If neither architecture can hold the network, or its tokenizer cannot be written.
        """
        _library()
        if self.type not in _TYPES:
            raise ConfigError(f"export.gguf.type must be one of {', '.join(_TYPES)}; got {self.type!r}.")
        if self.vocabulary not in ("auto", "none"):
            raise ConfigError(f"export.gguf.vocabulary must be auto or none; got {self.vocabulary!r}.")
        block = _TYPES[self.type][1]
        if intent.round_to % block:
            raise ConfigError(
                f"export.gguf.type={self.type} stores rows in blocks of {block} values, and hidden widths will be "
                f"multiples of {intent.round_to}; add round_to={block}, or choose f32, f16 or bf16."
            )
        _require(loaded.model, even=intent.even)
        if self.vocabulary == "auto":
            gguf_tokens.described(_text(loaded), self.pre)

    def __call__(self, loaded: LoadedModel, *, example: Tensor, path: Path, facts: Mapping[str, str]) -> ExportReport:
        """Write the decoder, read the file back, and compare every tensor.

        Raises:
            ConfigError: If a setting is wrong or a width is no multiple of the type's blocks.
            UnsupportedModelError: If neither architecture can hold the network, or its tokenizer cannot be written.
            NumericsError: If a tensor comes back further from the network's than the type explains.
            DataError: If the file cannot be written.
        """
        start = time.perf_counter()
        gguf = _library()
        model = loaded.model
        shapes = [shape_of(model, number) for number in range(model.config.num_hidden_layers)]
        even = all(shape == shapes[0] for shape in shapes)
        self.foresee(loaded, Intent(even=even, round_to=_TYPES[self.type][1] if self.type in _TYPES else 1))
        _require_blocks(model, self.type)
        architecture = "deci" if not even else "qwen3" if model.config.model_type == "qwen3" else "llama"
        path = Path(path)
        path = path / "model.gguf" if path.is_dir() else path
        with placed(path, "gguf") as file:
            writer = gguf.GGUFWriter(os.fspath(file), architecture, use_temp_file=True)
            _write_keys(writer, loaded, shapes, even, facts)
            writer.add_file_type(_FILE_TYPES[self.type])
            if self.vocabulary == "none":
                writer.add_tokenizer_model("none")
                writer.add_vocab_size(int(model.config.vocab_size))
            else:
                gguf_tokens.write(writer, gguf_tokens.described(_text(loaded), self.pre), _text(loaded))
            for name, tensor in _tensors(model, shapes, permuted=architecture != "qwen3"):
                kind = _kind(gguf, name, tensor, self.type)
                values = tensor.detach().cpu().float().contiguous().numpy()
                writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            difference, largest = _read_back(file, model, shapes, self.type, architecture != "qwen3")
            size = size_of(file.parent)
        return ExportReport(
            format="gguf",
            path=path,
            bytes=size,
            batch=0,
            max_difference=difference,
            max_logit=largest,
            tolerance=_TYPES[self.type][2],
            runtime=f"read back by gguf {_version()}, architecture {architecture}, {self.type}",
            seconds=time.perf_counter() - start,
            opens="llama-cli -m model.gguf, or any program built on llama.cpp",
        )


def _library() -> Any:
    need_packages("export=[gguf]", *PACKAGES)
    import gguf

    return gguf


def _version() -> str:
    from importlib.metadata import version

    return version("gguf")


def _text(loaded: LoadedModel) -> TextInput:
    assert isinstance(loaded.preprocess, TextInput)
    return loaded.preprocess


def _require(model: nn.Module, *, even: bool) -> None:
    """Refuse families, activations and rotations that the two architectures do not have."""
    config = model.config
    kind = config.model_type
    said = f"export.gguf: {type(model).__name__} cannot be written"
    if kind not in _FAMILIES:
        raise UnsupportedModelError(
            f"{said}: only decoders of Llama's shape can ({', '.join(_FAMILIES)}); layers that are equally wide give a "
            "folder that llama.cpp's own convert_hf_to_gguf takes, so leave gguf out and convert model/."
        )
    if not even and kind in _EVEN_ONLY:
        raise UnsupportedModelError(
            f"{said} with layers of unequal width: llama.cpp's format for those has no place for the norms of queries "
            "and keys (self_attn.q_norm, k_norm); keep layers equally wide with allocation=uniform."
        )
    activation = getattr(config, "hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedModelError(f"{said}: its MLPs use {activation}, and llama.cpp's file of that shape silu.")
    _rotation(config, said)


def _rotation(config: Any, said: str = "export.gguf") -> dict[str, Any]:
    """Base and scaling of the rotary embedding, from either generation of transformers' configurations."""
    rope = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    rope.setdefault("rope_theta", getattr(config, "rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None)) or 1.0
    if kind not in ("default", "linear", "llama3", "yarn") or partial != 1.0:
        what = f"rotary embeddings of type {kind}" if partial == 1.0 else f"{partial:.0%} rotated heads"
        raise UnsupportedModelError(f"{said}: it has {what}, which this writer does not know; leave gguf out.")
    return rope | {"rope_type": kind}


def _require_blocks(model: nn.Module, type_: str) -> None:
    block = _TYPES[type_][1]
    odd = sorted({name for name, module in _matrices(model) if module.weight.shape[1] % block})
    if odd:
        width = model.get_submodule(odd[0]).weight.shape[1]
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        raise ConfigError(
            f"export.gguf.type={type_} stores rows in blocks of {block} values, and {odd[0]} has {width}{more}; choose "
            f"f32, f16 or bf16, or prune with round_to={block}."
        )


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2:
            yield name, module


def _write_keys(writer: Any, loaded: LoadedModel, shapes: list[dict[str, int]], even: bool, facts: Mapping[str, str]):
    config = loaded.model.config
    rope = _rotation(config)
    head_dim = shapes[0]["head_dim"]
    # llama.cpp's graph of this shape attends to everything; within the sliding window that is the same thing.
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    longest = int(config.max_position_embeddings)

    def over_layers(key: str) -> int | list[int]:
        values = [shape[key] for shape in shapes]
        return values[0] if even else values

    writer.add_name(loaded.name)
    about = ", ".join(f"{key} {value}" for key, value in facts.items())
    writer.add_description(f"pruned by modhifi from {loaded.weights}" + (f" ({about})" if about else ""))
    writer.add_context_length(min(longest, window) if window else longest)
    writer.add_embedding_length(int(config.hidden_size))
    writer.add_block_count(len(shapes))
    writer.add_feed_forward_length(over_layers("neurons"))
    writer.add_head_count(over_layers("heads"))
    writer.add_head_count_kv(over_layers("kv_heads"))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        _scaled(writer, "linear", rope)
    elif rope["rope_type"] == "yarn":
        _scaled(writer, "yarn", rope)
        writer.add_rope_scaling_orig_ctx_len(int(rope.get("original_max_position_embeddings", longest)))


def _scaled(writer: Any, kind: str, rope: Mapping[str, Any]) -> None:
    writer.add_string(f"{writer.arch}.rope.scaling.type", kind)
    writer.add_rope_scaling_factor(float(rope["factor"]))


def _tensors(model: nn.Module, shapes: list[dict[str, int]], *, permuted: bool) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its GGUF name, in the layout that llama.cpp wants.

    Raises:
        UnsupportedModelError: If the network holds a tensor that has no place there.
    """
    body = model.model
    yield "token_embd.weight", body.embed_tokens.weight
    taken = {"model.embed_tokens.weight", "model.norm.weight"}
    for number, (layer, shape) in enumerate(zip(body.layers, shapes, strict=True)):
        for name, source, tensor in _of_layer(layer, shape, permuted=permuted):
            taken.add(f"model.layers.{number}.{source}")
            yield f"blk.{number}.{name}", tensor
    yield "output_norm.weight", body.norm.weight
    head = model.lm_head.weight
    if head.data_ptr() != body.embed_tokens.weight.data_ptr():
        yield "output.weight", head
    rope = _rotation(model.config)
    if rope["rope_type"] == "llama3":
        yield "rope_freqs.weight", _llama3_factors(rope, shapes[0]["head_dim"])
    left = [name for name in model.state_dict() if name not in taken and name != "lm_head.weight"]
    if left:
        raise UnsupportedModelError(
            f"export.gguf: {left[0]} has no place in llama.cpp's file of this shape; leave gguf out of export=[…]."
        )


def _of_layer(layer: nn.Module, shape: Mapping[str, int], *, permuted: bool) -> Iterator[tuple[str, str, Tensor]]:
    """Name without the layer, the network's own name of where it came from, and the tensor."""
    attention, mlp = layer.self_attn, layer.mlp
    heads, kv_heads, dim = shape["heads"], shape["kv_heads"], shape["head_dim"]
    yield "attn_norm.weight", "input_layernorm.weight", layer.input_layernorm.weight
    yield "ffn_norm.weight", "post_attention_layernorm.weight", layer.post_attention_layernorm.weight
    for own in ("q_norm", "k_norm"):
        if hasattr(attention, own):
            yield f"attn_{own}.weight", f"self_attn.{own}.weight", getattr(attention, own).weight
    rows = {"attn_q": heads * dim, "attn_k": kv_heads * dim, "attn_v": kv_heads * dim}
    if hasattr(attention, "qkv_proj"):
        found = [*_split("self_attn.qkv_proj", attention.qkv_proj, rows)]
    else:
        found = [
            (name, f"self_attn.{own}", getattr(attention, own))
            for name, own in (("attn_q", "q_proj"), ("attn_k", "k_proj"), ("attn_v", "v_proj"))
        ]
    found.append(("attn_output", "self_attn.o_proj", attention.o_proj))
    if hasattr(mlp, "gate_up_proj"):
        halves = {"ffn_gate": shape["neurons"], "ffn_up": shape["neurons"]}
        found += [*_split("mlp.gate_up_proj", mlp.gate_up_proj, halves)]
    else:
        found += [("ffn_gate", "mlp.gate_proj", mlp.gate_proj), ("ffn_up", "mlp.up_proj", mlp.up_proj)]
    found.append(("ffn_down", "mlp.down_proj", mlp.down_proj))
    turned = {"attn_q": heads, "attn_k": kv_heads} if permuted else {}
    for name, source, module in found:
        for leaf in ("weight", "bias"):
            tensor = getattr(module, leaf, None)
            if tensor is not None:
                yield f"{name}.{leaf}", f"{source}.{leaf}", _turned(tensor, turned[name]) if name in turned else tensor


@dataclass(frozen=True)
class _Rows:
    """Some rows of a fused projection."""

    weight: Tensor
    bias: Tensor | None


def _split(source: str, module: nn.Module, rows: Mapping[str, int]) -> Iterator[tuple[str, str, _Rows]]:
    weights = module.weight.split(list(rows.values()))
    biases = [None] * len(rows) if module.bias is None else module.bias.split(list(rows.values()))
    for name, weight, bias in zip(rows, weights, biases, strict=True):
        yield name, source, _Rows(weight, bias)


def _turned(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head from (first half, second half) to neighbouring pairs."""
    return tensor.reshape(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _llama3_factors(rope: Mapping[str, Any], head_dim: int) -> Tensor:
    """By what llama.cpp divides each frequency, ``[head_dim / 2]``: 1 for short waves, `factor` for long ones."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(head_dim=head_dim, rope_parameters=dict(rope))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return plain / scaled


def _kind(gguf: Any, name: str, tensor: Tensor, type_: str) -> Any:
    matrix = tensor.dim() == 2 and not name.endswith("norm.weight")
    return gguf.GGMLQuantizationType[_TYPES[type_][0] if matrix else "F32"]


def _read_back(
    file: Path, model: nn.Module, shapes: list[dict[str, int]], type_: str, permuted: bool
) -> tuple[float, float]:
    """Largest difference of a weight and largest weight; an error where rounding does not explain a difference."""
    import numpy

    gguf = _library()
    try:
        stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    except Exception as error:  # the reader raises what numpy and struct raise
        raise NumericsError(f"export.gguf: the written file cannot be read back ({first_line(error)}).") from error
    _, block, share = _TYPES[type_]
    difference = largest = 0.0
    for name, tensor in _tensors(model, shapes, permuted=permuted):
        wanted = tensor.detach().cpu().float().numpy()
        found = gguf.quants.dequantize(stored[name].data, stored[name].tensor_type).reshape(wanted.shape)
        apart = numpy.abs(found - wanted)
        exact = stored[name].tensor_type == gguf.GGMLQuantizationType.F32
        scale = numpy.abs(wanted).reshape(-1, 1 if exact else block).max(1) if wanted.size else apart
        # Half precision has a least step of its own, 2^-24, for values below its normal range.
        allowed = numpy.repeat(scale, 1 if exact else block) * (0.0 if exact else 2 * share) + (0.0 if exact else 2**-24)
        if not (apart.ravel() <= allowed).all():
            raise NumericsError(
                f"export.gguf: {name} comes back with a difference of {apart.max():.3g}, more than {type_} rounds; "
                "choose another export.gguf.type, f32 keeps every bit."
            )
        difference, largest = max(difference, float(apart.max())), max(largest, float(numpy.abs(wanted).max()))
    return difference, largest
