"""Storage: paths on disks and in buckets, atomic writes, JSON with a checksum, fingerprints."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import importlib.util
import json
import logging
import os
import posixpath
import re
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import fsspec.config
import jax
import numpy as np
from etils import epath, epy

from nvg_jax.errors import UserError, comes_with, is_mistake, reported
from nvg_jax.runtime.processes import everywhere, from_main, is_main, is_restarted

with epy.lazy_imports(error_callback=comes_with("train")):  # slow, and only for gs://
    import gcsfs
    from gcsfs import retry

logger = logging.getLogger("nvg_jax")
MISSING = FileNotFoundError, NotADirectoryError
PATIENCE = 180  # seconds; a lock of NFSv4 lives for 90 after its machine
RETRIES = 11  # a request to Cloud Storage is repeated after 1, 2, 4, 8, 16, 32, 32, ... seconds
BUCKETS = {"gs": "gcsfs", "s3": "s3fs"}  # scheme of a URL -> the package that epath reaches it with

# The same client everywhere: without this, epath takes TensorFlow's where it is installed.
os.environ.setdefault("EPATH_USE_TF", "0")
for _name in ("gcs", "s3"):  # their caches would not show what other processes write
    fsspec.config.conf.setdefault(_name, {}).setdefault("use_listings_cache", False)


@functools.cache
def use_patient_client():
    """Makes epath reach gs:// with a client that outlasts failures of some minutes.

    gcsfs gives up after half a minute, and then its `isdir` says that there is no folder: a run
    would not see its checkpoints and start afresh.
    """
    with_retries: Any = retry.retry_request  # a decorator that turns into one with arguments

    class Client(gcsfs.GCSFileSystem):
        _request = with_retries(retries=RETRIES)(gcsfs.GCSFileSystem._request.__wrapped__)

        async def _isdir(self, path):
            return await self._type(path) == "directory"

        async def _isfile(self, path):
            return await self._type(path) == "file"

        async def _type(self, path):
            try:
                info: Any = await self._info(path)
                return info["type"]
            except FileNotFoundError:
                return None

    for name in ("gs", "gcs"):
        fsspec.register_implementation(name, Client, clobber=True)


# Paths.


def storage_path(name: str | os.PathLike) -> epath.Path:
    """The absolute path of a file or folder that a user names, on a disk or in a bucket.

    `~` is expanded, and a slash at the end dropped. A path that this returned stays as it is.

    Raises:
        UserError: a URL that is no path in a bucket, a home folder that does not exist, or a name
            that is too long.
    """
    text = os.fspath(name)
    if not text:
        raise UserError("A path is empty; give a folder or a file.")
    if url := re.fullmatch(r"(\w+)://(.*)|(gs|s3):/(.*)", text):  # pathlib merges slashes
        scheme, place = url[1] or url[3], (url[2] or url[4] or "").strip("/")
        if scheme not in BUCKETS or not place:
            raise UserError(
                f"{text} is neither a path nor a bucket's URL, such as gs://BUCKET/x. A model of "
                "the Hugging Face hub is hf://ORG/NAME."
            )
        if importlib.util.find_spec(BUCKETS[scheme]) is None:
            raise UserError(f"{text} needs the package {BUCKETS[scheme]}; install it with pip.")
        if scheme == "gs":
            use_patient_client()
        return epath.Path(f"{scheme}://{posixpath.normpath(place)}")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise UserError(
            f"{text} needs a home folder, and there is none of that name. Set HOME, or give "
            "another path (./~ for a folder that is called so)."
        )
    path = os.path.abspath(expanded)
    if path.split("/")[1] in ("gs", "s3", "az", "hf"):
        raise UserError(
            f"{path} cannot be used: libraries take /{path.split('/')[1]} for a bucket. Mount or "
            "link it under another name."
        )
    try:
        os.stat(path)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{path} cannot be used: {error.strerror}.") from error
        if not is_mistake(error):  # of a disk; who may not enter a folder is told at its use
            raise
    return epath.Path(path)


def in_bucket(path: str | os.PathLike) -> bool:
    return "://" in os.fspath(path)


def local_path(name: str | os.PathLike, what: str) -> Path:
    """`storage_path` of what libraries can only read or write on a disk.

    Args:
        what: its name in the message, such as "data_dir".

    Raises:
        UserError: it is in a bucket.
    """
    path = storage_path(name)
    if in_bucket(path):
        raise UserError(
            f"{what} must be a path on this machine, not {name}. Copy it there, or mount the "
            "bucket on every machine (gcsfuse; docs/launch.md) and give the path there."
        )
    return Path(path)


@contextlib.contextmanager
def local_file(path: epath.Path) -> Iterator[Path]:
    """A file as one of this machine's disk: itself or, from a bucket, a temporary copy."""
    if not in_bucket(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="nvg_jax_") as folder:
        copy = epath.Path(folder) / path.name
        path.copy(copy)
        yield Path(copy)


# Writing.


@contextlib.contextmanager
def atomic_path(path: Path | epath.Path, shared: bool = False) -> Iterator[Path]:
    """A temporary path on a disk to write to; it replaces `path` when the block succeeds.

    After an interruption at any moment, `path` is either complete or as it was before.

    Args:
        shared: whether several commands may write `path` at once; the last one to finish wins.
            Otherwise what an interrupted one leaves behind is overwritten by the next.

    Raises:
        UserError: there is no space or no permission; the message names `path`.
    """
    with contextlib.ExitStack() as stack:
        if in_bucket(path):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="nvg_jax_"))
            temporary = Path(folder, path.name)
        else:
            own = f".{secrets.token_hex(4)}" if shared else ""
            temporary = Path(path).with_name(f"{path.name}{own}.tmp")
        try:
            yield temporary
            if in_bucket(path):
                scheme = os.fspath(path).split("://")[0]
                fsspec.filesystem(scheme).put_file(str(temporary), os.fspath(path))
            else:
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
                os.replace(temporary, path)
        except BaseException as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            if not isinstance(error, OSError) or error.filename not in (None, str(temporary)):
                raise  # an error about something else
            through = f", through {temporary}," if in_bucket(path) else ""
            with reported(f"{path}{through} cannot be written"):
                raise


