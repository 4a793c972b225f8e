"""TensorBoard's event files: what TensorBoard reads, and no need of TensorFlow."""

import contextlib
import errno
import io
from unittest.mock import Mock

import numpy as np
import pytest
from etils import epath
from helpers import logged, make_reporter, python
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from nvg_jax.training import metrics


def read(folder) -> list[tuple]:
    """(step, tag, content) in the order in which TensorBoard reads them."""
    found = []
    for path in sorted(folder.iterdir()):
        events = list(EventFileLoader(str(path)).Load())
        assert events[0].file_version == "brain.Event:2"
        for event in events[1:]:
            for value in event.summary.value:
                content = value.tensor.float_val or value.tensor.string_val
                found.append((event.step, value.tag, list(content)))
    return found


def test_tensorboard_reads_what_was_written(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    writer = metrics.EventWriter(epath.Path(tmp_path / "tokenizer"))
    writer.write_scalars(7, {"l1_loss": 0.5, "accuracy/3": 1.0})
    writer.write_images(8, {"pictures": picture})
    writer.flush()
    writer.write_scalars(9, {"l1_loss": 0.25})
    writer.flush()
    assert len(list((tmp_path / "tokenizer").iterdir())) == 1
    *scalars, (step, tag, (width, height, content)), last = read(tmp_path / "tokenizer")
    assert scalars == [(7, "l1_loss", [0.5]), (7, "accuracy/3", [1.0])]
    assert last == (9, "l1_loss", [0.25])
    assert (step, tag, width, height) == (8, "pictures", b"6", b"4")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(content))), picture)


def test_only_a_few_steps_are_queued(tmp_path, monkeypatch):
    """Each holds its batch in memory, and all have to end before a preempted run is saved."""
    ended = []
    monkeypatch.setattr(metrics.jax, "block_until_ready", ended.append)
    reporter = make_reporter(tmp_path, "tokenizer")
    for step in range(5):
        reporter.add({"loss": step})
    assert ended == [{"loss": 0}, {"loss": 1}, {"loss": 2}]


def test_an_evaluation_that_is_noted_as_done_is_in_the_file(tmp_path):
    """A process that is killed then would not repeat it."""
    reporter = make_reporter(tmp_path, "tokenizer")
    reporter.fid(3, 5.0, 5.0)
    reporter.assessed(3)
    assert logged(tmp_path / "tokenizer")["fid", 3] == 5.0


def test_the_file_of_a_later_process_comes_later_whatever_its_clock_says(tmp_path, monkeypatch):
    for number, now in enumerate((1796123988.5, 1796123988.9, 1796120000.0)):
        monkeypatch.setattr(metrics.time, "time", lambda now=now: now)
        writer = metrics.EventWriter(epath.Path(tmp_path))
        writer.write_scalars(number, {"loss": 0.5})
        writer.flush()
    assert [step for step, *_ in read(tmp_path)] == [0, 1, 2]


def test_objects_in_a_bucket_are_written_whole_and_never_again(tmp_path, monkeypatch):
    """An object for each flush; together they are read like one file."""
    writer = metrics.EventWriter(epath.Path(tmp_path))
    monkeypatch.setattr(writer, "_in_bucket", True)
    for step in range(11):
        writer.write_scalars(step, {"l1_loss": step})
        writer.flush()
        writer.flush()  # nothing left: no object
    assert len(list(tmp_path.iterdir())) == 11
    assert read(tmp_path) == [(step, "l1_loss", [step]) for step in range(11)]


@pytest.mark.parametrize("in_bucket", [False, True])
def test_a_failure_to_write_ends_no_training(tmp_path, monkeypatch, caplog, in_bucket):
    writer = metrics.EventWriter(epath.Path(tmp_path))
    monkeypatch.setattr(writer, "_in_bucket", in_bucket)
    with monkeypatch.context() as broken:
        broken.setattr(metrics, "write_file", Mock(side_effect=RuntimeError("503")))
        broken.setattr(metrics, "reported", Mock(side_effect=OSError(errno.EIO, "stale")))
        writer.write_scalars(0, {"l1_loss": 1.0})
        writer.flush()
    assert "cannot be written now" in caplog.text and not list(tmp_path.iterdir())
    writer.write_scalars(1, {"l1_loss": 2.0})
    writer.flush()
    assert read(tmp_path) == [(0, "l1_loss", [1.0]), (1, "l1_loss", [2.0])]


def test_what_a_failed_write_left_is_written_over(tmp_path, monkeypatch):
    @contextlib.contextmanager
    def fails_at_the_end(what):
        yield
        raise OSError(errno.EIO, "the disk answered too late")

    writer = metrics.EventWriter(epath.Path(tmp_path))
    writer.write_scalars(0, {"l1_loss": 1.0})
    writer.write_scalars(1, {"l1_loss": 2.0})
    with monkeypatch.context() as broken:
        broken.setattr(metrics, "reported", fails_at_the_end)
        writer.flush()
    writer.write_scalars(2, {"l1_loss": 3.0})
    writer.flush()
    assert [step for step, *_ in read(tmp_path)] == [0, 1, 2]


def test_events_appear_while_a_training_runs(tmp_path, monkeypatch):
    writer = metrics.EventWriter(epath.Path(tmp_path))
    writer.write_scalars(0, {"l1_loss": 1.0})  # at once, so that a run is seen from its start
    writer.write_scalars(1, {"l1_loss": 1.0})
    assert len(read(tmp_path)) == 1
    later = metrics.time.monotonic() + metrics.FLUSH_SECONDS + 1
    monkeypatch.setattr(metrics.time, "monotonic", lambda: later)
    writer.write_scalars(2, {"l1_loss": 1.0})
    assert [step for step, *_ in read(tmp_path)] == [0, 1, 2]


def test_only_process_0_writes_events(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "is_main", lambda: False)
    writer = metrics.EventWriter(epath.Path(tmp_path))
    writer.write_scalars(0, {"l1_loss": 1.0})
    writer.flush()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_training_needs_no_tensorflow(tmp_path):
    """All that a training imports, and the events."""
    script = """
import sys
sys.modules["tensorflow"] = None  # importing it raises an error
from etils import epath
from nvg_jax import distill, train
from nvg_jax.data import loader, sources
from nvg_jax.jobs import training
from nvg_jax.training import metrics
writer = metrics.EventWriter(epath.Path(sys.argv[1]))
writer.write_scalars(1, {"l1_loss": 1.0})
"""
    done = python("-c", script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(read(tmp_path)) == 1
