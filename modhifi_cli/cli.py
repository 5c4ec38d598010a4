"""The command line: takes the verb, hands the rest to the settings, turns errors into one sentence and an exit code.

Nothing heavy is imported before a verb starts its work, so that help answers at once.
"""

import contextlib
import errno
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from modhifi_cli.errors import ConfigError, EndedElsewhere, ModHiFiError, nearest
from modhifi_cli.files.run_names import named_words, runs
from modhifi_cli.settings import completion, config

USER_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
PIPE_CLOSED = 141  # 128 + SIGPIPE, as programs end whose reader (head, less) has left

_FLAGS = frozenset(
    "-m --multirun -c --cfg -p --package --resolve --info -i -cd --config-dir --hydra-help --run -r".split()
)
_FLAGS_WITH_VALUE = frozenset("-c --cfg -p --package -cd --config-dir".split())

_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGINT") if hasattr(signal, name)]
_SHOWN = {"--cfg": ("job", "hydra", "all"), "-c": ("job", "hydra", "all")}

_OF_A_PATH = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ELOOP)  # what asking for a path alone may meet
_LONGEST_SHOWN = 80  # characters of a path

_outcome: list[BaseException] = []  # what ended the job; Hydra would print a text of its own if it saw the exception


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Words after ``modhifi``; None takes them from the process.

    Returns:
        Exit code: 0 done, 2 something the user can mend, 130 interrupted, 141 nobody reads the output any more.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    _open_standard_streams()
    with _outliving() as out:
        try:
            with _ended_like_ctrl_c():
                code = _run(words)
                sys.stdout.flush()  # here, where a closed pipe can still be said; at exit it is too late
        except ModHiFiError as error:
            if not isinstance(error, EndedElsewhere):
                print(f"error: {_sentence(error)}", file=sys.stderr)
            code = USER_ERROR
        except OSError as error:
            if error.errno not in _OF_A_PATH or error.filename is None:
                raise
            place = str(error.filename)
            place = place if len(place) <= _LONGEST_SHOWN else f"{place[:_LONGEST_SHOWN]}…"
            print(f"error: {place}: {error.strerror}; give a path that this machine can open.", file=sys.stderr)
            code = USER_ERROR
        except KeyboardInterrupt as interrupt:
            why = "nobody reads the output any more." if out.unread else "interrupted."
            print(f"{why} {interrupt}".strip(), file=sys.stderr)
            code = PIPE_CLOSED if out.unread else INTERRUPTED
        if out.lost and code == 0:
            reason = out.lost.strerror or out.lost
            print(f"error: done, but the output could not be written ({reason}); send it elsewhere.", file=sys.stderr)
            code = USER_ERROR
    return code


class _Outliving:
    """Standard output that a run outlives: what becomes of the text never ends the work, save that nobody reads it.

    Where the terminal is gone it goes silent, so that a run under nohup ends as if somebody looked on. Where the text
    cannot be written (a full disk) it goes silent too, and `lost` says why at the end. A closed pipe is taken like
    Ctrl-C: whoever types ``| head`` has seen enough.

    Attributes:
        unread: Whether the reader of a pipe has left.
        lost: Why text was lost, or None.
    """

    def __init__(self, stream: TextIO, *, ends: bool) -> None:
        self._stream, self._ends, self._gone = stream, ends, False
        self.unread = False
        self.lost: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As the stream's own."""
        return self._kept(lambda: self._stream.write(text)) or len(text)

    def flush(self) -> None:
        """As the stream's own."""
        self._kept(self._stream.flush)

    def silence(self) -> None:
        """Let the interpreter's last flush succeed, if nothing can be written any more."""
        if self._gone:
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), self._stream.fileno())

    def _kept(self, act: Callable[[], Any]) -> Any:
        if self._gone:
            return None
        try:
            return act()
        except BrokenPipeError:
            self._gone = self.unread = True
            if self._ends:
                raise KeyboardInterrupt from None
        except OSError as error:
            self._gone = True
            if error.errno not in (errno.EIO, errno.ENXIO, errno.EBADF):
                self.lost = error
        return None


@contextlib.contextmanager
def _outliving() -> Iterator[_Outliving]:
    before = sys.stdout, sys.stderr
    out, words = _Outliving(before[0], ends=True), _Outliving(before[1], ends=False)
    sys.stdout, sys.stderr = out, words  # type: ignore[assignment]
    try:
        yield out
    finally:
        with contextlib.suppress(KeyboardInterrupt):
            out.flush()
        words.flush()
        out.silence()
        words.silence()
        sys.stdout, sys.stderr = before


