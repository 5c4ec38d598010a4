"""What settings may name: each group its own role, nothing that writes or deletes, code of the user's own by name."""

import pytest

from modhifi_cli.errors import ConfigError
from modhifi_cli.settings import config, foreign, heard
from modhifi_cli.settings.targets import at_present, build, check_targets

NOT_FOR_DATA = [
    "modhifi_cli.files.cache.clean",
    "modhifi_cli.files.artifacts.answer",
    "modhifi_cli.files.saved_network.answer",
    "modhifi_cli.files.disk.write_text",
    "modhifi_cli.verbs.prune.prune",
    "modhifi_cli.cli.main",
    "modhifi_cli.models.module.load",
    "modhifi_cli.data.folder.Path",
    "modhifi_cli.data.generator._found",
    "modhifi_cli.data.generator.os",
    "modhifi_cli.numerics.scoring.Singleton",
    "modhifi_cli.data.sources.load.__globals__",
]


@pytest.mark.parametrize("group", ["data", "evaluation_data"])
@pytest.mark.parametrize("target", NOT_FOR_DATA)
def test_data_may_name_nothing_but_a_source(group, target):
    with pytest.raises(ConfigError, match=f"{group}._target_ (must name a source of data|names)"):
        check_targets({group: {"_target_": target, "_partial_": True}})


@pytest.mark.parametrize("target", [name for name in NOT_FOR_DATA if "module.load" not in name and "Singleton" not in name])
def test_nothing_that_no_group_may_name_is_ever_built(target):
    with pytest.raises(ConfigError, match="must name something that settings may name|names"):
        build({"_target_": target})


@pytest.mark.parametrize(
    "group, target",
    [
        ("scoring", "modhifi_cli.numerics.scoring.Scores"),
        ("scoring", "modhifi_cli.numerics.selection.TopK"),
        ("model", "modhifi_cli.models.module.build"),
        ("model", "modhifi_cli.models.weights.read_weights"),
        ("allocation", "modhifi_cli.numerics.allocation.UnreachableShare"),
        ("statistics", "modhifi_cli.engine.gathering.held_out_images"),
        ("evaluation", "modhifi_cli.evaluation.latency_table.LatencyTable"),
    ],
)
def test_a_callable_of_another_role_is_refused(group, target):
    with pytest.raises(ConfigError, match="must name"):
        check_targets({group: {"_target_": target}})


