"""Causal decoders of transformers: from a folder, a hub or a GGUF file, and back into a folder that transformers opens.

The network stays the ordinary class of its family, and its tokenizer comes with it. What cannot be edited (quantised
weights, encoders, sequence-to-sequence models) is refused before any weight is read. A pruned network whose layers are
all equally wide is an ordinary folder for `AutoModelForCausalLM.from_pretrained`; any other is rebuilt by `restore`.
"""

import contextlib
import copy
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli.errors import ConfigError, DataError, UnsupportedModelError, need_packages, reason
from modhifi_cli.graph.decoder import attention_attributes, decoder_layers, shape_of
from modhifi_cli.graph.experts import closed, open_experts_
from modhifi_cli.graph.heads import free_heads_
from modhifi_cli.graph.surgery import describe_widths, restore_widths_, set_attribute_
from modhifi_cli.models import uneven
from modhifi_cli.models.mapped import mapped
from modhifi_cli.models.vocabulary import cut_vocabulary_, read_texts
from modhifi_cli.models.weights import seeded_initialisation
from modhifi_cli.records import LoadedModel, TextInput

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MLP_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
_SHARED_WIDTHS = ("shared_expert_intermediate_size", "shared_intermediate_size")  # of the MLP beside the experts
_WIDTH_KEYS = {
    "neurons": _MLP_WIDTHS,
    "expert_neurons": ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
}
_WEIGHTS = ("*.safetensors", "*.bin")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
BUILDER = "modhifi_cli.models.hf.build"
NATIVE, DENSE = "config.json", "dense_config.json"  # of a pruned network that transformers opens, and of another


def load(
    *,
    path: str | None = None,
    gguf: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    weights: str = "default",
    seed: int = 0,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
    vocabulary: str | None = None,
    vocabulary_least: int = 1,
) -> LoadedModel:
    """A causal decoder with its tokenizer.

    One parameter for each key of the YAML, and for what every one of the kind is given.

    Args:
        path: Folder in Hugging Face's layout, or a name on the hub.
        gguf: A GGUF file instead; its weights are dequantised, its tokenizer is taken from it.
        name: Short name for tables and folders; None takes the last part of path or file.
        revision: Branch, tag or commit on the hub; None is the newest. What was fetched is recorded.
        dtype: ``"float32"``, ``"float64"``, ``"bfloat16"``, ``"float16"`` or ``"auto"``, as stored.
        weights: ``"default"``, or ``"random"`` for untrained ones of the same configuration.
        seed: Of random weights.
        tokenizer: Folder or hub name of another tokenizer; None takes the network's own.
        trust_remote_code: Whether code from the hub may run.
        vocabulary: Texts (a .txt or .jsonl file, or a folder of them) whose tokens alone are kept (`vocabulary.py`).
        vocabulary_least: How often a token must come up in them.

    Raises:
        ConfigError: If a setting is out of range, or neither path nor file is given.
        DataError: If a folder lacks its configuration, weights or tokenizer, or the hub cannot be reached.
        UnsupportedModelError: If it is no causal decoder, or its weights are quantised.
    """
    _check(path, gguf, dtype, weights)
    place = Path(os.path.expanduser(gguf or path or ""))
    source, options = _source(path, gguf, place, weights, tokenizer)
    options |= {"trust_remote_code": trust_remote_code}
    if revision is not None:
        options["revision"] = revision
    with quiet(), _explained(source):
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(source, **options)
        _refuse_unsuitable(config, gguf=gguf is not None)
        wanted: Any = dtype if dtype == "auto" else DTYPES[dtype]
        if weights == "random":
            again = None
            with seeded_initialisation(seed):
                model = AutoModelForCausalLM.from_config(config, dtype=config.dtype if dtype == "auto" else wanted)
            account = f"random (seed {seed}), configuration of {source}"
        else:
            again = partial(_mapped, place, config, wanted) if gguf is None and place.is_dir() else None
            model = None if again is None or trust_remote_code else again()
            if model is None:
                model, again = AutoModelForCausalLM.from_pretrained(source, dtype=wanted, **options), None
            account = f"{gguf or path} ({_digest(place) if place.exists() else _revision(source, revision)})"
    open_experts_(model)
    free_heads_(model)
    if gguf is not None:
        _forget_quantisation_(model)
    words = _tokenizer(tokenizer or source, {} if tokenizer else options)
    if vocabulary is not None:
        again = None
        words, cut = cut_vocabulary_(model, words, read_texts(vocabulary), least=vocabulary_least)
        account += f"; {cut.account} ({vocabulary})"
    return LoadedModel(
        model=model.eval().requires_grad_(False),
        name=name or place.stem,
        preprocess=text_input(model.config, words),
        architecture={"builder": BUILDER, "kwargs": _arguments(model)},
        weights=account,
        again=again,
        license=None if weights == "random" else _license(place, gguf=gguf is not None),
    )


