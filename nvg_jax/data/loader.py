"""Batches from a source, made by Grain: endless and resumable for training, one pass to evaluate.

Every process makes its own part of each global batch of process_batch_size * process_count
examples: the rows from process_index * process_batch_size on. The content of the global batches
depends only on the seed, not on the number of processes, workers or threads.

An example has a "label" (int32). From a source of images it also has "image": float32 (H, W, 3) in
[-1, 1]. From cached sequences it has "structure": int (L,), the finest map, and
"tokens": int (2L - 1,), one for each cluster of stage 0, 1, ...; both in the smallest integer type
that holds them.
"""

import dataclasses
import functools
import logging
import math
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags
from etils import epy

from nvg_jax.data.sources import SequenceSource, Source
from nvg_jax.data.transforms import Transform
from nvg_jax.errors import UserError, comes_with

with epy.lazy_imports(error_callback=comes_with("train")):  # takes seconds
    import grain

SHARED_MEMORY = "/dev/shm"  # on Linux
logger = logging.getLogger("nvg_jax")

MAX_DRAWS = 10  # unreadable records drawn in a row before training stops


@dataclasses.dataclass(frozen=True)
class LoaderOptions:
    """How examples are made and batched.

    Attributes:
        transform: from an image to the pixels of an example; unused for cached sequences.
        process_batch_size: examples per batch of this process.
        on_bad: what to do with an unreadable record. "error" raises an error that names it.
            "skip" logs it and adds it to `source.unreadable`; in training, another example drawn
            at random takes its place.
        process_index, process_count: the index of this process, and the number of processes.
        num_threads: threads that make batches, per worker.
        num_workers: worker processes; 0 makes the batches in threads of this process. They are
            spawned, so a script needs `if __name__ == "__main__":`; the iterator's `close()` ends
            them.
        prefetch: batches made ahead, per worker.

    Raises:
        UserError: an invalid setting.
    """

    transform: Transform
    process_batch_size: int
    on_bad: str = "error"
    process_index: int = 0
    process_count: int = 1
    num_threads: int = 2
    num_workers: int = 0
    prefetch: int = 4

    def __post_init__(self):
        if self.process_batch_size < 1:
            raise UserError(
                f"The batch of a process must be at least 1, not {self.process_batch_size}."
            )
        if self.on_bad not in ("error", "skip"):
            raise UserError(f"on_bad must be 'error' or 'skip', not '{self.on_bad}'.")
        if not 0 <= self.process_index < self.process_count:
            raise UserError(
                f"process_index {self.process_index} must be in 0 to process_count - 1 "
                f"(process_count {self.process_count})."
            )

    @property
    def global_batch_size(self) -> int:
        return self.process_batch_size * self.process_count


def check_batch_size(source: Source, options: LoaderOptions):
    """Raises UserError if a training batch is larger than the data set."""
    if options.global_batch_size > len(source):
        raise UserError(
            f"A batch of {options.global_batch_size} ({options.process_batch_size} for each of "
            f"{options.process_count} processes) is larger than the {len(source)} training "
            "examples; add images, or make the batch smaller "
            "(--config.tokenizer_training.batch_size or --config.generator_training.batch_size)."
        )


def train_batches(
    source: Source, options: LoaderOptions, seed: int, skip: int = 0
) -> "grain.DatasetIterator":
    """Endless training batches with random crops, in a new order every epoch.

    The examples of an epoch fill the global batches one after the other. A batch may hold the end
    of one epoch and the start of the next, so that no example is left out. With cached sequences,
    each visit to an image draws one of its stored crops.

    Args:
        source: the training split.
        options: how to make examples and batches.
        seed: seed of the order and the crops.
        skip: leaves out this number of examples at the start.

    Returns:
        An iterator over stacked examples. `get_state` and `set_state` resume training at the exact
        batch (with the same num_workers); `grain.checkpoint.CheckpointSave` and
        `CheckpointRestore` accept the iterator.

    Raises:
        UserError: the batch is larger than the data set; later, on iteration, an unreadable
            record.
    """
    check_batch_size(source, options)
    load = _Load.of(source, options)
    examples = grain.MapDataset.range(len(source)).seed(seed).shuffle()
    return _own_batches(examples.random_map(load.train).repeat()[skip:], source, options)


