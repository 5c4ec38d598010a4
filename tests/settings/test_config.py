"""Settings: checks, folder names, differences and help, without running anything."""

import re

import pytest

from modhifi_cli.errors import ConfigError
from modhifi_cli.settings import config, yamls


def test_a_folder_name_holds_nothing_that_hydra_cannot_take_as_a_value():
    name = config.slug(["data.path='my images, old'", "exclude=[a,b]", "sparsity=0.4"])
    assert not set(name) & set("=,[]'\" ")


def test_a_folder_name_depends_on_the_overrides_and_not_on_their_order():
    assert config.slug(["a=1", "b=2"]) == config.slug(["b=2", "a=1"])
    assert config.slug(["a=1,2"]) != config.slug(["a=1-2"])
    assert config.slug([]) == "default"


def test_two_long_lists_of_overrides_do_not_share_a_folder():
    words = [f"key_{number}=value" for number in range(40)]
    assert config.slug([*words, "z=1"]) != config.slug([*words, "z=2"])
    assert len(config.slug(words)) < 120


def test_differences_name_key_and_both_values():
    found = config.differences({"a": {"b": 1}, "same": 2}, {"a": {"b": 3}, "same": 2, "only": 4})
    assert found == ["a.b (1 here, 3 there)", "only (absent here, 4 there)"]


def test_differences_name_a_choice_that_one_side_has_not_made_once():
    ours = {"evaluation": {"size": {"_target_": "x", "_partial_": True, "batch": 64}}}
    assert config.differences(ours, {"evaluation": {}}) == ["evaluation.size (given here, absent there)"]


def test_yaml_gives_back_what_was_written():
    plain = {"sparsity": 0.4, "exclude": ["a"], "model": {"weights": None}}
    assert config.from_yaml(config.to_yaml(plain)) == plain


def test_saved_settings_of_an_earlier_version_name_what_stands_in_its_place_now():
    text = "method: {_target_: modhifi_cli.tasks.forgetting.ContrastU}\naudit: {_target_: modhifi_cli.tasks.relearn.Relearn}"
    found = config.from_yaml(text)
    assert found["method"]["_target_"] == "modhifi_cli.unlearning.contrast.ContrastU"
    assert config.build(found["method"]).strength == "beta"
    assert config.build(found["audit"]).steps == 32


def test_a_setting_that_is_gone_is_forgotten_where_it_was_left_off():
    node = "selection: {_target_: modhifi_cli.numerics.selection.Greedy, swaps: %d}"
    assert config.build(config.from_yaml(node % 0)["selection"]).block == "auto"
    assert "swaps" in config.from_yaml(node % 3)["selection"], "what asked for something is not forgotten in silence"


def test_a_config_that_is_no_mapping_is_refused():
    with pytest.raises(ConfigError, match="not a YAML mapping"):
        config.from_yaml("- 1\n- 2\n")


@pytest.mark.parametrize("verb", config.verbs())
def test_help_of_a_verb_teaches_every_key_and_group(verb):
    text, known = config.verb_help(verb), yamls.choices(verb)
    for key in config.top_level_keys(verb):
        assert key in text or known[key] == (), "a group without a choice for this verb"
    assert "modhifi " + verb in text


def test_main_help_names_every_verb():
    text = config.main_help()
    assert all(verb in text for verb in (*config.verbs(), "list"))


def test_build_binds_and_partial_waits():
    partial = config.build({"_target_": "modhifi_cli.numerics.schedule.geometric", "_partial_": True, "iterations": 2})
    assert partial(0.5)[-1] == 0.5
    compensation = config.build({"_target_": "modhifi_cli.numerics.compensation.PerKernel", "ridge": 0.5})
    assert compensation.ridge == 0.5


def test_a_long_folder_name_is_cut_between_settings_and_not_inside_a_value():
    name = config.slug(["data.path=/somewhere/with/a/rather/long/name", "model=resnet50", "round_to=8", "sparsity=0.25"])
    assert len(name) <= 80 + 9 and re.search(r"_[0-9a-f]{8}$", name)
    assert name.rpartition("_")[0].endswith(("round_to-8", "sparsity-0.25", "model-resnet50"))


def test_a_cut_folder_name_still_says_what_leads():
    words = ["a.rather.long.key=of_an_experiment", "another.rather.long.key=that_all_jobs_share", "forget_class=3"]
    assert "forget_class" not in config.slug(words)
    assert config.slug(words, leading=["forget_class=3"]).startswith("forget_class-3_")


def test_what_an_experiment_says_to_another_verb_is_left_out():
    words = ["experiment=cifar_compare_resnet20"]
    assert config.compose("compare", words)["budgets"] == [0.2, 0.35, 0.5, 0.65]
    assert "methods" not in config.compose("prune", words)
    with pytest.raises(ConfigError, match="modhifi prune has no key 'methods'"):
        config.compose("prune", ["+methods=[best]"])


def test_a_key_of_another_verb_is_said_to_be_so():
    with pytest.raises(ConfigError, match="modhifi prune has no key 'method', which is for modhifi unlearn"):
        config.compose("prune", ["method=contrast"])


@pytest.mark.parametrize("word", ["console=[[1]]", "statistics=[1,2]", "evaluation=[[top1]]", "data=5", "experiment=[1]"])
def test_a_group_that_is_given_no_name_is_told_what_it_takes(word):
    with pytest.raises(ConfigError, match=re.escape(word) + ".*takes the name of one of its choices .*, not null, a number or a nested list"):
        config.compose("prune", [word])


def test_what_breaks_hydra_itself_is_one_sentence():
    with pytest.raises(ConfigError, match="cannot be put together"):
        config.compose("prune", ["data.num_samples=" + "[" * 400 + "]" * 400])


@pytest.mark.parametrize(("verb", "group", "key"), [("unlearn", "audit", "relearn.steps"), ("prune", "healing", "epochs")])
def test_keys_of_an_optional_group_that_is_left_out_leave_it_out(verb, group, key):
    # As an experiment's file puts them there, whose words are not checked against the choice.
    own = ["forget_class=1"] if verb == "unlearn" else []
    assert not config.compose(verb, [*own, f"{group}=none", f"++{group}.{key}=3"]).get(group)
    assert config.compose("unlearn", ["forget_class=1"])["audit"]["probe"]
