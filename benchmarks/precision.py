"""Compares half precision with float32: `python -m benchmarks.precision --workdir=runs/digits`.

Draws the same samples in every dtype, with the same noise, and counts the map positions and tokens
of each stage that differ. Once a split differs, a sample diverges from there on, so the first stage
that differs says more than the last. Then all decode the float32 samples and encode their images.

To compare two machines, run with --save=FILE on one, then with --reference=FILE on the other, which
compares its samples of all dtypes with the saved ones. By default, GPUs multiply float32
numbers in TF32 (10 bits of mantissa), and TPUs in bfloat16; JAX_DEFAULT_MATMUL_PRECISION=highest
prevents it.
"""

import jax
import numpy as np
from absl import app, flags, logging

from nvg_jax.pipeline import Pipeline, SampleOutput
from nvg_jax.sampling.settings import DTYPES
from nvg_jax.tokenizer import GranularitySequence

FLAGS = flags.FLAGS


def compare(pipeline: Pipeline, samples, encoded, classes):
    """Prints how far a pipeline is from samples, and from the sequences of their images."""
    own = pipeline.sample(classes, seed=0)
    print("stage | map positions that differ | tokens that differ | images equal so far")
    equal = np.ones(len(classes), bool)
    for stage in range(samples.sequence.structure.shape[1]):
        differ = [x[:, stage] != y[:, stage] for x, y in zip(samples.sequence, own.sequence)]
        equal &= ~(differ[0] | differ[1]).any(1)
        print(f"{stage:5} | {differ[0].mean():.4%} | {differ[1].mean():.4%} | {equal.mean():.2%}")
    error = pipeline.decode(samples.sequence) - samples.images
    with np.errstate(divide="ignore"):  # infinite where no pixel differs
        psnr = 10 * np.log10(4 / np.square(error).mean())
    print(
        f"\ndecoding the same sequences: PSNR {psnr:.1f} dB, largest error {abs(error).max():.4f}"
    )
    differ = [(x != y).mean() for x, y in zip(encoded, pipeline.encode(samples.images))]
    print(
        f"encoding the same images: {differ[0]:.4%} of map positions, {differ[1]:.4%} of tokens\n"
    )


def main(_):
    logging.set_verbosity(logging.WARNING)  # Orbax logs every file that it reads
    pipelines = {dtype: Pipeline.from_pretrained(FLAGS.workdir, dtype) for dtype in DTYPES}
    exact = pipelines["float32"]
    classes_of = lambda count: np.arange(count) % len(exact.class_names)
    if FLAGS.reference:
        with np.load(FLAGS.reference) as file:
            sequence = GranularitySequence(file["structure"], file["tokens"])
            samples = SampleOutput(file["images"], sequence)
            encoded = file["encoded_structure"], file["encoded_tokens"]
        classes = classes_of(len(samples.images))
    else:
        classes = classes_of(FLAGS.num_samples)
        samples = exact.sample(classes, seed=0)
        encoded = exact.encode(samples.images)
        del pipelines["float32"]
    if FLAGS.save:
        np.savez_compressed(
            FLAGS.save,
            images=samples.images,
            **samples.sequence._asdict(),
            **dict(zip(("encoded_structure", "encoded_tokens"), encoded)),
        )
    for dtype, pipeline in pipelines.items():
        print(f"{len(classes)} samples of {FLAGS.workdir}: float32 against {dtype} on", end=" ")
        print(f"{jax.devices()[0].device_kind}\n")
        compare(pipeline, samples, encoded, classes)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of a model.", required=True)
    flags.DEFINE_integer("num_samples", 200, "Samples, cycling through the classes.")
    flags.DEFINE_string("save", None, "File for the float32 samples.")
    flags.DEFINE_string(
        "reference", None, "The --save of another machine, and its number of samples."
    )
    app.run(main)