def _check(path: str | None, gguf: str | None, dtype: str, weights: str) -> None:
    if (path is None) == (gguf is None):
        raise ConfigError("model: give either model.path=FOLDER_OR_HUB_NAME or model.gguf=FILE.")
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"model.dtype must be auto or one of {', '.join(DTYPES)}, got '{dtype}'.")
    if weights not in ("default", "random"):
        raise ConfigError(f"model.weights of a language model must be default or random, got '{weights}'; give "
                          "model.path=FOLDER for other weights.")


def _mapped(place: Path, config: Any, dtype: Any) -> nn.Module | None:
    with quiet():
        model = mapped(place, config, dtype)
        if model is not None:
            open_experts_(model)
            free_heads_(model)
        return None if model is None else model.eval().requires_grad_(False)


def described(model: nn.Module, tokenizer: Any, name: str) -> LoadedModel:
    """A decoder at hand."""
    return LoadedModel(
        model=model,
        name=name,
        preprocess=text_input(model.config, tokenizer),
        architecture={"builder": BUILDER, "kwargs": _arguments(model)},
        weights=f"weights given in Python, {type(model).__name__}",
    )


def outline(
    *, path: str | None, revision: str | None = None, dtype: str | None = None, trust_remote_code: bool | None = None
) -> nn.Module:
    """A decoder of a configuration, its tensors on ``meta``: nothing but ``config.json`` is read.

    Args:
        path: Folder with ``config.json``, or a name on the hub.
        revision: Branch, tag or commit on the hub.
        dtype: As in `load`; ``"auto"`` as the configuration says.
        trust_remote_code: Whether code from the hub may run.

    Raises:
        ConfigError: If there is no path.
        DataError: If the folder has no configuration, or the hub cannot be reached.
        UnsupportedModelError: If it is no causal decoder.
    """
    if path is None:
        raise ConfigError("model: dry_run=true reads a configuration; give model.path=FOLDER_OR_HUB_NAME.")
    place = Path(os.path.expanduser(path))
    if place.is_dir() and not (place / "config.json").is_file():
        raise DataError(f"model.path: {place} has no config.json; copy the network's there.")
    options: dict[str, Any] = {"trust_remote_code": bool(trust_remote_code)}
    if revision is not None:
        options["revision"] = revision
    source = str(place) if place.is_dir() else path
    with quiet(), _explained(source), torch.device("meta"):
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(source, **options)
        _refuse_unsuitable(config, gguf=False)
        wanted = config.dtype if dtype in (None, "auto") else DTYPES[dtype]
        model = AutoModelForCausalLM.from_config(config, dtype=wanted).eval().requires_grad_(False)
        open_experts_(model)
        free_heads_(model)
        return model


def build(*, config: Mapping[str, Any], dtype: str = "float32", kind: str | None = None) -> nn.Module:
    """An untrained decoder from its configuration, weights undefined.

    Args:
        config: Configuration with ``model_type``.
        dtype: Name of the weights' type.
        kind: Name of its class in transformers, where that makes another of such a configuration for causal language
            modelling, or none: the text part of a larger network, say. None: the usual class.

    Raises:
        DataError: If the configuration names no known family or does not hold together, or there is no such class.
    """
    with quiet():
        import transformers
        from transformers.initialization import no_init_weights

        given = {key: value for key, value in config.items() if key != "model_type"}
        own = None if kind is None else getattr(transformers, kind, None) if kind.isidentifier() else None
        if kind is not None and not (isinstance(own, type) and issubclass(own, transformers.PreTrainedModel)):
            raise DataError(f"the saved configuration cannot be built (transformers has no network '{kind}'); restore the run folder.")
        try:
            if own is None:
                made = transformers.AutoConfig.for_model(config["model_type"], **given)
            else:
                made = own.config_class(**given)
            with no_init_weights():
                if own is None:
                    model = transformers.AutoModelForCausalLM.from_config(made, dtype=DTYPES[dtype])
                else:
                    model = own._from_config(made, dtype=DTYPES[dtype])
        except Exception as error:  # every family validates in its own way
            raise DataError(
                f"the saved configuration cannot be built ({reason(error)}); restore the run folder."
            ) from error
    open_experts_(model)
    free_heads_(model)
    return model.eval().requires_grad_(False)


