"""Batches of a source by Grain, for training (endless, resumable) and evaluation (each once).

Every process makes its own part of a global batch of batch_size * process_count examples: rows
process_index * batch_size onwards. What the global batches hold depends on the seed alone, not
on the number of processes, workers or threads.
"""

import dataclasses
from typing import Any

import grain
import numpy as np
from absl import logging

from nvg_jax.data.sources import Source
from nvg_jax.data.transforms import Transform, decode

MAX_DRAWS = 10  # records tried for one place of a batch before the data set counts as broken


def train_loader(
    source: Source,
    *,
    image_size: tuple[int, int],
    batch_size: int,
    seed: int,
    resize: int | None = None,
    pad: int = 0,
    on_bad: str = "error",
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 2,
    num_workers: int = 0,
    prefetch: int = 4,
) -> grain.DatasetIterator:
    """Endless training batches, every epoch in a new order.

    The examples of an epoch are dealt out to the global batches one after the other; a batch may
    hold the end of one epoch and the start of the next, so that none is left out.

    Args:
        source: the training split.
        image_size, resize, pad: see `Transform`.
        batch_size: examples of this process in a batch.
        seed: of the order and the crops.
        on_bad: what an unreadable image does. "error" stops with its name. "skip" logs it, notes
            it in `source.unreadable`, and draws another example at random for its place.
        process_index, process_count: which process of how many this is.
        num_threads: threads that make batches, in every worker.
        num_workers: worker processes; 0 makes the batches in threads of this process. With
            workers absl's flags must be parsed, and `close()` ends them.
        prefetch: batches made ahead, in every worker.

    Returns:
        An iterator over {"image": float32 (batch_size, H, W, 3) in [-1, 1], "label": int32
        (batch_size,)}. Its `get_state` and `set_state` continue exactly where training was (with
        the same num_workers); `grain.checkpoint.CheckpointSave` and `CheckpointRestore` take it.

    Raises:
        ValueError: settings that do not fit, here; an unreadable image, on iteration.
    """
    _check(source, batch_size, on_bad, process_index, process_count)
    if batch_size * process_count > len(source):
        raise ValueError(
            f"A batch of {batch_size * process_count} ({batch_size} for each of {process_count} "
            f"processes) is larger than the {len(source)} training examples; make it smaller."
        )
    load = _Load(source, Transform(image_size, resize, pad), on_bad)
    examples = grain.MapDataset.range(len(source)).seed(seed).shuffle()
    examples = examples.random_map(load.train).repeat()
    return _batches(
        examples,
        source,
        batch_size,
        process_index,
        process_count,
        num_threads,
        num_workers,
        prefetch,
    )


def eval_batches(
    source: Source,
    *,
    image_size: tuple[int, int],
    batch_size: int,
    resize: int | None = None,
    on_bad: str = "error",
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 2,
    num_workers: int = 0,
    prefetch: int = 4,
) -> grain.DatasetIterator:
    """Every example once over all processes, in the order of the source, with centre crops.

    The arguments are those of `train_loader`. The last batches are filled up, so that every
    process sees the same number of batches.

    Returns:
        An iterator over {"image": float32 (batch_size, H, W, 3) in [-1, 1], "label": int32
        (batch_size,), "mask": bool (batch_size,)}. Where the mask is False (filled up, or an
        unreadable image with on_bad="skip") image and label are zero and must not count.

    Raises:
        ValueError: settings that do not fit, here; an unreadable image, on iteration.
    """
    _check(source, batch_size, on_bad, process_index, process_count)
    load = _Load(source, Transform(image_size, resize), on_bad)
    global_batch = batch_size * process_count
    padded = -(-len(source) // global_batch) * global_batch
    examples = grain.MapDataset.range(padded).map(load.evaluate)
    return _batches(
        examples,
        source,
        batch_size,
        process_index,
        process_count,
        num_threads,
        num_workers,
        prefetch,
    )


def _check(
    source: Source, batch_size: int, on_bad: str, process_index: int, process_count: int
) -> None:
    if len(source) == 0:
        raise ValueError("The data source is empty.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
    if on_bad not in ("error", "skip"):
        raise ValueError(f"on_bad must be 'error' or 'skip', not '{on_bad}'.")
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index {process_index} must be in 0 to process_count - 1 "
            f"(process_count {process_count})."
        )


class _UnreadableError(ValueError):
    """A record of the source cannot be read; the arguments are its name and the reason."""

    def __str__(self) -> str:
        return "{}: {}".format(*self.args)


@dataclasses.dataclass(frozen=True)
class _Load:
    """Makes an example of an index; the field "unreadable" lists the records it had to skip."""

    source: Source
    transform: Transform
    on_bad: str

    def read(self, index: int, rng: np.random.Generator | None) -> dict[str, Any]:
        name = f"record {index}"
        try:
            item = self.source[index]
            name = item["name"]
            image = decode(item["image"])
        except Exception as error:  # readers of damaged files raise errors of many kinds
            raise _UnreadableError(name, str(error)) from error
        return {"image": self.transform(image, rng), "label": np.int32(item["label"])}

    def train(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        unreadable = []
        while True:
            try:
                return self.read(index, rng) | {"unreadable": unreadable}
            except _UnreadableError as error:
                if self.on_bad == "error":
                    raise
                unreadable.append(error.args)
                if len(unreadable) == MAX_DRAWS:
                    raise ValueError(
                        f"{MAX_DRAWS} records drawn in a row are unreadable; too much of this "
                        f"data set is damaged to go on. The last: {error}"
                    ) from error
            index = int(rng.integers(len(self.source)))

    def evaluate(self, index: int) -> dict[str, Any]:
        unreadable = []
        if index < len(self.source):
            try:
                example = self.read(index, None)
                return example | {"mask": np.True_, "unreadable": unreadable}
            except _UnreadableError as error:
                if self.on_bad == "error":
                    raise
                unreadable.append(error.args)
        return {
            "image": np.zeros((*self.transform.image_size, 3), np.float32),
            "label": np.int32(0),
            "mask": np.False_,
            "unreadable": unreadable,
        }


def _batches(
    examples: grain.MapDataset,
    source: Source,
    batch_size: int,
    process_index: int,
    process_count: int,
    num_threads: int,
    num_workers: int,
    prefetch: int,
) -> grain.DatasetIterator:
    """This process's batches: of all batches of batch_size in a row, every process_count-th."""

    def note_unreadable(batch: dict[str, Any]) -> dict[str, np.ndarray]:
        # In the main process: what threads and workers found comes here with their batches.
        for name, reason in batch.pop("unreadable"):
            if name not in source.unreadable:
                source.unreadable[name] = reason
                logging.warning(
                    "Left out unreadable image %d: %s: %s", len(source.unreadable), name, reason
                )
        return batch

    batches = examples.batch(batch_size, drop_remainder=True, batch_fn=_stack)
    batches = batches[process_index::process_count].to_iter_dataset(
        grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(prefetch, num_threads))
    )
    if num_workers:
        batches = batches.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=prefetch)
        )
    return iter(batches.map(note_unreadable))


def _stack(examples: list[dict[str, Any]]) -> dict[str, Any]:
    unreadable = [record for example in examples for record in example.pop("unreadable")]
    batch = {key: np.stack([example[key] for example in examples]) for key in examples[0]}
    return batch | {"unreadable": unreadable}
