"""Measures what `nvg_jax.compile` estimates: a training step or the sampler, on this machine.

    python -m benchmarks.programs --config=configs/imagenet256.py:d16 --batch_size=96
    python -m benchmarks.programs --config=configs/imagenet256.py:d16 --batch_size=64 \\
        --program=sample

Runs the program that `train` (of `config.part`, by default both generators) or `sample` runs, on
all devices of this machine, with random weights and images. With the same --config, --program and
--batch_size, `compile` estimates the same program. Prints the median time of a call and the peak
memory of the first device.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import config_flags

from benchmarks.sampling import CLASSES, random_params, random_weights, read_config
from nvg_jax.aot.lowering import training_part
from nvg_jax.pipeline import sample_keys
from nvg_jax.runtime import sharding
from nvg_jax.sampling.networks import sampling_program
from nvg_jax.training import generators, tokenizer
from nvg_jax.workdir import DISTILLATION, RECIPES

FLAGS = flags.FLAGS
STEPS = 1000  # of the training, which only shapes the schedule


def training(config, mesh):
    """The compiled training step of `config.part` -> function that runs it, returns its metrics."""
    sizes, _, _ = read_config(config)
    part = training_part(config)
    if part == DISTILLATION:
        raise app.UsageError("Distillation needs a teacher; choose another --config.part.")
    config[RECIPES[part]].batch_size = batch = FLAGS.batch_size
    replicated = NamedSharding(mesh, PartitionSpec())
    rng = np.random.default_rng(0)

    def random_batch(abstract):
        images = rng.uniform(-1, 1, abstract["image"].shape).astype(np.float32)
        labels = rng.integers(0, CLASSES, batch, np.int32)
        return jax.device_put(
            {"image": images, "label": labels}, NamedSharding(mesh, sharding.BATCH_SPEC)
        )

    with sharding.in_mesh(mesh):
        if part == "tokenizer":
            program = tokenizer.make_program(config, mesh, STEPS)
            _, frozen, abstract, _ = program.arguments
            shared = (jax.device_put(random_weights(frozen), replicated),)
            static = {"index_backprop": config.tokenizer_training.index_backprop_epochs > 0}
            state = program.init(jax.random.key(0))
        else:
            names = generators.parts_of(part)
            program = generators.make_program(config, mesh, STEPS, names, CLASSES)
            _, _, frozen, _, abstract, _ = program.arguments
            encoder = random_params(sizes, {})["tokenizer"]
            scale = jnp.ones(sizes.num_stages + 1)
            shared = (*jax.device_put((encoder, random_weights(frozen)), replicated), scale)
            static = {}
            state = program.init(jax.random.key(0), encoder["quantizer"]["codebook"])
        arguments = (*shared, random_batch(abstract), jax.random.key(0))
        step = program.step.lower(state, *arguments, **static).compile()

    def run():
        nonlocal state
        state, metrics = step(state, *arguments)
        return metrics

    return run


def sampling(config, mesh):
    """The compiled sampler -> function that runs it and returns images and sequences."""
    sizes, transformers, settings = read_config(config)
    batch = FLAGS.batch_size
    program = sampling_program(sizes, **transformers, num_classes=CLASSES, dtype=config.dtype)
    plan, values = program.plan(settings)
    split = NamedSharding(mesh, sharding.BATCH_SPEC)
    with jax.set_mesh(mesh):
        _, _, _, _, noise, _, prefix, region = program.arguments(batch, values, mesh)
        zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
        args = (
            jax.device_put(
                random_params(sizes, transformers), NamedSharding(mesh, PartitionSpec())
            ),
            jnp.ones(sizes.num_stages + 1),
            jax.device_put(jnp.arange(batch) % CLASSES, split),
            jax.device_put(sample_keys(0, np.arange(batch)), split),
            jax.device_put(jax.random.normal(jax.random.key(1), noise.shape), split),
            values,
            *jax.device_put((zeros(prefix), zeros(region)), split),
        )
        sample = program.sample.lower(*args, plan=plan).compile()
    return lambda: sample(*args)


def main(_):
    logging.set_verbosity(logging.WARNING)  # JAX logs which backends are missing
    mesh = sharding.make_mesh(**FLAGS.config.mesh)
    start = time.perf_counter()
    run = {"train": training, "sample": sampling}[FLAGS.program](FLAGS.config, mesh)
    jax.block_until_ready(run())
    print(
        f"{FLAGS.program}, {mesh.size} x {jax.devices()[0].device_kind}, jax {jax.__version__}, "
        f"batch {FLAGS.batch_size}, ready after {time.perf_counter() - start:.0f} s",
        flush=True,
    )
    times = []
    for _ in range(FLAGS.rounds):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    if FLAGS.trace:
        with jax.profiler.trace(FLAGS.trace):
            jax.block_until_ready(run())
    seconds = np.median(times)
    memory = jax.local_devices()[0].memory_stats()
    peak = f", peak memory {memory['peak_bytes_in_use'] / 2**30:.1f} GiB" if memory else ""
    print(
        f"{1e3 * seconds:,.1f} ms a call ({1e3 * min(times):,.1f} to {1e3 * max(times):,.1f}), "
        f"{1e3 * seconds / FLAGS.batch_size:,.2f} ms an image{peak}"
    )


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Configuration, as for `train`.")
    flags.DEFINE_enum("program", "train", ["train", "sample"], "The program to run.")
    flags.DEFINE_integer("batch_size", 64, "Global batch.", lower_bound=1)
    flags.DEFINE_integer("rounds", 5, "Calls, of which the median counts.", lower_bound=1)
    flags.DEFINE_string("trace", None, "Folder for a profile of one more call.")
    flags.mark_flags_as_required(["config"])
    app.run(main)