def continuation(model: nn.Module, tokens: Tensor, count: int) -> Tensor:
    """Greedy continuation with a cache, ``[batch, length]`` → ``[batch, count]`` int64; ends of text do not stop it."""
    with quiet(), torch.inference_mode():
        found = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
            eos_token_id=None,
        )
    return found[:, tokens.shape[1] :]


def native_config(model: nn.Module) -> Any | None:
    """A configuration from which transformers itself builds a network of exactly these shapes, or None.

    Layers of different widths are asked for with ``per_layer_config``, which only some families honour. None where
    the family's configuration cannot say the shapes (such widths, a bias that was added, head counts that its
    validation refuses or ties to the width).
    """
    shapes = [shape_of(model, number) for number in range(len(decoder_layers(model)))]
    with quiet(), closed(model) as fits:
        config = _with_shapes(model.config, shapes) if fits else None
        return config if config is not None and _same_shapes(config, model) else None


@dataclass(frozen=True)
class Opening:
    """What opens the folder of a pruned language model.

    Attributes:
        by: ``"transformers"``, ``"transformers with trust_remote_code"`` (our file of code lies in the folder) or
            ``"modhifi"``.
        why: Why not plain transformers; empty where it does.
    """

    by: str
    why: str = ""

    def __str__(self) -> str:
        return {
            "transformers": "plain transformers opens the new folder",
            "modhifi": f"modhifi_cli.load_model opens the new folder, plain transformers does not: {self.why}",
        }.get(self.by, f"transformers opens the new folder with trust_remote_code=True: {self.why}")


def will_open(model: nn.Module, *, even: bool) -> Opening:
    """What will open the folder of a network once it is pruned, as far as it is known before.

    Args:
        model: The dense network.
        even: Whether all layers will keep the same widths.
    """
    shape = shape_of(model, 0)
    key = next((key for key in ("neurons", "expert_neurons") if shape.get(key, 0) > 1), None)
    narrow = shape if key is None else shape | {key: shape[key] - 1}
    known = model.config.model_type in uneven.FAMILIES
    shapes = [narrow if even or number == 0 else shape for number in range(len(decoder_layers(model)))]
    if even:
        with quiet():
            config = _with_shape(model.config, narrow)
            if config is not None and _builds(config, narrow):
                return Opening("transformers")
    return _other_opening(model, shapes, known)


def _other_opening(model: nn.Module, shapes: Sequence[Mapping[str, int]], coded: bool) -> Opening:
    """What opens a network that plain transformers does not, and the reason."""
    kind = model.config.model_type
    if any(shape != shapes[0] for shape in shapes):
        why = "its layers differ in width" + ("" if coded else f", and there is no file of code of ours for {kind}")
    elif not {"neurons", "expert_neurons"} & shapes[0].keys() or not any(hasattr(model.config, key) for key in _MLP_WIDTHS):
        why = f"the configuration of {kind} has no key for the width of the MLPs"
    else:
        why = f"the configuration of {kind} cannot say these widths, head counts or biases"
    return Opening("transformers with trust_remote_code" if coded else "modhifi", why)


def _builds(config: Any, shape: Mapping[str, int]) -> bool:
    """Whether a family builds layers of a shape from a configuration."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    try:
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(config)
            open_experts_(built)
            return shape_of(built, 0) == shape
    except Exception:  # families refuse in their constructors
        return False


def accepts_heads(model: nn.Module, heads: int, kv_heads: int) -> bool:
    """Whether the family's own configuration can hold so many heads in every layer, at the dense head dimension."""
    before = shape_of(model, 0)
    wanted = before | {"heads": heads, "kv_heads": kv_heads}
    with quiet():
        config = _with_shape(model.config, wanted)
        if config is None:
            return False
        config.num_hidden_layers = 1
        return _builds(config, wanted)


