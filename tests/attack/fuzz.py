"""Command lines that nobody would mean: deleted keys, numbers of all sizes, lists for scalars, strange folders."""

import random
from collections.abc import Sequence
from pathlib import Path

from modhifi_cli.settings import config, yamls

VALUES = (
    "null", "true", "false", "''", "0", "-1", "1", "2", "1e400", ".nan", ".inf", "-.inf", "0.5", "1.5", "99999999999999999999",
    "9223372036854775808", "-9223372036854775809", "[[1]]", "[]", "{}", "[1,2]", "{a: 1}", "x", "'a b'", "/", ".", "..", "~",
    "../..", "/dev/null", "/dev/zero", "here.txt", "missing", "é", "$x", "${x}", "${oc.env:HOME}", "${model}", "???", "a=b",
    "'${model.name}'", "[", "{", "'", "*", "&a", "!!python/object:os.system", "x" * 300, "0x10", "1_000", "1e3", "auto", "default",
    "pipe", "deep.json", "huge.npz", "bomb.yaml", "cut.safetensors",
)  # fmt: skip
PREFIXES = ("", "", "", "+", "++", "~")
FLAGS = ("--cfg", "--cfg=job", "--cfg=x", "-c", "--resolve", "--package", "-p", "--info", "-i", "--config-dir", "--config-dir=/nowhere",
         "-cd=.", "--hydra-help", "-m", "--multirun", "--run", "--help", "-h", "--zzz", "-z", "--", "-", "", "=", "==", "x")  # fmt: skip


def verbs() -> tuple[str, ...]:
    """All verbs, and some that are none."""
    return (*config.verbs(), *config.verbs(), "list", "prun", "")


def words_of(draw: random.Random, run: Path) -> list[str]:
    """One command line, drawn."""
    verb = draw.choice(verbs())
    words = [verb]
    if verb not in config.verbs():
        return words + [draw.choice(("group=model", "group=x", "zzz=1", "console=json", "console=[1]"))]
    own, chosen = yamls.inherited(verb)
    if "run" in own and draw.random() < 0.8:
        words.append(f"run={run}")
    if verb == "unlearn" and draw.random() < 0.8:
        words.append("forget_class=3")
    keys = [*own, *chosen, *own, *(f"{group}.{key}" for group in chosen for key in _keys(group, chosen[group]))]
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        key = draw.choice((*keys, "zzz", "model.zzz", "hydra.run.dir", "hydra.job.name", "model._target_", "data._target_", "resume", "run"))
        prefix = draw.choice(PREFIXES)
        value = draw.choice((*VALUES, *config.groups().get(key, ())))
        words.append(f"~{key}" if prefix == "~" else f"{prefix}{key}={value}")
    if draw.random() < 0.1:
        words.insert(draw.randrange(1, len(words) + 1), draw.choice(FLAGS))
    return words


def _keys(group: str, choice: str) -> list[str]:
    path = yamls.config_directory() / group / f"{choice}.yaml"
    return list(yamls.read_verb(path)[0]) if path.is_file() else []


def litter(folder: Path) -> None:
    """Strange files that command lines name."""
    import os
    import zipfile

    (folder / "here.txt").write_text("text")
    os.mkfifo(folder / "pipe")
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "bomb.yaml").write_text("a: &a [x, x]\nb: &b [*a, *a]\n")
    (folder / "cut.safetensors").write_bytes(b"\xff" * 7)
    header = "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 32, 32, 3), }".ljust(117) + "\n"
    member = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
    with zipfile.ZipFile(folder / "huge.npz", "w") as file:
        file.writestr("images.npy", member + bytes(100))
        file.writestr("labels.npy", member + bytes(100))


def attack(words: Sequence[str], room: Path, *, whole: bool, limit: float = 120) -> tuple[str | None, int]:
    """Type one command line.

    Args:
        words: After ``modhifi``.
        room: The folder to stand in.
        whole: Whether the work itself may begin; otherwise it ends where the settings are right.
        limit: Seconds.

    Returns:
        What was wrong about the end, or None; and the exit code.
    """
    from tests.attack.forked import run

    def act() -> int:
        from modhifi_cli import verbs as ours
        from modhifi_cli.cli import main

        if not whole:
            ours.run = lambda *_, **__: None
        return main(list(words))

    ended = run(words, room, limit=limit, act=act)
    told = ended.output.strip().splitlines()
    if ended.defect is None and ended.code == 2 and not any(line.startswith("error: ") for line in told):
        return f"exit code 2 without a sentence: {ended.output[-200:]}", ended.code
    return (None if ended.defect is None else f"{ended.defect}: {ended.output[-600:]}"), ended.code
