"""Every YAML composes and binds: choices, presets, experiments, launchers and the commands in their headers."""

import re
import shlex
from pathlib import Path

import pytest

from modhifi_cli.errors import ConfigError
from modhifi_cli.settings import config

ROOT = config.config_directory()
GROUPS = config.groups()
CHOICES = [(group, choice) for group, choices in GROUPS.items() for choice in choices if not group.startswith("hydra/")]
COMMANDS = sorted(
    {
        (path.relative_to(ROOT).as_posix(), command)
        for path in ROOT.rglob("*.yaml")
        for command in config.header(path)[1]
    }
)


def required(path: Path, group: str) -> list[str]:
    """Overrides for the keys that a file leaves open with ???."""
    known = {"sources": "[{name: procedural}]"}
    return [f"{group}.{key}={known.get(key, 'given')}" for key in re.findall(r"^(\w+): \?\?\?", path.read_text(encoding="utf-8"), re.M)]


def fill(overrides: list[str]) -> list[str]:
    """The first value of every sweep, and a value for every key that a chosen file leaves open."""
    firsts = []
    for word in overrides:
        key, _, value = word.partition("=")
        value = re.sub(r"^(?:range|interval|choice)\((\w[\w.]*),.*\)$", r"\1", value)
        firsts.append(word if value[:1] in "[{'\"" else f"{key}={value.split(',')[0]}")
    given = {word.partition("=")[0] for word in firsts}
    for word in list(firsts):
        group, _, choice = word.partition("=")
        path = ROOT / group / f"{choice}.yaml"
        if group in GROUPS and path.is_file():
            firsts += [text for text in required(path, group) if text.partition("=")[0] not in given]
    return firsts


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=lambda value: value)
def test_every_choice_composes_and_binds(group, choice):
    asked = f"{group}=[{choice}]" if group in ("evaluation", "export") else f"{group}={choice}"
    path = ROOT / group / f"{choice}.yaml"
    # An experiment or a study is made for one verb, which its header's command names; a method or audit for another.
    verb = {"method": "unlearn", "audit": "audit"}.get(group, "prune")
    if group in ("experiment", "study"):
        verb = re.search(r"modhifi (\w+)", config.header(path)[1][0])[1]
    needs = {"unlearn": ["forget_class=3"], "audit": ["run=given"]}.get(verb, [])
    settings = config.compose(verb, [asked, *needs, *required(path, group)])
    assert settings["output_dir"] == "outputs"
    assert verb != "prune" or (settings["sparsity"] is None) == (asked == "target=max_drop")


@pytest.mark.parametrize("verb", config.verbs())
def test_every_verb_composes(verb):
    needs = {"unlearn": ["forget_class=3"]} | dict.fromkeys(("verify", "replay", "audit", "export"), ["run=given"])
    needs["push"] = ["run=given", "repo=given"]
    assert config.compose(verb, needs.get(verb, []))["output_dir"] == "outputs"


@pytest.mark.parametrize(("file", "command"), COMMANDS, ids=lambda value: value)
def test_the_command_in_a_header_composes(file, command):
    words = shlex.split(re.split(r"\s{3,}", command[command.index("modhifi ") :])[0])
    verb, overrides = words[1], [word for word in words[2:] if not word.startswith("-")]
    if verb == "list":
        return
    if any(word.startswith(("hydra/", "hydra.")) for word in overrides):
        overrides = [word for word in overrides if not word.startswith("hydra")]
    config.compose(verb, fill(overrides))


def test_every_yaml_says_what_it_is_and_how_to_use_it():
    silent = [
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.yaml")
        if path.name != "base.yaml" and (not config.header(path)[0] or not config.header(path)[1])
    ]
    assert not silent


@pytest.mark.parametrize("kind", ["launcher", "sweeper"])
def test_every_launcher_and_sweeper_composes(kind):
    for choice in GROUPS[f"hydra/{kind}"]:
        config.compose("prune", [f"hydra/{kind}={choice}"])


def test_the_command_line_wins_over_a_preset():
    preset = config.compose("prune", ["preset=paper"])
    assert preset["compensation"]["towards"] == "zero"
    assert preset["data"]["num_samples"] == "auto"  # 2,000, or all where there are fewer
    ours = config.compose("prune", ["preset=paper", "data.num_samples=5", "compensation=none", "batchnorm=stored"])
    assert ours["data"]["num_samples"] == 5
    assert ours["compensation"]["_target_"].endswith("NoCompensation")
    assert ours["batchnorm"] == "stored"


@pytest.mark.parametrize("model", ["timm", "torchvision", "efficientnet_lite0"])
def test_arguments_of_a_library_can_be_given(model):
    given = config.compose("prune", [f"model={model}", "model.name=x", "model.options={pad_type: same}"])
    assert given["model"]["options"] == {"pad_type": "same"}


def test_a_list_of_evaluations_replaces_the_default_list():
    chosen = config.compose("prune", ["evaluation=[top1,latency]", "evaluation.latency.iterations=5"])
    assert list(chosen["evaluation"]) == ["top1", "latency"]
    assert chosen["evaluation"]["latency"]["iterations"] == 5
    assert config.compose("prune", ["evaluation=[]"])["evaluation"] == {}


def test_the_embedded_network_brings_its_images_and_others_have_theirs_made():
    assert config.compose("prune", [])["data"]["_target_"].endswith("digits.load")
    for verb, words in (("prune", []), ("unlearn", ["forget_class=3"]), ("compare", [])):
        others = config.compose(verb, ["model=resnet50", *words])
        assert others["data"]["_target_"] == "modhifi_cli.data.synthetic.load"
        assert others["evaluation_data"] is None
    assert config.compose("evaluate", ["model=resnet50"])["data"] is None


def test_a_mixture_takes_the_keys_of_the_choices_it_names():
    parts = "data.sources=[{name: folder, path: here, weight: 0.25}, {name: procedural, kind: fractal}]"
    sources = config.compose("prune", ["data=mixed", parts])["data"]["sources"]
    assert [(one["name"], one["weight"]) for one in sources] == [("folder", 0.25), ("procedural", 1.0)]
    assert sources[0]["source"]["path"] == "here" and sources[0]["source"]["skip_corrupt"] is False
    assert sources[1]["source"]["kind"] == "fractal" and sources[1]["source"]["seed"] == 0


IMAGES = [
    choice
    for choice in GROUPS["data"]
    if not re.search(r"modhifi_cli\.data\.(text|generated)\.", (ROOT / f"data/{choice}.yaml").read_text())
]


@pytest.mark.parametrize("choice", IMAGES)
def test_every_source_of_calibration_images_says_where_labels_come_from(choice):
    words = [f"data={choice}", *required(ROOT / "data" / f"{choice}.yaml", "data")]
    assert config.compose("prune", words)["data"]["labels"] == "auto"
    assert config.compose("prune", [*words, "data.labels=model"])["data"]["labels"] == "model"
    with pytest.raises(ConfigError, match="^data.labels must be auto, given or model; got 'modle'.$"):
        config.compose("prune", [*words, "data.labels=modle"])


def test_num_samples_counts_images_and_texts_alike():
    text = ["model=hf", "model.path=given", "data=text", "data.path=given", "evaluation_data=wikitext2"]
    settings = config.compose("prune", [*text, "data.num_samples=16", "evaluation_data.num_samples=8"])
    assert settings["data"]["sequences"] == 16 and settings["evaluation_data"]["sequences"] == 8
    assert config.compose("prune", ["data=procedural", "data.num_samples=16"])["data"]["num_samples"] == 16
