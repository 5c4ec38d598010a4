"""Run mypy and hold each room to its baseline: errors may only become fewer. Rooms that are not listed have none.

    python scripts/check_types.py            # fails where a room has more errors than its baseline
    python scripts/check_types.py --lower    # writes the lower numbers down

The baseline is `[tool.modhifi.type_errors]` in pyproject.toml.
"""

import argparse
import collections
import re
import subprocess
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
_ERROR = re.compile(r"^modhifi_cli/(?P<room>\w+)(?:\.py|/\S*?):\d+: error: ")
_TABLE = "[tool.modhifi.type_errors]"


def judge(output: str, baseline: dict[str, int]) -> tuple[list[str], dict[str, int]]:
    """Rooms with more errors than allowed, in sentences, and the baseline as low as it may be written now."""
    rooms = [found["room"] for found in map(_ERROR.match, output.splitlines()) if found]
    found = collections.Counter(rooms)
    wrong = []
    for room in sorted(found.keys() | baseline.keys()):
        now, allowed = found[room], baseline.get(room, 0)
        if now > allowed:
            wrong.append(f"{room}: {now} type errors, {allowed} allowed; mend what was added.")
    lowered = {room: min(found[room], allowed) for room, allowed in baseline.items()}
    return wrong, {room: count for room, count in lowered.items() if count}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lower", action="store_true", help="write the baseline as low as it may be now")
    lower = parser.parse_args().lower
    text = PROJECT.read_text(encoding="utf-8")
    baseline = tomllib.loads(text)["tool"]["modhifi"]["type_errors"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary"], cwd=PROJECT.parent, capture_output=True, text=True, check=False
    )
    if done.returncode not in (0, 1):
        print(done.stdout + done.stderr, file=sys.stderr)
        return done.returncode
    wrong, lowered = judge(done.stdout, baseline)
    if lower:
        head, _, rest = text.partition(_TABLE)
        after = rest.partition("\n\n")[2]
        table = "\n".join([_TABLE, *(f"{room} = {count}" for room, count in sorted(lowered.items()))])
        PROJECT.write_text(f"{head}{table}\n" + (f"\n{after}" if after else ""), encoding="utf-8")
    elif lowered != baseline:
        print("fewer type errors than the baseline allows; python scripts/check_types.py --lower keeps it so.")
    more = {sentence.partition(":")[0] for sentence in wrong}
    for line in done.stdout.splitlines():
        found = _ERROR.match(line)
        if found and found["room"] in more:
            print(line)
    print("\n".join(wrong), file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
