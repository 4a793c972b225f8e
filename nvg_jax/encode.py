"""Encodes a data set once: `python -m nvg_jax.encode --workdir=runs/digits --out=DIR --crops=8`.

The generators then train with `--config.data.name=sequences --config.data.data_dir=DIR`, without
the encoder and the clustering in every step. Run the same command again to resume a killed run: it
writes the files that are missing. Several processes share the files (`--distributed`; all must see
the same folder).
"""

import logging
from typing import Any

from absl import flags

from nvg_jax import cli
from nvg_jax.pipeline import Pipeline

FLAGS = flags.FLAGS
logger = logging.getLogger("nvg_jax")


def data_from_flags(pipeline: Pipeline) -> dict[str, Any]:
    """The section `data` of the config the tokenizer was trained with, overridden by flags."""
    given = {name: FLAGS[name].value for name in ("data_dir", "resize", "pad")}
    given = {name: value for name, value in given.items() if value is not None}
    if FLAGS.data_name:
        return {"name": FLAGS.data_name, "data_dir": "", "resize": 0, "pad": 0, **given}
    if "config" in pipeline.meta:
        return {**pipeline.meta["config"]["data"], **given}
    raise ValueError(
        "This folder does not say which data set it was trained on (converted weights do not). "
        "Give --data_name, for example tfds:imagenet2012, and --data_dir."
    )


def main(_):
    pipeline = Pipeline.from_pretrained(FLAGS.workdir)
    data = data_from_flags(pipeline)

    from nvg_jax.jobs.encoding import encode_dataset  # slow to import

    meta = encode_dataset(
        pipeline,
        FLAGS.out,
        data,
        crops=FLAGS.crops,
        seed=FLAGS.seed,
        batch_size=FLAGS.batch_size,
        on_bad=FLAGS.on_bad,
        num_threads=FLAGS.num_threads,
        num_workers=FLAGS.num_workers,
    )
    for split, shards in meta.get("shards", {}).items():
        images = sum(shard["records"] for shard in shards.values())
        unreadable = meta["unreadable"][split]
        logger.info("%s: %d images, %d unreadable ones skipped", split, images, len(unreadable))
        for name, reason in unreadable.items():
            logger.warning("skipped %s: %s", name, reason)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of a run, or an exported or converted model.")
    flags.DEFINE_string("out", None, "Folder for the sequences.")
    flags.DEFINE_string("data_name", None, "Data set, if not the one the tokenizer was trained on.")
    flags.DEFINE_string("data_dir", None, "Folder of the data set.")
    flags.DEFINE_integer("resize", None, "Short side before the crop; 0: image size * 288 / 256.")
    flags.DEFINE_integer("pad", None, "Random shifts by up to this many pixels.")
    flags.DEFINE_integer("crops", 1, "Random crops of each training image.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 64, "Crops encoded at a time.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the crops.")
    flags.DEFINE_enum("on_bad", "error", ["error", "skip"], "What to do on unreadable images.")
    flags.DEFINE_integer("num_threads", 2, "Decoding threads in each worker.", lower_bound=1)
    flags.DEFINE_integer("num_workers", 0, "Decoding processes; 0: threads only.", lower_bound=0)
    flags.mark_flags_as_required(["workdir", "out"])
    cli.run(main)
