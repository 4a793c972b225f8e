"""Batches of a source by Grain, for training (endless, resumable) and evaluation (each once).

Every process makes its own part of a global batch of batch_size * process_count examples: rows
process_index * batch_size onwards. What the global batches hold depends on the seed alone, not
on the number of processes, workers or threads.

An example has "label" (int32) and, of a source of images, "image": float32 (H, W, 3) in [-1, 1];
of a cache of sequences "structure": int (L,), the labels of the finest stage, and "tokens": int
(2L - 1,), those of each cluster of stage 0, 1, ..., both in the smallest type that holds them.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np
from absl import logging

from nvg_jax.data.sequences import crop_dtype
from nvg_jax.data.sources import SequenceSource, Source
from nvg_jax.data.transforms import Transform, decode

MAX_DRAWS = 10  # records tried for one place of a batch before the data set counts as broken


@dataclasses.dataclass(frozen=True)
class Options:
    """How batches are made, whatever is in them.

    Attributes:
        batch_size: examples of this process in a batch.
        on_bad: what an unreadable record does. "error" stops with its name. "skip" logs it and
            notes it in `source.unreadable`; in training another example, drawn at random, takes
            its place.
        process_index, process_count: which process of how many this is.
        num_threads: threads that make batches, in every worker.
        num_workers: worker processes; 0 makes the batches in threads of this process. With
            workers absl's flags must be parsed, and `close()` ends them.
        prefetch: batches made ahead, in every worker.

    Raises:
        ValueError: settings that cannot be.
    """

    batch_size: int
    on_bad: str = "error"
    process_index: int = 0
    process_count: int = 1
    num_threads: int = 2
    num_workers: int = 0
    prefetch: int = 4

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}.")
        if self.on_bad not in ("error", "skip"):
            raise ValueError(f"on_bad must be 'error' or 'skip', not '{self.on_bad}'.")
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(
                f"process_index {self.process_index} must be in 0 to process_count - 1 "
                f"(process_count {self.process_count})."
            )

    @property
    def global_batch_size(self) -> int:
        return self.batch_size * self.process_count


def train_batches(
    source: Source,
    *,
    image_size: tuple[int, int],
    seed: int,
    resize: int | None = None,
    pad: int = 0,
    **options,
) -> grain.DatasetIterator:
    """Endless training batches, every epoch in a new order.

    The examples of an epoch are dealt out to the global batches one after the other; a batch may
    hold the end of one epoch and the start of the next, so that none is left out.

    Args:
        source: the training split.
        image_size, resize, pad: see `Transform`; of no meaning for a cache of sequences, of which
            each visit to an image draws one of its crops.
        seed: of the order and the crops.
        options: the fields of `Options`.

    Returns:
        An iterator over stacked examples. Its `get_state` and `set_state` continue exactly where
        training was (with the same num_workers); `grain.checkpoint.CheckpointSave` and
        `CheckpointRestore` take it.

    Raises:
        ValueError: settings that do not fit, here; an unreadable record, on iteration.
    """
    options = Options(**options)
    load = _Load(source, *_maker(source, image_size, resize, pad), options.on_bad)
    if options.global_batch_size > len(source):
        raise ValueError(
            f"A batch of {options.global_batch_size} ({options.batch_size} for each of "
            f"{options.process_count} processes) is larger than the {len(source)} training "
            "examples; make it smaller."
        )
    examples = grain.MapDataset.range(len(source)).seed(seed).shuffle()
    return _own_batches(examples.random_map(load.train).repeat(), source, options)


def eval_batches(
    source: Source, *, image_size: tuple[int, int], resize: int | None = None, **options
) -> grain.DatasetIterator:
    """Every example once over all processes, in the order of the source, with center crops.

    The arguments are those of `train_batches`; of a cache of sequences the first crop is taken.
    The last batches are filled up, so that every process sees the same number of batches.

    Returns:
        An iterator over stacked examples with a "mask", bool (batch_size,). Where it is False
        (filled up, or an unreadable record with on_bad="skip") the rest is zero and must not
        count.

    Raises:
        ValueError: settings that do not fit, here; an unreadable record, on iteration.
    """
    options = Options(**options)
    load = _Load(source, *_maker(source, image_size, resize), options.on_bad)
    padded = -(-len(source) // options.global_batch_size) * options.global_batch_size
    return _own_batches(grain.MapDataset.range(padded).map(load.evaluate), source, options)


def crop_batches(
    source: Source,
    ranges: Sequence[tuple[int, int]],
    *,
    crops: int,
    image_size: tuple[int, int],
    seed: int,
    resize: int | None = None,
    pad: int = 0,
    **options,
) -> grain.DatasetIterator:
    """Images start .. stop - 1 of each (start, stop) in order, each with several crops.

    The arguments are those of `train_batches`. The crops of an image depend on the seed and its
    index alone. A batch does not go over the end of a range, so that the last of each may be
    smaller.

    Args:
        crops: random crops of each image; 0 for one from the center.

    Returns:
        An iterator over {"image": float32 (batch, max(crops, 1), H, W, 3), "label", "mask"}, as
        `eval_batches` gives them.
    """
    options = Options(**options)
    transform = Transform(image_size, resize, pad)
    blank = {"image": np.zeros((max(crops, 1), *image_size, 3), np.float32)}
    load = _Load(source, functools.partial(_crops, transform, crops), blank, options.on_bad)
    examples = grain.MapDataset.range(len(source)).seed(seed).random_map(load.evaluate)
    batches = [
        examples[start:stop].batch(options.batch_size, batch_fn=_stack) for start, stop in ranges
    ]
    return _iterate(grain.MapDataset.concatenate(batches), source, options)


# From an item of a source to the arrays of an example, but its label: functions of the item and a
# random generator, None for the one way that evaluation takes.

Arrays = dict[str, np.ndarray]


def _maker(
    source: Source, image_size: tuple[int, int], resize: int | None, pad: int = 0
) -> tuple[Callable[..., Arrays], Arrays]:
    """The function for a kind of source, and what stands in a place without an example."""
    if isinstance(source, SequenceSource):
        blank = np.zeros((), crop_dtype(source.tokenizer))
        return _draw, {name: blank[name] for name in blank.dtype.names}
    transform = Transform(image_size, resize, pad)
    return functools.partial(_crop, transform), {"image": np.zeros((*image_size, 3), np.float32)}


def _crop(transform: Transform, item: dict[str, Any], rng: np.random.Generator | None) -> Arrays:
    return {"image": transform(decode(item["image"]), rng)}


def _crops(
    transform: Transform, count: int, item: dict[str, Any], rng: np.random.Generator
) -> Arrays:
    image = decode(item["image"])
    crops = [transform(image, rng) for _ in range(count)] or [transform(image)]
    return {"image": np.stack(crops)}


def _draw(item: dict[str, Any], rng: np.random.Generator | None) -> Arrays:
    crop = item["crops"][0 if rng is None else rng.integers(len(item["crops"]))]
    return {name: crop[name] for name in crop.dtype.names}


class _UnreadableError(ValueError):
    """A record of the source cannot be read; the arguments are its name and the reason."""

    def __str__(self) -> str:
        return "{}: {}".format(*self.args)


@dataclasses.dataclass(frozen=True)
class _Load:
    """Makes an example of an index; the field "unreadable" lists the records it had to skip."""

    source: Source
    make: Callable[..., Arrays]
    blank: Arrays
    on_bad: str

    def __post_init__(self):
        if len(self.source) == 0:
            raise ValueError("The data source is empty.")

    def read(self, index: int, rng: np.random.Generator | None) -> dict[str, Any]:
        name = f"record {index}"
        try:
            item = self.source[index]
            name = item["name"]
            arrays = self.make(item, rng)
        except Exception as error:  # readers of damaged files raise errors of many kinds
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
                    raise ValueError(
                        f"{MAX_DRAWS} records drawn in a row are unreadable; too much of this "
                        f"data set is damaged to go on. The last: {error}"
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
    examples: grain.MapDataset, source: Source, options: Options
) -> grain.DatasetIterator:
    """This process's batches: of all batches of batch_size in a row, every process_count-th."""
    batches = examples.batch(options.batch_size, drop_remainder=True, batch_fn=_stack)
    return _iterate(batches[options.process_index :: options.process_count], source, options)


def _iterate(batches: grain.MapDataset, source: Source, options: Options) -> grain.DatasetIterator:
    """Makes the batches ahead, and notes in the source what could not be read."""

    def note_unreadable(batch: dict[str, Any]) -> Arrays:
        # In the main process: what threads and workers found comes here with their batches.
        for name, reason in batch.pop("unreadable"):
            if name not in source.unreadable:
                source.unreadable[name] = reason
                logging.warning(
                    "Left out unreadable record %d: %s: %s", len(source.unreadable), name, reason
                )
        return batch

    batches = batches.to_iter_dataset(
        grain.ReadOptions(
            num_threads=options.num_threads,
            prefetch_buffer_size=max(options.prefetch, options.num_threads),
        )
    )
    if options.num_workers:
        batches = batches.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=options.num_workers, per_worker_buffer_size=options.prefetch
            )
        )
    return iter(batches.map(note_unreadable))


def _stack(examples: list[dict[str, Any]]) -> dict[str, Any]:
    unreadable = [record for example in examples for record in example.pop("unreadable")]
    batch = {key: np.stack([example[key] for example in examples]) for key in examples[0]}
    return batch | {"unreadable": unreadable}
