"""The page of a run or study: every part from plain JSON, parts that are absent left out, HTML that stands alone."""

import base64
import re
from html.parser import HTMLParser

import pytest

from modhifi_cli.errors import DataError
from modhifi_cli.pages import page as pages
from modhifi_cli.pages import run as run_pages
from modhifi_cli.records import Chart, Results, Series

PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")


def measured(model, name, value, unit, **protocol):
    return {"model": model, "name": name, "value": value, "unit": unit, "protocol": protocol}


RESULTS = {
    "format_version": 1,
    "verb": "prune",
    "model": "resnet56_cifar",
    "weights": "FILE",
    "target": "flops",
    "sparsity": 0.4,
    "achieved": {"params": 0.4, "flops": 0.3821, "components": 0.25},
    "measurements": [
        measured("dense", "top1", 93.39, "%", samples=10000, standard_error=0.25, data={"source": "cifar10"}),
        measured("pruned", "top1", 92.19, "%", samples=10000, standard_error=0.27, data={"source": "cifar10"}),
        measured("dense", "latency_ms", 10.0, "ms", p10_ms=9.0, p90_ms=12.0),
        measured("pruned", "latency_ms", 8.0, "ms", p10_ms=7.5, p90_ms=9.0),
    ],
    "groups": [
        {"group": "layer1.0.conv1", "pass": 0, "kept": 9, "removed": 7, "dead_outputs": 0,
         "fidelity": {"layer1.0.conv2": 0.95}, "subset_fidelity": {"layer1.0.conv2": 0.96}, "rows": {"a": 3}},
    ],
    "predicted_error": {"layer1.0.conv1": 0.04},
    "widths": {
        "layer1.0.conv1": {"in_channels": [16, 16], "out_channels": [16, 9], "groups": [1, 1]},
        "layer1.0.bn1": {"num_features": [16, 9]},
    },
    "exports": [{"format": "onnx", "path": "model.onnx", "bytes": 2048, "max_difference": 1.2e-6, "runtime": "ort 1"}],
    "calibration": {"source": "arrays", "path": "train.npz", "num_samples": 1024, "available": 10000, "seed": 0},
    "calibration_quality": {"distinct_images": 1024, "effective_classes": 9.8},
    "warnings": ["The target was\nmissed."],
    "seconds": {"prune": 12.3},
}  # fmt: skip
SETTINGS = {"sparsity": 0.4, "exclude": [], "batchnorm": "reestimate", "target": {"_target_": "modhifi_cli.engine.prices.Flops"},
            "compensation": {"_target_": "modhifi_cli.numerics.compensation.Joint", "ridge": "auto"}}  # fmt: skip
ENVIRONMENT = {"command": "modhifi prune model=resnet56_cifar resume=there", "device": "cpu", "threads": 2,
               "packages": {"torch": "2.0", "timm": None}}  # fmt: skip
CHARTS = [
    Chart("curve", "a curve", "x, %", "y", (Series("a", (0.1, 0.9), (1.0, 2.0)),), levels={"dense": 0.5}),
    Chart("needed", "bars", "%", "", (Series("b", (3.0,)),), kind="bars", categories=("layer1",)),
]
STUDY = {
    "format_version": 1, "verb": "study", "study": "existence", "model": "embedded", "weights": "inside",
    "settings": {"subsets": 10}, "charts": ["curve", "needed"], "calibration": RESULTS["calibration"],
    "findings": [{"claim": "Few suffice.", "found": "2 of 3 layers.", "holds": False}],
    "summary": [{"layer": "layer1", "kept": 3}], "notes": ["A note."],
}  # fmt: skip


def made(results=RESULTS, **material):
    material = {"results": Results.read(results), **material}
    return run_pages.page(material, run_pages.figures(material))


def whole():
    return made(settings=SETTINGS, environment=ENVIRONMENT, sheet=PNG)


