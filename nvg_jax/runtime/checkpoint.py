"""Orbax checkpoints: state, metadata and data position of one training run, and their readers.

Orbax restores a flipped bit silently, so every checkpoint holds a checksum of each leaf and of its
metadata. Whoever reads compares them, and takes the checkpoint before a damaged one.
"""

import logging
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from nvg_jax.runtime.files import digest, storage_path

logger = logging.getLogger("nvg_jax")

# What a user must mend; the errors of the libraries that write only tell it in words.
UNWRITABLE = re.compile(
    "no space left|quota|file too large|permission.denied|not permitted|read-only", re.IGNORECASE
)


class Manager(ocp.CheckpointManager):
    """Orbax's, which leaves it to `preemption` to ask whether the processes are to end.

    JAX finds the step at which all of them stop by the numbers they ask with; two who count
    differently would make each other miss it.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints of one run in a folder, the last `keep` of them, to write and to go on from.

    Saving is asynchronous; `close` waits for what is under way. Every process of a run takes part
    in every call.
    """

    def __init__(self, folder: str | os.PathLike, keep: int = 2):
        self._folder = storage_path(folder)
        self._manager = Manager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=True, cleanup_tmp_directories=True
            ),
        )

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state, meta: dict[str, Any], position=None):
        """Begins to save a state, JSON-able metadata and the data iterator's position.

        Raises:
            OSError: there is no room, or no right to write, for this checkpoint or the one before.
                Other failures, of a network or another process, are raised as they are.
        """
        content = {"meta": meta, "position": position, "leaves": describe(state)}
        content["digest"] = digest(content)
        items = dict(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(content))
        self._writing(lambda: self._manager.save(step, args=ocp.args.Composite(**items)))

    def restore(self, state, check: Callable[[dict[str, Any]], None]) -> tuple[Any, Any, int]:
        """The newest undamaged checkpoint; damaged ones that are newer are put aside.

        Args:
            state: the shapes, dtypes and shardings to restore to.
            check: raises for metadata of a run that must not go on.

        Returns:
            (state, data position, step).

        Raises:
            ValueError: there are checkpoints and all are damaged, or of a state of other sizes.
        """

        def wanted(meta):
            check(meta)
            return state

        found, damaged = newest(self._manager, self._folder, wanted, restore_state)
        if found is None:
            raise ValueError(
                f"Every checkpoint in {self._folder} is damaged (steps {sorted(damaged)}). Put "
                "back a copy, or remove the folder to start anew."
            )
        self._put_aside(damaged)
        step, content, restored = found
        return restored, content["position"], step

    def _put_aside(self, steps: list[int]):
        if not steps:
            return
        if jax.process_index() == 0:
            for step in steps:
                target = self._folder / f"damaged_{step}"
                number = 0
                while target.exists():
                    number += 1
                    target = self._folder / f"damaged_{step}_{number}"
                (self._folder / str(step)).rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("nvg_jax put aside")
        self._manager.reload()

    def _writing(self, write: Callable[[], Any]):
        try:
            write()
        except Exception as error:  # of many kinds, from the threads and libraries that write
            if not UNWRITABLE.search(str(error)):
                raise
            raise OSError(
                f"A checkpoint could not be written to {self._folder} "
                f"({short(error)}). Earlier checkpoints are as they were; make room or give "
                "the right to write, and start again to go on from the last one."
            ) from error

    def wait(self):
        """Waits until what was saved is on disk; raises as `save` does."""
        self._writing(self._manager.wait_until_finished)
        self._writing(self._manager.check_for_errors)

    def close(self):
        self.wait()
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace):
        """Waits for what is being saved, also when an error ends the run, which it then is."""
        try:
            self.close()
        except Exception:
            if kind is None:
                raise


# Reading.


def read_meta(folder: str | os.PathLike) -> dict[str, Any] | None:
    """The metadata of the newest checkpoint of a folder, None if there is no checkpoint.

    "step" is the checkpoint's. See `read` about damaged ones.
    """
    found = read(folder, lambda meta: {})
    return found and found[0]


def read(
    folder: str | os.PathLike, part: Callable[[dict[str, Any]], Any]
) -> tuple[dict[str, Any], Any] | None:
    """The metadata and a part of the state of the newest undamaged checkpoint of a folder.

    A damaged one is left where it is, with a warning.

    Args:
        part: from the metadata to the abstract tree of the leaves wanted.

    Returns:
        (metadata with "step", tree of NumPy arrays), or None if the folder has no checkpoint.

    Raises:
        ValueError: all checkpoints are damaged, or have other leaves.
    """
    folder = storage_path(folder)
    if not folder.is_dir():
        return None
    with ocp.CheckpointManager(folder) as manager:
        found, damaged = newest(manager, folder, part, restore_part)
    if found is not None:
        step, content, state = found
        return {**content["meta"], "step": step}, state
    if damaged:
        raise ValueError(f"Every checkpoint in {folder} is damaged (steps {damaged}).")
    return None


