"""What short settings stand for: data that choose themselves, lists of sources, a share that has to be found."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from modhifi_cli.errors import ConfigError, nearest
from modhifi_cli.settings.checks import SEARCHED
from modhifi_cli.settings.targets import build, check_targets
from modhifi_cli.settings.words import ABSENT, from_yaml, select, spell
from modhifi_cli.settings.yamls import config_directory, groups

_OF_A_ROW = ("name", "title")  # keys of a compared source that are no setting of it
_SPARSITY = 0.4  # where nothing is said and a share is wanted
_SPARSITY_OF_EMBEDDED = 0.6  # the network inside the package keeps its accuracy, and a first run shows what that buys


def resolve_auto_data(plain: dict[str, Any], *, makes_data: bool) -> None:
    """`data: auto` is the embedded network's own digits; a saved run's are its own; for other networks they are made.

    Afterwards a source is a mapping with a `_target_`, or None where there is none, or absent where the run knows it.
    """
    embedded = str(select(plain, "model._target_")).startswith("modhifi_cli.models.embedded.")
    for key in ("data", "evaluation_data"):
        node = plain.get(key)
        if isinstance(node, dict) and node.pop("auto", False):
            if plain.get("run") is not None:
                del plain[key]
            elif not embedded and key == "data" and makes_data:
                count = node.get("num_samples")
                plain[key] = {
                    "_target_": "modhifi_cli.data.synthetic.load",
                    "_partial_": True,
                    "num_samples": "auto" if count is None else count,
                    **{name: node[name] for name in ("seed", "labels") if name in node},
                }
            elif not embedded:
                plain[key] = None
        elif isinstance(node, dict) and "_target_" not in node or key in plain and node is None:
            plain[key] = None


def resolve_mixed_data(plain: dict[str, Any]) -> None:
    """Entries ``{name: CHOICE, weight: …, key: value …}`` become ``{name, weight, source: the choice's settings}``."""
    sources = select(plain, "data.sources")
    if sources is ABSENT:
        return
    if not isinstance(sources, list) or not sources:
        raise ConfigError(f"data.sources must be a list such as [{{name: procedural, weight: 1}}]; got {sources!r}.")
    choices = [choice for choice in groups()["data"] if choice not in ("auto", "mixed")]
    for number, entry in enumerate(sources):
        name, whole = _listed_source(entry, f"data.sources[{number}]", choices, beside=("weight",))
        sources[number] = {"name": name, "weight": entry.get("weight", 1.0), "source": whole}


def resolve_compared_sources(plain: dict[str, Any]) -> None:
    """Entries ``{name: CHOICE, title: …, key: value …}`` of a comparison become ``{name, title, source: settings}``.

    What the comparison calibrates on where it needs any data is then the first of them.
    """
    listed = plain.get("sources")
    if listed is None:
        return
    if not isinstance(listed, list) or not listed:
        raise ConfigError(f"sources must be a list such as [{{name: folder, path: IMAGES}}]; got {listed!r}.")
    titles: set[str] = set()
    for number, entry in enumerate(listed):
        name, whole = _listed_source(entry, f"sources[{number}]", groups()["data"], beside=_OF_A_ROW)
        if "seed" in entry:
            raise ConfigError(
                f"sources[{number}].seed: a comparison draws every source with seeds=[0,1,2]; leave it out."
            )
        own = {"model": plain["model"], "data": whole}
        resolve_auto_data(own, makes_data=True)
        resolve_mixed_data(own)
        count = own["data"].get("num_samples")
        title = str(entry.get("title") or (name if count in (None, "auto") else f"{name} {count}"))
        if title in titles:
            raise ConfigError(f"sources[{number}]: two sources are called '{title}'; give one of them another title.")
        titles.add(title)
        words = [f"data={name}", *(spell(f"data.{key}", value) for key, value in entry.items() if key not in _OF_A_ROW)]
        listed[number] = {"title": title, "source": own["data"], "words": words}
    plain["data"] = copy.deepcopy(listed[0]["source"])


def _listed_source(
    entry: Any, path: str, choices: Sequence[str], *, beside: Sequence[str]
) -> tuple[str, dict[str, Any]]:
    """Name and settings of the choice of data that an entry ``{name: CHOICE, key: value …}`` of a list names.

    Args:
        entry: The entry.
        path: Where it stands, for messages.
        choices: Names that are allowed.
        beside: Keys of the entry that are not the source's.
    """
    name = str(entry.get("name")) if isinstance(entry, Mapping) else ""
    if name not in choices:
        raise ConfigError(f"{path}.name: there is no such choice; {nearest(name or 'None', choices)}")
    file = config_directory() / "data" / f"{name}.yaml"
    own = {key: value for key, value in entry.items() if key not in ("name", *beside)}
    whole = from_yaml(file.read_text(encoding="utf-8")) | own
    missing = next((key for key, value in whole.items() if value == "???"), None)
    if missing is not None:
        raise ConfigError(f"{path}.{missing} must be given: {name} needs it.")
    return name, whole


def resolve_target(plain: dict[str, Any]) -> None:
    """`target: auto` is the choice that its YAML names for the kind of network at hand."""
    node = plain["target"]
    if not isinstance(node, Mapping) or not node.get("auto"):
        return
    kind = "text" if str(select(plain, "model._target_")).startswith("modhifi_cli.models.hf.") else "images"
    chosen, choices = node[kind], [choice for choice in groups()["target"] if choice != "auto"]
    if chosen not in choices:
        raise ConfigError(f"target.{kind}: there is no target {chosen!r}; {nearest(str(chosen), choices)}")
    plain["target"] = from_yaml((config_directory() / "target" / f"{chosen}.yaml").read_text(encoding="utf-8"))


def resolve_sparsity(plain: dict[str, Any]) -> None:
    """`sparsity: auto` is 0.4 (0.6 of the network inside the package), or nothing where the run shall find the share.

    Then it may not be given.

    Afterwards a share that has to be found is None.
    """
    check_targets(plain["target"], "target")
    price = build(plain["target"])
    if not price.searched:
        if plain.get("sparsity") == "auto":
            embedded = str(select(plain, "model._target_")).startswith("modhifi_cli.models.embedded.")
            plain["sparsity"] = _SPARSITY_OF_EMBEDDED if embedded and not price.timed else _SPARSITY
        elif "sparsity" in plain and plain["sparsity"] is None:
            raise ConfigError(
                f"sparsity must be given with target={price.name}: the share that is removed, 0 <= sparsity < 1; only "
                "target=max_drop finds it itself."
            )
        return
    if plain.get("sparsity") not in ("auto", None):
        raise ConfigError(
            f"sparsity={plain['sparsity']} makes no sense with target={price.name}, which finds the share itself; leave "
            "it out, or choose another target."
        )
    plain["sparsity"] = SEARCHED
