"""Several processes working on one job: how they divide the work and synchronize."""

import os

import jax
import numpy as np
from jax.experimental import multihost_utils

HEARTBEAT = "NVG_HEARTBEAT"  # names a file on this machine, which launch/restart.sh reads


def is_main() -> bool:
    """Whether this is process 0, which writes everything that is written only once."""
    return jax.process_index() == 0


def is_restarted() -> bool:
    """Whether a launcher repeats this command after a failure: one that reads its heartbeat."""
    return bool(os.environ.get(HEARTBEAT))


def barrier(name: str):
    """Waits until every process has reached the barrier with this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"nvg_jax: {name}")


def own_share(count: int) -> range:
    """This process's items of 0 .. count - 1: its index, then every process_count-th."""
    return range(jax.process_index(), count, jax.process_count())


def gather(own: np.ndarray, count: int) -> np.ndarray:
    """Collects the rows that all processes computed; every process must call it.

    Args:
        own: this process's rows, those of `own_share(count)`.
        count: the total number of rows of all processes.

    Returns:
        All rows in order, (count, ...), on every process.
    """
    processes = jax.process_count()
    if processes == 1:
        return own
    rows_per_process = -(-count // processes)
    gathered = np.empty((rows_per_process, processes, *own.shape[1:]), own.dtype)
    for row in range(rows_per_process):  # one at a time, since they pass through device memory
        sent = own[row] if row < len(own) else np.zeros(own.shape[1:], own.dtype)
        # Sent as bytes, since JAX would convert float64 to float32.
        received = multihost_utils.process_allgather(sent.reshape(-1).view(np.uint8))
        received = np.ascontiguousarray(received).view(own.dtype)
        gathered[row] = received.reshape(gathered.shape[1:])
    return gathered.reshape(-1, *own.shape[1:])[:count]


def from_all(value) -> np.ndarray:
    """What every process passes, arrays of one shape, stacked; every process must call it."""
    return gather(np.asarray(value)[None], jax.process_count())


def from_main(value) -> np.ndarray:
    """The array or number that process 0 passes, on every process; every process must call it."""
    return from_all(value)[0]


def everywhere(holds: bool) -> bool:
    """Whether something holds on every process; every process must call it."""
    return bool(from_all(holds).all())


def gather_rows(own: list[np.ndarray], count: int) -> np.ndarray:
    """All processes' batches (B, D), concatenated in order; `own` are those of `own_share`."""
    if jax.process_count() == 1:
        return np.concatenate(own)
    shape = from_all(own[0].shape if own else (0, 0)).max(0)
    stacked = np.stack(own) if own else np.empty((0, *shape), np.float32)
    return gather(stacked, count).reshape(-1, shape[-1])
