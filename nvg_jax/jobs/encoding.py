"""Encodes a data set once, on several processes, and keeps its granularity sequences."""

import contextlib
import math
from pathlib import Path
from typing import Any

import numpy as np

from nvg_jax.data import SequenceSource, Source, crop_batches, open_source, sequences
from nvg_jax.data.sources import SPLITS
from nvg_jax.pipeline import Pipeline
from nvg_jax.runtime import processes
from nvg_jax.runtime.progress import Progress
from nvg_jax.runtime.sharding import fill_batch


def encode_dataset(
    pipeline: Pipeline,
    out: str | Path,
    data: dict[str, Any],
    *,
    crops: int = 1,
    seed: int = 0,
    **options,
) -> dict[str, Any]:
    """Writes the sequences of a data set to a folder. Collective: every process must call it.

    Args:
        data: "name", "data_dir", "resize" and "pad" as in the section `data` of a config.
        crops: random crops of each training image. Test images get one center crop.
        seed: seed of the crops.
        options: keyword arguments of `write_shards`.

    Returns:
        The metadata (see `sequences.finish`) on process 0, {} on the others.

    Raises:
        ValueError: the data set has no images or other classes, `out` holds something else, or an
            image is unreadable (on_bad="error").
        OSError: a file cannot be written.
    """
    out = Path(out)
    sources, settings = prepare(pipeline, data, crops, seed)
    if processes.is_main():
        sequences.begin(out, settings)
    processes.barrier(f"{out} is begun")
    sequences.begin(out, settings)  # checks the settings of the other processes
    write_shards(pipeline, out, sources, settings, **options)
    processes.barrier(f"{out} is written")
    return sequences.finish(out, settings) if processes.is_main() else {}


def prepare(
    pipeline: Pipeline, data: dict[str, Any], crops: int, seed: int
) -> tuple[dict[str, Source], dict[str, Any]]:
    """Opens the splits of a data set, and collects the settings that determine its sequences."""
    if pipeline.meta["hash"] is None:
        raise ValueError(
            "The training of this tokenizer is not finished, and generators can only be trained "
            "with a finished one. Finish it with `python -m nvg_jax.train` first."
        )
    if crops < 1:
        raise ValueError(f"crops must be at least 1, got {crops}.")
    # Converted weights give only an upper bound on the number of classes; the data set names them.
    class_names = pipeline.class_names if "config" in pipeline.meta else None
    sources = {
        split: open_source(
            data["name"], split, data_dir=data["data_dir"] or None, class_names=class_names
        )
        for split in SPLITS
    }
    if isinstance(sources["train"], SequenceSource):
        raise ValueError(
            "The data set sequences holds sequences already. Give a data set of images."
        )
    return sources, {
        "format": sequences.FORMAT,
        "tokenizer": pipeline.meta["tokenizer"],
        "tokenizer_hash": pipeline.meta["hash"],
        "class_names": sources["train"].class_names,
        "data": {name: data[name] for name in ("name", "data_dir", "resize", "pad")},
        "crops": crops,
        "seed": seed,
        "images": {split: len(source) for split, source in sources.items()},
        "shard_size": sequences.SHARD_SIZE,
    }


def write_shards(
    pipeline: Pipeline,
    out: Path,
    sources: dict[str, Source],
    settings: dict[str, Any],
    *,
    batch_size: int = 64,
    on_bad: str = "error",
    num_threads: int = 2,
    num_workers: int = 0,
):
    """Writes this process's share of the files, except those already there.

    Args:
        batch_size: crops encoded at a time; at least all crops of one image.
        on_bad, num_threads, num_workers: see `nvg_jax.data.loader`. With on_bad="skip" an
            unreadable image gets no record.
    """
    shards = sequences.plan(settings)
    shards = [shards[i] for i in processes.own_share(len(shards))]
    shards = [shard for shard in shards if not (out / shard.file).exists()]
    progress = Progress("encoding", sum(shard.stop - shard.start for shard in shards), "images")
    done = 0
    for split, source in sources.items():
        missing = [shard for shard in shards if shard.split == split]
        if not missing:
            continue
        crops = settings["crops"] if split == "train" else 0  # 0: one center crop
        images = max(1, batch_size // max(crops, 1))
        batches = crop_batches(
            source,
            [(shard.start, shard.stop) for shard in missing],
            crops=crops,
            image_size=pipeline.tokenizer.config.image_size,
            seed=settings["seed"],
            resize=settings["data"]["resize"] or None,
            pad=settings["data"]["pad"],
            batch_size=images,
            on_bad=on_bad,
            num_threads=num_threads,
            num_workers=num_workers,
        )
        with contextlib.closing(batches):
            for shard in missing:
                records, known = [], len(source.unreadable)
                for _ in range(math.ceil((shard.stop - shard.start) / images)):
                    batch = next(batches)
                    records += encode_records(pipeline, batch, images)
                    done += len(batch["label"])
                    progress.update(done)
                unreadable = dict(list(source.unreadable.items())[known:])
                sequences.write_shard(out / shard.file, records, unreadable)


def encode_records(pipeline: Pipeline, batch: dict[str, np.ndarray], images: int) -> list[bytes]:
    """The records of a batch of `crop_batches`; unreadable images have none.

    Args:
        images: the batch is filled to this many images, so that encoding compiles once.
    """
    crops = fill_batch(batch["image"], images)
    sequence = pipeline.encode(crops.reshape(-1, *crops.shape[2:]))
    packed = sequences.compact(*sequence, sequences.crop_dtype(pipeline.meta["tokenizer"]))
    packed = packed.reshape(images, -1)
    return [
        sequences.pack(int(label), image)
        for label, image, readable in zip(batch["label"], packed, batch["mask"])
        if readable
    ]
