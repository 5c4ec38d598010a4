"""Random damage of a run's files: what is still read must be what was written."""

import random
import shutil
from pathlib import Path

from tests.attack.forked import run as forked

TENSORS = ("model/weights.safetensors", "edits.safetensors", "verification.safetensors")
DESCRIPTIONS = ("model/architecture.json", "edits.json", "checksums.json", "model/checksums.json", "config.yaml")


def harm(path: Path, draw: random.Random) -> str:
    """Damage one file in one of the ways that disks and people have; how."""
    content = bytearray(path.read_bytes())
    size = max(len(content), 1)
    how = draw.choice(("a bit", "a byte", "cut", "zeros", "swapped", "longer", "gone", "40 low bytes", "empty", "half moved"))
    place = draw.randrange(size)
    if how == "a bit" and content:
        content[place] ^= 1 << draw.randrange(8)
    elif how == "a byte" and content:
        content[place] = (content[place] + draw.randrange(1, 256)) % 256
    elif how == "cut":
        del content[place:]
    elif how == "zeros":
        content[place : place + 64] = bytes(len(content[place : place + 64]))
        if content == path.read_bytes():  # they were zeros before
            content.append(0)
    elif how == "swapped" and size > 16:
        other = draw.randrange(size - 8)
        content[other : other + 4], content[other + 4 : other + 8] = content[other + 4 : other + 8], content[other : other + 4]
        if content == path.read_bytes():
            content[place] ^= 255
    elif how == "longer":
        content += draw.randbytes(draw.randrange(1, 200))
    elif how == "40 low bytes":
        for _ in range(40):  # the low bytes of float32 numbers: weights that nobody sees to be wrong
            at = max(size - 4 * draw.randrange(1, max(2, size // 8)), 0)
            content[at] ^= 255
    elif how == "half moved":
        content = content[size // 2 :] + content[: size // 2]
        if content == path.read_bytes():
            content.append(1)
    elif how == "empty":
        content.clear()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(bytes(content))
    return how


def attack_finished(run: Path, weights: str, room: Path, seed: int) -> str | None:
    """Damage one file of a finished run, then read it and replay it; what was accepted with other weights, or None."""
    draw = random.Random(seed)
    folder = room / "run"
    shutil.copytree(run, folder)
    name = draw.choice((*TENSORS, *TENSORS, *DESCRIPTIONS))
    before = (folder / name).read_bytes()
    how = harm(folder / name, draw)
    if (folder / name).exists() and (folder / name).read_bytes() == before:
        return None
    of_network = name.startswith("model/")

    def act() -> int:
        from modhifi_cli import load_model
        from modhifi_cli.cli import main
        from modhifi_cli.errors import ModHiFiError
        from modhifi_cli.graph.surgery import weights_hash

        if of_network:
            try:
                found = weights_hash(load_model(folder))
            except ModHiFiError:
                return 2
            print("ACCEPTED", found == weights)
            return 0
        code = main(["replay", f"run={folder}", "console=plain", "output_dir=out"])
        if code == 0:
            (again,) = Path("out").glob("replay/embedded/*")
            print("ACCEPTED", weights_hash(load_model(again)) == weights)
        return code

    return _judged(f"{name}, {how} (seed {seed})", forked((), room, limit=120, act=act))


def attack_interrupted(begun: Path, words: list[str], weights: str, room: Path, seed: int) -> str | None:
    """Damage one saved edit of an interrupted run, then resume it; what came out with other weights, or None."""
    draw = random.Random(seed)
    folder = room / begun.name
    shutil.copytree(begun, folder)
    victim = draw.choice(sorted((folder / "edits").iterdir()))
    how = harm(victim, draw)

    def act() -> int:
        from modhifi_cli import load_model
        from modhifi_cli.cli import main
        from modhifi_cli.graph.surgery import weights_hash

        code = main([*words, f"resume={folder}"])
        if code == 0:
            print("ACCEPTED", weights_hash(load_model(folder.with_name(folder.name.removesuffix(".incomplete")))) == weights)
        return code

    return _judged(f"{victim.name[:4]} of edits, {how} (seed {seed})", forked((), room, limit=300, act=act))


def _judged(what: str, ended) -> str | None:
    if ended.defect is not None:
        return f"{what}: {ended.defect} {ended.output[-300:]}"
    return f"{what}: accepted with other weights" if "ACCEPTED False" in ended.output else None
