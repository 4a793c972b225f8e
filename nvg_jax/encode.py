"""Encodes a data set once: `python -m nvg_jax.encode --workdir=runs/digits --out=DIR`.

Generators then train with `--config.data.name=sequences --config.data.data_dir=DIR`, without the
encoder and the clustering in every step. Run the same command again to resume; several processes
share the work (`--distributed`, one folder for all).
"""

import logging

from absl import flags
from etils import epy

from nvg_jax import cli
from nvg_jax.errors import comes_with

with epy.lazy_imports(error_callback=comes_with("train")):  # slow
    from nvg_jax import pipeline
    from nvg_jax.jobs import encoding

FLAGS = flags.FLAGS
logger = logging.getLogger("nvg_jax")


def main(_):
    pipe = pipeline.Pipeline.from_pretrained(FLAGS.workdir)
    data = cli.data_section(pipe.metadata)
    metadata = encoding.encode_data_set(
        pipe,
        FLAGS.out,
        data,
        crops=FLAGS.crops,
        seed=FLAGS.seed,
        batch_size=FLAGS.batch_size,
        on_bad=FLAGS.on_bad or data.get("on_bad", "error"),
        num_threads=FLAGS.num_threads,
        num_workers=FLAGS.num_workers,
    )
    for split, shards in metadata.get("shards", {}).items():
        images = sum(shard["records"] for shard in shards.values())
        left_out = metadata["unreadable"][split]
        logger.info("%s: %d images, %d unreadable ones left out", split, images, len(left_out))
        for name, reason in left_out.items():
            logger.warning("left out: %s: %s", name, reason)


if __name__ == "__main__":
    cli.define_model_flags()
    cli.define_data_flags()
    flags.DEFINE_integer(
        "pad", None, "Random shifts of training crops by up to this many pixels.", 0
    )
    flags.DEFINE_string("out", None, "Folder of the sequences; several processes share it.")
    flags.DEFINE_integer("crops", 1, "Random crops of each training image.", lower_bound=1)
    flags.DEFINE_enum(
        "on_bad", None, ["error", "skip"], "What an unreadable image does, if not as in training."
    )
    flags.DEFINE_integer("num_threads", 2, "Threads that decode, in every worker.", lower_bound=1)
    flags.DEFINE_integer("num_workers", 0, "Processes that decode; 0: threads only.", lower_bound=0)
    flags.mark_flags_as_required(["workdir", "out"])
    cli.main(main, kept="Written parts are kept; the same command encodes the others.")