def _open_standard_streams() -> None:
    """Open those of the streams 0 to 2 that whoever started us has closed (``>&-``): a file would take their number.

    Else the output of a library would end up in the first file that is written.
    """
    while True:
        number = os.open(os.devnull, os.O_RDWR)
        if number > 2:
            os.close(number)
            break
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


@contextlib.contextmanager
def _ended_like_ctrl_c() -> Iterator[None]:
    """Take a request to end (SIGTERM, as `kill` and the schedulers of clusters send it; SIGHUP) like Ctrl-C (SIGINT).

    What is ignored is left alone: nohup does that to SIGHUP.

    So the processes that a command has started end with it, and it says how to go on. Libraries in C may take an
    interrupt inside a question of theirs for the answer "no" and go on to some other error: once a request has come,
    whatever ends the command is that request.
    """
    if threading.current_thread() is not threading.main_thread():  # only there may a signal be handled
        yield
        return

    asked = False

    def interrupt(*_: object) -> None:
        nonlocal asked
        asked = True
        raise KeyboardInterrupt

    taken = [number for number in _ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in taken}
    try:
        yield
    except Exception:
        if asked:
            raise KeyboardInterrupt from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(config.main_help())
        return 0
    if words[0] == "--version":
        print(_versions())
        return 0
    verb, rest = words[0], words[1:]
    if verb == "completion":
        return _complete(rest)
    known = [*config.verbs(), "list", "completion"]
    if verb not in known:
        raise ConfigError(f"there is no verb '{verb}'; {nearest(verb, known)} (modhifi --help)")
    if any(word in ("-h", "--help") for word in rest):
        print(_list_help() if verb == "list" else config.verb_help(verb))
        return 0
    overrides, flags = _sort_words(verb, rest)
    config.check_words(verb, overrides)
    if verb == "list":
        return _list(overrides)
    overrides = [word if isinstance(word, str) else config.spell(*word) for word in named_words(overrides)]
    sweeping = "-m" in flags or "--multirun" in flags
    if sweeping and verb not in ("prune", "unlearn", "evaluate"):
        raise ConfigError(f"modhifi {verb} runs once; -m is for prune, unlearn and evaluate.")
    if sweeping:
        return _sweep(verb, overrides, flags)
    _outcome.clear()
    config.run_hydra(verb, [*overrides, *flags], job)
    if _outcome:
        raise _outcome.pop()
    return 0


def _versions() -> str:
    """The tool's version, those of what a result depends on most, and what it would run on."""
    import platform
    from importlib.metadata import version

    import torch

    from modhifi_cli import __version__

    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "timm", "transformers"))
    card = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no graphics card"
    return f"modhifi {__version__} (Python {platform.python_version()}, {packages}; {card})"


def _complete(words: Sequence[str]) -> int:
    """What a shell asks for: the lines it evaluates (``bash``), or the words that may follow (``words LINE``)."""
    if words[:1] == ["words"]:
        line = " ".join(words[1:])
        print("\n".join(completion.candidates(line, lambda: [run.name for run in runs(Path("outputs"))])))
    elif not words or words[0] in ("-h", "--help"):
        print('eval "$(modhifi completion bash)" in ~/.bashrc; zsh alike; fish: modhifi completion fish | source')
    else:
        print(completion.script(words[0]), end="")
    return 0


def _sweep(verb: str, overrides: Sequence[str], flags: Sequence[str]) -> int:
    """A sweep in a folder that its overrides name, so that the same command finds its finished jobs again.

    With ``dry_run=true`` the script of its jobs is shown instead.
    """
    from modhifi_cli.verbs import sweeps

    given = dict(word.partition("=")[::2] for word in overrides)
    named = [word for word in overrides if not word.startswith(("hydra", "console", "output_dir="))]
    folder = Path(given.get("output_dir", "outputs").strip("'\"")) / "sweeps" / f"{verb}_{config.slug(named)}"
    if given.get("dry_run", "").lower() == "true":
        print(sweeps.slurm_script(config.launcher(verb, overrides), folder))
        return 0
    sweeps.begin_sweep(folder)
    quoted = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    config.run_hydra(verb, [*overrides, f"hydra.sweep.dir='{quoted}'", *flags], job)
    failed = sweeps.summarise_sweep(folder, given.get("console", "rich"))
    if failed:
        some = "a job" if failed == 1 else f"{failed} jobs"
        raise ConfigError(f"{folder}: {some} did not finish, as said above; the same command tries only what failed again.")
    return 0


