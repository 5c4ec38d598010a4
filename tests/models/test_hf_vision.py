"""Image networks of transformers from a folder: loaded, pruned, saved and read back."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from modhifi_cli.cli import main
from modhifi_cli.errors import ConfigError, DataError, UnsupportedModelError
from modhifi_cli.files import artifacts
from modhifi_cli.models import build_architecture, hf_vision

transformers = pytest.importorskip("transformers")

QUERIES, VALUES = ("q_proj", "query"), ("v_proj", "value")  # the names change with versions


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks") / "vit"
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=8,
        id2label={0: "ant", 1: "bee"}, label2id={"ant": 0, "bee": 1},
    )  # fmt: skip
    network = transformers.ViTForImageClassification(config).eval()
    network.save_pretrained(folder)
    settings = {"size": {"height": 16, "width": 16}, "image_mean": [0.4] * 3, "image_std": [0.2] * 3, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder, network


def test_a_folder_gives_the_networks_logits_its_preprocessing_and_its_classes(vit):
    folder, network = vit
    loaded = hf_vision.load(path=str(folder))
    images = torch.randn(3, 3, 16, 16)
    assert torch.equal(loaded.model(images), network(pixel_values=images).logits)
    assert loaded.classes == ("ant", "bee") and loaded.preprocess.size == (16, 16)
    assert loaded.preprocess.mean == (0.4,) * 3 and loaded.preprocess.interpolation == "bicubic"
    again = build_architecture(json.loads(json.dumps(loaded.architecture)))
    again.load_state_dict(loaded.model.state_dict())
    assert torch.equal(again(images), loaded.model(images))


@pytest.mark.parametrize("preset", ["fast", "best"])
def test_a_folder_prunes_on_the_command_line_and_is_read_back(vit, tmp_path, monkeypatch, preset):
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    for number in range(24):
        (tmp_path / "set").mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / f"set/{number}.png")
    words = ["model=hf_vision", f"model.path={vit[0]}", "data=folder", "data.path=set", "sparsity=0.2",
             f"preset={preset}", "evaluation=[size]", "console=plain"]  # fmt: skip
    assert main(["prune", *words]) == 0
    (run,) = (tmp_path / "outputs/prune").glob("*/*")
    narrow = artifacts.load_model(run)
    assert sum(p.numel() for p in narrow.parameters()) < 0.85 * sum(p.numel() for p in vit[1].parameters())
    written = {name.rpartition(".")[2]: one.out_features for name, one in narrow.named_modules() if hasattr(one, "out_features")}
    queries, values = (next(written[name] for name in names if name in written) for names in (QUERIES, VALUES))
    assert (queries < values) == (preset == "best")
    assert main(["verify", f"run={run}", "console=plain"]) == 0
    assert main(["replay", f"run={run}", "console=plain"]) == 0


def test_info_tells_its_heads_from_channels(vit, capsys):
    assert main(["info", "model=hf_vision", f"model.path={vit[0]}", "console=json"]) == 0
    (told,) = map(json.loads, capsys.readouterr().out.strip().splitlines()[-1:])
    assert [row["component"] for row in told["groups"]] == ["Q/K feature", "head", "channel"]


def test_the_library_says_nothing_of_its_own_while_a_folder_is_read(vit, capfd):
    hf_vision.load(path=str(vit[0]))
    said = capfd.readouterr()
    assert said.out == said.err == ""


def test_a_size_that_is_no_pixels_can_be_set_as_the_message_says(vit, tmp_path):
    import shutil

    folder = shutil.copytree(vit[0], tmp_path / "vit")
    settings = json.loads((folder / "preprocessor_config.json").read_text()) | {"size": {"longest_edge": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"model.preprocess.size: the folder gives {'longest_edge': 16}, expected pixels; set it"):
        hf_vision.load(path=str(folder))
    assert hf_vision.load(path=str(folder), preprocess={"size": 16}).preprocess.size == (16, 16)


def test_what_is_wrong_with_a_folder_is_told(vit, tmp_path):
    with pytest.raises(DataError, match="config.json cannot be read .FileNotFoundError.; give a folder in Hugging Face's"):
        hf_vision.load(path=str(tmp_path))
    config = tmp_path / "config.json"
    config.write_text("{}")
    with pytest.raises(DataError, match="names no model_type and architectures; copy the folder again"):
        hf_vision.load(path=str(tmp_path))
    config.write_text(json.dumps({"model_type": "vit", "architectures": ["os"]}))
    with pytest.raises(DataError, match="transformers has no network 'os'"):
        hf_vision.load(path=str(tmp_path))
    config.write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 32,
                                  "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 32}))  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="BertModel reads input_ids, not images; use model=hf for a language"):
        hf_vision.load(path=str(tmp_path))
