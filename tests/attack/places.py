"""Places that refuse: a full disk, read-only folders, a limit on file sizes, two processes, a closed pipe, a gone terminal."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.attack.forked import begin, end, run
from tests.attack.kills import PRUNE
from tests.attack.runs import weights


def limited(room: Path, size: int) -> str | None:
    """No file may grow beyond `size` bytes, as `ulimit -f` has it: one sentence, or a whole run where all files fit.

    What the command prints goes to a file here, too, so that `size` has to leave room for that.
    """
    import resource

    from modhifi_cli.cli import main

    def act() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python starts with
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return main(PRUNE)

    ended = run((), room, act=act)
    whole = [path for path in room.glob("outputs/prune/embedded/*") if not path.name.endswith(".incomplete")]
    if ended.code == 0 and len(whole) == 1:  # every file was small enough
        weights(whole[0])
        return None
    if whole or ended.defect is not None or ended.code != 2 or "cannot be written" not in ended.output:
        return f"file size at most {size}: {ended.code} {ended.output[-300:]}"
    return None


def full(room: Path, mount: Path) -> str | None:
    """A disk without room: one sentence; resumed with room it ends as ever."""
    ended = run([*PRUNE, f"output_dir={mount}"], room)
    whole = [path for path in mount.glob("prune/embedded/*") if not path.name.endswith(".incomplete")]
    if ended.defect is not None or (ended.code == 0) != bool(whole):
        return f"full disk: {ended.code} {ended.output[-300:]}"
    if whole:
        weights(whole[0])
    return None


def read_only(room: Path) -> str | None:
    """A folder that cannot be written is said so before the work."""
    (room / "closed").mkdir()
    (room / "file").write_text("")
    ended = run([*PRUNE, "output_dir=file"], room)  # root may write anywhere; a file in the way refuses everybody
    if ended.code != 2 or "cannot be written" not in ended.output:
        return f"a file in the way: {ended.code} {ended.output[-300:]}"
    if os.geteuid() == 0:
        return None
    (room / "closed").chmod(0o500)
    ended = run([*PRUNE, "output_dir=closed"], room)
    return None if ended.code == 2 and "cannot be written" in ended.output else f"read-only: {ended.code} {ended.output[-300:]}"


def two(room: Path, wanted: str) -> str | None:
    """Two processes that resume one folder: one goes on, the other is told."""
    from modhifi_cli.cli import main

    begun = interrupted(room, PRUNE)
    if begun is None:
        return "two processes: the run could not be interrupted"
    words = [*PRUNE, f"resume={begun}"]
    logs = [room / ".first", room / ".second"]
    children = [begin(lambda: main(words), room, each) for each in logs]
    ends = [end(child, each, limit=300) for child, each in zip(children, logs, strict=True)]
    codes = sorted(one.code for one in ends)
    told = " ".join(one.output for one in ends)
    # Where the first has finished before the second looks, the second finds nothing to resume.
    if codes != [0, 2] or not ("another process" in told or "nothing to resume" in told or "no such folder" in told):
        return f"two processes: {codes} {told[-400:]}"
    (finished,) = [path for path in room.glob("outputs/prune/embedded/*")]
    return None if weights(finished) == wanted else "two processes: other weights"


def interrupted(room: Path, words: list[str], after: int = 2) -> Path | None:
    """A run that was ended by Ctrl-C after some edits."""
    from modhifi_cli.cli import main

    def act() -> int:
        from modhifi_cli.files import artifacts

        save, left = artifacts.RunDirectory.save_edit, [after]

        def save_or_stop(run, edit, dense_hash) -> None:
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            save(run, edit, dense_hash)

        artifacts.RunDirectory.save_edit = save_or_stop
        return main(words)

    run((), room, act=act)
    found = list(room.glob("outputs/prune/embedded/*.incomplete"))
    return found[0] if found else None


def closed_pipe(room: Path, package: Path) -> str | None:
    """The reader leaves early: exit code 141 and no traceback."""
    code = "import sys; from modhifi_cli.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": str(package)}
    child = subprocess.Popen([sys.executable, "-c", code, "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             cwd=room, env=environment, text=True)  # fmt: skip
    child.stdout.close()  # before a word is written
    error = child.stderr.read()
    return None if child.wait(120) == 141 and "Traceback" not in error else f"closed pipe: {child.returncode} {error[-300:]}"


def gone_terminal(room: Path) -> str | None:
    """The terminal goes while the run is at work and SIGHUP is ignored, as under nohup: it ends well."""
    import pty

    from modhifi_cli.cli import main

    ours, theirs = pty.openpty()

    def act() -> int:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in (1, 2):
            os.dup2(theirs, number)
        os.close(ours)
        return main(PRUNE)

    log = room / ".output"
    child = begin(act, room, log)
    os.close(theirs)
    os.read(ours, 1)
    os.close(ours)
    ended = end(child, log, limit=300)
    return None if ended.code == 0 else f"terminal gone: {ended.code} {ended.output[-300:]}"