def job(composed: Any) -> tuple[float, float] | None:
    """One job, called by Hydra with its config object; a parallel launcher calls it in another process.

    In a sweep a failure is written to the job's record and the sweep goes on; otherwise `main` reports it. What a sweep's
    job returns is for a sweeper that searches.
    """
    from modhifi_cli import verbs
    from modhifi_cli.verbs import sweeps

    facts = config.job_facts()
    if facts["sweep"] is not None:
        found = sweeps.run_sweep_job(composed, facts)
        _release_memory()
        return found
    try:
        verbs.run(facts["verb"], config.settings(facts["verb"], composed), facts)
    except Exception as error:
        _outcome.append(error)
    return None


def _sort_words(verb: str, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides and Hydra's flags apart; anything else is refused here in words that a person understands.

    Hydra's parser takes overrides only in one block, so flags are put behind them.
    """
    overrides: list[str] = []
    flags: list[str] = []
    expects_value = False
    for word in words:
        if expects_value:
            _check_value(flags[-1], word)
            expects_value = False
            flags.append(word)
        elif word in _FLAGS:
            expects_value = word in _FLAGS_WITH_VALUE
            flags.append(word)
        elif word.startswith("--") and word.partition("=")[0] in _FLAGS_WITH_VALUE:
            _check_value(word.partition("=")[0], word.partition("=")[2])
            flags.append(word)
        elif word.startswith("--"):
            key, _, value = word[2:].partition("=")
            raise ConfigError(
                f"there is no option '{word}'; settings are written key=value without dashes, "
                f"such as {key.replace('-', '_')}={value or 'VALUE'} (modhifi {verb} --help)."
            )
        elif word.startswith("-"):
            raise ConfigError(f"there is no option '{word}'; settings are written key=value (modhifi {verb} --help).")
        elif "=" not in word and not word.startswith("~"):
            raise ConfigError(f"'{word}' is no setting; settings are written key=value (modhifi {verb} --help).")
        else:
            overrides.append(word)
    if expects_value:
        _check_value(flags[-1], "")
    shown = any(flag.partition("=")[0] in _SHOWN for flag in flags)
    alone = next((flag for flag in flags if flag.partition("=")[0] in ("--resolve", "-p", "--package")), None)
    if alone is not None and not shown:
        raise ConfigError(f"{alone} goes with --cfg job, which shows settings instead of running.")
    return overrides, flags


def _check_value(flag: str, value: str) -> None:
    """What a flag of Hydra's needs behind it; the folder of `--config-dir` is looked at before anything is read from it.

    Raises:
        ConfigError: If it is missing, unknown, or a folder that must not be read.
    """
    known = _SHOWN.get(flag)
    if known is not None and value not in known:
        raise ConfigError(f"{flag} must be one of {', '.join(known)}, such as --cfg job; got {value!r:.60}.")
    if not value or value.startswith("-"):
        raise ConfigError(f"{flag} needs a value behind it; got {value!r:.60}.")
    if flag in ("--config-dir", "-cd"):
        config.check_foreign_folder(value)


def _list_help() -> str:
    return "modhifi list [group=NAME]\n\nShow the choices of every config group, or of one with the command for each."


def _list(words: Sequence[str]) -> int:
    """`modhifi list [group=NAME]`, from the files alone."""
    groups = config.groups()
    wanted = None
    style = "plain"
    for word in words:
        key, _, value = word.partition("=")
        if key == "group":
            wanted = value
        elif key == "console":
            style = value
        else:
            raise ConfigError(f"modhifi list has no key '{key}'; {nearest(key, ['group', 'console'])}")
    if style not in ("rich", "plain", "json"):
        raise ConfigError(f"console must be rich, plain or json; got {style!r}.")
    if wanted is not None and wanted not in groups:
        raise ConfigError(f"there is no group '{wanted}'; {nearest(wanted, groups)}")
    if style == "json":
        import json

        print(json.dumps({name: list(choices) for name, choices in groups.items() if wanted in (None, name)}))
        return 0
    for name, choices in groups.items():
        if wanted in (None, name):
            print(f"{name}:")
            for choice in choices:
                description, _ = config.header(config.config_directory() / name / f"{choice}.yaml")
                print(f"  {choice:<18} {_short(description) if wanted is None else description}")
    return 0


def _short(text: str, width: int = 100) -> str:
    first = text.split(". ")[0].rstrip(".")
    return first if len(first) <= width else first[: width - 1] + "…"


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split())


def _release_memory() -> None:
    """Between the jobs of a sweep: nothing of one job may stay in the memory of the next."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
