"""Paths on disks and in buckets, and what commands refuse before they do any work."""

import contextlib
import errno
import fcntl
import os
import time
from pathlib import Path

import pytest
from helpers import raising

from nvg_jax import workdir
from nvg_jax.errors import UserError
from nvg_jax.runtime import checkpoint, storage
from nvg_jax.runtime.storage import (
    alone,
    atomic_path,
    atomic_write,
    in_bucket,
    local_path,
    locked,
    storage_path,
    write_file,
)


def test_where_only_files_can_be_locked_a_file_is(tmp_path, monkeypatch):
    """As on NFS, which locks what is open for writing."""
    lock = fcntl.flock

    def of_nfs(descriptor, operation):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EBADF, "Bad file descriptor")
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", of_nfs)
    with locked(tmp_path) as first, locked(tmp_path) as second:
        assert first and not second
    with locked(tmp_path) as again:
        assert again


def test_a_lock_that_outlives_its_machine_is_waited_for(tmp_path, monkeypatch):
    stack = contextlib.ExitStack()
    assert stack.enter_context(locked(tmp_path))
    waits = []
    monkeypatch.setattr(time, "sleep", lambda seconds: waits.append(seconds) or stack.close())
    with pytest.raises(UserError, match="Another command is writing to"), alone(tmp_path):
        pass
    assert not waits  # nobody starts the command again
    monkeypatch.setenv("NVG_HEARTBEAT", str(tmp_path / "beat"))
    with alone(tmp_path):
        assert waits
        monkeypatch.setattr(storage, "PATIENCE", 0)
        with pytest.raises(UserError, match="Another command is writing to"), alone(tmp_path):
            pass


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """The home folder is HOME, the current folder WORK."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.mark.parametrize(
    "given, expected",
    [
        ("runs/x", "{tmp}/work/runs/x"),
        ("./runs//x/", "{tmp}/work/runs/x"),
        ("../x", "{tmp}/x"),
        (Path("runs/x/"), "{tmp}/work/runs/x"),
        (Path("~/x"), "{tmp}/home/x"),
        ("~", "{tmp}/home"),
        ("~/runs/x/", "{tmp}/home/runs/x"),
        ("./~", "{tmp}/work/~"),
        ("/data/a b[1]*?", "/data/a b[1]*?"),
        ("gs://bucket/run", "gs://bucket/run"),
        ("gs://bucket/run/", "gs://bucket/run"),
        ("gs://bucket//run/./a/../b", "gs://bucket/run/b"),
        ("gs://bucket", "gs://bucket"),
        (Path("gs://bucket/run"), "gs://bucket/run"),  # pathlib makes it gs:/bucket/run
    ],
)
def test_a_path_that_a_user_gives(given, expected, tmp_path):
    path = storage_path(given)
    assert os.fspath(path) == expected.format(tmp=tmp_path)
    assert storage_path(path) == path == storage_path(os.fspath(path))
    assert in_bucket(path) == expected.startswith("gs:")
    if not in_bucket(path):
        assert local_path(given, "it") == Path(path)


@pytest.mark.parametrize(
    "given, message",
    [
        ("", "A path is empty"),
        ("gs://", "neither a path nor a bucket's URL"),
        ("hdfs://host/run", "neither a path nor a bucket's URL"),
        ("https://huggingface.co/org/name", "the Hugging Face hub is hf://ORG/NAME"),
        ("s3://bucket/run", "needs the package s3fs"),
        ("~nobody_of_that_name/x", "needs a home folder"),
        ("/gs/bucket/run", "Mount or link it under another name"),
        ("/tmp/" + 300 * "x", "cannot be used: File name too long"),
    ],
)
def test_paths_that_are_refused(given, message, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "s3fs" else name)
    with pytest.raises(UserError, match=message):
        storage_path(given)


def test_what_must_be_on_a_disk_is_not_in_a_bucket():
    with pytest.raises(UserError, match="data_dir must be a path on this machine, not gs://b/x"):
        local_path("gs://b/x", "data_dir")


@pytest.mark.parametrize("name", ["exp[1]", "a*b", "what?", "back\\slash"])
def test_checkpoints_are_refused_where_they_could_not_be_read(name, tmp_path):
    with pytest.raises(UserError, match="is a pattern for Orbax"):
        checkpoint.run_folder(tmp_path / name)
    with pytest.raises(UserError, match="is a pattern for Orbax"):
        checkpoint.Checkpoints(tmp_path / name / "tokenizer")
    assert not (tmp_path / name).exists()


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x"
    with atomic_write(path) as file:
        file.write(b"old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    with atomic_write(path, shared=True) as file:  # by two commands at once
        with atomic_write(path, shared=True) as other:
            other.write(b"other")
        file.write(b"new")
    assert path.read_bytes() == b"new"
    write_file(path, "é")
    assert path.read_bytes() == b"\xc3\xa9"
    with pytest.raises(UserError, match="x cannot be written: No such file"):
        with atomic_write(tmp_path / "missing" / "x"):
            pass


def test_a_disk_that_fails_is_no_mistake_and_a_closed_folder_is_one_where_it_is_read(monkeypatch):
    """Whether a machine may enter a folder says nothing of those that will."""
    failing = lambda number: raising(OSError(number, os.strerror(number)))
    monkeypatch.setattr(os, "stat", failing(errno.ESTALE))
    with pytest.raises(OSError, match="Stale file handle"):
        storage_path("/mnt/nfs/run")
    monkeypatch.setattr(os, "stat", failing(errno.EACCES))
    place = storage_path("/mnt/closed/run")
    with pytest.raises(UserError, match="/mnt/closed/run cannot be read: Permission denied"):
        workdir.read_workdir(place)
