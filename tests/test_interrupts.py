"""Ctrl-C of a command: one line, nothing left behind, and the work saved if there is any."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from helpers import CACHE_READ_ONLY, TIMEOUT, Process, finish, python, read_meta, wait_for

# Python's own handler, which a background process of a shell does not have.
FOREGROUND = "import os, signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"


def run(script: str) -> tuple[int, str, float]:
    """(exit code, output, seconds) of a script."""
    start = time.monotonic()
    done = python("-c", FOREGROUND + script, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout, time.monotonic() - start


def test_during_the_imports_of_a_command():
    code, output, _ = run(
        # As Python says while it looks for the module.
        "import sys, time; sys.argv[0] = '-m'; sys.orig_argv = ['python', '-m', 'nvg_jax.train']\n"
        "import nvg_jax\n"
        "os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
    )
    assert (code, output) == (130, "Interrupted.\n")


@pytest.mark.parametrize("before", ["", "import sys; sys.argv[0] = '-m'; "])  # of another package
def test_a_library_handles_no_signals(before):
    code, output, _ = run(before + "import nvg_jax; os.kill(os.getpid(), signal.SIGINT)")
    assert code == -signal.SIGINT and "KeyboardInterrupt" in output


STUCK = """
import multiprocessing, threading, time
from nvg_jax.runtime import interrupts

if __name__ == "__main__":
    interrupts.listen()
    interrupts.kept = "Parts are kept."
    context = multiprocessing.get_context("fork")
    child = context.Process(target=time.sleep, args=(600,), daemon=True)
    child.start()
    print(child.pid, flush=True)
    os.kill(child.pid, signal.SIGINT)  # which it does not notice
    time.sleep(0.1)
    assert child.is_alive()
"""


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_it_ends_at_once_with_its_workers_though_the_main_thread_is_in_a_library():
    code, output, _ = run(
        STUCK + "    import ctypes; threading.Timer(0.2, os.kill, (os.getpid(), 2)).start()\n"
        "    ctypes.CDLL(None).sleep(60)\n"
    )
    pid, line = output.splitlines()
    assert (code, line) == (130, "Interrupted. Parts are kept.")
    assert is_gone(int(pid))


def test_the_first_is_a_request_while_there_is_work_to_save_and_the_second_ends():
    code, output, _ = run(
        STUCK + "    interrupts.defer(True); os.kill(os.getpid(), 2)\n"
        "    assert interrupts.requested.wait(30); print('saves', flush=True)\n"
        "    os.kill(os.getpid(), 2); time.sleep(60)\n"
    )
    first = "Saving after this step. Ctrl-C again ends at once."
    assert code == 130 and first in output and "saves" in output  # two threads, in any order
    assert output.endswith("\nInterrupted. Parts are kept.\n")


@pytest.mark.slow
def test_whatever_a_library_waits_for_at_the_end():
    code, output, seconds = run(
        STUCK + "    from nvg_jax.runtime import preemption\n"
        "    interrupts.GRACE = 0.5\n"
        "    try:\n"
        "        preemption.stop('All is saved.')\n"
        "    finally:\n"
        "        threading.Thread(target=time.sleep, args=(600,)).start()\n"  # joined at exit
    )
    assert code == 75 and seconds < 50
    assert "preempted; All is saved." in output


def progress(workdir) -> int:
    """The step in the heartbeat of a training; 0 before the first."""
    beat = workdir / "heartbeat.json"
    return json.loads(beat.read_text())["step"] if beat.exists() else 0


@pytest.mark.slow
def test_a_training_with_workers_saves_and_ends(tmp_path):
    command = [
        "-m", "nvg_jax.train", "--config=configs/digits.py:runlocal", "--config.part=tokenizer",
        f"--workdir={tmp_path}", "--config.data.num_workers=2",
        "--config.tokenizer_training.length=12 steps",
    ]  # fmt: skip
    script = "import sys\nos.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    command = [sys.executable, "-c", FOREGROUND + script, *command]
    with Process(command, env=os.environ | CACHE_READ_ONLY) as process:
        wait_for(lambda: process.poll() is not None or progress(tmp_path) >= 2, TIMEOUT)
        process.send_to_all(signal.SIGINT)  # as a terminal does
        (done,) = finish(process)
        ended = time.time()
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr and "Saving after this step" in done.stderr
    step = read_meta(tmp_path / "tokenizer")["step"]
    assert ended - (tmp_path / "tokenizer" / str(step)).stat().st_mtime < 10  # since it was saved
    last = done.stderr.splitlines()[-1]
    assert re.search(rf"interrupted; tokenizer: saved at step {step} of 12. The same", last)
