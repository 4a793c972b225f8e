"""Long jobs in parts: a folder of files that several processes write and a killed run resumes.

Every existing file is complete and was made with the settings that the folder names.
"""

import contextlib
import fnmatch
import json
import logging
import os
import reprlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from nvg_jax.errors import UserError, is_failure
from nvg_jax.runtime import preemption
from nvg_jax.runtime.processes import barrier, is_main, own_share
from nvg_jax.runtime.progress import Progress
from nvg_jax.runtime.storage import alone, atomic_write, check_shared, make_folder, write_file

SETTINGS_FILE = "settings.json"

logger = logging.getLogger("nvg_jax")


def open_folder(folder: Path | epath.Path, pattern: str, description: dict[str, Any], noun: str):
    """Creates a folder of parts, or checks that its parts have the same settings.

    Collective: every process must call it, and all with the same description.

    Args:
        pattern: pattern of the names of the parts.
        description: everything the parts depend on, JSON-serializable; stored in the folder.
        noun: what the parts are, such as "samples".

    Raises:
        UserError: the folder holds parts with other or unknown settings, or not all processes see
            the same folder or have the same description.
    """
    path, what = folder / SETTINGS_FILE, "The processes were started with different settings"
    if folder.is_dir() and fnmatch.filter((p.name for p in folder.iterdir()), pattern):
        if not path.exists():
            raise UserError(
                f"{folder} holds {noun} but no {SETTINGS_FILE} that says how they were made. Give "
                "another --out, or move them away."
            )
        what = f"{folder} holds {noun} made with other settings"
    elif is_main():
        if path.exists():  # of a command that ended before its first part
            read_settings(path, description, noun)
        make_folder(folder)
        write_file(path, json.dumps(description))
    barrier(f"{path} is there")
    check_shared(path.exists(), path, "--out")
    stored = read_settings(path, description, noun)
    differ = [
        f"{name} was {reprlib.repr(stored.get(name))} and is {reprlib.repr(value)} now"
        for name, value in description.items()
        if stored.get(name) != value
    ]
    if differ:
        raise UserError(
            f"{what}: {'; '.join(differ)}. Give the same settings to resume, or another --out; or "
            "delete that folder to start over. (Another model: a run that was trained further has "
            "other weights.)"
        )


def read_settings(
    path: Path | epath.Path, description: dict[str, Any], noun: str
) -> dict[str, Any]:
    """What the parts beside `path` depend on; raises UserError if it is not of such a folder."""
    try:
        stored = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(
            f"{path}, which says how the {noun} there were made, is damaged ({error}). Give "
            "another --out, or delete that folder to start over."
        ) from error
    if not isinstance(stored, dict) or not stored.keys() & description.keys():
        raise UserError(f"{path} is of another program. Give another --out.")
    return stored


def own_missing(num_batches: int, files: Callable[[int], Sequence[Path | epath.Path]]) -> list[int]:
    """This process's batches for which one of `files(batch)`, all in one folder, is missing."""
    own = own_share(num_batches)
    folder = files(0)[0].parent  # listed once: in a bucket, every look at a file is a request
    present = {path.name for path in folder.iterdir()}
    missing = [batch for batch in own if not all(path.name in present for path in files(batch))]
    if len(missing) < len(own):
        logger.info("%d of %d batches exist already", len(own) - len(missing), len(own))
    return missing


def own_parts(
    compute: Callable[[Sequence[int]], Iterator[Any]],
    num_batches: int,
    size: int,
    noun: str,
    folder: Path | epath.Path | None = None,
    description: dict[str, Any] | None = None,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yields (number, arrays) for each of this process's batches: computed, or read from a file.

    Collective: every process must iterate to the end.

    Args:
        compute: batch numbers -> an iterator over their arrays, NamedTuples.
        size: images in a batch, for the progress lines.
        noun: what the parts are, such as "features".
        folder: where the arrays are stored, one file per batch; None stores nothing.
        description: everything the arrays depend on.

    Raises:
        UserError: `folder` holds arrays that were made with other settings, or another command is
            writing to it.
        Preempted: SIGTERM arrived.
    """
    own = own_share(num_batches)

    def path(number: int) -> Path | epath.Path:
        assert folder is not None
        return folder / f"{number:06d}.npz"

    with contextlib.nullcontext() if folder is None else alone(folder):
        if folder is None:
            missing = list(own)
        else:
            assert description is not None  # a folder says what its arrays depend on
            open_folder(folder, "*.npz", description, noun)
            missing = own_missing(num_batches, lambda number: [path(number)])
        computed, progress = compute(missing), Progress(noun, len(missing) * size, "images")
        done, missing = 0, set(missing)
        for row in range(-(-num_batches // jax.process_count())):
            if preemption.noticed():
                raise preemption.Preempted("preempted during an evaluation")
            if row == len(own):
                return
            number = own[row]
            arrays: dict[str, Any] | None
            arrays = None if number in missing else read_arrays(path(number))
            if arrays is None:
                source = computed if number in missing else compute([number])
                arrays = {k: np.asarray(v) for k, v in next(source)._asdict().items()}
                if folder is not None:
                    write_arrays(path(number), arrays)
                done += size
                progress.update(done)
            yield number, arrays


def write_arrays(path: Path | epath.Path, arrays: dict[str, Any], shared: bool = False):
    """Writes an .npz for `read_arrays`; `shared` as for `atomic_path`."""
    with atomic_write(path, shared) as file:
        np.savez(file, **arrays)


def read_kept(path: Path) -> dict[str, np.ndarray] | None:
    """`read_arrays` of a file in a cache, or None if there is none that can be seen."""
    return read_arrays(path) if os.path.exists(path) else None


def read_arrays(path: Path | epath.Path) -> dict[str, np.ndarray] | None:
    """The arrays of an .npz, or None if it is damaged or missing."""
    try:
        with path.open("rb") as file, np.load(file) as archive:
            return dict(archive)
    except Exception as error:  # damage raises errors of many kinds
        if is_failure(error):
            raise
        logger.warning("%s is damaged or missing (%s); making it again", path, error)
        return None
