"""Files: paths on disks and in buckets, atomic writes, fingerprints, JSON with a checksum."""

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
from etils import epath

from nvg_jax.errors import UserError, reported


def storage_path(folder: str | os.PathLike) -> epath.Path:
    """The absolute path of a folder on a disk or in a bucket (gs://...)."""
    folder = os.fspath(folder)
    return epath.Path(folder if "://" in folder else os.path.abspath(folder))


@contextlib.contextmanager
def local_file(path: epath.Path) -> Iterator[Path]:
    """A file as one of this machine's disk: itself or, from a bucket, a temporary copy."""
    if "://" not in os.fspath(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = epath.Path(folder) / path.name
        path.copy(copy)
        yield Path(copy)


@contextlib.contextmanager
def atomic_path(path: Path | epath.Path) -> Iterator[Path]:
    """A temporary path to write to; its file replaces `path` when the block succeeds.

    After an interruption at any moment, `path` is either complete or as it was before. A file in a
    bucket is written to a disk and then copied, which is atomic there.

    Raises:
        UserError: there is no space or no permission; the message names `path`.
    """
    if "://" in os.fspath(path):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / path.name
            (epath.Path(folder) / path.name).copy(path, overwrite=True)
        return
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if error.filename not in (None, str(temporary)):  # an error about another file
            raise
        with reported(f"{path} cannot be written"):
            raise


@contextlib.contextmanager
def atomic_write(path: Path | epath.Path) -> Iterator[BinaryIO]:
    """Like `atomic_path`, but yields the temporary file, opened for binary writing."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        yield file


def lock(folder: epath.Path) -> int | None:
    """Locks a folder against other processes, until the descriptor is closed or this process ends.

    Returns:
        A file descriptor; None where nothing can be locked: in buckets and on some network disks.

    Raises:
        BlockingIOError: another process has locked it.
    """
    if "://" in os.fspath(folder):
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor


def make_folder(folder: Path | epath.Path):
    """Creates a folder and those above it.

    Raises:
        UserError: a file has the name of one of them, or there is no permission.
    """
    for place in (folder, *folder.parents):
        if place.exists():
            if not place.is_dir():
                raise UserError(f"{place} is a file, so it cannot be a folder; give another name.")
            break
    with reported(f"{folder} cannot be created"):
        folder.mkdir(parents=True, exist_ok=True)


# Fingerprints.


def digest(content: dict[str, Any]) -> str:
    """The SHA-256 of JSON-serializable content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def fingerprint(tree) -> str:
    """A short hash of all names and values in a tree of host or fully addressable arrays."""
    sha = hashlib.sha256()
    for path, leaf in sorted(
        jax.tree_util.tree_leaves_with_path(tree), key=lambda item: jax.tree_util.keystr(item[0])
    ):
        sha.update(jax.tree_util.keystr(path).encode())
        sha.update(np.ascontiguousarray(leaf).tobytes())
    return sha.hexdigest()[:16]


# JSON with a checksum.


def write_json(path: Path, content: dict[str, Any]):
    """Writes JSON together with its checksum, atomically."""
    with atomic_write(path) as file:
        file.write(json.dumps({**content, "digest": digest(content)}, indent=1).encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """Reads what `write_json` wrote; None if there is no such file.

    Raises:
        UserError: the file is damaged.
    """
    try:
        content = json.loads(path.read_bytes())
        stored = content.pop("digest")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, AttributeError):
        content = stored = None
    if content is None or stored != digest(content):
        raise UserError(
            f"{path} is damaged. Restore a copy, or delete {path.parent} and start over."
        )
    return content
