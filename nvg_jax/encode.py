"""Encodes a data set once: `python -m nvg_jax.encode --workdir=runs/digits --out=DIR --crops=8`.

The generators then train on `--config.data.name=sequences --config.data.data_dir=DIR`, without
the encoder and the clustering in every step. Started again after a kill it goes on with the files
that are missing; several processes share them (`--distributed`, one folder for all).
"""

import contextlib
import logging
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from nvg_jax import cli
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
from nvg_jax.pipeline import Pipeline

logger = logging.getLogger("nvg_jax")

PROGRESS_SECONDS = 10


def tokenize(
    pipeline: Pipeline,
    out: str | Path,
    data: dict[str, Any],
    *,
    crops: int = 1,
    seed: int = 0,
    **options,
) -> dict[str, Any]:
    """Writes the cache of a data set, together with all other processes.

    Args:
        data: "name", "data_dir", "resize" and "pad" as in the section `data` of a config.
        crops: random crops of every training image. Test images have one from the center.
        seed: of the crops.
        options: of `write_shards`, from batch_size on.

    Returns:
        The metadata (see `sequences.finish`) in process 0, {} in the others.

    Raises:
        ValueError: data that has no images or other classes, `out` holds something else, or an
            unreadable image (on_bad="error").
        OSError: a file cannot be written.
    """
    out = Path(out)
    sources, settings = prepare(pipeline, data, crops, seed)
    if jax.process_index() == 0:
        sequences.begin(out, settings)
    wait_for_all("begun")
    sequences.begin(out, settings)  # the others, which may have been given other settings
    write_shards(
        pipeline, out, sources, settings, jax.process_index(), jax.process_count(), **options
    )
    wait_for_all("written")
    return sequences.finish(out, settings) if jax.process_index() == 0 else {}


def prepare(
    pipeline: Pipeline, data: dict[str, Any], crops: int, seed: int
) -> tuple[dict[str, Source], dict[str, Any]]:
    """The splits of the data, and the settings that decide what the cache holds."""
    if pipeline.meta["hash"] is None:
        raise ValueError(
            "The training of this tokenizer is not finished, and generators will be trained on the "
            "finished one only. Let `python -m nvg_jax.train` finish it first."
        )
    if crops < 1:
        raise ValueError(f"crops must be at least 1, got {crops}.")
    # Converted weights know the number of their classes at most; then the data names them.
    class_names = pipeline.class_names if "config" in pipeline.meta else None
    sources = {
        split: open_source(
            data["name"], split, data_dir=data["data_dir"] or None, class_names=class_names
        )
        for split in SPLITS
    }
    if isinstance(sources["train"], SequenceSource):
        raise ValueError("The data set granularity holds sequences already; give one of images.")
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
    process_index: int,
    process_count: int,
    *,
    batch_size: int = 64,
    on_bad: str = "error",
    num_threads: int = 2,
    num_workers: int = 0,
):
    """Writes those files of a process that are missing.

    Args:
        batch_size: crops encoded at a time; at least all of one image.
        on_bad, num_threads, num_workers: see `nvg_jax.data.LoaderOptions`; with "skip" an
            unreadable image has no record.
    """
    shards = [
        shard
        for shard in sequences.plan(settings)[process_index::process_count]
        if not (out / shard.file).exists()
    ]
    total, done = sum(s.stop - s.start for s in shards), 0
    first, start, shown = 0, time.monotonic(), time.monotonic()
    for split, source in sources.items():
        missing = [shard for shard in shards if shard.split == split]
        if not missing:
            continue
        crops = settings["crops"] if split == "train" else 0
        images = max(1, batch_size // max(crops, 1))
        data = settings["data"]
        options = LoaderOptions(
            Transform(pipeline.tokenizer.config.image_size, data["resize"] or None, data["pad"]),
            batch_size=images,
            on_bad=on_bad,
            num_threads=num_threads,
            num_workers=num_workers,
        )
        ranges = [(shard.start, shard.stop) for shard in missing]
        batches = crop_batches(source, options, ranges, crops=crops, seed=settings["seed"])
        with contextlib.closing(batches):
            for shard in missing:
                records, noted = [], len(source.unreadable)
                for _ in range(math.ceil((shard.stop - shard.start) / images)):
                    batch = next(batches)
                    records += encode_records(pipeline, batch, images)
                    done, now = done + len(batch["label"]), time.monotonic()
                    if not first:  # it was compiled for this one, which tells nothing of the rate
                        first, start, shown = done, now, now
                    elif now - shown > PROGRESS_SECONDS or done == total:
                        shown = now
                        log_progress(done, total, (done - first) / (now - start))
                unreadable = dict(list(source.unreadable.items())[noted:])
                sequences.write_shard(out / shard.file, records, unreadable)


def encode_records(pipeline: Pipeline, batch: dict[str, np.ndarray], images: int) -> list[bytes]:
    """The records of a batch of `crop_batches`, encoded as if it had `images` images."""
    crops = batch["image"]
    filled = np.concatenate([crops, np.zeros((images - len(crops), *crops.shape[1:]), np.float32)])
    sequence = pipeline.encode(filled.reshape(-1, *crops.shape[2:]))
    packed = sequences.compact(*sequence, sequences.crop_dtype(pipeline.meta["tokenizer"]))
    packed = packed.reshape(images, -1)
    return [
        sequences.pack(int(label), packed[i])
        for i, (label, real) in enumerate(zip(batch["label"], batch["mask"]))
        if real
    ]


def wait_for_all(name: str):
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"nvg_jax.encode {name}")


