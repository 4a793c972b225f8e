"""Signs of life of a training, and its end when there are none."""

import json
import os
import time
from pathlib import Path

import pytest
from etils import epath
from helpers import CACHE_READ_ONLY, forked, make_reporter, python

from nvg_jax.runtime import heartbeat
from nvg_jax.runtime.progress import Progress
from nvg_jax.runtime.storage import storage_path

# The heartbeat.


def test_every_line_of_the_log_replaces_the_heartbeat(tmp_path, monkeypatch):
    monkeypatch.setenv("NVG_HEARTBEAT", str(tmp_path / "here.json"))
    read = lambda: json.loads((tmp_path / "run/heartbeat.json").read_text())
    before = time.time()
    (tmp_path / "run/tokenizer").mkdir(parents=True)
    reporter = make_reporter(tmp_path / "run", "tokenizer", start=4)
    assert read() | {"time": 0} == dict(part="tokenizer", start=4, step=4, time=0, steps=9, loss={})
    for step, loss in ((6, 0.5), (8, 0.25)):
        reporter.start_step()
        reporter.add({"l1_loss": loss, "accuracy": 0.0})
        reporter.add({"l1_loss": loss, "accuracy": 0.0})
        reporter.progress(step, learning_rate=1.0, checkpoint=None)
        line = read()
        reporter.evaluation(step, {"psnr": 1.0}, picture=None)
        reporter.fid(step, 1.0, best=1.0)
        beat = read()
        assert line["time"] < beat["time"]
        assert before <= beat.pop("time") <= time.time()
        assert beat == dict(part="tokenizer", start=4, step=step, steps=9, loss={"l1_loss": loss})
    reporter.close()
    text = (tmp_path / "here.json").read_text()
    assert text == (tmp_path / "run/heartbeat.json").read_text() and text.count("\n") == 1
    # What launchers compare: it changes when training goes on from another checkpoint.
    assert text.split(', "step"')[0] == '{"part": "tokenizer", "start": 4'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here.json", "run"]


def test_the_heartbeat_goes_on_while_something_else_does(tmp_path, monkeypatch):
    beats = lambda: json.loads((tmp_path / "heartbeat.json").read_text())["time"]
    heartbeat.beat(epath.Path(tmp_path), "tokenizer", 0, 5)
    first = beats()
    progress = Progress("features", 3, "images")
    progress.update(1)
    assert beats() == first  # it is not a minute old
    monkeypatch.setattr(heartbeat, "AGAIN", 0)
    progress.update(2)
    assert beats() > first
    heartbeat.stop()
    first = beats()
    progress.update(3)
    assert beats() == first


class Bucket:
    """A client of buckets, as fsspec gives."""

    def __init__(self):
        self.objects = {}

    def put_file(self, local, name):
        if "denied" in name:
            raise RuntimeError("403")
        self.objects[name] = Path(local).read_text()


@pytest.fixture
def bucket(monkeypatch):
    client = Bucket()
    monkeypatch.setattr("fsspec.filesystem", {"gs": client}.get)
    return client


def test_the_heartbeat_in_a_bucket_is_written_in_one_piece(bucket):
    heartbeat.beat(storage_path("gs://b/run"), "tokenizer", 0, 5)
    assert json.loads(bucket.objects["gs://b/run/heartbeat.json"])["step"] == 5


@pytest.mark.parametrize("place", ["gs://denied", "/dev/null"])
def test_a_heartbeat_that_cannot_be_written_ends_nothing(bucket, place, caplog):
    with caplog.at_level("WARNING", "nvg_jax"):
        heartbeat.beat(storage_path(place), "tokenizer", 0, 5)
    assert "heartbeat.json cannot be written" in caplog.text


def test_only_process_0_writes_to_the_workdir(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "is_main", lambda: False)
    monkeypatch.setenv("NVG_HEARTBEAT", str(tmp_path / "here.json"))
    heartbeat.beat(epath.Path(tmp_path), "tokenizer", 0, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["here.json"]


# The watchdog.

STUCK = """
import ctypes, time
from nvg_jax.runtime import watchdog

def stuck(): {stuck}

watchdog.SLOW = {slow}
watchdog.start({timeout})
for _ in range(15):
    watchdog.reset()
    time.sleep(0.1)
{last}
print("goes on", flush=True)
stuck()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "stuck",
    ["time.sleep(60)", "ctypes.PyDLL(None).sleep(60)"],  # the second holds Python's lock
)
def test_what_stands_still_is_ended_with_its_stacks(stuck):
    done = python("-c", STUCK.format(stuck=stuck, slow=2, timeout=1, last=""))
    assert done.returncode == 1 and done.stdout == "goes on\n"
    assert done.stderr.startswith("Timeout (0:00:01)!") and "in stuck" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "slow, timeout, last", [(60, 1, "watchdog.reset(slow=True)"), (0, 0, ""), (0, 9, "")]
)
def test_what_goes_on_or_may_be_slow_is_left_alone(slow, timeout, last):
    script = STUCK.format(stuck="time.sleep(1.5)", slow=slow, timeout=timeout, last=last)
    done = python("-c", script)
    assert (done.returncode, done.stderr) == (0, "")


TRAIN = """
import runpy, sys, time
from nvg_jax.runtime import sharding, watchdog
from nvg_jax.training.run import Run

place, calls, evaluated = sharding.global_batch, [], Run.test_batches
watchdog.SLOW = {slow}

def place_and_stop(batch, mesh):
    calls.append(batch)
    if len(calls) == {stop}:
        time.sleep(600)
    return place(batch, mesh)

def slowly(*arguments):
    for batch in evaluated(*arguments):
        time.sleep(1.6)  # seven batches: longer than stall_timeout in all
        yield batch

sharding.global_batch, Run.test_batches = place_and_stop, slowly
sys.argv = ["train", "--config=configs/digits.py:runlocal", "--config.part=tokenizer"]
sys.argv += ["--config.stall_timeout={timeout}", "--workdir={workdir}"]
runpy.run_module("nvg_jax.train", run_name="__main__")
"""


@pytest.mark.slow
def test_a_training_that_stands_still_is_ended_and_goes_on_when_restarted(tmp_path):
    def start(stop):
        script = TRAIN.format(stop=stop, timeout=10, slow=100, workdir=tmp_path)
        return forked("-c", script, env=os.environ | CACHE_READ_ONLY)

    stuck = start(stop=7)
    assert stuck.returncode == 1, stuck.stderr
    assert "Timeout (0:00:10)!" in stuck.stderr and "in place_and_stop" in stuck.stderr
    assert json.loads((tmp_path / "heartbeat.json").read_text())["step"] == 6
    whole = start(stop=0)
    assert whole.returncode == 0, whole.stderr
    beat = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (beat["start"], beat["step"], beat["steps"]) == (4, 12, 12)
