"""A page to sample, control and edit in the browser: `python -m nvg_jax.app --workdir=runs/digits`.

Without --workdir it shows the bundled Fashion-MNIST model. Only this machine can open it unless
--host says otherwise. Needs Gradio, which the extra `app` installs (docs/install.md).
"""

import logging
import os
import tempfile

from absl import flags
from etils import epy

from nvg_jax import cli
from nvg_jax.errors import comes_with
from nvg_jax.sampling.settings import DTYPES

with epy.lazy_imports(error_callback=comes_with("app")):
    from nvg_jax import page, pipeline

FLAGS = flags.FLAGS
logger = logging.getLogger("nvg_jax")


def main(_):
    build = page.build  # first, since it may need what is not installed
    pipe = pipeline.Pipeline.from_pretrained(FLAGS.workdir, FLAGS.dtype)
    pipe.check_can_sample()
    shown = page.Page(pipe, FLAGS.workdir)
    if FLAGS.write_opening:
        shown.write_opening()
        return
    uploads = f"{tempfile.gettempdir()}/nvg_jax-{os.getuid()}"  # Gradio's may be another user's
    os.environ.setdefault("GRADIO_TEMP_DIR", uploads)
    blocks = build(shown).queue(max_size=FLAGS.max_waiting)
    logger.info("the page is at %s", page.serve(blocks, FLAGS.host, FLAGS.port))
    blocks.block_thread()


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "fashion_mnist", cli.MODEL)
    flags.DEFINE_enum("dtype", None, DTYPES, "Arithmetic; by default what the devices do best.")
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 lets others in.")
    flags.DEFINE_integer("port", 7860, "Port to listen on.", 1, 65535)
    flags.DEFINE_integer("max_waiting", 20, "Requests that may wait.", lower_bound=1)
    flags.DEFINE_boolean(
        "write_opening", False, "Write opening.png, with which the page opens, and serve nothing."
    )
    cli.main(main)
