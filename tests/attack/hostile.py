"""Folders and YAMLs that a stranger might write: each is a finished run with one thing in it that should not act."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modhifi_cli.files import manifest
from modhifi_cli.settings import config

# Callables that would run, write, delete, import or open something if they were ever reached.
CALLABLES = (
    "os:system", "os.system", "subprocess:getoutput", "builtins:exec", "builtins.eval", "torch.serialization:os.system",
    "numpy.lib._utils_impl:os.system", "torch:load", "torch.load", "pickle:load", "shutil:rmtree", "runpy:run_path",
    "importlib:import_module", "evil:make", "evil.make", "antigravity:webbrowser", "this:c",
    "modhifi_cli.cli.main", "modhifi_cli.verbs.run", "modhifi_cli.verbs.prune.prune", "modhifi_cli.files.cache.clean",
    "modhifi_cli.cache.clean", "modhifi_cli.files.artifacts.answer", "modhifi_cli.artifacts.answer",
    "modhifi_cli.files.saved_network.answer_process", "modhifi_cli.files.disk.write_text",
    "modhifi_cli.files.disk.os.system", "modhifi_cli.models.module._made", "modhifi_cli.models.module._found",
    "modhifi_cli.models.module.load", "modhifi_cli.models.module.build", "modhifi_cli.models.module.importlib",
    "modhifi_cli.models.weights.read_weights", "modhifi_cli.models.hf.load", "modhifi_cli.models.hf.restore",
    "modhifi_cli.data.generator.load", "modhifi_cli.data.generator._found", "modhifi_cli.data.folder.Path",
    "modhifi_cli.settings.targets.build", "modhifi_cli.settings.compose.compose", "modhifi_cli.api.prune",
)  # fmt: skip
# Arguments by which an allowed callable would reach out.
KWARGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("modhifi_cli.models.timm.build", {"name": "resnet18", "options": {"pretrained": True}}),
    ("modhifi_cli.models.timm.build", {"name": "resnet18", "options": {"checkpoint_path": "/etc/passwd"}}),
    ("modhifi_cli.models.timm.build", {"name": "resnet18", "options": {"pretrained_cfg": {"file": "/etc/passwd"}}}),
    ("modhifi_cli.models.timm.build", {"name": "resnet18", "options": {"cache_dir": "/tmp"}}),
    ("modhifi_cli.models.timm.build", {"name": "hf-hub:stranger/net"}),
    ("modhifi_cli.models.timm.build", {"name": "local-dir:/etc"}),
    ("modhifi_cli.models.torchvision.build", {"name": "fcn_resnet50", "options": {"weights_backbone": "DEFAULT"}}),
    ("modhifi_cli.models.torchvision.build", {"name": "resnet18", "options": {"weights": "DEFAULT"}}),
    ("modhifi_cli.models.module.build", {"factory": "evil:make", "allow": True}),
    ("modhifi_cli.models.module.build", {"factory": "evil:make", "allow": "evil:make"}),
    ("modhifi_cli.models.embedded.build", {"num_classes": 10**12}),
    ("modhifi_cli.models.cifar_resnet.build", {"depth": 20, "widths": [10**9, 10**9, 10**9]}),
    ("modhifi_cli.models.hf.build", {"config": {"model_type": "llama", "auto_map": {"AutoConfig": "evil.Make"}}}),
    ("modhifi_cli.models.hf.build", {"config": {"model_type": "llama", "attn_implementation": "stranger/kernel"}}),
    ("modhifi_cli.models.hf.build", {"config": {"model_type": "llama", "quantization_config": {"quant_method": "x"}}}),
)
PATHS = ("/etc/passwd", "../../secret", "~/secret", "secret", "stranger/name", "/dev/zero", "//host/share", "./secret")
LINKED = (
    "config.yaml", "results.json", "edits.json", "edits.safetensors", "verification.safetensors", "calibration.png",
    "report.md", "report.html", "report.md.writing", "report.html.writing", "checksums.json", "environment.json",
    "model/architecture.json", "model/weights.safetensors", "model/checksums.json", "model",
)  # fmt: skip
JSONS = ("model/architecture.json", "edits.json", "results.json", "checksums.json", "model/checksums.json")
STRANGE = ('{"a":' * 5000, "[" * 100_000, "[1]", "null", "1" * 6000, '{"format_version": 1e999}', '"text"', "", "{}")


@dataclass(frozen=True)
class Hostile:
    """One hostile thing.

    Attributes:
        name: What it is.
        plant: Puts it into a copy of a finished run; told the folder and a place outside with a secret.
        verbs: What is asked of the folder then.
    """

    name: str
    plant: Callable[[Path, Path], None]
    verbs: tuple[str, ...] = ("load", "verify", "evaluate", "replay", "report")


def every() -> Iterator[Hostile]:
    """All hostile things, always in the same order."""
    for target in CALLABLES:
        yield Hostile(f"builder {target}", _architecture(lambda d, t=target: d | {"builder": t}), ("load", "evaluate"))
        yield Hostile(f"factory {target}", _architecture(lambda d, t=target: d | {
            "builder": "modhifi_cli.models.module.build", "kwargs": {"factory": t, "kwargs": {"command": "touch ran"}}
        }), ("load", "verify"))  # fmt: skip
        for key in ("model", "data", "evaluation_data"):
            yield Hostile(f"{key}._target_ {target}", _settings(key, {"_target_": target, "asked": "."}), ("evaluate", "replay"))
    for builder, kwargs in KWARGS:
        yield Hostile(f"{builder} {kwargs}"[:90], _architecture(lambda d, b=builder, k=kwargs: d | {"builder": b, "kwargs": k}), ("load",))
    for path in PATHS:
        embedded = {"_target_": "modhifi_cli.models.embedded.load", "name": "embedded", "weights": path}
        yield Hostile(f"weights {path}", _settings("model", embedded), ("evaluate", "replay"))
        source = {"_target_": "modhifi_cli.data.arrays.load", "_partial_": True, "path": path}
        yield Hostile(f"data {path}", _settings("data", source, evaluation_data=None), ("evaluate",))
        yield Hostile(f"evaluation data {path}", _settings("evaluation_data", source), ("evaluate",))
        language = {"_target_": "modhifi_cli.models.hf.load", "path": path, "trust_remote_code": True}
        yield Hostile(f"trust_remote_code {path}", _settings("model", language), ("evaluate", "replay"))
    for name in LINKED:
        yield Hostile(f"link {name}", _linked(name))
        if name != "model":
            yield Hostile(f"pipe {name}", _piped(name))
    for name in JSONS:
        for text in STRANGE:
            yield Hostile(f"{name}: {text[:12]}…", _written(name, text))
    yield Hostile("alias bomb", _written("config.yaml", bomb()))
    yield Hostile("a module beside it", lambda folder, _: (folder / "evil.py").write_text(EVIL) and None)
    for up in ("../secret", "/etc/passwd", "model/../../secret"):
        yield Hostile(f"checksums of {up}", _listed(up))


EVIL = "import os\nos.system('touch ran')\nopen('ran', 'w').write('x')\ndef make(**_): open('ran', 'w').write('x')\n"


def bomb() -> str:
    """A few lines of YAML that stand for 9 ** 40 words."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join(f'*a{n - 1}' for _ in range(9))}]" for n in range(1, 40)]
    return "\n".join(lines) + "\n"