def log_progress(done: int, total: int, rate: float):
    minutes, seconds = divmod(round((total - done) / rate), 60)
    logger.info("%d/%d images  %.3g images/s  ETA %d:%02d", done, total, rate, minutes, seconds)


FLAGS = flags.FLAGS


def chosen_data(pipeline: Pipeline) -> dict[str, Any]:
    """The section `data` of the tokenizer's own run, or of the flags."""
    given = {"name": FLAGS.data_name, "data_dir": FLAGS.data_dir, "resize": FLAGS.resize}
    given = {k: v for k, v in (given | {"pad": FLAGS.pad}).items() if v is not None}
    if FLAGS.data_name:
        return {"data_dir": "", "resize": 0, "pad": 0} | given
    if "config" in pipeline.meta:
        return {**pipeline.meta["config"]["data"], **given}
    raise ValueError(
        "This folder does not say what data it was trained on (converted weights do not); give "
        "--data_name, for example tfds:imagenet2012, and --data_dir."
    )


def main(_):
    pipeline = Pipeline.from_pretrained(FLAGS.workdir)
    meta = tokenize(
        pipeline,
        FLAGS.out,
        chosen_data(pipeline),
        crops=FLAGS.crops,
        seed=FLAGS.seed,
        batch_size=FLAGS.batch_size,
        on_bad=FLAGS.on_bad,
        num_threads=FLAGS.num_threads,
        num_workers=FLAGS.num_workers,
    )
    for split, shards in meta.get("shards", {}).items():
        left_out = meta["unreadable"][split]
        logger.info(
            "%s: %d images, %d unreadable ones left out",
            split,
            sum(shard["records"] for shard in shards.values()),
            len(left_out),
        )
        for name, reason in left_out.items():
            logger.warning("left out: %s: %s", name, reason)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "A run's folder, or an exported or converted one.")
    flags.DEFINE_string("out", None, "Folder of the cache; one of several processes is shared.")
    flags.DEFINE_string("data_name", None, "Data set, if not the one it was trained on.")
    flags.DEFINE_string("data_dir", None, "Folder of the data set.")
    flags.DEFINE_integer("resize", None, "Short side before the crop; 0: image size * 288 / 256.")
    flags.DEFINE_integer("pad", None, "Random shifts by up to this many pixels.")
    flags.DEFINE_integer("crops", 1, "Random crops of each training image.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 64, "Crops encoded at a time.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the crops.")
    flags.DEFINE_enum("on_bad", "error", ["error", "skip"], "What an unreadable image does.")
    flags.DEFINE_integer("num_threads", 2, "Threads that decode, in every worker.", lower_bound=1)
    flags.DEFINE_integer("num_workers", 0, "Processes that decode; 0: threads only.", lower_bound=0)
    flags.mark_flags_as_required(["workdir", "out"])
    cli.run(main)
