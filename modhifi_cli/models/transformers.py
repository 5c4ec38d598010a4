"""Every causal decoder and image classifier of the installed transformers, untrained: for `modhifi coverage`.

Decoders are made small: a family's own default configuration is taken and its sizes are replaced by what their names say,
not by what the family is called. Image classifiers keep their sizes and lose layers where one number says how many.
Nothing is fetched.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli.errors import NotRunnableError, UnsupportedModelError
from modhifi_cli.models import hf, hf_vision
from modhifi_cli.models.weights import seeded_initialisation
from modhifi_cli.records import LoadedModel, Preprocess, TextInput

DECODER, CLASSIFIER = "causal decoder", "image classifier"
_LARGEST = 40_000_000  # parameters of a decoder that was made small
_RUN = 300_000_000  # parameters of a default network that is tried as it is
# What a size is called → how large it is here.
_SIZES: Mapping[str, int] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
                     "num_decoder_layers"), 4),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "emb_dim", "word_embed_proj_dim", "embedding_size",
                     "input_embedding_size", "encoder_hidden_size", "cross_attention_hidden_size", "lru_width"), 64),
    **dict.fromkeys(("num_attention_heads", "n_heads", "num_heads", "decoder_attention_heads", "index_n_heads",
                     "encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads",
                     "linear_num_value_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "linear_num_key_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "attention_head_dim", "attention_head_size", "kv_channels",
                     "qk_nope_head_dim", "v_head_dim", "linear_key_head_dim", "linear_value_head_dim", "index_head_dim",
                     "mamba_d_head", "mamba_head_dim", "swa_head_dim", "global_head_dim", "swa_v_head_dim"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "decoder_ffn_dim", "encoder_ffn_dim",
                     "moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size", "dim_ff", "dff",
                     "shared_intermediate_size", "moe_shared_expert_intermediate_size", "intermediate_size_mlp",
                     "num_hidden_neurons", "moe_latent_size", "d_inner"), 96),
    **dict.fromkeys(("vocab_size", "n_words", "vocab_size_per_layer_input", "type_vocab_size", "unpadded_vocab_size"), 128),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "zero_expert_num"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "num_limited_groups", "first_k_dense_replace",
                     "num_dense_layers", "mamba_n_groups", "n_groups", "n_shared_experts", "moe_layer_start_index",
                     "num_shared_experts", "num_nextn_predict_layers"), 1),
    "n_head": 8, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_head_dim": 24, "rotary_dim": 8, "index_topk": 64,
    "mamba_n_heads": 8, "mamba_num_heads": 8, "mamba_d_ssm": 128, "mamba_d_state": 8, "ssm_state_size": 8, "state_size": 8,
    "sliding_window": 64, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "attention_hidden_size": 64,
    "time_step_rank": 8, "mamba_dt_rank": 8, "num_memory_blocks": 1, "chunk_size": 32, "mamba_chunk_size": 32,
}  # fmt: skip
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_WORDS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "sep_token_id")
# Where these do not hold together in a family, they are changed so, one after the other. ``None`` leaves the default;
# "all" says what a default leaves open, too; "lists" shortens lists that have an entry for each layer.
_OTHERWISE: tuple[Mapping[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4, "swa_num_key_value_heads": 4},
    {"all": True, "num_key_value_heads": 4, "swa_num_key_value_heads": 4},
    {"head_dim": None},
    {"head_dim": 8, "num_key_value_heads": 4},  # as wide as what is turned
    {"head_dim": 24, "num_key_value_heads": 4},  # as what is turned and the rest together
    {"lists": True},
    {"lists": True, "all": True, "num_key_value_heads": 4, "swa_num_key_value_heads": 4},
    {"num_key_value_heads": 4, "head_dim": None},
    {"mamba_n_heads": None, "mamba_num_heads": None, "mamba_d_ssm": None},
    {"num_hidden_layers": 8, "num_layers": 8},
    {"head_dim": None, "num_key_value_heads": None, "hidden_size": 128, "num_attention_heads": 8},
    {"n_head": 4},
)
_OPEN = ("head_dim", "num_key_value_heads", "num_experts_per_tok", "intermediate_size", "n_routed_experts", "n_shared_experts")  # what "all" says
_PICTURES = {"num_hidden_layers": 2, "n_layer": 2, "image_size": 64}  # the others are sizes of whole stages


def names() -> dict[str, str]:
    """Every family by the name of its class → `DECODER` or `CLASSIFIER`.

    Classes that make text from pictures or sound stand under the name of their text decoder, which is a family by itself.
    """
    return {name: kind for name, (kind, _) in _families().items()}


def load(*, name: str, weights: str = "random", seed: int = 0) -> LoadedModel:
    """One of them.

    Args:
        name: Its class.
        weights: ``"random"``.
        seed: Of the weights.

    Raises:
        NotRunnableError: If the class is not made from its default configuration, or does not answer token ids (pictures)
            alone with it, with the library's own words.
        UnsupportedModelError: If its sizes cannot be made small by their names, likewise.
    """
    kind, family = _families()[name]
    with warnings.catch_warnings(), hf.quiet(), seeded_initialisation(seed):
        warnings.simplefilter("ignore")
        return _decoder(name, family) if kind == DECODER else _classifier(name, family)


def _families() -> dict[str, tuple[str, str]]:
    """Class → what it is, and the first ``model_type`` that has it."""
    from transformers.models.auto import modeling_auto as auto

    found: dict[str, tuple[str, str]] = {}
    for kind, known in (
        (DECODER, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        (CLASSIFIER, auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
    ):
        for family, classes in known.items():
            for name in (classes,) if isinstance(classes, str) else classes:
                if kind == CLASSIFIER or not name.endswith("ForConditionalGeneration"):
                    found.setdefault(name, (kind, family))
    return found


def _decoder(name: str, family: str) -> LoadedModel:
    import transformers

    made = getattr(transformers, name)
    told = ""
    for change in _OTHERWISE:
        try:
            config = type(_default(made, family))(**_smaller(_default(made, family), _SIZES, change))
            with torch.device("meta"):
                if sum(tensor.numel() for tensor in made(config).parameters()) > _LARGEST:
                    raise ValueError("it has no sizes with usual names")
            model = made(copy.deepcopy(config)).eval().requires_grad_(False)
            with torch.inference_mode():
                model(input_ids=torch.arange(16)[None], use_cache=False)
        except Exception as error:  # every family validates in its own way
            told = told or _last_words(error)
            continue
        loaded = hf.described(model, None, name)
        assert isinstance(loaded.preprocess, TextInput)
        return loaded

    def default() -> nn.Module:
        config = _default(made, family)
        if hasattr(config, "is_decoder"):
            config.is_decoder = True
        return made(config)

    _refuse_broken(name, default, {"input_ids": torch.zeros(1, 16, dtype=torch.int64)}, use_cache=False)
    raise UnsupportedModelError(f"it cannot be made small by the names of its sizes ({told}).")


def _classifier(name: str, family: str) -> LoadedModel:
    import transformers

    made = getattr(transformers, name)
    told = "no configuration was made"
    for sizes in (_PICTURES, {"num_hidden_layers": 2, "n_layer": 2}, {}):
        try:
            config = type(_default(made, family))(**_smaller(_default(made, family), sizes, {}))
            given = hf._described(config) | {"model_type": config.model_type}
            given.pop("text_config", None)
            model = hf_vision.build(config=given, kind=name)
            side = _side(config)
            with torch.inference_mode():
                model(torch.zeros(1, 3, side, side))
        except Exception as error:  # likewise
            told = _last_words(error)
            continue
        return LoadedModel(
            model=model,
            name=name,
            preprocess=Preprocess(size=(side, side), mean=(0.5,) * 3, std=(0.5,) * 3),
            architecture={"builder": "modhifi_cli.models.hf_vision.build", "kwargs": {"config": given, "kind": name}},
            weights="random",
        )
    side = _side(_default(made, family))
    _refuse_broken(name, lambda: made(_default(made, family)), {"pixel_values": torch.zeros(1, 3, side, side)})
    raise UnsupportedModelError(f"it does not take an image batch alone ({told}).")


def _refuse_broken(name: str, make: Callable[[], nn.Module], inputs: Mapping[str, Tensor], **options: bool) -> None:
    """Look whether the library's own default runs: without any memory, and for real where that is small enough.

    Raises:
        NotRunnableError: If it does not.
    """
    with torch.inference_mode():
        try:
            with torch.device("meta"):
                model = make().eval()
        except Exception as error:  # every family fails in its own way
            raise NotRunnableError(f"{name} is not made from its default configuration here ({_last_words(error)}).") from error
        real = sum(parameter.numel() for parameter in model.parameters()) <= _RUN
        try:
            model = make().eval() if real else model
            model(**{key: value if real else value.to("meta") for key, value in inputs.items()}, **options)
        except Exception as error:  # likewise
            words = _last_words(error)
            # Some products are not written for tensors without values: that is no defect of the network.
            if real or isinstance(error, ValueError) or "shape" in words:
                taken = " and ".join(inputs)
                raise NotRunnableError(f"{name} with its default configuration does not answer {taken} alone ({words}).") from error


def _last_words(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip().rstrip(".")[:160]


def _default(made: type[nn.Module], family: str) -> Any:
    """The family's default configuration, as the class wants it: of the text part where it is one of several."""
    from transformers import AutoConfig

    wanted = made.config_class
    try:
        return wanted()
    except Exception:  # some validate defaults that do not hold together
        return AutoConfig.for_model(family)


