"""Decoders whose layers differ in width, for plain transformers: a file of code that lies beside their weights.

transformers' families build every layer from one set of numbers. The file written here derives from a family's own
classes and builds each layer from ``per_layer_config`` instead; it needs transformers alone, and is opened with
``trust_remote_code=True``. This package never runs it: `modhifi_cli.models.hf.restore` knows the widths itself. For
vLLM, whose ``DeciLMForCausalLM`` reads ``block_configs``, the configuration shows its numbers in that form, too, where
all layers have the same number of query heads.
"""

import copy
from collections.abc import Mapping, Sequence
from string import Template
from typing import Any

from torch import nn

from modhifi_cli.graph.decoder import decoder_layers

FILE = "modeling_modhifi.py"
PREFIX = "modhifi_uneven_"  # of the model_type that the file gives its configuration
FAMILIES: Mapping[str, str] = {  # model_type → prefix of transformers' class names
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "phi3": "Phi3",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
}
_DECI = ("llama", "mistral")  # what vLLM's DeciLM computes
_KEYS = {"neurons": "intermediate_size", "heads": "num_attention_heads", "kv_heads": "num_key_value_heads"}

_CODE = Template(
    '''"""A pruned $family whose layers differ in width: `per_layer_config` says how, layer by layer.

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Written by modhifi; it needs nothing but transformers.
"""

import copy
from collections.abc import Mapping
from types import SimpleNamespace

import torch
from torch import nn
from transformers.models.$module.configuration_$module import ${family}Config
from transformers.models.$module.modeling_$module import ${family}ForCausalLM


class Uneven${family}Config(${family}Config):
    """The family's numbers, what single layers have instead, and biases that the family does not have."""

    model_type = "modhifi_uneven_$module"

    def __init__(self, per_layer_config=None, added_biases=(), **kwargs):
        super().__init__(**kwargs)
        self.added_biases = list(added_biases)
        # The family's own code reads numbers of the whole network; the layers are put right afterwards.
        self.allow_global_per_layer_attribute_access = True
        self.per_layer_config = dict(per_layer_config or {})

    def of_layer(self, number):
        """The configuration that one layer is built from."""
        given = self.per_layer_config
        if not isinstance(given, Mapping):  # transformers 5 keeps configurations, earlier ones what they were given
            return given[number]
        own = copy.copy(self)
        for key, value in (given.get(str(number)) or given.get(number) or {}).items():
            setattr(own, key, value)
        return own

    @property
    def block_configs(self):
        """The same for vLLM's DeciLMForCausalLM."""
        found = []
        for number in range(self.num_hidden_layers):
            own = self.of_layer(number)
            grouped = self.num_attention_heads // own.num_key_value_heads
            found.append(
                SimpleNamespace(
                    attention=SimpleNamespace(no_op=False, n_heads_in_group=grouped),
                    ffn=SimpleNamespace(no_op=False, intermediate_size=own.intermediate_size),
                )
            )
        return found


class Uneven${family}ForCausalLM(${family}ForCausalLM):
    """The family's network with layers of their own widths."""

    config_class = Uneven${family}Config

    def __init__(self, config):
        super().__init__(config)
        for number, layer in enumerate(self.model.layers):
            own = config.of_layer(number)
            own._attn_implementation = config._attn_implementation
            self.model.layers[number] = type(layer)(own, number)
        for name in config.added_biases:
            module = self.get_submodule(name)
            module.bias = nn.Parameter(torch.zeros(module.out_features, dtype=module.weight.dtype))
        self.post_init()

    def set_attn_implementation(self, *args, **kwargs):
        """As the family's, for the layers' own configurations, too."""
        super().set_attn_implementation(*args, **kwargs)
        for layer in self.model.layers:
            layer.self_attn.config._attn_implementation = self.config._attn_implementation
'''
)


def code(model: nn.Module) -> str | None:
    """The file for a network's family, or None for families that it does not know."""
    return code_of(model.config.model_type)


def code_of(kind: str) -> str | None:
    """As `code`, by the family's ``model_type``."""
    return _CODE.substitute(module=kind, family=FAMILIES[kind]) if kind in FAMILIES else None


def auto_map(kind: str) -> dict[str, str]:
    """Where transformers finds the classes of a family in `FAMILIES`: in `FILE` beside the configuration."""
    module, name = FILE.removesuffix(".py"), f"Uneven{FAMILIES[kind]}"
    return {"AutoConfig": f"{module}.{name}Config", "AutoModelForCausalLM": f"{module}.{name}ForCausalLM"}


def config_of(model: nn.Module, shapes: Sequence[Mapping[str, int]]) -> dict[str, Any]:
    """``config.json`` of a network with unequal layers.

    Args:
        model: Of a family in `FAMILIES`; its configuration is still the dense one.
        shapes: Neurons and heads of every layer, as `modhifi_cli.graph.decoder.shape_of`.

    Returns:
        JSON-able: numbers that all layers share for the whole network, the others for each layer.
    """
    kind = model.config.model_type
    plain = copy.deepcopy(model.config).to_dict()
    for key in ("_name_or_path", "_model_name_or_path"):  # where it was read from; the second of GGUF files
        plain.pop(key, None)
    layers: dict[str, dict[str, int]] = {str(number): {} for number in range(len(shapes))}
    hidden = plain["hidden_size"]
    for ours, theirs in _KEYS.items():
        values = [shape[ours] for shape in shapes]
        # The families refuse a number of heads for the whole network that does not divide its width.
        if len(set(values)) == 1 and (ours != "heads" or hidden % values[0] == 0):
            plain[theirs] = values[0]
        else:
            for number, value in enumerate(values):
                layers[str(number)][theirs] = value
    return plain | {
        "model_type": f"{PREFIX}{kind}",
        "architectures": [f"Uneven{FAMILIES[kind]}ForCausalLM"],
        "auto_map": auto_map(kind),
        "head_dim": shapes[0]["head_dim"],
        "per_layer_config": {number: own for number, own in layers.items() if own},
        "added_biases": _added_biases(model),
    }


def deci(config: Mapping[str, Any]) -> bool:
    """Whether vLLM's ``DeciLMForCausalLM`` can run a network that `config_of` describes."""
    kind = str(config["model_type"]).removeprefix(PREFIX)
    varied = any("num_attention_heads" in own for own in config["per_layer_config"].values())
    return kind in _DECI and not varied and not config["added_biases"] and not config.get("sliding_window")


def _added_biases(model: nn.Module) -> list[str]:
    """Linear layers of the decoder layers with a bias that the family's own network does not have."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        own = {name for name, _ in AutoModelForCausalLM.from_config(model.config).named_parameters()}
    prefixes = decoder_layers(model)
    return [
        name.removesuffix(".bias")
        for name, _ in model.named_parameters()
        if name.endswith(".bias") and name not in own and name.startswith(tuple(f"{one}." for one in prefixes))
    ]