def eval_batches(source: Source, options: LoaderOptions, count: int = 0) -> "grain.DatasetIterator":
    """Every example once over all processes, in the order of the source, with center crops.

    For cached sequences, the first stored crop is taken. The last batches are padded, so that every
    process sees the same number of batches.

    Args:
        source: any split.
        options: how to make examples and batches.
        count: take only this number of examples, evenly spaced over the source; 0: all.

    Returns:
        An iterator over stacked examples with a "mask", bool (process_batch_size,). Where the mask
        is False (padding, or an unreadable record with on_bad="skip") the arrays are zero and must
        not be counted.

    Raises:
        UserError: the source is empty; later, on iteration, an unreadable record.
    """
    load = _Load.of(source, options)
    count = min(count or len(source), len(source))
    padded = -(-count // options.global_batch_size) * options.global_batch_size
    places = grain.MapDataset.range(padded).map(functools.partial(_place, len(source), count))
    return _own_batches(places.map(load.evaluate), source, options)


def crop_batches(
    source: Source,
    options: LoaderOptions,
    ranges: Sequence[tuple[int, int]],
    *,
    crops: int,
    seed: int,
) -> "grain.DatasetIterator":
    """Images start .. stop - 1 of each (start, stop) in order, each with several crops.

    The crops of an image depend only on the seed and the image's index. A batch never crosses the
    end of a range, so the last batch of a range may be smaller.

    Args:
        source: images, not cached sequences.
        options: how to make examples and batches; process_index and process_count are unused.
        ranges: the images to load.
        crops: random crops per image; 0 for a single center crop.
        seed: seed of the crops.

    Returns:
        An iterator over {"image": float32 (batch, max(crops, 1), H, W, 3), "label", "mask"}, with
        the "mask" of `eval_batches`.

    Raises:
        UserError: the source is empty; later, on iteration, an unreadable record.
    """
    height, width = options.transform.image_size
    blank = {"image": np.zeros((max(crops, 1), height, width, 3), np.float32)}
    load = _Load(source, functools.partial(_crops, options.transform, crops), blank, options.on_bad)
    examples = grain.MapDataset.range(len(source)).seed(seed).random_map(load.evaluate)
    batches = [
        examples[start:stop].batch(options.process_batch_size, batch_fn=_stacking(options))
        for start, stop in ranges
    ]
    return _iterate(grain.MapDataset.concatenate(batches), source, options)


def _place(length: int, count: int, index: int) -> int:
    """The index in the source of one of `count` evenly spaced examples; `length` for padding."""
    return index * length // count if index < count else length


# The next functions make the arrays of one example, without its label, from an item of a source.
# rng=None takes the deterministic crop for evaluation.

Arrays = dict[str, np.ndarray]


def _crop(transform: Transform, item: dict[str, Any], rng: np.random.Generator | None) -> Arrays:
    return {"image": transform(transform.decode(item["image"]), rng)}


def _crops(
    transform: Transform, count: int, item: dict[str, Any], rng: np.random.Generator
) -> Arrays:
    image = transform.decode(item["image"])
    crops = [transform(image, rng) for _ in range(count)] or [transform(image)]
    return {"image": np.stack(crops)}


def _draw(item: dict[str, Any], rng: np.random.Generator | None) -> Arrays:
    crop = item["crops"][0 if rng is None else rng.integers(len(item["crops"]))]
    return {name: crop[name] for name in crop.dtype.names}


class _UnreadableError(UserError):
    """A record of the source cannot be read; the arguments are its name and the reason."""

    def __str__(self) -> str:
        name, reason = self.args
        return (
            f"{name}: {reason.rstrip('.')}. Repair or remove it, or leave it out with on_bad=skip."
        )


@dataclasses.dataclass(frozen=True)
class _Load:
    """Makes the example of an index; its field "unreadable" lists the records skipped for it.

    Attributes:
        make: (item, rng) -> arrays of an example.
        blank: the arrays that stand in for a missing example.
    """

    source: Source
    make: Callable[..., Arrays]
    blank: Arrays
    on_bad: str

    def __post_init__(self):
        if len(self.source) == 0:
            raise UserError("The data source is empty.")

    @classmethod
    def of(cls, source: Source, options: LoaderOptions) -> "_Load":
        """Loads one example per index, from either kind of source."""
        if isinstance(source, SequenceSource):
            zeros = np.zeros((), source.crop_dtype)
            make, blank = _draw, {name: zeros[name] for name in zeros.dtype.names or ()}
        else:
            make = functools.partial(_crop, options.transform)
            blank = {"image": np.zeros((*options.transform.image_size, 3), np.float32)}
        return cls(source, make, blank, options.on_bad)

    def read(self, index: int, rng: np.random.Generator | None) -> dict[str, Any]:
        name = f"record {index}"
        try:
            item = self.source[index]
            name = item["name"]
            arrays = self.make(item, rng)
        except UserError as error:
            raise _UnreadableError(name, str(error)) from error
        return arrays | {"label": np.int32(item["label"])}

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
                    raise UserError(
                        f"{MAX_DRAWS} records drawn in a row are unreadable: too much of this data "
                        "set is damaged. Repair it or get it again. The last one is "
                        f"{': '.join(error.args)}"
                    ) from error
            index = int(rng.integers(len(self.source)))

    def evaluate(self, index: int, rng: np.random.Generator | None = None) -> dict[str, Any]:
        unreadable = []
        if index < len(self.source):
            try:
                return self.read(index, rng) | {"mask": np.True_, "unreadable": unreadable}
            except _UnreadableError as error:
                if self.on_bad == "error":
                    raise
                unreadable.append(error.args)
        return self.blank | {"label": np.int32(0), "mask": np.False_, "unreadable": unreadable}


def _own_batches(
    examples: "grain.MapDataset", source: Source, options: LoaderOptions
) -> "grain.DatasetIterator":
    """This process's batches: every process_count-th batch, starting at process_index."""
    batches = examples.batch(
        options.process_batch_size, drop_remainder=True, batch_fn=_stacking(options)
    )
    return _iterate(batches[options.process_index :: options.process_count], source, options)


def _iterate(
    batches: "grain.MapDataset", source: Source, options: LoaderOptions
) -> "grain.DatasetIterator":
    """Prefetches batches, and records in `source.unreadable` what could not be read."""

    def note_unreadable(batch: dict[str, Any]) -> Arrays:
        # Runs in the main process: threads and workers send skipped records with their batches.
        for name, reason in batch.pop("unreadable"):
            if name not in source.unreadable:
                source.unreadable[name] = reason
                logger.warning(
                    "Skipped unreadable record %d: %s: %s", len(source.unreadable), name, reason
                )
        return batch

    loaded = batches.to_iter_dataset(
        grain.ReadOptions(
            num_threads=options.num_threads,
            prefetch_buffer_size=max(options.prefetch, options.num_threads),
        )
    )
    if options.num_workers:
        if not flags.FLAGS.is_parsed():  # Grain reads some; a notebook or a script has none
            flags.FLAGS.mark_as_parsed()
        loaded = loaded.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=options.num_workers, per_worker_buffer_size=options.prefetch
            ),
            worker_init_fn=_follow_parent,
        )
    return iter(loaded.map(note_unreadable))


