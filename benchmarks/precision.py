"""Compares bfloat16 with float32: `python -m benchmarks.precision --workdir=runs/digits`.

Draws the same samples twice, with the same noise, and counts the map positions and tokens of each
stage that differ. Once a split differs, a sample diverges from there on, so the first stage that
differs says more than the last. Then both decode the float32 samples, and the encoder, which is
float32 in both, is checked to give equal sequences.
"""

import numpy as np
from absl import app, flags, logging

from nvg_jax.pipeline import Pipeline

FLAGS = flags.FLAGS


def main(_):
    logging.set_verbosity(logging.WARNING)  # Orbax logs every file that it reads
    exact, fast = (
        Pipeline.from_pretrained(FLAGS.workdir, dtype) for dtype in ("float32", "bfloat16")
    )
    classes = [index % len(exact.class_names) for index in range(FLAGS.num_samples)]
    a, b = (pipeline.sample(classes, seed=0) for pipeline in (exact, fast))
    print(f"{FLAGS.num_samples} samples of {FLAGS.workdir}, float32 against bfloat16\n")
    print("stage | map positions that differ | tokens that differ | images equal so far")
    equal = np.ones(len(classes), bool)
    for stage in range(a.sequence.structure.shape[1]):
        differ = [x[:, stage] != y[:, stage] for x, y in zip(a.sequence, b.sequence)]
        equal &= ~(differ[0] | differ[1]).any(1)
        print(f"{stage:5} | {differ[0].mean():.4%} | {differ[1].mean():.4%} | {equal.mean():.2%}")
    error = fast.decode(a.sequence) - a.images
    psnr = 10 * np.log10(4 / np.square(error).mean())
    print(
        f"\ndecoding the same sequences: PSNR {psnr:.1f} dB, largest error {abs(error).max():.4f}"
    )
    same = all(map(np.array_equal, exact.encode(a.images), fast.encode(a.images)))
    print(f"encoding the same images: {'equal' if same else 'DIFFERENT'} sequences")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of a model.", required=True)
    flags.DEFINE_integer("num_samples", 200, "Samples, cycling through the classes.")
    app.run(main)
