"""Throughput of the data pipeline: images per second per core, from JPEG files to 256 x 256 pixels.

    python -m benchmarks.data [--need=IMAGES_PER_SECOND]

The training loader decodes, resizes, crops and batches JPEGs of ImageNet's mean size (500 x 375
pixels, 110 kB) with detail at every scale, in threads of this process. Rates are per second of CPU
time, so that other load on the machine matters little. Both resize filters are timed. --need prints
the number of cores that the last rate requires.
"""

import itertools
import pathlib
import tempfile
import time

import numpy as np
from absl import app, flags
from PIL import Image

from nvg_jax.data import LoaderOptions, Transform, open_source, train_batches
from nvg_jax.data.transforms import RESIZE_FILTERS

flags.DEFINE_integer("images", 256, "Number of different images.", lower_bound=128)
flags.DEFINE_integer("batches", 20, "Number of timed batches of 64 images.")
flags.DEFINE_float(
    "need", None, "Images per second that training needs; prints the number of cores."
)
FLAGS = flags.FLAGS
BATCH_SIZE = 64


def picture(rng: np.random.Generator) -> Image.Image:
    """A 500 x 375 image whose spectrum falls with frequency, like that of a photograph."""
    shape = (375, 500)
    frequency = np.hypot(*np.meshgrid(*(np.fft.fftfreq(n) for n in shape), indexing="ij"))
    noise = rng.normal(size=(3, *shape))
    smooth = np.fft.ifft2(np.fft.fft2(noise) / (frequency + 0.01) ** 0.8).real
    smooth = (smooth - smooth.mean()) / smooth.std() * 55 + 118
    return Image.fromarray(np.moveaxis(smooth, 0, -1).clip(0, 255).astype(np.uint8))


def main(_):
    with tempfile.TemporaryDirectory() as folder:
        target = pathlib.Path(folder) / "one"
        target.mkdir()
        rng = np.random.default_rng(0)
        for number in range(FLAGS.images):
            picture(rng).save(target / f"{number:04d}.jpg", quality=86)
        size = sum(path.stat().st_size for path in target.iterdir()) / FLAGS.images
        print(f"{FLAGS.images} JPEGs of 500 x 375 pixels, {size / 1e3:.0f} kB each")
        source = open_source("image_folder", "train", data_dir=folder)
        for resize_filter, threads in itertools.product(RESIZE_FILTERS, (1, 2)):
            transform = Transform((256, 256), resize_filter=resize_filter)
            options = LoaderOptions(transform, BATCH_SIZE, num_threads=threads, prefetch=1)
            batches = train_batches(source, options, seed=0)
            next(batches)
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(FLAGS.batches):
                next(batches)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            batches.close()
            count = FLAGS.batches * BATCH_SIZE
            print(
                f"{resize_filter}, {threads} threads: {count / cpu:.0f} images per second of CPU "
                f"time ({count / wall:.0f} per second of wall time)"
            )
            if FLAGS.need:
                cores = FLAGS.need * cpu / count
                print(f"  {FLAGS.need:.0f} images per second need {cores:.1f} cores")


if __name__ == "__main__":
    app.run(main)
