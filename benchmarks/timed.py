"""Runs commands one after the other within some minutes, and keeps what they said.

Each starts only if enough time is left, and is ended with its children at its limit. A folder gets
results.jsonl, a line with the exit code, seconds, numbers and last lines of a command as soon as it
ends; results.md, the same as a table; and NAME.log with all that it printed. The next run goes on
with the commands that have no result; to repeat one, delete its line.
"""

import contextlib
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
GRACE = 20  # seconds between the request to end and the kill
SAVED = 75  # exit code of a training that was asked to end (nvg_jax/cli.py)


class Entry(NamedTuple):
    """A command that starts if `least` seconds are left, and is ended after `limit`.

    needs: a package, or a path with a slash, that it cannot do without.
    keep: seconds that it leaves to the entries after it.
    """

    name: str
    command: str
    least: float = 60
    limit: float = 150
    needs: str = ""
    keep: float = 0


def available(needs: str) -> bool:
    return os.path.exists(needs) if "/" in needs else importlib.util.find_spec(needs) is not None


def run(command: str, seconds: float, log: Path) -> tuple[int, bool]:
    """(exit code of a command, whether it was told to end). All its processes are gone by then."""
    grace = min(GRACE, seconds / 2)
    with log.open("w") as file:
        process = subprocess.Popen(
            shlex.split(command),
            cwd=ROOT,
            env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(seconds - grace), False
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode, True


def objects(text: str) -> list[dict]:
    """The lines of a text that are JSON objects. A line that was cut is none."""
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            found += [json.loads(line)] if line.startswith('{"') else []
    return found


def resumed(file: Path) -> list[dict]:
    """The objects in a file to which lines are added; one that a kill has cut is ended there."""
    text = file.read_text() if file.exists() else ""
    if text and not text.endswith("\n"):
        file.write_text(text + "\n")
    return objects(text)


def measure(entry: Entry, left: float, log: Path) -> dict:
    """The row of an entry; "final" if it need not run again."""
    row = {"name": entry.name, "command": entry.command, "final": False}
    if entry.needs and not available(entry.needs):
        return row | {"result": f"not run: there is no {entry.needs}"}
    if left < entry.least:
        return row | {"result": f"not run: {max(left, 0):.0f} s left, needs {entry.least:.0f}"}
    start, allowed = time.monotonic(), min(entry.limit, left)
    code, ended = run(entry.command, allowed, log)
    seconds = time.monotonic() - start
    result, cut = {0: "done", SAVED: "saved"}.get(code, f"exit code {code}"), False
    if ended and code not in (0, SAVED):
        cut = allowed < entry.limit
        result = "ended with the minutes" if cut else "ended at its limit"
    row |= {"result": result, "final": not cut, "code": code}
    text = log.read_text(errors="replace")
    row |= {"seconds": round(seconds, 1), "numbers": objects(text)}
    return row | {"last": text.splitlines()[-12:]}


def table(rows: Iterable[dict]) -> str:
    lines = ["| entry | result | seconds | last line |", "|---|---|---|---|"]
    for row in rows:
        last = " ".join(row.get("last", ())[-1:]).replace("|", " ").strip()
        lines.append(f"| {row['name']} | {row['result']} | {row.get('seconds', '')} | {last} |")
    return "\n".join(lines) + "\n"


def run_all(entries: Iterable[Entry], out: Path, minutes: float):
    """Runs what has no final row in `out`, and writes each row at once."""
    end = time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.jsonl"
    rows = {row["name"]: row for row in resumed(file)}  # the last of each entry
    for entry in entries:
        if rows.get(entry.name, {}).get("final"):
            continue
        left = end - time.monotonic() - entry.keep
        rows[entry.name] = row = measure(entry, left, out / f"{entry.name}.log")
        with file.open("a") as results:
            results.write(json.dumps(row) + "\n")
        (out / "results.md").write_text(table(rows.values()))
        print(f"{row['name']}: {row['result']}", *row.get("last", ())[-1:], flush=True)
