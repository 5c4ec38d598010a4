"""What vLLM's own code reads in a folder with unequal layers: its classes of configuration and its DeciLM layer.

vLLM itself needs a card. The two files that read a configuration run without one: they are taken from an unpacked vLLM
(MODHIFI_VLLM names the folder `vllm` of its wheel), and what they import from the rest of it is replaced.
"""

import importlib.util
import logging
import os
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from modhifi_cli.graph.components import Layout
from modhifi_cli.graph.decoder import find_parts, slice_part_
from modhifi_cli.models import hf
from modhifi_cli.records import TextInput
from tests.decoders import tiny, uneven

_IMPORT = re.compile(r"^from (vllm\S*|\.\S*) import (?:\(([^)]*)\)|([^\n]*))", re.M)


class _Kept(nn.Module):
    """Stands for any layer of vLLM's: keeps what it is built with."""

    DECODER = "decoder"

    def __init__(self, *_, **given):
        super().__init__()
        self.given = given


def _plain(*given, **_):
    return given[0] if given else _plain


def _stand_in(name: str):
    if not name[0].isupper():
        return _plain
    return type(name, (object,) if name.startswith(("Supports", "HasNoOps")) else (_Kept,), {})


@pytest.fixture
def vllm(monkeypatch):
    """Reads one of vLLM's files, with stand-ins for what it imports of the rest."""
    folder = Path(os.environ.get("MODHIFI_VLLM", "none"))
    if not (folder / "model_executor").is_dir():
        pytest.skip("no vLLM: unpack its wheel, then MODHIFI_VLLM=FOLDER/vllm")

    def put(name: str, **content):
        while name:
            module = sys.modules.get(name) or types.ModuleType(name)
            module.__path__ = []
            module.__dict__.update(content)
            monkeypatch.setitem(sys.modules, name, module)
            name, content = name.rpartition(".")[0], {}

    def read(file: str, **known):
        package = "vllm." + file.removesuffix(".py").rpartition("/")[0].replace("/", ".")
        text = (folder / file).read_text()
        for source, several, one in _IMPORT.findall(text):
            names = re.findall(r"\w+", several or one)
            put(package + source if source.startswith(".") else source, **{n: known.get(n, _stand_in(n)) for n in names})
        spec = importlib.util.spec_from_file_location(f"{package}.read", folder / file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return read


def configuration(model, folder):
    """Of the saved network, as a stranger reads it."""
    from transformers import AutoConfig

    folder.mkdir()
    told = hf.save(model, folder, TextInput(None, 64, 64, 0))[1]["opens"]
    return AutoConfig.from_pretrained(folder, trust_remote_code=True), told["vllm_deci"]


def narrow():
    model = tiny("llama")
    (part,) = [one for one in find_parts(model, components=["mlp"]).parts if one.layer == 0]
    slice_part_(model, Layout(model, [part.group]), part, torch.arange(20))
    return model


def first_of(config, names, default=None, default_factory=None):
    found = [getattr(config, name) for name in names if hasattr(config, name)]
    return found[0] if found else default_factory() if default_factory else default


@pytest.mark.parametrize("make, heads, neurons", [(narrow, [4, 4], [20, 48]), (lambda: uneven("llama"), [4, 2], [48, 12])])
def test_vllm_takes_the_heads_and_widths_of_each_layer(tmp_path, vllm, make, heads, neurons):
    aliases = {"total_num_kv_heads": ("num_key_value_heads",)}
    read = vllm(
        "transformers_utils/model_arch_config_convertor.py", CONFIG_FIELD_ALIASES=aliases, getattr_iter=first_of,
        init_logger=logging.getLogger,
    )  # fmt: skip
    config, _ = configuration(make(), tmp_path / "model")
    layers = [one for one, _ in read.ModelArchConfigConvertorBase(config, config).get_per_layer_hf_configs()]
    told = [read.ModelArchConfigConvertorBase(one, one) for one in layers]
    assert [one.get_total_num_attention_heads() for one in told] == heads
    assert [one.get_total_num_kv_heads() for one in told] == [2, 2] and [one.get_head_size() for one in told] == [8, 8]
    assert [one.intermediate_size for one in layers] == neurons
    assert read.NemotronNasModelArchConfigConvertor(config, config).get_total_num_kv_heads() == 2


def test_vllms_deci_layer_is_built_with_the_widths_of_the_folder(tmp_path, vllm):
    read = vllm("model_executor/models/nemotron_nas.py")
    read.DeciLMAttention = _Kept
    model = narrow()
    config, deci = configuration(model, tmp_path / "model")
    assert deci
    for number, layer in enumerate(model.model.layers):
        built = read.DeciLMDecoderLayer(config, number)
        assert built.mlp.given["intermediate_size"] == layer.mlp.gate_proj.out_features
        attention = built.self_attn.given
        assert 8 * attention["num_heads"] == layer.self_attn.q_proj.out_features
        assert 8 * attention["num_kv_heads"] == layer.self_attn.k_proj.out_features
