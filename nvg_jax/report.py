"""Compares trainings: `python -m nvg_jax.report --workdir=runs/a --workdir=runs/b`.

Prints the settings that differ and the last numbers of every part, the best run first, and draws
the curves into one PNG. Workdirs may be in buckets. Needs the extras `train` and, for the picture,
`report`.
"""

import logging
from pathlib import Path

import jax
from absl import flags
from etils import epy

from nvg_jax import cli
from nvg_jax.errors import UserError, comes_with

with epy.lazy_imports(error_callback=comes_with("train")):  # slow
    from nvg_jax.runtime import storage
    from nvg_jax.training import curves

FLAGS = flags.FLAGS
logger = logging.getLogger("nvg_jax")


def main(_):
    if Path(FLAGS.out).suffix != ".png":
        raise UserError(f"--out={FLAGS.out} must end in .png: the picture is a PNG.")
    runs, configs = curves.read({name: name for name in FLAGS.workdir})
    print(curves.tables(runs, configs))
    curves.draw(runs, storage.storage_path(FLAGS.out))
    logger.info("The curves are in %s.", FLAGS.out)


if __name__ == "__main__":
    flags.DEFINE_multi_string("workdir", None, "A run's workdir; give the flag once for each.")
    flags.DEFINE_string("out", "report.png", "The picture to write.")
    flags.mark_flags_as_required(["workdir"])
    # A training on this machine may hold its devices.
    cli.main(main, lambda: jax.config.update("jax_platforms", "cpu"))