def newest(
    manager: ocp.CheckpointManager,
    folder: epath.Path,
    wanted: Callable[[dict[str, Any]], Any],
    restore: Callable[[ocp.CheckpointManager, int, Any], Any],
) -> tuple[tuple[int, dict[str, Any], Any] | None, list[int]]:
    """((step, content, restored tree) of the newest undamaged checkpoint or None, damaged steps).

    Args:
        wanted: from the metadata to the abstract tree to restore.
        restore: (manager, step, abstract tree) -> tree.
    """
    damaged = []
    for step in sorted(manager.all_steps(), reverse=True):
        content, reason = attempt(lambda: read_content(manager, step))
        if reason is None:
            abstract = wanted(content["meta"])
            check_leaves(content["leaves"], abstract, folder)
            state, reason = attempt(lambda: restore(manager, step, abstract))
            if reason is None:
                reason = difference(content["leaves"], state)
        if reason is None:
            return (step, content, state), damaged
        warn(folder, step, reason)
        damaged.append(step)
    return None, damaged


def read_content(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """The JSON of a checkpoint: "meta", "position" and "leaves"; raises if it is damaged."""
    items = ocp.args.Composite(meta=ocp.args.JsonRestore())
    content = manager.restore(step, args=items)["meta"]
    if "digest" not in content:
        raise ValueError("it has no checksums; an older version of this program wrote it")
    if content.pop("digest") != digest(content):
        raise ValueError("its metadata has another checksum")
    return content


def restore_state(manager: ocp.CheckpointManager, step: int, state) -> Any:
    items = ocp.args.Composite(state=ocp.args.StandardRestore(state))
    return manager.restore(step, args=items)["state"]


def restore_part(manager: ocp.CheckpointManager, step: int, part) -> Any:
    if not jax.tree.leaves(part):
        return part
    restore = ocp.args.PyTreeRestore(
        part,
        restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), part),
        partial_restore=True,
    )
    return manager.restore(step, args=ocp.args.Composite(state=restore))["state"]


def attempt(read: Callable[[], Any]) -> tuple[Any, str | None]:
    """(what `read` gives, None), or (None, why it failed) if it fails in any process."""
    result, reason = None, None
    try:
        result = read()
    except Exception as error:  # damage comes as errors of many kinds
        reason = short(error)
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.array(reason is not None))
        if failed.any():
            reason = reason or "another process cannot read it"
    return result, reason


def short(error: Exception) -> str:
    """The first sentence of an error; those of the storage library go on for pages."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0][:300]


def warn(folder: epath.Path, step: int, reason: str):
    logger.warning(
        "The checkpoint of step %d in %s is damaged (%s); taking the one before it.",
        step,
        folder,
        reason,
    )


# Checksums.


def leaf_names(tree) -> dict[str, Any]:
    """{path: leaf}, the same for dictionaries and for objects with the same fields."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def describe(state) -> dict[str, list]:
    """{path: [shape, dtype, checksum]} of every leaf."""
    names = leaf_names(state)
    sums = np.asarray(checksums(list(names.values()))).tolist() if names else []
    return {
        name: [list(leaf.shape), str(leaf.dtype), value]
        for (name, leaf), value in zip(names.items(), sums)
    }


def check_leaves(stored: dict[str, list], wanted, folder: epath.Path):
    """Raises ValueError if a checkpoint lacks a leaf of an abstract tree, or has another size."""
    for name, leaf in leaf_names(wanted).items():
        found = stored.get(name)
        if found is None or found[:2] != [list(leaf.shape), str(leaf.dtype)]:
            raise ValueError(
                f"The checkpoints in {folder} are of another model: {name} should be "
                f"{leaf.dtype} {tuple(leaf.shape)}, and there it is "
                f"{found and (found[1], tuple(found[0]))}."
            )


def difference(stored: dict[str, list], state) -> str | None:
    """What is wrong with the values of a restored tree, None if nothing."""
    for name, found in describe(state).items():
        if found[2] != stored[name][2]:
            return f"{name} has another checksum"
    return None


@jax.jit
def checksums(leaves: list) -> jax.Array:
    """uint32 (number of leaves,): a sum over scrambled (position, bits), however it is sharded.

    Every step of the scrambling is one to one, so no single wrong value goes unnoticed.
    """

    def checksum(x):
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

    return jnp.stack([checksum(x) for x in leaves])
