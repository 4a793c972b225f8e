"""Orbax checkpoints of a training run: state, metadata and data position.

Orbax silently restores flipped bits. Every checkpoint therefore holds a checksum of its metadata
and of each leaf; readers verify them and fall back from a damaged checkpoint to the one before. The
metadata is any JSON; its keys are defined in `metadata.RunMetadata`.
"""

import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath, epy

from nvg_jax.errors import (
    MISTAKE_TEXT,
    UserError,
    comes_with,
    is_damage,
    is_in_code,
    is_mistake,
    reported,
)
from nvg_jax.runtime import processes, watchdog
from nvg_jax.runtime.storage import alone, digest, storage_path

with epy.lazy_imports(error_callback=comes_with("train")):  # slow
    import orbax.checkpoint as ocp

logger = logging.getLogger("nvg_jax")


# Seconds between attempts to read a checkpoint, after a failure of the network, say.
PAUSES = (1, 2, 4, 8, 16, 32, 64, 64)
PATTERN = re.compile(r"[*?\[\\]")  # what begins or is a glob pattern


def run_folder(workdir: str | os.PathLike) -> epath.Path:
    """`storage_path` of a folder to write checkpoints to.

    Raises:
        UserError: Orbax takes its path for a pattern. What it writes there, it cannot read.
    """
    folder = storage_path(workdir)
    if pattern := PATTERN.search(os.fspath(folder)):
        raise UserError(
            f"Checkpoints cannot be kept in {folder}: {pattern[0]} in a path is a pattern for "
            "Orbax, which writes them. Choose a path without [ * ? and backslashes."
        )
    return folder


class Checkpoints:
    """Writes the checkpoints of one run to a folder, keeps the last `keep`, and resumes from them.

    Saving is asynchronous; `close` waits for pending saves. All methods are collective: every
    process of the run must call them.

    Raises:
        UserError: another run is writing to this folder.
    """

    def __init__(self, folder: str | os.PathLike, keep: int = 2):
        self._folder, self._saving = run_folder(folder), None  # the step of a save that has begun
        with contextlib.ExitStack() as stack:
            stack.enter_context(alone(self._folder))
            self._manager = ocp.CheckpointManager(
                self._folder,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep, create=True, cleanup_tmp_directories=True
                ),
            )
            self._lock = stack.pop_all()
        # Orbax must not poll for preemption (github.com/google/orbax/issues/3406): a second caller
        # would desynchronize the counter that `preemption.noticed` relies on.
        self._manager.reached_preemption = lambda step: False

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state, meta: dict[str, Any], position=None):
        """Starts saving a state, JSON-serializable metadata and the data iterator's position.

        Waits for the save before, which counts as done when it can be read.

        Raises:
            RuntimeError: the save before is not complete.
            UserError: no space or no permission to write this checkpoint or the previous one.
                Other failures (a network, another process) are raised unchanged.
        """
        self.wait()
        content = {"meta": meta, "position": position, "leaves": describe(state)}
        content["digest"] = digest(content)
        items = dict(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(content))
        self._writing(lambda: self._manager.save(step, args=ocp.args.Composite(**items)))
        self._saving = step

    def restore(
        self, abstract_of: Callable[[dict[str, Any]], Any], step: int | None = None
    ) -> tuple[Any, dict[str, Any], Any]:
        """Restores the newest undamaged checkpoint; renames newer ones.

        Args:
            abstract_of: maps the metadata to the shapes, dtypes and shardings to restore to;
                raises if the run must not be resumed.
            step: restores the checkpoint of this step, or the newest undamaged one before it.

        Returns:
            (state, metadata with "step", data position).

        Raises:
            UserError: all checkpoints are damaged, or they hold a state of other sizes.
        """
        steps = sorted(self._manager.all_steps())
        assert step is None or step in steps  # see `check_step`
        later = [] if step is None else [s for s in steps if s > step]
        latest, damaged = newest(
            self._manager, self._folder, abstract_of, ocp.args.StandardRestore, step
        )
        assert latest is not None  # there are checkpoints
        self._rename({s: "damaged" for s in damaged} | {s: "abandoned" for s in later})
        step, content, restored = latest
        return restored, content["meta"] | {"step": step}, content["position"]

    def _rename(self, steps: dict[int, str]):
        if not steps:
            return
        if processes.is_main():
            for step, reason in steps.items():
                target = self._folder / f"{reason}_{step}"
                number = 0
                while target.exists():
                    number += 1
                    target = self._folder / f"{reason}_{step}_{number}"
                (self._folder / str(step)).rename(target)
        processes.barrier("checkpoints are renamed")
        self._manager.reload()

    def _writing(self, write: Callable[[], Any]):
        try:
            write()
        except Exception as error:  # writing threads and libraries raise errors of many kinds
            if not is_mistake(error):
                raise
            raise UserError(
                f"A checkpoint could not be written to {self._folder} "
                f"({short(error)}). Earlier ones are intact, if there are any; free some space or "
                "fix the permissions, then run the same command again to go on from the last one."
            ) from error

    def wait(self):
        """Waits until the last save is complete; raises like `save`."""
        self._writing(self._manager.wait_until_finished)
        self._writing(self._manager.check_for_errors)
        step, self._saving = self._saving, None
        if step is None or not processes.is_main():
            return
        place = self._folder / str(step)
        reason = damage(json.loads((place / "meta" / "metadata").read_bytes()))
        if not (place / "state" / "manifest.ocdbt").exists():
            reason = "it has no index of its arrays"
        if reason:
            raise RuntimeError(f"What was saved to {place} cannot be read: {reason}.")

    def close(self):
        try:
            self.wait()
            self._manager.close()
        finally:
            self._lock.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace):
        """Waits for pending saves; if the body raised, that error wins over any save error."""
        try:
            self.close()
        except Exception:
            if kind is None:
                raise