class Watcher(HTMLParser):
    """Notes everything that a browser would load, run or be confused by."""

    VOID = {"meta", "link", "img", "br", "wbr", "input", "use", "path", "rect", "line"}

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.tags, self.identifiers = [], [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.identifiers.append(value)
            if name in ("src", "href", "xlink:href", "srcset", "action") and not value.startswith(("#", "data:")):
                self.loads.append(value)
            assert not name.startswith("on"), f"{tag} has a script in {name}"

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_of_a_run_holds_every_part():
    text = pages.markdown(whole())
    assert text.startswith("# resnet56_cifar: 40 % of FLOPs removed\n")
    assert "## Warnings\n\n- The target was missed.\n" in text
    assert "- Removed 40 % of parameters, 38.2 % of FLOPs, 25 % of components (asked: 40 % of FLOPs)." in text
    assert "| top-1 accuracy | 93.39 % | 92.19 % | −1.20 points | dense ± 0.25; pruned ± 0.27 |" in text
    assert "- Cost: top-1 accuracy 93.39 % before, 92.19 % after, −1.20 points; standard error" in text
    assert "- One warning, below;" in text and "load_model" in text
    assert "dense 9 … 12 ms in 80 % of runs; pruned 7.5 … 9 ms in 80 % of runs" in text
    assert "| layer1.0.conv1 | 16 | 9 (56 %) |" in text and "layer1.0.bn1" not in text
    assert "| layer1.0.conv1 | 4.00 % | 5.00 % |" in text, "predicted and measured error of the group"
    assert "| layer1.0.conv2 | 0.9500 | 0.9600 |" in text, "fidelity of the layer, and the best there is"
    assert "](groups.svg)" in text and "](calibration.png)" in text
    assert "| distinct images | 1024 |" in text
    assert "| onnx | model.onnx | 2.05 kB | 1.2e-06 | ort 1 |" in text
    assert "| compensation | Joint (ridge auto) |" in text and "exclude" not in text
    assert "Data of top1: source cifar10." in text and "| versions | torch 2.0 |" in text
    assert text.endswith("## Again\n\n```\nmodhifi prune model=resnet56_cifar\n```\n"), "a finished run is not resumed"


def test_a_run_that_says_little_still_has_a_page():
    text = pages.markdown(made({"verb": "prune"}))
    assert text == "# network: prune\n\n"[:-1] or text.startswith("# network: prune\n")
    assert "##" not in text


def test_an_unlearning_run_gets_the_parts_that_fit():
    results = {
        "verb": "unlearn", "model": "resnet20_cifar", "weights": "FILE", "forget": [1], "classes": ["dog", "cat"],
        "strength": {"beta": 0.3}, "finetuned_epochs": 0, "trials": [{"beta": 0.3, "forget": "1.0 %"}],
        "measurements": [measured("dense", "forget_accuracy", 90.0, "%"),
                         measured("edited", "forget_accuracy", 0.5, "%", per_class={"0": 91.0, "1": 0.5}),
                         {"model": "odd"}],
        "layers": [{"layer": "layer3.2.conv2", "edited": 40}], "calibration_samples": ["a story"],
    }  # fmt: skip
    text = pages.markdown(made(results))
    assert text.startswith("# resnet20_cifar: forgetting class 1 (cat)\n")
    assert "| forget class | 1 (cat) |" in text and "| beta | 0.3 |" in text and "| fine-tuning | none |" in text
    assert "| 1 (cat), forgotten | 0.50 % |" in text and "per_class" not in text
    assert "## Trials\n\n| beta | forget |\n| --- | --- |\n| 0.3 | 1.0 % |" in text
    assert "| layer3.2.conv2 | 40 |" in text and "- a story" in text and "90.00 %" in text
    assert "Widths" not in text and "Error of each group" not in text
    assert "<p class=\"banner" not in pages.to_html(made(results)), "nothing was audited, so there is no verdict"
    assert "## Audit: left out\n" in text and "not what the features still hold" in text
    audit = {"verdict": "forgotten at the output only", "sentences": ["Inside, nothing changed."],
             "figures": [{"figure": "FA", "dense": "90.0", "edited": "0.5"}]}  # fmt: skip
    text = pages.markdown(made({**results, "audit": audit}))
    assert "## Audit: forgotten at the output only\n\n- Inside, nothing changed." in text
    assert "| FA | 90.0 | 0.5 |" in text and "left out" not in text
    page = pages.to_html(made({**results, "audit": audit}))
    verdict = '<p class="banner bad">Forgotten at the output only.</p>'
    assert page.index(verdict) < page.index('<dl class="facts">'), "the verdict is read before any number"
    assert "change better" not in page, "a class that is no longer answered is no gain by itself"


def test_a_run_to_a_share_of_time_says_what_was_predicted_and_what_the_clock_said():
    latency = {"table": 0.41, "predicted": 0.4, "measured": 0.35, "p10": 0.3, "p90": 0.4, "rounds": 15, "batch": 64}
    results = {**RESULTS, "target": "latency", "achieved": {"latency": 0.35}, "latency": latency}
    text = pages.markdown(made(results))
    assert text.startswith("# resnet56_cifar: 40 % of time removed\n")
    assert "| time saved, predicted from networks timed before the cut | 40.0% |" in text
    assert "| time saved, measured | 35.0%, median of 15 rounds, 80 % of them 30.0% … 40.0%; batch 64 |" in text


def test_a_search_within_a_bound_names_the_bound_and_lists_its_trials():
    trials = [{"asked, flops": "30.0%", "measured drop, points": "1.50", "verdict": "broke the bound"}]
    settings = {"target": {"_target_": "modhifi_cli.engine.prices.MaxDrop", "value": 1.0, "of": "flops", "table": None}}
    text = pages.markdown(
        made(
            {**RESULTS, "target": "max_drop", "sparsity": None, "trials": trials,
             "goal": "as few FLOPs as 1 points of agreement allow"}, settings=settings,
        )  # fmt: skip
    )
    assert text.startswith("# resnet56_cifar: as few FLOPs as 1 points of agreement allow\n")
    assert "| target | MaxDrop (value 1, of flops) |" in text and "asked:" not in text
    assert "| 30.0% | 1.50 | broke the bound |" in text


def test_the_page_of_a_study_has_claims_figures_and_numbers():
    page = made(STUDY, charts=CHARTS)
    text = pages.markdown(page)
    assert "**Few suffice.** *does not hold here.* 2 of 3 layers." in text
    assert "](curve.svg)" in text and "](needed.svg)" in text and "| layer1 | 3 |" in text and "A note." in text
    assert "does not hold here" in pages.to_html(page)


@pytest.mark.parametrize("page", [whole(), made(STUDY, charts=CHARTS)], ids=["run", "study"])
def test_html_stands_alone_without_script_or_anything_to_load(page):
    text = pages.to_html(page)
    watcher = Watcher(text)
    assert not watcher.loads
    assert "script" not in watcher.tags and "iframe" not in watcher.tags and "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert len(watcher.identifiers) == len(set(watcher.identifiers))
    assert "prefers-color-scheme:dark" in text and 'name="viewport"' in text


def test_html_shows_what_was_written_not_what_it_could_mean():
    odd = {**RESULTS, "model": '<img src="x">', "warnings": ["a < b & c"]}
    text = pages.to_html(made(odd))
    assert "<img src" not in text and "&lt;img" in text and "a &lt; b &amp; c" in text


def test_a_figure_inside_the_page_takes_the_colours_of_the_page():
    text = pages.to_html(made(STUDY, charts=CHARTS))
    drawing = text[text.index("<svg") : text.index("</svg>")]
    assert "var(--c0)" in drawing and "#0072b2" not in drawing.lower() and "#ffffff" not in drawing.lower()
    assert "<metadata" not in drawing


def test_layers_that_kept_their_widths_are_folded_by_name():
    widths = {**RESULTS["widths"], "fc": {"out_features": [10, 10]}}
    page = made({**RESULTS, "widths": widths})
    shown, same = (section for section in page.sections if "outputs" in section.title or "Widths" in section.title)
    assert "fc" not in str(shown) and not shown.folded
    assert same.title == "1 layers kept all their outputs" and same.folded and "fc: 10" in str(same)


def test_no_absolute_path_of_the_maker_is_on_a_page():
    odd = {**RESULTS, "weights": "/home/me/weights/net.pt", "warnings": ["read /data/big/train.npz, twice"],
           "calibration": {"source": "arrays", "path": "/data/big/train.npz", "num_samples": 3}}  # fmt: skip
    text = pages.to_html(made(odd))
    assert "/home" not in text and "/data/big" not in text and "…/net.pt" in text and "…/train.npz, twice" in text


def test_shares_of_a_language_model_are_told_one_way():
    results = {"verb": "prune", "model": "m", "target": "params", "sparsity": 0.2,
               "achieved": {"params": 0.2, "model_params": 0.174, "flops": 0.19}}  # fmt: skip
    text = pages.markdown(made(results))
    assert text.startswith("# m: 20 % of decoder parameters removed\n")
    assert "Removed 20 % of decoder parameters (17.4 % of the network), 19 % of FLOPs (asked: 20 % of decoder" in text


def test_results_of_a_later_format_are_refused_and_what_it_adds_is_kept_apart():
    with pytest.raises(DataError, match="written in format 2, this version reads up to 1; install a newer modhifi"):
        made({"verb": "prune", "format_version": 2})
    assert Results.read({"verb": "prune", "new": 1, "groups": None}).further == {"new": 1}


def test_a_verb_cannot_write_what_no_page_reads():
    with pytest.raises(TypeError, match="colour"):
        Results.written(verb="prune", colour="red")


def test_results_of_another_program_are_refused():
    with pytest.raises(DataError, match="does not say what was done .no 'verb'."):
        made({"model": "resnet20"})
