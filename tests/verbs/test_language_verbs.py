"""The verbs end to end on a tiny random decoder: prune, verify, replay, resume, evaluate, info, compare, bad input."""

import csv
import json
import shutil

import pytest
import torch

from modhifi_cli import load_model
from modhifi_cli.cli import main
from modhifi_cli.files import artifacts, manifest
from modhifi_cli.graph.surgery import weights_hash
from modhifi_cli.settings import config
from tests.decoders import saved
from tests.evaluation.test_language import TEXT
from tests.machines import Machine


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language")
    saved(folder / "dense")
    (folder / "calibration.txt").write_text(TEXT)
    (folder / "evaluation.txt").write_text(TEXT[::-1])
    return folder


@pytest.fixture(scope="module")
def words(place):
    return [
        "model=hf", f"model.path={place / 'dense'}", "data=text", f"data.path={place / 'calibration.txt'}",
        "data.sequences=16", "data.length=20", "evaluation_data=text",
        f"evaluation_data.path={place / 'evaluation.txt'}", "evaluation_data.length=20", "console=plain",
    ]  # fmt: skip


EVEN = ["allocation=uniform", "round_to=8", "components=[mlp,attention]", "sparsity=0.3"]


@pytest.fixture(scope="module")
def finished(place, words):
    asked = ["evaluation=[token_perplexity,size]", f"output_dir={place / 'outputs'}"]
    assert main(["prune", *words, *EVEN, *asked]) == 0
    (run,) = (place / "outputs" / "prune" / "dense").iterdir()
    return run


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_even_run_opens_with_plain_transformers_and_has_a_card(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain = AutoModelForCausalLM.from_pretrained(finished / "model").eval()
    ours = load_model(finished)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, ours(input_ids=ids).logits)
    assert plain.config.intermediate_size < 48
    assert AutoTokenizer.from_pretrained(finished / "model")("abc")["input_ids"]
    card = (finished / "model" / "README.md").read_text()
    assert "AutoModelForCausalLM" in card and "token perplexity" in card and "length 20" in card
    results = artifacts.read_results(finished)
    assert abs(results["achieved"]["params"] - 0.3) < 0.06
    assert 0 < results["achieved"]["model_params"] < results["achieved"]["params"]


def test_a_decoder_is_written_as_gguf_with_the_run(words, here, capsys):
    asked = ["export=[gguf]", "export.gguf.vocabulary=none", "export.gguf.type=f32", "preset=best_uneven"]
    assert main(["prune", *words, *asked, "evaluation=[]"]) == 0
    (run,) = (here / "outputs" / "prune" / "dense").iterdir()
    (export,) = artifacts.read_results(run)["exports"]
    assert export["max_difference"] == 0 and "architecture deci" in export["runtime"]
    assert (run / "export" / "model.gguf").stat().st_size == export["bytes"]


def test_verify_takes_both_readers_and_finds_damage(finished, here, capsys):
    assert main(["verify", f"run={finished}", "console=json"]) == 0
    assert '["modhifi", "transformers alone"]' in capsys.readouterr().out
    copied = shutil.copytree(finished, here / "copied")
    from safetensors.torch import load_file, save_file

    (file,) = (copied / "model").glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if "down_proj" in name)
    save_file(tensors | {name: tensors[name] + 1}, file, {"format": "pt"})
    assert main(["verify", f"run={copied}", "console=plain"]) == 2
    assert "holds other weights than were saved, its sha256 is" in capsys.readouterr().err
    manifest.write(copied / "model")
    manifest.write(copied)
    assert main(["verify", f"run={copied}", "console=plain"]) == 2
    assert "differs from the saved logits" in capsys.readouterr().err, "checksums of other weights are no proof"


def test_replay_needs_no_text(finished, capsys):
    assert main(["replay", f"run={finished}", "console=plain"]) == 0
    assert "weights equal to those of the run's saved network" in capsys.readouterr().out


def test_a_run_goes_on_where_it_was_interrupted(finished, words, here, monkeypatch, capsys):
    save, calls = artifacts.RunDirectory.save_edit, []

    def interrupted(self, *given):
        save(self, *given)
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(artifacts.RunDirectory, "save_edit", interrupted)
    assert main(["prune", *words, *EVEN, "evaluation=[size]"]) == 130
    monkeypatch.undo()
    monkeypatch.chdir(here)
    (begun,) = (here / "outputs" / "prune" / "dense").iterdir()
    assert f"resume={begun.relative_to(here)}" in capsys.readouterr().err
    assert main(["prune", *words, *EVEN, "evaluation=[size]", f"resume={begun}"]) == 0
    (run,) = (here / "outputs" / "prune" / "dense").iterdir()
    assert weights_hash(load_model(run)) == weights_hash(load_model(finished))