# Reading.


def check_step(folder: epath.Path, step: int):
    """Raises UserError if a folder of checkpoints has none of this step."""
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]
    if step not in steps:
        raise UserError(
            f"There is no checkpoint of step {step} in {folder}; it has those of "
            f"{', '.join(map(str, sorted(steps)))}."
        )


def read(
    folder: str | os.PathLike, part: Callable[[dict[str, Any]], Any], last: int | None = None
) -> tuple[dict[str, Any], Any] | None:
    """The metadata and part of the state of a folder's newest undamaged checkpoint.

    Damaged checkpoints are skipped with a warning and left in place.

    Args:
        part: maps the metadata to the abstract tree of the leaves to read.
        last: ignores checkpoints of later steps.

    Returns:
        (metadata with "step", tree of NumPy arrays), or None if the folder has no checkpoint.

    Raises:
        UserError: all checkpoints are damaged, or they lack a leaf or hold it in another size.
    """
    folder = storage_path(folder)
    # Reading waits for all processes, so all must take the same branch.
    seen = processes.from_all(folder.is_dir())
    if not seen.any():
        return None
    if not seen.all():
        raise UserError(
            f"Only some processes see {folder}. Give a folder that all processes share, or that "
            "every machine has."
        )
    with ocp.CheckpointManager(folder) as manager:
        latest, _ = newest(manager, folder, part, partial_restore, last)
    if latest is None:
        return None
    step, content, state = latest
    return {**content["meta"], "step": step}, state


def newest(
    manager: "ocp.CheckpointManager",
    folder: epath.Path,
    abstract_of: Callable[[dict[str, Any]], Any],
    restore: Callable[[Any], "ocp.args.CheckpointArgs"],
    last: int | None = None,
) -> tuple[tuple[int, dict[str, Any], Any] | None, list[int]]:
    """Finds and restores the newest undamaged checkpoint.

    Args:
        abstract_of: maps the metadata to the abstract tree to restore.
        restore: how to restore an abstract tree.
        last: ignores checkpoints of later steps.

    Returns:
        (step, content, restored tree) of the checkpoint, or None if there is none; and the steps of
        newer, damaged checkpoints.

    Raises:
        UserError: all checkpoints are damaged.
        Exception: none can be read, all for what a mistake in the code raises too.
    """
    damaged = {}
    for step in sorted(manager.all_steps(), reverse=True):
        if last is not None and step > last:
            continue
        content, reason = attempt(manager, folder, step, meta=ocp.args.JsonRestore())
        reason = agreed(reason or damage(content))
        if reason is None:
            state = abstract = abstract_of(content["meta"])
            check_leaves(content["leaves"], abstract, folder)
            if jax.tree.leaves(abstract):
                state, reason = attempt(manager, folder, step, state=restore(abstract))
            reason = agreed(reason or difference(content["leaves"], state))
        if reason is None:
            return (step, content, state), list(damaged)
        logger.warning(
            "The checkpoint of step %d in %s is damaged (%s); falling back to the one before it.",
            step,
            folder,
            short(reason),
        )
        damaged[step] = reason
    errors = [e for e in damaged.values() if isinstance(e, Exception) and is_in_code(e)]
    if errors and len(errors) == len(damaged):
        raise errors[-1]
    if damaged:
        raise UserError(
            f"Every checkpoint in {folder} is damaged (steps {sorted(damaged)}). Put back a copy, "
            "or delete the folder to start over."
        )
    return None, []