def _architecture(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path, Path], None]:
    def plant(folder: Path, outside: Path) -> None:
        path = folder / "model" / "architecture.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
        _relist(folder)

    return plant


def _settings(key: str, node: Any, **more: Any) -> Callable[[Path, Path], None]:
    def plant(folder: Path, outside: Path) -> None:
        path = folder / "config.yaml"
        path.write_text(config.to_yaml(config.from_yaml(path.read_text()) | {key: node} | more))
        _relist(folder)

    return plant


def _written(name: str, text: str) -> Callable[[Path, Path], None]:
    def plant(folder: Path, outside: Path) -> None:
        (folder / name).write_text(text)
        if "checksums" not in name:
            _relist(folder)

    return plant


def _linked(name: str) -> Callable[[Path, Path], None]:
    def plant(folder: Path, outside: Path) -> None:
        path = folder / name
        if path.is_dir():
            path.rename(outside / "model")
            path.symlink_to(outside / "model")
            return
        path.unlink(missing_ok=True)
        path.symlink_to(outside / "secret")

    return plant


def _piped(name: str) -> Callable[[Path, Path], None]:
    def plant(folder: Path, outside: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return plant


def _listed(up: str) -> Callable[[Path, Path], None]:
    def plant(folder: Path, outside: Path) -> None:
        for path in (folder / "checksums.json", folder / "model" / "checksums.json"):
            told = json.loads(path.read_text())
            path.write_text(json.dumps(told | {"files": told["files"] | {up: "0" * 64}}))

    return plant


def _relist(folder: Path) -> None:
    """A stranger writes checksums that fit; the mark of the reader is what they cannot make."""
    for place in (folder / "model", folder):
        manifest.write(place)
        told = json.loads((place / manifest.NAME).read_text())
        told["mark"] = "0" * 64
        (place / manifest.NAME).write_text(json.dumps(told))


def attack(hostile: Hostile, run: Path, room: Path) -> str | None:
    """Plant one hostile thing into a copy of a run and ask for it; what it reached, or None."""
    import shutil
    import sys

    from tests.attack.forked import run as forked
    from tests.attack.forked import watched
    from tests.attack.runs import readers

    outside, folder, here = room / "outside", room / "folder", room / "here"
    for place in (outside, here):
        place.mkdir(parents=True)
    shutil.copytree(run, folder)
    for name in ("secret", "../secret"):
        (outside / name).write_text("nobody's business")
    (here / "secret").write_text("nobody's business")
    (here / "evil.py").write_text(EVIL)
    hostile.plant(folder, outside)
    allowed = [str(folder), str(here / "out"), sys.prefix, sys.base_prefix, str(Path(config.config_directory()).parent),
               "/proc", "/sys", "/dev/null", "/dev/urandom", os.environ.get("XDG_STATE_HOME", "/nowhere"), str(here / ".output"),
               "/usr", "/lib", "/etc/localtime", "/etc/nsswitch.conf"]  # fmt: skip

    def act() -> int:
        from modhifi_cli import load_model
        from modhifi_cli.cli import main
        from modhifi_cli.errors import ModHiFiError
        from modhifi_cli.files import saved_network

        worst = 0
        with watched(allowed) as seen:
            for verb in hostile.verbs:
                if verb == "load":
                    try:
                        load_model(folder)
                    except ModHiFiError:
                        worst = max(worst, 2)
                    continue
                if verb == "verify":  # the process that it starts is asked for here, where it is watched
                    try:
                        saved_network.answer(str(folder), "out/answer")
                    except ModHiFiError:
                        worst = max(worst, 2)
                    continue
                worst = max(worst, main([*readers(folder)[verb], "output_dir=out"]))
        for one in seen:
            print("REACHED", one)
        return worst

    (here / "out").mkdir()
    ended = forked((), here, limit=120, act=act)
    reached = [line for line in ended.output.splitlines() if line.startswith("REACHED")]
    if reached or list(room.rglob("ran")):
        return f"{hostile.name}: {reached[:3] or 'its code ran'}"
    if (outside / "secret").read_text() != "nobody's business":
        return f"{hostile.name}: a file outside was overwritten"
    if any("nobody's business" in path.read_text(errors="replace") for path in folder.rglob("*.html") if not path.is_symlink()):
        return f"{hostile.name}: a file outside was read into a page"
    return None if ended.defect is None else f"{hostile.name}: {ended.defect} {ended.output[-300:]}"