def test_evaluate_measures_a_run_again(finished, capsys):
    assert main(["evaluate", f"run={finished}", "evaluation=[token_perplexity]", "console=plain"]) == 0
    results = artifacts.read_results(finished)["measurements"]
    before = next(m["value"] for m in results if m["name"] == "token_perplexity" and m["model"] == "pruned")
    assert f"{before:.4g}" in capsys.readouterr().out


def test_info_shows_neurons_and_heads(place, capsys):
    assert main(["info", "model=hf", f"model.path={place / 'dense'}", "console=plain"]) == 0
    told = capsys.readouterr().out
    assert "decoder layers" in told and "mlp.down_proj" in told and "self_attn.o_proj" in told


def test_a_comparison_takes_the_presets_of_language_models(words, here):
    asked = ["methods=[paper,fast]", "budgets=[0.2]", "seeds=[0]", "evaluation=[token_perplexity]"]
    assert main(["compare", *words, *asked]) == 0
    (folder,) = (here / "outputs" / "compare").iterdir()
    table = (folder / "comparison.csv").read_text()
    methods = [row["method"] for row in csv.DictReader(table.splitlines()) if float(row["token_perplexity"]) > 1]
    assert methods == ["dense", "paper", "fast"]
    assert "calibration.txt, sequences 16, length 20" in (folder / "comparison.md").read_text()


def test_a_preset_means_what_it_is_for_language_models():
    of_text = config.compose("prune", ["model=smollm2_135m", "preset=paper"])
    assert of_text["scoring"]["_target_"].endswith("Energy") and of_text["compensation"]["towards"] == "zero"
    assert config.compose("prune", ["preset=paper"])["scoring"]["_target_"].endswith("Singleton")
    own = config.compose("prune", ["model=smollm2_135m", "preset=paper", "scoring=fluctuation"])
    assert own["scoring"]["_target_"].endswith("Fluctuation")


def test_text_that_calibration_and_evaluation_share_is_told(place, words, here, capsys):
    long = [f"evaluation_data.path={place / 'calibration.txt'}", "evaluation_data.length=60", "data.length=60"]
    long += ["data.sequences=8"]
    assert main(["prune", *words, *long, "preset=fast", "evaluation=[]"]) == 0
    (run,) = (here / "outputs" / "prune" / "dense").iterdir()
    assert any("32 tokens in a row" in warning for warning in artifacts.read_results(run)["warnings"])


def test_a_decoder_without_text_is_calibrated_on_what_it_says_itself(words, here, capsys):
    kept = [word for word in words if not word.startswith("data")]
    assert main(["prune", *kept, "data.num_samples=6", "preset=fast", "evaluation=[]"]) == 0
    (run,) = (here / "outputs" / "prune" / "dense").iterdir()
    calibration = artifacts.read_results(run)["calibration"]
    assert calibration["source"] == "generated" and calibration["sequences"] == 6
    assert "no data= was given, so dense is calibrated on text sampled from itself" in capsys.readouterr().out