def test_code_of_ones_own_is_named_on_the_command_line_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "myscores.py").write_text(
        "class Mine:\n    needs_statistics = False\n    def __call__(self, *_, **__): return None\n"
        "class Nothing: pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="names code of your own, 'myscores:Mine', which runs only if"):
        check_targets({"scoring": {"_target_": "myscores:Mine"}})
    assert type(build({"_target_": "myscores:Mine"}, allow=["myscores:Mine"])).__name__ == "Mine"
    with pytest.raises(ConfigError, match="scoring._target_ must name a score with __call__; got 'myscores:Nothing'"):
        check_targets({"scoring": {"_target_": "myscores:Nothing"}}, allow=["myscores:Nothing"])


def test_targets_of_earlier_versions_have_their_present_names():
    then = {"a": [{"_target_": "modhifi_cli.tasks.forgetting.ContrastU"}], "_target_": "modhifi_cli.exports.to_onnx"}
    assert at_present(then) == {
        "a": [{"_target_": "modhifi_cli.unlearning.contrast.ContrastU"}],
        "_target_": "modhifi_cli.files.exports.onnx.Onnx",
    }


FOLDER = {"model": {"_target_": "modhifi_cli.models.embedded.load", "name": "embedded", "weights": "default"}}


def test_a_strangers_folder_names_no_file_and_ones_own_does():
    theirs = {"model": {**FOLDER["model"], "weights": "/etc/passwd"}}
    with pytest.raises(ConfigError, match=r"model.weights: the folder was not made by you .* '/etc/passwd' outside"):
        foreign.refuse_reaching(theirs, ["model"], made_here=False, trust=False)
    foreign.refuse_reaching(theirs, ["model"], made_here=True, trust=False)
    foreign.refuse_reaching(FOLDER, ["model"], made_here=False, trust=False)


@pytest.mark.parametrize("made_here", [True, False])
@pytest.mark.parametrize("trust", [True, False])
def test_code_from_the_hub_never_comes_from_a_folder(made_here, trust):
    node = {"_target_": "modhifi_cli.models.hf.load", "trust_remote_code": True, "path": "org/name"}
    with pytest.raises(ConfigError, match="trust_remote_code never comes from a folder"):
        foreign.refuse_reaching({"model": node}, ["model"], made_here=made_here, trust=trust)


def test_a_folders_factory_runs_only_when_trusted():
    node = {"_target_": "modhifi_cli.models.module.load", "factory": "antigravity:anything"}
    with pytest.raises(ConfigError, match="names code of your own, 'antigravity:anything'.*model.trust=true"):
        foreign.refuse_reaching({"model": node}, ["model"], made_here=True, trust=False)


def test_aliases_in_yaml_are_refused_before_they_grow():
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
    with pytest.raises(ConfigError, match="aliases"):
        config.from_yaml(bomb)
    assert config.from_yaml("pattern: '*'\nproduct: a*b\n") == {"pattern": "*", "product": "a*b"}


@pytest.mark.parametrize(
    "verb, words, expected",
    [
        ("prune", ["hydra.run.dir=elsewhere"], "hydra.run.dir has no effect"),
        ("prune", ["+hydra.sweep.dir=elsewhere"], "hydra.sweep.dir has no effect"),
        ("prune", ["+runtime.zzz=1"], "modhifi prune has no key 'runtime.zzz'"),
        ("prune", ["+console.zzz=1"], "modhifi prune has no key 'console.zzz'"),
        ("prune", ["+target.zzz=1"], "modhifi prune has no key 'target.zzz'"),
        ("prune", ["+preset.zzz=1"], "preset: keys cannot be put into a preset"),
        ("prune", ["+evaluation.zzz=1"], "evaluation has no choice 'zzz'"),
        ("prune", ["+data.zzz=1", "model=resnet18"], "modhifi prune has no key 'data.zzz'"),
        ("evaluate", ["run=somewhere", "model=resnet18"], "evaluate run=DIR measures the run's own network"),
        ("evaluate", ["run=somewhere", "model.weights=random"], "evaluate run=DIR measures the run's own network"),
        ("prune", ["~model"], "modhifi prune needs model"),
        ("prune", ["~console"], "modhifi prune needs console"),
        ("prune", ["~runtime.seed"], "modhifi prune needs runtime.seed"),
        ("prune", ["runtime=null"], "a group takes the name of one of its choices"),
        ("prune", ["runtime.seed=100000000000000000000000"], "runtime.seed must be"),
        ("prune", ["data.num_samples=100000000000000000000000"], "data.num_samples must be a number below 2\\*\\*63"),
        ("verify", ["run=x", "tolerance=.inf"], "tolerance must be a number above 0 and at most 0.1"),
        ("verify", ["run=x", "model.trust=maybe"], "model.trust must be true or false"),
    ],
)
def test_words_that_would_be_taken_and_not_heeded_are_refused(verb, words, expected):
    with pytest.raises(ConfigError, match=expected):
        config.compose(verb, words)


def test_what_may_be_left_out_still_may():
    assert config.compose("prune", ["~evaluation_data"])["evaluation_data"] is None
    assert config.compose("evaluate", ["run=x", "model.trust=true"])["trust"] is True


def test_code_that_only_a_foreign_yaml_names_must_be_said_again():
    plain = {"model": {"factory": "evil:f"}}
    with pytest.raises(ConfigError, match="only a YAML of another folder says it.*model.factory=evil:f"):
        heard.refuse_unsaid_code(plain, ["sparsity=0.4"], foreign=True, trust=False)
    heard.refuse_unsaid_code(plain, ["model.factory=evil:f"], foreign=True, trust=False)
    heard.refuse_unsaid_code(plain, [], foreign=False, trust=False)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data=digits", "data.split=false"], "data.split must be a name or text or null; got False"),
        (["data=digits", "data.split=[train]"], r"data.split must be a name or text or null; got \['train'\]"),
        (["data=digits", "data.seed={a: 1}"], "data.seed must be a whole number; got {'a': 1}"),
        (["data=digits", "data.num_samples=true"], "data.num_samples must be a name or text or a whole number or null; got True"),
        (["model=resnet18", "model.weights=[a]"], r"model.weights must be .*text.*; got \['a'\]"),
    ],
)
def test_an_argument_of_another_kind_is_refused_before_any_work(words, told):
    with pytest.raises(ConfigError, match=told):
        config.compose("prune", words)
