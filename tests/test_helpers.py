"""What other tests rely on."""

import sys

import pytest
from helpers import Process, finish, run

STUCK = """
import threading, time
def one(): time.sleep(60)
def other(): time.sleep(60)
threading.Thread(target=one).start()
print("beg" + "un", flush=True)
other()
"""
COMMAND = [sys.executable, "-c", STUCK]


@pytest.mark.slow
def test_processes_that_stand_still_are_killed_and_all_stacks_printed():
    with Process(COMMAND, timeout=2) as alone, Process(COMMAND, timeout=2) as with_another:
        with pytest.raises(AssertionError, match="did not end in time") as raised:
            finish(alone, with_another)
    said = str(raised.value)
    assert said.count("begun") == said.count("in one") == said.count("in other") == 2
    assert alone.poll() is not None and with_another.poll() is not None


@pytest.mark.slow
def test_what_a_shell_started_is_killed_with_it():
    with pytest.raises(AssertionError, match="in other"):
        run(["bash", "-c", '"$@"; true', "bash", *COMMAND], timeout=2)


def test_outputs_and_code_of_a_process():
    done = run([sys.executable, "-c", "import sys; print(1); sys.exit('two')"])
    assert (done.returncode, done.stdout, done.stderr) == (1, "1\n", "two\n")