@contextlib.contextmanager
def atomic_write(path: Path | epath.Path, shared: bool = False) -> Iterator[BinaryIO]:
    """Like `atomic_path`, but yields the temporary file, opened for binary writing."""
    with atomic_path(path, shared) as temporary, open(temporary, "wb") as file:
        yield file


def write_file(path: Path | epath.Path, content: str | bytes, shared: bool = False):
    """Writes a whole file, text as UTF-8; see `atomic_path`."""
    with atomic_write(path, shared) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def locked(folder: Path | epath.Path, patience: float = 0) -> Iterator[bool]:
    """Creates a folder and, inside, locks it against other commands; every process must call it.

    Process 0 locks it. In buckets and on some network disks nothing can be locked.

    Args:
        patience: for how many seconds to wait for another command to unlock it.

    Yields:
        Whether no other command has locked it, the same on every process.

    Raises:
        UserError: it cannot be created.
    """
    free = True
    with contextlib.ExitStack() as stack:
        if is_main():
            make_folder(folder)
            if not in_bucket(folder):
                free, end = _lock(folder, os.O_RDONLY, stack), time.monotonic() + patience
                if patience and not free:
                    logger.warning("%s is in use; waiting for %d s at most", folder, patience)
                while not free and time.monotonic() < end:
                    time.sleep(5)
                    free = _lock(folder, os.O_RDONLY, stack)
        yield bool(from_main(free))


def _lock(path: os.PathLike, flags: int, stack: contextlib.ExitStack) -> bool:
    """Locks a folder or file until the stack ends; whether no other command has."""
    with reported(f"{path} cannot be locked"):
        descriptor = os.open(path, flags, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno == errno.EBADF and flags == os.O_RDONLY:  # NFS: only what is written
            return _lock(Path(path, ".lock"), os.O_RDWR | os.O_CREAT, stack)
        return not isinstance(error, BlockingIOError)
    stack.callback(os.close, descriptor)
    return True


@contextlib.contextmanager
def alone(folder: Path | epath.Path, name: os.PathLike | None = None):
    """Keeps other commands from writing to a folder, as `locked`; every process must call it.

    On a network disk, the lock of a machine that has died may outlive it by some minutes, in which
    its job is started on another one: under a launcher, this waits.

    Args:
        name: of what is written there; by default the folder.

    Raises:
        UserError: another command is writing to it, or it cannot be created.
    """
    with locked(folder, PATIENCE if is_restarted() else 0) as free:
        if not free:
            raise UserError(
                f"Another command is writing to {name or folder}. Wait until it has ended, or give "
                "another name. (Processes share the work only if they are started together.)"
            )
        yield


def check_shared(seen: bool, path: Path | epath.Path, option: str):
    """Raises UserError unless `seen`, that this process sees `path`, holds on every process.

    Collective: every process must call it.

    Args:
        option: the flag that named the place of `path`.
    """
    if not everywhere(seen):
        raise UserError(
            f"Not every process sees {path}, which process 0 wrote: {option} must be in a file "
            "system that all processes share."
        )


def make_folder(folder: Path | epath.Path):
    """Creates a folder and those above it; in a bucket, folders need not be created.

    Raises:
        UserError: there is no such bucket, a file has the name of a folder, or there is no
            permission.
    """
    if in_bucket(folder):
        bucket = epath.Path(*folder.parts[:3])
        with contextlib.suppress(OSError):  # who may write objects need not be allowed to look
            if not bucket.exists():
                raise UserError(f"There is no bucket {bucket}. Create it, or correct its name.")
        return
    with reported(f"{folder} cannot be created"):
        for place in (folder, *folder.parents):
            if place.exists():
                if not place.is_dir():
                    raise UserError(
                        f"{place} is a file, so it cannot be a folder; give another name."
                    )
                break
        folder.mkdir(parents=True, exist_ok=True)


# Fingerprints.


def as_json(content: Any) -> Any:
    """Content as a JSON file gives it back: tuples as lists, values of NumPy as Python's."""
    return json.loads(json.dumps(content, default=lambda x: x.tolist()))


def digest(content: Any) -> str:
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


def sealed(content: dict[str, Any]) -> str:
    """JSON with its checksum, its `digest`, as "digest"."""
    return json.dumps({**content, "digest": digest(content)}, indent=1)


def write_json(path: Path | epath.Path, content: dict[str, Any]):
    """Writes JSON together with its checksum, atomically."""
    write_file(path, sealed(content))


def read_json(path: Path | epath.Path) -> dict[str, Any] | None:
    """Reads what `write_json` wrote; None if there is no such file.

    Raises:
        UserError: the file is damaged.
    """
    try:
        content = json.loads(path.read_bytes())
        stored = content.pop("digest")
    except MISSING:
        return None
    except (ValueError, KeyError, AttributeError):
        content = stored = None
    if content is None or stored != digest(content):
        raise UserError(
            f"{path} is damaged. Restore a copy, or delete {path.parent} and start over."
        )
    return content