def agreed(reason: Exception | str | None) -> Exception | str | None:
    """Why something counts as damaged, on every process if on any: all take the same branch."""
    damaged = processes.from_all(reason is not None).any()
    return (reason or "another process cannot read it") if damaged else None


def partial_restore(part) -> "ocp.args.PyTreeRestore":
    """Restores some leaves of a state as NumPy arrays."""
    numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), part)
    return ocp.args.PyTreeRestore(part, restore_args=numpy, partial_restore=True)


def attempt(
    manager: "ocp.CheckpointManager", folder: epath.Path, step: int, **item
) -> tuple[Any, Exception | str | None]:
    """Restores an item of a checkpoint on every process: (it, None), or why it counts as damaged.

    Raises:
        UserError: no permission to read it.
        Exception: a failure that says nothing about the checkpoint, such as a network's, and that
            has not passed after `PAUSES`.
    """
    result, reason = None, None
    for pause in (*PAUSES, None):
        failure = reason = None
        try:
            (result,) = manager.restore(step, args=ocp.args.Composite(**item)).values()
        except Exception as error:  # errors of many kinds
            if is_damage(error):
                reason = error
            else:
                failure = error
        # A disk's error; of a bucket's, permissions may yet change.
        mistake = isinstance(failure, OSError) and bool(failure.errno) and is_mistake(failure)
        states = [failure is not None, mistake]
        failed, mistake = np.any(processes.from_all(states), axis=0)
        if not failed:
            break
        if pause is None or mistake:
            failure = failure or RuntimeError(f"Another process cannot read {folder}/{step}.")
            if not mistake:
                raise failure
            with reported(f"The checkpoint of step {step} in {folder} cannot be read"):
                raise failure
        why = short(failure) if failure else "another process cannot read it"
        logger.warning("Step %d in %s: %s; reading again in %d s", step, folder, why, pause)
        watchdog.reset(slow=True)
        time.sleep(pause)
    return result, agreed(reason)


def short(error: Exception | str) -> str:
    """The first sentence of an error message; the storage library's messages span pages.

    And the reason, if it is one that only the user can mend.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text, reason = lines[0].split(". ")[0][:300], MISTAKE_TEXT.search(str(error))
    return text if reason is None or reason[0] in text else f"{text}: {reason[0]}"


# Checksums.


def leaf_names(tree) -> dict[str, Any]:
    """{path: leaf}; dictionaries and objects with the same fields have the same paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def describe(state) -> dict[str, list]:
    """{path: [shape, dtype, checksum]} for every leaf."""
    # One program after the other: several devices of a CPU that run two of them at once may wait
    # for each other's sums forever.
    return {
        name: [list(leaf.shape), str(leaf.dtype), int(checksum(leaf))]
        for name, leaf in leaf_names(state).items()
    }


def check_leaves(stored: dict[str, list], abstract, folder: epath.Path):
    """Raises UserError if a leaf of the abstract tree is missing or has another size or dtype."""
    for name, leaf in leaf_names(abstract).items():
        entry = stored.get(name)
        if entry is None or entry[:2] != [list(leaf.shape), str(leaf.dtype)]:
            raise UserError(
                f"The checkpoints in {folder} are of another model: {name} should be "
                f"{leaf.dtype} {tuple(leaf.shape)}, but there it is "
                f"{f'{entry[1]} {tuple(entry[0])}' if entry else 'missing'}."
            )


def damage(content: Any) -> str | None:
    """What is wrong with the JSON of a checkpoint, or None; takes out its checksum."""
    if not isinstance(content, dict) or "digest" not in content:
        return "it has no checksums"
    if content.pop("digest") != digest(content):
        return "the checksum of its metadata does not match"
    return None


def difference(stored: dict[str, list], state) -> str | None:
    """The first mismatch between a restored tree and its stored checksums, or None."""
    for name, entry in describe(state).items():
        if entry[2] != stored[name][2]:
            return f"the checksum of {name} does not match"
    return None


@jax.jit  # compiled once for all leaves of the same shape, in all states
def checksum(x) -> jax.Array:
    """A uint32: the sum over hashes of (position, bits), which does not depend on the sharding.

    The hash of an element is a bijection of its bits, so any single wrong value is detected.
    """
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    position = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        position = position * np.uint32(size % 2**32) + index
    bits = bits ^ (position * np.uint32(0x9E3779B1))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * np.uint32(factor)
    return jnp.sum(bits ^ (bits >> 16), dtype=jnp.uint32)
