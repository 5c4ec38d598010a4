"""Which logit a class folder stands for: by the network's class names, by its number, by its WordNet id, by sort order.

A sort order says which folder comes first, not which class it is: a folder that is missing shifts all that follow. So it
is the last resort, taken only where nothing else is known and the numbers of folders and logits agree.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modhifi_cli.errors import DataError, nearest

ORDERS = ("auto", "sorted", "text", "imagenet")
_SHOWN = 12  # folders in a sentence


@dataclass(frozen=True)
class Known:
    """What is known of the network's classes.

    Attributes:
        names: Names in the order of the logits, or None.
        logits: Tells how many logits the network has, or None where it is no classifier; called where it matters only.
    """

    names: Sequence[str] | None = None
    logits: Callable[[], int | None] = field(default=lambda: None)


@dataclass(frozen=True)
class Folders:
    """The class of every class folder.

    Attributes:
        classes: Folder → number of the logit.
        count: How many classes the numbers count, where that can be told from the folders; otherwise None.
        how: How they were matched, in words.
    """

    classes: Mapping[str, int]
    count: int | None
    how: str

    @property
    def account(self) -> str:
        """One sentence for the terminal and the report: how folders were matched, and which is which."""
        pairs = sorted(self.classes.items(), key=lambda pair: (pair[1], pair[0]))
        shown = ", ".join(f"{name} = {number}" for name, number in pairs[:_SHOWN])
        more = f" and {len(pairs) - _SHOWN} more" if len(pairs) > _SHOWN else ""
        return f"class folders taken by {self.how}: {shown}{more}"


def classes_of_folders(
    folders: Sequence[str], known: Known, *, order: str, root: Path, group: str, empty: Sequence[str] = ()
) -> Folders:
    """The class of every folder.

    Args:
        folders: Names of the folders that hold images.
        known: Of the network.
        order: ``"auto"``: by the network's class names; else, where all folders are whole numbers, these are the
            classes; else by WordNet id where all are there; else in sorted order, if there are as many as logits.
            ``"sorted"``: in sorted order, numbers by their size. ``"text"``: in the order of their letters, as
            torchvision's ``ImageFolder`` (10 comes before 2). ``"imagenet"``: by WordNet id among the 1,000 classes.
        root: Folder that holds them, for messages.
        group: Settings that asked, for messages.
        empty: Folders beside them without an image: in a sorted order they count, so that a class that lacks images
            does not shift those behind it.

    Raises:
        DataError: If a folder stands for no class, or it is not clear for which.
    """
    if order == "text":
        return _counted([*folders, *empty], None, "order of letters")
    if order == "sorted":
        return _counted([*folders, *empty], _by_size, "sorted order")
    if order == "imagenet":
        return _by_wordnet(folders, root, group)
    found = _by_name(folders, known.names, root, group) or _by_number(folders, known, root, group)
    return found or _in_order(folders, empty, known, root, group)


def _counted(folders: Sequence[str], key: Callable[[str], Any] | None, how: str) -> Folders:
    return Folders({name: number for number, name in enumerate(sorted(folders, key=key))}, len(folders), how)


def _by_size(name: str) -> tuple[int, int, str]:
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def _by_name(folders: Sequence[str], names: Sequence[str] | None, root: Path, group: str) -> Folders | None:
    if not names:
        return None
    exact = {name: number for number, name in enumerate(names)}
    alike: dict[str, set[int]] = {}
    for number, name in enumerate(names):
        for word in {_plain(name), *(_plain(part) for part in name.split(","))}:  # "tench, Tinca tinca"
            alike.setdefault(word, set()).add(number)
    alike |= _by_id(names)
    found: dict[str, int] = {}
    for folder in folders:
        numbers = {exact[folder]} if folder in exact else alike.get(_plain(folder), set())
        if len(numbers) == 1:
            found[folder] = next(iter(numbers))
    if len(found) == len(folders):
        return Folders(found, len(names), "the network's class names")
    if not found:
        return None
    lost = next(folder for folder in folders if folder not in found)
    raise DataError(
        f"{root}: the folder {lost} is no class of the network; rename or remove it, set model.classes to the names in "
        f"the order of the logits, or set {group}.labels_path=FILE.json{instead(group)} ({nearest(lost, list(names))})"
    )


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name).strip().casefold()


def _by_id(names: Sequence[str]) -> dict[str, set[int]]:
    """WordNet ids as names of ImageNet's classes, where the network has all 1,000."""
    return {name: {number} for number, name in enumerate(imagenet_ids())} if len(names) == 1000 else {}