def _smaller(config: Any, sizes: Mapping[str, int], change: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a configuration with the sizes that it has under these names; parts of it likewise."""
    wanted = {key: change.get(key, size) for key, size in sizes.items()}
    plain = config.to_dict()
    layers = next((plain[key] for key in _LAYERS if isinstance(plain.get(key), int)), 0)
    found: dict[str, Any] = {}
    for key, value in plain.items():
        size = wanted.get(key)
        if size is not None and isinstance(value, int) and not isinstance(value, bool) and value > size:
            found[key] = size
        elif change.get("all") and value is None and key in _OPEN:
            found[key] = size
        elif change.get("lists") and isinstance(value, list) and layers > 4 and len(value) == layers:
            found[key] = _some(value, 4)
        elif key in _WORDS and isinstance(value, int) and sizes is _SIZES:
            found[key] = min(value, 3)
        elif key == "attention_types" and sizes is _SIZES:  # GPT-Neo's way to say every layer's kind
            found[key] = [[["global", "local"], 2]]
        elif key == "attention_type" and sizes is _SIZES:  # BigBird's; blocks of it want more tokens than are used here
            found[key] = "original_full"
        elif key == "is_decoder" and sizes is _SIZES:
            found[key] = True
        elif isinstance(value, dict) and sizes is _SIZES and (inside := _smaller_inside(value, wanted)) != value:
            found[key] = inside
    for key, part in _parts(config):
        inside = _smaller(part, sizes, change)
        found[key] = inside if sizes is _SIZES else part.to_dict() | inside
    return found


def _smaller_inside(plain: Mapping[Any, Any], wanted: Mapping[str, Any]) -> dict[Any, Any]:
    """Settings of single layers, and others that stand in a mapping; those of layers that are left out go."""
    found = {}
    for key, value in plain.items():
        size = wanted.get(key)
        if isinstance(value, dict):
            if not str(key).isdecimal() or int(key) < 4:
                found[key] = _smaller_inside(value, wanted)
        elif size is not None and isinstance(value, int) and not isinstance(value, bool):
            found[key] = min(value, size)
        else:
            found[key] = value
    return found


def _some(values: list[Any], count: int) -> list[Any]:
    """So many of the entries in their order, one of each kind first."""
    first = list({str(value): place for place, value in reversed(list(enumerate(values)))}.values())[::-1]
    places = sorted(first)[:count]
    places += [place for place in range(len(values)) if place not in places][: count - len(places)]
    return [values[place] for place in sorted(places)]


def _parts(config: Any) -> Iterator[tuple[str, Any]]:
    from transformers import PreTrainedConfig

    for key in getattr(type(config), "sub_configs", {}):
        part = getattr(config, key, None)
        if isinstance(part, PreTrainedConfig):
            yield key, part


def _side(config: Any) -> int:
    """Pixels of the images that a classifier was made for."""
    for holder in (config, *(part for _, part in _parts(config))):
        side = getattr(holder, "image_size", None)
        if side is not None:
            return int(side if isinstance(side, int) else side[0])
    return 64
