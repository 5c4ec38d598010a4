"""Commands in forked children: torch and Hydra are imported once, and a child costs what its work costs."""

import contextlib
import copy
import gc
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PLACES = ("run=", "resume=", "output_dir=")
_DEFAULTS = {"resume": None, "output_dir": "outputs"}
_TRACEBACK = 99  # exit code of a child whose function raised


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        code: Exit code, or minus the signal's number.
        output: Everything it printed, both streams.
        seconds: How long it took.
        hung: Whether it was still at it when its time was up.
    """

    code: int
    output: str
    seconds: float
    hung: bool

    @property
    def defect(self) -> str | None:
        """What is wrong with this end, whatever was asked for: a traceback, a strange exit code, a hang."""
        if self.hung:
            return "hang"
        if self.code == _TRACEBACK or "Traceback (most recent call last)" in self.output:
            return "traceback"
        return None if self.code in (0, 2, 130, 141) else f"exit code {self.code}"


def compose_once() -> None:
    """Let a command whose settings were composed before take them from memory: Hydra costs more than most attacks.

    What `cli.main` does around it stays: words, signals, streams, exit codes. Only folders may differ from the first time.
    For a process that attacks and does nothing else.
    """
    from modhifi_cli import cli, verbs
    from modhifi_cli.settings import config

    known: dict[tuple[str, ...], dict[str, Any]] = {}
    compose = config.run_hydra

    def run_hydra(verb: str, overrides: Sequence[str], job: Callable[[Any], None]) -> None:
        places = dict(word.split("=", 1) for word in overrides if word.startswith(_PLACES))
        same = (verb, *(word for word in overrides if not word.startswith(_PLACES)))
        if "-m" in overrides:
            compose(verb, overrides, job)
        elif same not in known:
            def remembering(verb: str, settings: dict[str, Any], facts: dict[str, Any]) -> None:
                known[same] = copy.deepcopy(settings) | {key: value for key, value in _DEFAULTS.items() if key in settings}
                run(verb, settings, facts)

            run, verbs.run = verbs.run, remembering
            try:
                compose(verb, overrides, job)
            finally:
                verbs.run = run
        else:
            facts = {"verb": verb, "overrides": list(overrides), "sweep": None, "swept": [], "number": 0, "parallel": False}
            try:
                verbs.run(verb, copy.deepcopy(known[same]) | places, facts)
            except Exception as error:
                cli._outcome.append(error)

    config.run_hydra = run_hydra


def warm(commands: Iterable[Sequence[str]], folder: Path) -> None:
    """Run commands in this very process, so that its children find everything imported.

    Args:
        commands: What the children will be like.
        folder: A place for what they write.
    """
    from modhifi_cli.cli import main

    here = os.getcwd()
    os.chdir(folder)
    try:
        for words in commands:
            told = io.StringIO()
            with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
                code = main(list(words))
            assert code == 0, f"{words}: {told.getvalue()[-500:]}"
    finally:
        os.chdir(here)
    gc.collect()
    gc.freeze()  # else the first collection of every child copies all that was imported


def begin(act: Callable[[], int | None], folder: Path, log: Path) -> int:
    """Fork a child that runs `act` in a folder with its output in `log`; its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = _TRACEBACK
    try:
        os.setpgid(0, 0)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin, sys.stdout, sys.stderr = (open(n, "w" if n else "r", buffering=1, closefd=False) for n in range(3))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.chdir(folder)
        try:
            code = int(act() or 0)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
    finally:
        os._exit(code)


def end(child: int, log: Path, *, limit: float, kill: tuple[float, int] | None = None) -> Ended:
    """Wait for a child, at most `limit` seconds; `kill` sends a signal after so many seconds."""
    began, hung, status = time.monotonic(), False, None
    while status is None:
        done, found = os.waitpid(child, os.WNOHANG)
        passed = time.monotonic() - began
        if done:
            status = found
        elif kill is not None and passed >= kill[0]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, kill[1]) if kill[1] == signal.SIGKILL else os.kill(child, kill[1])
            kill = None
        elif passed > limit:
            hung = True
            os.killpg(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        else:
            time.sleep(0.01)
    output = log.read_text(errors="replace") if log.exists() else ""
    return Ended(os.waitstatus_to_exitcode(status), output, time.monotonic() - began, hung)


def run(words: Sequence[str], folder: Path, *, limit: float = 300, act: Callable[[], int | None] | None = None) -> Ended:
    """One command, or any other act, in a child."""
    from modhifi_cli.cli import main

    log = folder / ".output"
    return end(begin(act or (lambda: main(list(words))), folder, log), log, limit=limit)


@contextlib.contextmanager
def watched(allowed: Sequence[str]) -> Iterator[list[str]]:
    """What Python's own audit events say was run, opened, written or removed outside the allowed places.

    For a forked child: a hook stays for the life of the process.
    """
    seen: list[str] = []
    at_work = True
    places = tuple(os.path.realpath(place) for place in allowed)

    def inside(path: object, folder: object = -1) -> bool:
        if isinstance(path, int) or not isinstance(path, (str, bytes, os.PathLike)):
            return True
        # shutil.rmtree names what it removes below an open folder.
        below = f"/proc/self/fd/{folder}/" if isinstance(folder, int) and folder >= 0 else ""
        text = os.path.realpath(f"{below}{os.fsdecode(path)}")
        return text.startswith(places) or text == os.getcwd()  # which Hydra makes although it is there

    def hook(event: str, arguments: tuple) -> None:
        if not at_work:
            return
        if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn", "socket.connect"):
            seen.append(f"{event} {arguments[:2]!r:.120}")
        elif event in ("open", "os.listdir", "os.scandir"):
            if not inside(arguments[0]):
                seen.append(f"{event} {arguments[0]!r:.120}")
        elif event in ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.truncate", "os.link", "os.symlink"):
            numbers = [argument for argument in arguments if isinstance(argument, int)]
            folder = numbers[-1] if numbers and event != "os.truncate" else -1
            if not all(inside(argument, folder) for argument in arguments[:2]):
                seen.append(f"{event} {arguments[:2]!r:.120}")

    sys.addaudithook(hook)
    try:
        yield seen
    finally:
        at_work = False