def save(model: nn.Module, directory: Path, text: TextInput) -> tuple[bool, dict[str, Any]]:
    """Write a pruned decoder with its tokenizer and generation settings.

    Args:
        model: The network.
        directory: An existing folder.
        text: Its tokenizer.

    Returns:
        Whether plain transformers opens the folder, and what else ``architecture.json`` says: widths and head counts
        that `restore` needs, and under ``opens`` what opens the folder (`Opening`).
    """
    native = native_config(model)
    dense = model.config
    shapes = [shape_of(model, number) for number in range(len(decoder_layers(model)))]
    code = uneven.code(model) if native is None else None
    opens = Opening("transformers") if native is not None else _other_opening(model, shapes, code is not None)
    described = {"widths": describe_widths(model), "attributes": attention_attributes(model), "opens": vars(opens)}
    with quiet(), closed(model) if native is not None else contextlib.nullcontext():
        try:
            model.config = _without_kernels(dense if native is None else native)
            # The tensors' present names for ourselves; for others those that the family's checkpoints have on the hub.
            model.save_pretrained(directory, save_original_format=native is not None)
        finally:
            model.config = dense
        if code is not None:
            written = uneven.config_of(model, shapes) | {"dtype": str(model.dtype).removeprefix("torch.")}
            (directory / NATIVE).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
            (directory / uneven.FILE).write_text(code, encoding="utf-8")
            described["opens"]["vllm_deci"] = uneven.deci(written)
        elif native is None:
            (directory / NATIVE).replace(directory / DENSE)  # plain transformers would build other shapes from it
        if text.tokenizer is not None:
            text.tokenizer.save_pretrained(directory)
    return native is not None, described


def restore(directory: Path, architecture: Mapping[str, Any], described: Mapping[str, Any]) -> nn.Module:
    """The network that `save` wrote, whatever its widths.

    Raises:
        DataError: If files are missing or do not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from modhifi_cli.models import build_architecture

    if described.get("native"):
        with quiet(), _explained(str(directory)):
            from transformers import AutoModelForCausalLM

            dtype = DTYPES[architecture["kwargs"]["dtype"]]
            # The folder may come from a stranger: nothing is fetched, unpickled or imported because of it.
            options = {"trust_remote_code": False, "local_files_only": True, "use_safetensors": True}
            found = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options)
            open_experts_(found)
            free_heads_(found)
            return found.eval().requires_grad_(False)
    model = build_architecture(architecture)
    try:
        restore_widths_(model, described["widths"])
        for name, values in described["attributes"].items():
            for key, value in values.items():
                set_attribute_(model.get_submodule(name), key, value)
        files = sorted(directory.glob("*.safetensors"))
        state = {key: tensor for file in files for key, tensor in load_file(file).items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{directory}: damaged architecture.json ({error}); restore the run folder.") from error
    except (OSError, SafetensorError) as error:
        raise DataError(f"{directory}: weights cannot be read ({error}); restore the run folder.") from error
    for key, tensor in state.items():
        name, _, leaf = key.rpartition(".")
        with contextlib.suppress(AttributeError):
            owner = model.get_submodule(name)
            if leaf == "bias" and isinstance(owner, nn.Linear) and owner.bias is None:  # a repair added it
                owner.bias = nn.Parameter(tensor, requires_grad=False)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise DataError(
            f"{directory}: the weights do not fit architecture.json ({reason(error)}); restore the run folder."
        ) from error
    model.tie_weights()
    tied = {key for key in missing if _is_tied(model, key, state)}
    if unexpected or set(missing) - tied:
        first = [*unexpected, *sorted(set(missing) - tied)][0]
        raise DataError(f"{directory}: the weights do not fit architecture.json ({first}); restore the run folder.")
    if (directory / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model.eval()


def text_input_of(directory: Path, model: nn.Module) -> TextInput:
    """The saved network's tokenizer and limits; the tokenizer is None where none was saved."""
    present = any((directory / name).is_file() for name in _TOKENIZERS)
    options = {"trust_remote_code": False, "local_files_only": True}
    return text_input(model.config, _tokenizer(str(directory), options) if present else None)


# ------------------------------------------------------------------------------------------------------------ reading


