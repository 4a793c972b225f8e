"""Encodes a data set once, so that generators train without the encoder and the clustering."""

import contextlib
import dataclasses
import logging
import math
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nvg_jax.data import (
    LoaderOptions,
    SequenceSource,
    Source,
    Transform,
    crop_batches,
    open_source,
    sequences,
)
from nvg_jax.data.sources import SPLITS
from nvg_jax.errors import UserError
from nvg_jax.pipeline import Pipeline
from nvg_jax.runtime.processes import barrier, is_main
from nvg_jax.runtime.progress import Progress
from nvg_jax.runtime.sharding import fill_batch
from nvg_jax.runtime.storage import alone, check_shared, local_path

logger = logging.getLogger("nvg_jax")


def encode_data_set(
    pipeline: Pipeline,
    out: str | os.PathLike,
    data: dict[str, Any],
    *,
    crops: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    **options,
) -> dict[str, Any]:
    """Writes the cached sequences of a data set; all processes share the work.

    Args:
        data: "name", "data_dir", "resize" and "pad", as in a config's `data`. Images are resized
            with the filter that the model was trained with.
        crops: random crops of each training image. Test images have one center crop.
        seed: seed of the crops.
        batch_size: crops that a process encodes at once; always at least all crops of one image.
        options: on_bad, num_threads and num_workers of `LoaderOptions`. With on_bad="skip", an
            unreadable image has no record.

    Returns:
        The metadata (see `sequences.finish`) on process 0, {} on the others.

    Raises:
        UserError: the data has no images, `out` holds something else, cannot be written or is being
            written by another command, or an image is unreadable (on_bad="error").
    """
    out = local_path(out, "out")
    sources, settings = plan_encoding(pipeline, data, crops, seed)
    size, images = pipeline.tokenizer.config.image_size, settings["data"]
    loading = LoaderOptions(
        Transform(size, images["resize"], images["pad"], images["resize_filter"]),
        process_batch_size=batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        **options,
    )
    if crops > 1 and not loading.transform.pad and loading.transform.cover == size:
        logger.warning(
            "the %d crops of an image that is as high as wide are all the same; --pad shifts them, "
            "a larger --resize leaves room for them",
            crops,
        )
    if is_main():
        sequences.begin(out, settings)
    barrier("encoding has begun")
    check_shared(sequences.has_begun(out), out, "--out")
    sequences.begin(out, settings)  # checks the other processes, whose settings may differ
    with alone(out):
        write_shards(pipeline, out, sources, settings, loading)
        barrier("all sequences are written")
        return sequences.finish(out, settings) if is_main() else {}


def plan_encoding(
    pipeline: Pipeline, data: dict[str, Any], crops: int, seed: int
) -> tuple[dict[str, Source], dict[str, Any]]:
    """The splits of the data, and the settings that determine the contents of the files."""
    metadata = pipeline.metadata
    if metadata.fingerprint is None:
        raise UserError(
            "The training of this tokenizer has not finished, and generators only train on a "
            "finished one. Let `python -m nvg_jax.train` finish it first."
        )
    if crops < 1:
        raise UserError(f"crops must be at least 1, got {crops}.")
    # A tokenizer knows no classes: their names come from the data.
    sources = {
        split: open_source(data["name"], split, data_dir=data["data_dir"] or None)
        for split in SPLITS
    }
    if isinstance(sources["train"], SequenceSource):
        raise UserError("The data set holds cached sequences already; give one of images.")
    return sources, {
        "format": sequences.FORMAT,
        "tokenizer": metadata.to_json()["tokenizer"],
        "fingerprint": metadata.fingerprint,
        "class_names": sources["train"].class_names,
        "data": {name: data[name] for name in ("name", "data_dir", "resize", "pad")}
        | {"resize_filter": metadata.resize_filter},
        "crops": crops,
        "seed": seed,
        "images": {split: len(source) for split, source in sources.items()},
        "records": {split: source.describe() for split, source in sources.items()},
        "shard_size": sequences.SHARD_SIZE,
    }


def write_shards(
    pipeline: Pipeline,
    out: Path,
    sources: dict[str, Source],
    settings: dict[str, Any],
    options: LoaderOptions,
):
    """Writes this process's files, except those that already exist.

    Args:
        settings: see `plan_encoding`.
        options: how images are loaded; its batch counts crops.
    """
    shards = [
        shard
        for shard in sequences.plan(settings)[options.process_index :: options.process_count]
        if not (out / shard.file).exists()
    ]
    progress = Progress("encoding", sum(s.stop - s.start for s in shards), "images")
    done = 0
    for split, source in sources.items():
        missing = [shard for shard in shards if shard.split == split]
        if not missing:
            continue
        crops = settings["crops"] if split == "train" else 0
        images = max(1, options.process_batch_size // max(crops, 1))
        ranges = [(shard.start, shard.stop) for shard in missing]
        loading = dataclasses.replace(options, process_batch_size=images)
        batches = crop_batches(source, loading, ranges, crops=crops, seed=settings["seed"])
        with contextlib.closing(batches):
            for shard in missing:
                records, noted = [], len(source.unreadable)
                for _ in range(math.ceil((shard.stop - shard.start) / images)):
                    batch = next(batches)
                    records += encode_records(pipeline, batch, images)
                    done += len(batch["label"])
                    progress.update(done)
                unreadable = dict(list(source.unreadable.items())[noted:])
                sequences.write_shard(out / shard.file, records, unreadable)


def encode_records(pipeline: Pipeline, batch: dict[str, np.ndarray], images: int) -> list[bytes]:
    """The records of a batch from `crop_batches`, encoded as a batch of `images` images."""
    crops = fill_batch(batch["image"], images)
    sequence = pipeline.encode(crops.reshape(-1, *crops.shape[2:]))
    dtype = sequences.crop_dtype(pipeline.metadata.to_json()["tokenizer"])
    packed = sequences.compact(*sequence, dtype).reshape(images, -1)
    return [
        sequences.pack(int(label), packed[row])
        for row, (label, real) in enumerate(zip(batch["label"], batch["mask"]))
        if real
    ]
