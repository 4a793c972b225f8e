"""Runs that are killed at any moment end with the weights of an uninterrupted run."""

import faulthandler
import os
import random
import shlex
import signal
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import flags
from helpers import TIMEOUT, fork, tiny_config

from nvg_jax.runtime import preemption, sharding
from nvg_jax.train import train
from nvg_jax.training.changes import MAY_CHANGE

KILLS = int(os.environ.get("NVG_JAX_TEST_KILLS", "2"))  # of each part
pytestmark = pytest.mark.slow


def run_to_be_killed(workdir, part):
    """A training that saves often, without writing to the shared compilation cache.

    A kill would leave half an entry. It ends with the stacks of all threads if it takes too long.
    """
    faulthandler.dump_traceback_later(TIMEOUT, exit=True)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    flags.FLAGS(["tests"])
    config = tiny_config(part=part)
    config.tokenizer_training.save_every = config.generator_training.save_every = 2
    train(config, workdir)


def content(folder):
    """Every item of the latest checkpoint of a run: the state's bits, the rest as JSON.

    Without the folder that it names, and settings that do not matter to what was trained.
    """
    with ocp.CheckpointManager(folder) as manager:
        items = ocp.args.Composite(state=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore())
        found = manager.restore(manager.latest_step(), args=items)
    meta = found["meta"]
    meta["meta"].pop("tokenizer_workdir", None)
    config = meta["meta"]["config"]
    config.pop("part")
    for training in (config["tokenizer_training"], config["generator_training"]):
        for name in MAY_CHANGE & training.keys():
            training.pop(name)
    meta.pop("digest")
    return jax.tree.map(np.asarray, found["state"]), meta


PARTS = "tokenizer", "generators"


def assert_same_run(folder, whole, parts=PARTS):
    for name in parts:
        (state, meta), (whole_state, whole_meta) = content(folder / name), content(whole / name)
        jax.tree.map(np.testing.assert_array_equal, state, whole_state)
        assert meta == whole_meta


def progress(folder) -> int:
    """The latest finished checkpoint of a part, read off the names of the folders."""
    return max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=0)


def saves(folder) -> set[str]:
    """Folders of unfinished saves. They may vanish during the search, which os.walk tolerates."""
    return {name for _, names, _ in os.walk(folder) for name in names if "tmp" in name}


@pytest.mark.parametrize("part", PARTS)
def test_kills_at_random_moments_change_nothing(trained, tmp_path, part):
    """Kills during a save, after one, so that the run makes progress, or at any moment."""
    rng = random.Random(int(os.environ.get("NVG_JAX_TEST_SEED", "0")))
    folder, reached = tmp_path / part, []
    if part == "generators":
        (tmp_path / "tokenizer").symlink_to(trained / "tokenizer")
    for kill in range(KILLS):
        begun, finished = saves(folder), progress(folder)
        process = fork(run_to_be_killed, tmp_path, part)
        if kill % 3 == 0:
            until = lambda: saves(folder) - begun
        elif kill % 3 == 1:
            until = lambda: progress(folder) > finished
        else:
            until = None
        while until and process.is_alive() and not until():
            time.sleep(0.002)
        process.join(rng.uniform(0, 0.6 if until else 6))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        reached.append(progress(folder))
    assert reached == sorted(reached), "a kill lost finished checkpoints"
    assert reached[-1] > 0
    train(tiny_config(part=part), tmp_path)
    assert_same_run(tmp_path, trained, [part])
    print("after each kill:", reached)


@pytest.mark.parametrize("batch,step", [(3, 3), (14, 12)])  # the second: after the last step
def test_asked_to_end_it_saves_at_once_and_loses_no_step(
    trained, tmp_path, monkeypatch, caplog, batch, step
):
    caplog.set_level("INFO", "nvg_jax")
    folder = tmp_path / "my run"
    handler = signal.getsignal(signal.SIGTERM)
    place, calls = sharding.global_batch, []

    def count(images, mesh):
        calls.append(images)
        if len(calls) == batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return place(images, mesh)

    monkeypatch.setattr(sharding, "global_batch", count)
    try:
        preemption.watch()
        with pytest.raises(preemption.Preempted, match=f"tokenizer: saved at step {step} of 12"):
            train(tiny_config(), folder)
    finally:
        signal.signal(signal.SIGTERM, handler)
        preemption._asked.clear()
    assert [progress(folder / part) for part in PARTS] == [step, 0]
    assert "finished" not in caplog.text
    if step < 12:
        train(tiny_config(), folder)
        assert_same_run(folder, trained)
        said, _, command = caplog.messages[-1].partition(": ")
        workdir = f"--workdir={folder}"
        assert said == "finished; to draw samples"
        assert shlex.split(command)[1:4] == ["-m", "nvg_jax.sample", workdir]
