"""What several test files use. Imports no conftest, so that tests can run as scripts too."""

import json
import os
import subprocess
import sys

import numpy as np


def with_devices(count: int) -> dict[str, str]:
    """The environment of a process with so many devices."""
    flags = f"--xla_force_host_platform_device_count={count}"
    return os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}"}


def on_eight_devices(script: str) -> dict:
    """The JSON that a test file prints when it is run as a script with eight devices."""
    run = subprocess.run(
        [sys.executable, script],
        env=with_devices(8) | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def logged(folder):
    """{(tag, step): value} of every scalar in the event files of a run."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util import tensor_util

    values = {}
    for path in folder.glob("events*"):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                array = tensor_util.make_ndarray(value.tensor)
                if array.dtype == np.float32 and array.ndim == 0:
                    values[value.tag, event.step] = float(array)
    return values


# Structure maps.


def labels_from_embedding(embedding, stage) -> np.ndarray:
    """The inverse of `structure_embedding`: int (..., L, K), stage i -> int (..., L)."""
    embedding = np.asarray(embedding)
    shift = np.asarray(stage)[..., None, None] - 1 - np.arange(embedding.shape[-1])
    bits = np.where(shift >= 0, embedding // 2, 0)  # channels from i on are padding
    return np.sum(bits << np.maximum(shift, 0), axis=-1)


def is_even_hierarchy(labels) -> np.ndarray:
    """Whether the maps of all stages, int (..., S, L), are a hierarchy of exact halves: bool (...).

    Every label 0..2**i-1 of stage i is used at exactly L / 2**i positions, and halving the labels
    of stage i+1 (rounded down) gives those of stage i. False everywhere unless S = log2(L) + 1.
    """
    labels = np.asarray(labels)
    *_, stages, length = labels.shape
    each_once = (np.sort(labels[..., -1, :]) == np.arange(length)).all(-1)
    nested = (labels[..., 1:, :] // 2 == labels[..., :-1, :]).all((-2, -1))
    return (2 ** (stages - 1) == length) & each_once & nested