@pytest.mark.parametrize("asked, said", [
    (["export=[onnx]"], "a language model generates with a cache that grows"),
    (["export=[gguf]"], "the tokenizer is of type WordLevel"),
    (["export=[gguf]", "export.gguf.type=q4_0"], "add round_to=32"),
    (["sparsity=0.95"], "cannot be reached"),
    (["sparsity=0.9", "components=[attention]", "target=components"], "cannot be reached"),
    (["data.length=1000"], "made for at most 64 tokens"),
    (["data.sequences=1000"], "1000 were asked for"),
    (["data=digits"], "a language model reads text"),
    (["scoring=tvsprune"], "a language model reads text"),
])  # fmt: skip
def test_bad_input_is_one_sentence_and_leaves_nothing(words, here, capsys, asked, said):
    keys = {word.partition("=")[0] for word in asked}
    kept = [word for word in words if word.partition("=")[0] not in keys]
    if "data=digits" in asked:
        kept = [word for word in kept if not word.startswith("data.")]
    assert main(["prune", *kept, "evaluation=[]", *asked]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not list((here / "outputs").glob("prune/*/*"))


def test_the_default_of_language_models_keeps_layers_alike():
    settings = config.compose("prune", ["model=smollm2_135m"])
    assert settings["allocation"]["_target_"].endswith("Uniform")
    assert config.compose("prune", ["model=resnet50"])["allocation"]["_target_"].endswith("Global")


def test_a_run_is_measured_again_without_the_text_it_was_calibrated_on(place, words, here, capsys):
    text = here / "gone.txt"
    text.write_text(TEXT)
    given = [f"data.path={text}" if word.startswith("data.path=") else word for word in words]
    assert main(["prune", *given, *EVEN, "evaluation=[size]", f"output_dir={here / 'outputs'}"]) == 0
    (run,) = (here / "outputs" / "prune" / "dense").iterdir()
    text.unlink()
    capsys.readouterr()
    assert main(["evaluate", f"run={run}", "evaluation=[token_perplexity]", "console=plain"]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_uneven_widths_are_the_same_recipe_with_another_allocation_and_the_dense_networks_stream():
    words = ["model=smollm2_135m", "data=text", "data.path=given"]
    even, uneven = (config.compose("prune", [*words, f"preset={name}"]) for name in ("best", "best_uneven"))
    assert {key for key in even if even[key] != uneven[key]} == {"allocation", "compensation"}
    assert uneven["allocation"]["_target_"].endswith("Global")
    assert {**even["compensation"], "reference": "auto"} == uneven["compensation"]


def test_the_table_of_language_models_counts_parameters_and_measures_perplexity():
    settings = config.compose("compare", ["experiment=language_smollm2"])
    assert settings["target"]["_target_"].endswith(".Params") and settings["components"] == ["mlp"]
    assert "token_perplexity" in settings["evaluation"]
    assert set(settings["methods"]) <= set(config.preset_names())
    best = config.compose("prune", ["experiment=language_smollm2"])  # the model stands in the experiment's file alone
    assert best["selection"]["_target_"].endswith("Greedy") and best["allocation"]["_target_"].endswith("Uniform")


@pytest.mark.parametrize("preset", config.preset_names())
def test_every_recipe_composes_for_a_language_model_and_is_the_one_written_for_it(preset):
    words = ["model=smollm2_135m", "data=text", "data.path=given"]
    said = config.compose("prune", [*words, f"preset={preset}"])
    written = f"{preset.removesuffix('_language')}_language"
    named = written if written in config.groups()["preset"] else preset
    # The same words with the file's own name, so that nothing is mapped.
    own = config.compose("prune", [*words, f"preset={named}"])
    assert all(said[step] == own[step] for step in ("scoring", "selection", "compensation", "allocation"))


def test_a_recipe_for_language_models_alone_can_be_compared_with_others(words, here):
    assert main(["compare", *words, "methods=[best_uneven,paper_without_batchnorm]", "budgets=[0.2]", "seeds=[0]",
                 f"output_dir={here / 'outputs'}", "evaluation=[size,token_perplexity]"]) == 0  # fmt: skip
    (folder,) = (here / "outputs" / "compare").iterdir()
    assert {json.loads(file.read_text())["method"] for file in (folder / "records").glob("*.json")} == {
        "best_uneven", "paper_without_batchnorm",
    }  # fmt: skip


def test_rivals_of_language_models_compose():
    without = config.compose("prune", ["model=smollm2_135m", "preset=paper_without_compensation"])
    assert without["scoring"]["_target_"].endswith("Energy")
    assert without["compensation"]["_target_"].endswith("NoCompensation")
    rival = config.compose("prune", ["model=smollm2_135m", "preset=fluctuation_bias"])
    assert rival["decoder"]["add_bias"] and rival["scoring"]["_target_"].endswith("Fluctuation")


def test_time_and_a_bound_on_the_next_tokens_are_targets_of_language_models(words, here, monkeypatch):
    from modhifi_cli.evaluation import latency_probe

    monkeypatch.setattr(latency_probe, "stopwatch", Machine(fixed=0.01))
    plain = ["evaluation=[size]", "preset=fast", "round_to=8", "components=[mlp]"]
    timed = ["target=latency", "target.rounds=3", "target.max_seconds=2", "sparsity=0.1"]
    assert main(["prune", *words, *plain, *timed, "output_dir=timed"]) == 0
    (run,) = (here / "timed" / "prune" / "dense").iterdir()
    latency = artifacts.read_results(run)["latency"]
    assert {"table", "predicted", "measured", "dense_ms"} <= latency.keys() and latency["batch"] == 1
    bound = ["target=max_drop", "target.of=params", "target.value=60", "target.trials=2"]
    assert main(["prune", *words, *plain, *bound, "output_dir=bound"]) == 0
    (run,) = (here / "bound" / "prune" / "dense").iterdir()
    results = artifacts.read_results(run)
    assert [trial for trial in results["trials"] if trial["verdict"] == "taken"]
    assert results["goal"] == "as few parameters as 60 points of agreement allow"