def _source(
    path: str | None, gguf: str | None, place: Path, weights: str, tokenizer: str | None
) -> tuple[str, dict[str, Any]]:
    """What transformers is asked for, after looking whether a local folder holds what it needs."""
    if gguf is not None:
        need_packages("model.gguf", "gguf", "accelerate")
        if not place.is_file():
            raise DataError(f"model.gguf: no file at {place}; give the path of a .gguf file.")
        return str(place.parent), {"gguf_file": place.name}
    assert path is not None
    looks_local = place.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1
    if not place.is_dir():
        if looks_local:
            raise DataError(f"model.path: no folder at {place}; give a folder with config.json, or a name on the hub.")
        return path, {}
    if not (place / "config.json").is_file():
        raise DataError(f"model.path: {place} has no config.json; give the folder that save_pretrained wrote.")
    if weights == "default" and not any(file for pattern in _WEIGHTS for file in place.glob(pattern)):
        raise DataError(
            f"model.path: {place} has no weights (*.safetensors); copy them there, or set model.weights=random."
        )
    if tokenizer is None and not any((place / name).is_file() for name in _TOKENIZERS):
        raise DataError(
            f"model.path: {place} has no tokenizer (tokenizer.json); copy it there, or set model.tokenizer=FOLDER."
        )
    return str(place), {}


def _refuse_unsuitable(config: Any, *, gguf: bool) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    made = ", ".join(getattr(config, "architectures", None) or ()) or type(config).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"model: {made} is a sequence-to-sequence model; only causal decoders can be pruned as language models."
        )
    causal = made.endswith(("ForCausalLM", "LMHeadModel", "Config"))
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or not causal:
        raise UnsupportedModelError(
            f"model: {made} is no causal decoder; give a model that generates text (…ForCausalLM)."
        )
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None and not gguf:
        how = quantised.get("quant_method") if isinstance(quantised, Mapping) else type(quantised).__name__
        raise UnsupportedModelError(
            f"model: the weights are quantised ({how}) and cannot be edited; give the unquantised checkpoint."
        )


def _tokenizer(source: str, options: Mapping[str, Any]) -> Any:
    with quiet(), _explained(source, what="tokenizer"):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(source, **options)


def text_input(config: Any, tokenizer: Any) -> TextInput:
    """What a decoder's configuration, of the part that reads text, and its tokenizer (or None) say of its input."""
    config = config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2048
    bos = getattr(tokenizer, "bos_token_id", None)
    return TextInput(
        tokenizer=tokenizer,
        vocabulary=int(config.vocab_size),
        max_length=int(longest),
        bos=bos,
        window=min(32, int(longest)),
    )


@contextlib.contextmanager
def _explained(source: str, what: str = "model") -> Iterator[None]:
    """One sentence for what transformers raises when it cannot find or read something."""
    try:
        yield
    except (ConfigError, DataError, UnsupportedModelError):
        raise
    except Exception as error:  # OSError, ValueError, HTTP errors of several libraries, safetensors' own
        local = Path(source).is_dir()
        said = reason(error)
        if not local:
            raise DataError(
                f"model.path={source}: the {what} could not be fetched from the hub ({type(error).__name__}: {said}); "
                "connect to the network once, check the name, or give a local folder."
            ) from error
        raise DataError(f"model.path: the {what} in {source} cannot be read ({said}); copy it again.") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers reports its progress and advice on standard error; what goes wrong comes as an error anyway."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # some bars ask nobody
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _forget_quantisation_(model: nn.Module) -> None:
    """The weights of a GGUF file are dequantised, but transformers goes on calling them quantised and saves nothing."""
    for owner, name in (
        (model.config, "quantization_config"),
        (model.config, "_model_name_or_path"),  # of the file's folder
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model, "is_quantized"),
    ):
        if name in vars(owner):
            delattr(owner, name)


def _digest(place: Path) -> str:
    """Short hash of the weights' files, so that a report says which weights they were."""
    files = sorted(place.glob("*.safetensors")) or sorted(place.glob("*.bin")) if place.is_dir() else [place]
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return f"sha256 {digest.hexdigest()[:12]}"


def _revision(source: str, revision: str | None) -> str:
    """The commit of what was fetched from the hub: the cache keeps it in a folder of that name."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, "config.json", revision=revision)
    return f"revision {Path(found).parent.name if isinstance(found, str) else revision or 'unknown'}"


def _license(place: Path, *, gguf: bool) -> str | None:
    """What a GGUF file, or the card in a folder, says of the licence."""
    if gguf:
        from gguf import GGUFReader

        field = GGUFReader(place).get_field("general.license")
        return None if field is None else str(field.contents())
    card = place / "README.md"
    head = card.read_text(encoding="utf-8", errors="replace")[:10_000] if card.is_file() else ""
    said = re.match(r"---\n(?:(?!---\n).*\n)*?license:[ \t]*([\w.+-]+)", head)
    return said[1] if said else None


def _arguments(model: nn.Module) -> dict[str, Any]:
    """Arguments of `build` for a network."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config: Any = model.config
    usual = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)] if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else None
    found = {"config": _described(config), "dtype": str(model.dtype).removeprefix("torch.")}
    return found if type(model) is usual else found | {"kind": type(model).__name__}


