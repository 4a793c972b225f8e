"""Checkpoints: restored exactly, or the one before, or a clear error."""

import gc
import logging
import os
import resource
import shutil
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import flip_bit, python, read_meta
from orbax.checkpoint import multihost

from nvg_jax.errors import UserError
from nvg_jax.runtime import checkpoint, processes
from nvg_jax.runtime.checkpoint import Checkpoints, check_step, checksum, read, short
from nvg_jax.runtime.storage import storage_path

# After an error Orbax leaves coroutines behind, which Python warns about.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

META = {"name": "run", "scale": [1.0, 0.3333333333333333], "none": None, "sizes": [3, 4]}


def make_state(value: int) -> dict:
    rng = np.random.default_rng(value)
    return {
        "params": {"kernel": jnp.asarray(rng.normal(size=(64, 48)), jnp.float32)},
        "half": jnp.asarray(rng.normal(size=(33,)), jnp.bfloat16),
        "step": jnp.int32(value),
    }


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def save(folder, *steps, keep=3):
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(step, make_state(step), {**META, "of": step}, {"next_index": 10 * step})
    checkpoints.close()


def same(found, state) -> bool:
    return all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True)
    )


def restore(folder, step=None):
    """(state, position, step) as a resumed run gets them."""
    with Checkpoints(folder) as checkpoints:
        state, meta, position = checkpoints.restore(lambda meta: abstract(make_state(0)), step)
        return state, position, meta["step"]