def _follow_parent(worker: int, count: int):
    """In a worker: it ends when the training process does, however that ends, and not before.

    Ctrl-C and SIGTERM, which a terminal, SLURM and systemd send to all processes, are for the one
    that saves and ends its workers.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow():
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _stacking(options: LoaderOptions) -> Callable[[Sequence[dict[str, Any]]], dict[str, Any]]:
    """How examples become a batch.

    Grain passes arrays in C order through shared memory and others, as crops are, through a pipe,
    which takes the time of the process that trains. Where there is no room, as in containers,
    workers would be killed.
    """
    if not options.num_workers or not os.path.isdir(SHARED_MEMORY):
        return _stack
    # Both ends keep as many; seen with Grain 0.2.
    count = 2 * options.num_workers * (options.prefetch + 1) + 1
    pixels = 4 * 3 * math.prod(options.transform.image_size)
    room = shutil.disk_usage(SHARED_MEMORY).free / 2  # an evaluation's workers need some, too
    processes = int(os.environ.get("SLURM_NTASKS_PER_NODE") or 1)  # of this machine
    fits = processes * count * options.process_batch_size * pixels < room
    return functools.partial(_stack, copy=np.ascontiguousarray) if fits else _stack


def _stack(
    examples: Sequence[dict[str, Any]], copy: Callable[[np.ndarray], np.ndarray] = np.asarray
) -> dict[str, Any]:
    unreadable = [record for example in examples for record in example.pop("unreadable")]
    batch = {key: copy(np.stack([example[key] for example in examples])) for key in examples[0]}
    return batch | {"unreadable": unreadable}