def _described(config: Any) -> dict[str, Any]:
    return _without_places(config.to_dict())


def _without_kernels(config: Any) -> Any:
    """The same, or a copy of it that asks for no kernels that would have to be fetched."""
    asked = [key for key, value in config.to_dict().items() if value is True and key.endswith("_kernels")]
    if not asked:
        return config
    config = copy.deepcopy(config)
    for key in asked:
        setattr(config, key, False)
    return config


def _without_places(plain: dict[str, Any]) -> dict[str, Any]:
    """The same without what says where a configuration, or a part of it, was read from (the second is of GGUF files).

    Nor does it ask for kernels that would have to be fetched: the network computes the same without them.
    """
    return {
        key: _without_places(value) if isinstance(value, dict) else False if value is True and key.endswith("_kernels") else value
        for key, value in plain.items()
        if key not in ("_name_or_path", "_model_name_or_path")
    }



# ------------------------------------------------------------------------------------------------------------- shapes


def _with_shape(config: Any, shape: Mapping[str, int]) -> Any | None:
    """A copy of a configuration with other widths, or None where it has no key for them or refuses them."""
    told = _said(config, shape)
    return None if told is None else _with(config, told)


def _with(config: Any, told: Mapping[str, Any]) -> Any | None:
    try:
        return type(config).from_dict(copy.deepcopy(config).to_dict() | dict(told))
    except Exception:  # families validate in their own ways
        return None


def _said(config: Any, shape: Mapping[str, int]) -> dict[str, int] | None:
    """What a family's configuration calls the widths of a layer → what they are; None where it has no key for them."""
    plain = config.to_dict()
    told: dict[str, int] = {}
    for ours, keys in _WIDTH_KEYS.items():
        if ours in shape:
            shared = ours == "neurons" and "experts" in shape
            key = next((key for key in (*_SHARED_WIDTHS, *keys) if key in plain) if shared else
                       (key for key in keys if hasattr(config, key)), None)  # fmt: skip
            if key is None:
                return None
            told[key] = shape[ours]
    if "heads" in shape and shape["heads"] != getattr(config, "num_attention_heads", None):
        key = next((key for key in ("num_attention_heads", "n_head", "num_heads") if key in plain), None)
        if key is None:
            return None
        told[key] = shape["heads"]
        if "head_dim" in shape:
            told["head_dim"] = shape["head_dim"]
    if "kv_heads" in shape and "num_key_value_heads" in plain:
        told["num_key_value_heads"] = shape["kv_heads"]
    return told


def _with_shapes(config: Any, shapes: Sequence[Mapping[str, int]]) -> Any | None:
    """A copy of a configuration with widths for every layer, or None where it has no way to say them."""
    every = [_said(config, shape) for shape in shapes]
    if any(told is None for told in every):
        return None
    values: dict[str, set[int]] = {}
    for told in every:
        for key, value in (told or {}).items():
            values.setdefault(key, set()).add(value)
    if all(len(found) == 1 for found in values.values()):  # layers of different kinds may each have keys of their own
        return _with(config, {key: found.pop() for key, found in values.items()})
    layers = [_with_shape(config, shape) for shape in shapes]
    if any(layer is None for layer in layers):
        return None
    dense = config.to_dict()
    plain = copy.deepcopy(dense)
    plain["per_layer_config"] = {
        number: {key: value for key, value in layer.to_dict().items() if value != dense.get(key)}
        for number, layer in enumerate(layers)
    }
    try:
        return type(config).from_dict(plain)
    except Exception:  # a version without it, or one that wants more to be said
        return None


def _same_shapes(config: Any, model: nn.Module) -> bool:
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    except Exception:  # families refuse in their constructors
        return False
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return ours == {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}


def _is_tied(model: nn.Module, key: str, state: Mapping[str, Tensor]) -> bool:
    tensors = model.state_dict()
    return any(tensors[key].data_ptr() == tensors[other].data_ptr() for other in state if other in tensors)