@pytest.fixture(scope="module", autouse=True)
def older_objects_aside():
    """Keeps what earlier tests left in memory out of the collections below, which take seconds."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def clear_up():
    yield
    gc.collect()  # the warnings come here, where they are filtered


@pytest.fixture
def two(tmp_path):
    save(tmp_path / "run", 1, 2)
    return tmp_path / "run"


def test_what_was_saved_comes_back(two):
    state, position, step = restore(two)
    assert step == 2 and position == {"next_index": 20} and same(state, make_state(2))
    assert read_meta(two) == {**META, "of": 2, "step": 2}
    wanted = {"params": abstract(make_state(0)["params"])}
    meta, part = read(two, lambda meta: wanted if meta["of"] == 2 else None)
    assert meta["step"] == 2 and same(part, {"params": make_state(2)["params"]})
    assert read_meta(two / "nowhere") is None and read_meta(two.parent) is None


def test_folders_on_disks_and_in_buckets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(storage_path("runs/a")) == str(tmp_path / "runs" / "a")
    assert str(storage_path("gs://bucket/a") / "b") == "gs://bucket/a/b"


def test_the_newest_checkpoints_are_kept(tmp_path):
    save(tmp_path / "run", 1, 2, 3, keep=2)
    kept = sorted(int(path.name) for path in (tmp_path / "run").iterdir() if path.name.isdigit())
    assert kept == [2, 3]


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int32, np.uint8])
def test_every_single_bit_counts(dtype):
    array = (np.arange(12).reshape(3, 4) % 2).astype(dtype)
    first = int(checksum(jnp.asarray(array)))
    width = array.dtype.itemsize
    bits = range(8 * width)
    for index in (0, 5, 11):
        for bit in bits:
            raw = bytearray(array.tobytes())
            raw[index * width + bit // 8] ^= 1 << bit % 8
            changed = np.frombuffer(bytes(raw), array.dtype).reshape(array.shape)
            assert int(checksum(jnp.asarray(changed))) != first
    swapped = array[:, ::-1]
    assert int(checksum(jnp.asarray(swapped))) != first


@pytest.mark.slow
def test_a_flipped_bit_anywhere_never_gives_wrong_numbers(two, tmp_path, caplog):
    """Training and readers get the newest checkpoint or the one before it, exactly."""
    rng = np.random.default_rng(0)
    files = sorted(
        path for path in (two / "2").rglob("*") if path.is_file() and path.stat().st_size
    )
    assert len(files) > 5
    fell_back = 0
    largest = max(files, key=lambda path: path.stat().st_size)
    for file in files:
        for trial in range(6 if file == largest else 1):
            copy = tmp_path / f"copy_{file.name}_{trial}"
            shutil.copytree(two, copy)
            flip_bit(copy / file.relative_to(two), int(rng.integers(file.stat().st_size)), trial)
            meta, part = read(copy, lambda meta: {"params": abstract(make_state(0)["params"])})
            assert meta["of"] == meta["step"]
            assert same(part, {"params": make_state(meta["step"])["params"]})
            state, position, step = restore(copy)
            assert position == {"next_index": 10 * step} and same(state, make_state(step))
            fell_back += step == 1
            shutil.rmtree(copy)
    assert fell_back >= 6
    assert "is damaged" in caplog.text


def test_truncated_missing_and_broken_files_give_the_one_before(two, tmp_path, caplog):
    largest = max((two / "2").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    metadata = next((two / "2" / "meta").glob("*"))
    for number, damage in enumerate(
        (
            lambda copy: os.truncate(copy / largest.relative_to(two), 100),
            lambda copy: (copy / largest.relative_to(two)).unlink(),
            lambda copy: (copy / metadata.relative_to(two)).write_text("{"),
            lambda copy: shutil.rmtree(copy / "2" / "state"),
        )
    ):
        copy = tmp_path / str(number)
        shutil.copytree(two, copy)
        damage(copy)
        wanted = {"params": abstract(make_state(0)["params"])}
        meta, part = read(copy, lambda meta: wanted)
        assert meta["step"] == 1 and same(part["params"], make_state(1)["params"])
        state, _, step = restore(copy)
        assert step == 1 and same(state, make_state(1))
        assert (copy / "damaged_2").is_dir() and not (copy / "2").exists()
        save(copy, 2)  # as the resumed run will
        assert restore(copy)[2] == 2
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert any("The checkpoint of step 2" in r.getMessage() for r in warnings)


def test_a_long_message_ends_with_its_reason():
    message = f"INTERNAL: {'x' * 400} No space left on device [source locations]. More"
    assert short(OSError(message)).endswith("x: No space left") and len(short(message)) < 330


def test_going_back_renames_what_came_later(tmp_path):
    folder = tmp_path / "run"
    save(folder, 1, 2, 3)
    with pytest.raises(UserError, match="no checkpoint of step 5 in .*; it has those of 1, 2, 3"):
        check_step(folder, 5)
    state, position, step = restore(folder, step=2)
    assert step == 2 and position == {"next_index": 20} and same(state, make_state(2))
    assert (folder / "abandoned_3").is_dir() and read_meta(folder)["step"] == 2
    save(folder, 3)  # as the run will
    restore(folder, step=2)
    assert (folder / "abandoned_3_1").is_dir() and restore(folder)[2] == 2


def test_when_all_are_damaged_nothing_starts_over(two):
    for step in ("1", "2"):
        largest = max((two / step).rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
        os.truncate(largest, 10)
    with pytest.raises(UserError, match=r"Every checkpoint in .* is damaged"):
        restore(two)
    with pytest.raises(UserError, match=r"Every checkpoint in .* is damaged"):
        read(two, lambda meta: abstract(make_state(0)))
    assert (two / "1").is_dir() and (two / "2").is_dir()


def test_one_process_at_a_time_writes_to_a_folder(two):
    with Checkpoints(two), pytest.raises(UserError, match=f"Another command is writing to {two}"):
        Checkpoints(two)
    assert restore(two)[2] == 2


def test_another_model_is_not_reported_as_damage(two):
    other = make_state(0)
    other["params"]["kernel"] = jnp.zeros((64, 47))
    with pytest.raises(UserError, match=r"params/kernel should be float32 \(64, 47\)"):
        read(two, lambda meta: abstract(other))
    checkpoints = Checkpoints(two)
    with pytest.raises(UserError, match="are of another model"):
        checkpoints.restore(lambda meta: abstract(other))
    checkpoints.close()
    assert restore(two)[2] == 2


def test_a_save_that_was_cut_off_does_not_count(two):
    shutil.copytree(two / "2", two / "3.orbax-checkpoint-tmp")
    assert read_meta(two)["step"] == 2
    save(two, 3)
    shutil.copytree(two / "2", two / "4.orbax-checkpoint-tmp")
    assert restore(two)[2] == 3


DENIED = ValueError("PERMISSION_DENIED: Error reading gs://b/2/state/manifest.ocdbt: HTTP 403")


def failing(monkeypatch, errors: list[Exception]) -> list[float]:
    """Makes the first reads fail; returns the pauses between attempts."""
    read_item, pauses = ocp.CheckpointManager.restore, []

    def fail(*args, **kwargs):
        if errors:
            raise errors.pop(0)
        return read_item(*args, **kwargs)

    monkeypatch.setattr(ocp.CheckpointManager, "restore", fail)
    monkeypatch.setattr(checkpoint.time, "sleep", pauses.append)
    return pauses


def test_a_read_that_fails_is_repeated_and_is_no_damage(two, monkeypatch):
    errors = [TimeoutError("late"), OSError("Forbidden: b/2"), DENIED]
    pauses = failing(monkeypatch, errors)
    assert restore(two)[2] == 2
    assert pauses == [1, 2, 4]


@pytest.mark.parametrize("number", [3, 6])  # the checksum of the metadata, those of the arrays
def test_what_another_process_reads_damaged_is_damaged_here(two, monkeypatch, number):
    """Otherwise they would go on with different checkpoints, or wait for each other forever."""
    from_all, asked = processes.from_all, []

    def with_another(value):
        asked.append(value)
        there = np.asarray(value) | (len(asked) == number)
        return np.concatenate([from_all(value), from_all(there)])

    monkeypatch.setattr(processes, "from_all", with_another)
    assert restore(two)[2] == 1


@pytest.mark.parametrize("denied", [DENIED, OSError("Forbidden: PERMISSION_DENIED")])
def test_a_read_that_fails_for_minutes_is_a_failure(two, monkeypatch, denied):
    pauses = failing(monkeypatch, [denied] * 100)
    with pytest.raises(type(denied), match="PERMISSION_DENIED") as raised:
        restore(two)
    assert not isinstance(raised.value, UserError)  # so the process is started again
    assert 60 < sum(pauses) < 600
    monkeypatch.undo()
    assert restore(two)[2] == 2


def test_a_save_that_cannot_be_read_is_not_done(two):
    with pytest.raises(RuntimeError, match="/3 cannot be read: it has no index of its arrays"):
        with Checkpoints(two) as checkpoints:
            checkpoints.save(3, make_state(3), META)
            checkpoints._manager.wait_until_finished()
            (two / "3" / "state" / "manifest.ocdbt").unlink()
            checkpoints.save(4, make_state(4), META)
    assert restore(two)[2] == 2


def test_other_failures_are_not_called_a_full_disk(two, monkeypatch):
    checkpoints = Checkpoints(two)

    def fail(*args, **kwargs):
        raise RuntimeError("the connection was lost")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="connection was lost"):
        patch.setattr(checkpoints._manager, "save", fail)
        checkpoints.save(3, make_state(3), META)
    checkpoints.save(3, make_state(3), META)
    checkpoints.close()
    assert restore(two)[2] == 3


def test_orbax_does_not_poll_for_preemption(two, monkeypatch):
    """Training polls for preemption itself; a second caller would disturb its counter."""

    def ask(step):
        raise AssertionError("asked")

    monkeypatch.setattr(multihost, "reached_preemption", ask)
    save(two, 3)
    assert restore(two)[2] == 3


def fill_disk(folder):
    """Saves with a file size limit below the size of the checkpoint, as on a full disk."""
    checkpoints = Checkpoints(folder)
    big = make_state(3) | {"big": jnp.asarray(np.random.default_rng(0).normal(size=1 << 18))}
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, resource.RLIM_INFINITY))
    try:
        checkpoints.save(3, big, META)
        checkpoints.wait()
    except UserError as error:
        print(error, flush=True)
    os._exit(0)  # skips the cleanup, in which Orbax would raise


@pytest.mark.slow
def test_a_full_disk_is_explained_and_old_checkpoints_stay(two):
    done = python(__file__, two, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert f"could not be written to {two}" in done.stdout, done
    assert "free some space" in done.stdout
    state, _, step = restore(two)
    assert step == 2 and same(state, make_state(2))


if __name__ == "__main__":
    fill_disk(sys.argv[1])


def test_a_folder_that_another_process_lacks_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "gather", lambda own, count: np.array([*own, not own[0]]))
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="Only some processes see .*all processes share"):
            checkpoint.read(folder, lambda content: {})
