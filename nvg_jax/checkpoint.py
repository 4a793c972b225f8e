"""Orbax checkpoints: state, metadata and data iterator of one training run, and its readers."""

import hashlib
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp


class Checkpoints:
    """The checkpoints of one run in a folder, the last `keep` of them.

    Saving is asynchronous; `close` waits for what is under way.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        self._manager = ocp.CheckpointManager(
            Path(folder).absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
        )

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state, meta: dict[str, Any], iterator=None):
        """Saves a state, JSON-able metadata and, if given, a Grain iterator's position."""
        items = dict(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        if iterator is not None:
            items["data"] = grain.checkpoint.CheckpointSave(iterator)
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, abstract_state, iterator=None):
        """The latest state, placed as `abstract_state` says; sets the iterator's position."""
        items = dict(state=ocp.args.StandardRestore(abstract_state))
        if iterator is not None:
            items["data"] = grain.checkpoint.CheckpointRestore(iterator)
        return self._manager.restore(self.latest_step, args=ocp.args.Composite(**items))["state"]

    def close(self):
        self._manager.wait_until_finished()
        self._manager.close()


def abstract(tree):
    """Shapes, dtypes and shardings of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def read_meta(folder: str | Path) -> dict[str, Any] | None:
    """The metadata of the latest checkpoint of a folder, None if there is no checkpoint."""
    folder = Path(folder).absolute()
    if not folder.is_dir():
        return None
    with ocp.CheckpointManager(folder) as manager:
        step = manager.latest_step()
        if step is None:
            return None
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    return {**meta, "step": step}


def read_part(folder: str | Path, abstract) -> Any:
    """The leaves of a folder's latest state that `abstract` names, as it places them."""
    with ocp.CheckpointManager(Path(folder).absolute()) as manager:
        restore = ocp.args.PyTreeRestore(
            abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=True,
        )
        return manager.restore(manager.latest_step(), args=ocp.args.Composite(state=restore))[
            "state"
        ]


def fingerprint(tree) -> str:
    """A short hash of every value of a tree of host or fully addressable arrays."""
    digest = hashlib.sha256()
    for path, leaf in sorted(
        jax.tree_util.tree_leaves_with_path(tree), key=lambda item: jax.tree_util.keystr(item[0])
    ):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]