def _by_number(folders: Sequence[str], known: Known, root: Path, group: str) -> Folders | None:
    if not all(folder.isdecimal() for folder in folders):
        return None
    found = {folder: int(folder) for folder in folders}
    logits = len(known.names) if known.names else known.logits()
    most = max(found.values())
    if logits is not None and most >= logits:
        raise DataError(
            f"{root}: the folder {most} is no class of a network with classes 0 to {logits - 1}; name folders by the "
            f"number of their logit, or set {group}.class_order=sorted to count them from 0 in their order"
            f"{instead(group)}."
        )
    if len(set(found.values())) < len(found):
        raise DataError(f"{root}: two folders stand for one number, such as 1 and 01; merge them.")
    return Folders(found, logits, "their numbers")


def _by_wordnet(folders: Sequence[str], root: Path, group: str) -> Folders:
    numbers = {name: number for number, name in enumerate(imagenet_ids())}
    missing = next((folder for folder in folders if folder not in numbers), None)
    if missing is not None:
        raise DataError(
            f"{root}: the folder {missing} is not the WordNet id of an ImageNet class; set "
            f"{group}.class_order=sorted if the network was trained on these folders."
        )
    return Folders({folder: numbers[folder] for folder in folders}, 1000, "WordNet id")


def _in_order(folders: Sequence[str], empty: Sequence[str], known: Known, root: Path, group: str) -> Folders:
    if known.names:
        raise DataError(
            f"{root}: no folder is a class of the network by name ({_first(folders)}; its classes are "
            f"{_first(known.names)}); name folders after classes or by the number of their logit, set model.classes to "
            f"their names in the order of the logits, or {group}.class_order=sorted if it was trained on these "
            f"folders{instead(group)}."
        )
    all_ids = all(re.fullmatch(r"n\d{8}", folder) for folder in folders)
    if all_ids and set(folders) <= set(imagenet_ids()) and len(folders) != 1000:
        raise DataError(
            f"{root}: holds {len(folders)} of ImageNet's 1,000 class folders, so the class indices are not clear; set "
            f"{group}.class_order=imagenet for a network with all 1,000 classes, or sorted for one trained on "
            f"these folders alone{instead(group)}."
        )
    logits = known.logits()
    if logits is not None and logits == len(folders) + len(empty):
        folders = [*folders, *empty]
    elif logits is not None and logits != len(folders):
        raise DataError(
            f"{root}: holds {len(folders)} class folders ({_first(folders)}) for a network with {logits} logits and no "
            "class names, so it is not clear which is which; set model.classes to the names in the order of the "
            f"logits, name folders by the number of their logit, or set {group}.labels_path=FILE.json{instead(group)}."
        )
    return _counted(folders, None, "sort order, since the network names no classes (set model.classes if that is wrong)")


def _first(names: Sequence[str]) -> str:
    return ", ".join(list(names)[:3]) + (" …" if len(names) > 3 else "")


def instead(group: str) -> str:
    """What else calibration images can do; evaluation needs true labels."""
    return "" if group == "evaluation_data" else ", or take the network's own predictions with data.labels=model"


def imagenet_ids() -> Sequence[str]:
    """WordNet ids of ImageNet's 1,000 classes in the order of the logits."""
    from timm.data import ImageNetInfo

    return ImageNetInfo("imagenet-1k").label_names()
