"""Measures what `nvg_jax.compile` estimates: a training step or the sampler, on this machine.

    python -m benchmarks.programs --config=configs/imagenet256.py:d16 --batch_size=96
    python -m benchmarks.programs --config=configs/imagenet256.py:d16 --batch_size=64 \\
        --program=sample

Runs the program that `train` (of `config.part`, by default both generators) or `sample` runs, on
all devices of this machine, with random weights and images. With the same --config, --program and
--batch_size, `compile` estimates the same program. Prints the median time of a call and the peak
memory of the first device, also as a line of JSON.

To try what the package does not do: --linears forces a form of the linear layers, --attention
replaces the attention, and --products quantizes the matrix products of a training step's blocks
(pip install tokamax, qwix).
"""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.attention import tokamax_attention
from benchmarks.sampling import CLASSES, random_params, random_weights, read_config
from nvg_jax import layers, presets
from nvg_jax.aot.lowering import IMAGENET, training_part
from nvg_jax.kernels import block_linears
from nvg_jax.models import ModelConfig
from nvg_jax.pipeline import sample_keys
from nvg_jax.runtime import sharding
from nvg_jax.sampling.generate import SampleRequests
from nvg_jax.sampling.networks import sampling_program
from nvg_jax.training.registry import make_trainer

FLAGS = flags.FLAGS
# Types of the factors, forward and of the gradient.
PRODUCTS = {"int8": ("int8", "int8"), "fp8": ("float8_e4m3fn", "float8_e5m2")}


def replace_parts():
    """Replaces parts of the generators as the flags say."""
    if FLAGS.linears:
        block_linears.form = lambda tokens, width: FLAGS.linears
    if FLAGS.attention == "tokamax":
        layers.attention = tokamax_attention
    if FLAGS.products:
        import qwix  # type: ignore[reportMissingImports]

        forward, gradient = PRODUCTS[FLAGS.products]
        rule = qwix.QtRule(
            module_path=".*blocks.*",
            op_names=("einsum",),  # the linear layers of many tokens, not attention
            weight_qtype=forward,
            act_qtype=forward,
            bwd_qtype=gradient,
        )
        make = ModelConfig.make_generator

        def make_quantized(self, name):
            method = "predict_canvas" if name == "content" else "__call__"
            return qwix.quantize_model(make(self, name), qwix.QtProvider([rule]), methods=(method,))

        ModelConfig.make_generator = make_quantized


def training(config, mesh):
    """The compiled training step of `config.part` -> function that runs it, returns its metrics."""
    model, _ = read_config(config)
    part = training_part(config)
    config[part.section].batch_size = batch = FLAGS.batch_size
    rng = np.random.default_rng(0)
    with sharding.in_mesh(mesh):
        trainer = make_trainer(part, config, model, mesh, num_images=IMAGENET[0])
        images = rng.uniform(-1, 1, trainer.abstract_batch["image"].shape).astype(np.float32)
        labels = rng.integers(0, CLASSES, batch, np.int32)
        examples = {"image": images, "label": labels}
        inputs = random_weights(trainer.abstract_inputs)
        if "canvas_scale" in inputs:
            inputs["canvas_scale"] = jnp.ones(trainer.abstract_inputs["canvas_scale"].shape)
        place = lambda x, like: jax.device_put(x, like.sharding)
        inputs, examples = jax.tree.map(
            place, (inputs, examples), (trainer.abstract_inputs, trainer.abstract_batch)
        )
        state = trainer.jit_init_state(jax.random.key(0), inputs)
        arguments = (inputs, examples, jax.random.key(0))
        step = trainer.jit_train_step.lower(
            state, *arguments, index_backprop=trainer.index_backprop(0)
        ).compile()

    def run():
        nonlocal state
        state, metrics = step(state, *arguments)
        return metrics

    return run


def sampling(config, mesh):
    """The compiled sampler -> function that runs it and returns images and sequences."""
    model, settings = read_config(config)
    batch = FLAGS.batch_size
    program = sampling_program(model)
    plan, values = program.plan(settings)
    split = NamedSharding(mesh, sharding.BATCH_SPEC)
    with jax.set_mesh(mesh):
        abstract = program.arguments(batch, values, mesh)[2]
        zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
        requests = SampleRequests(
            jnp.arange(batch) % CLASSES,
            sample_keys(0, np.arange(batch)),
            jax.random.normal(jax.random.key(1), abstract.noise.shape),
            zeros(abstract.prefix),
            zeros(abstract.region),
        )
        args = (
            jax.device_put(random_params(model), NamedSharding(mesh, PartitionSpec())),
            jnp.ones(model.tokenizer.num_stages + 1),
            jax.device_put(requests, split),
            values,
        )
        sample = program.sample.lower(*args, plan=plan).compile()
    return lambda: sample(*args)


def main(_):
    logging.set_verbosity(logging.WARNING)  # JAX logs which backends are missing
    replace_parts()
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
    numbers = {"seconds": times, "peak_bytes": memory and memory["peak_bytes_in_use"]}
    print(json.dumps(numbers))
    print(
        f"{1e3 * seconds:,.1f} ms a call ({1e3 * min(times):,.1f} to {1e3 * max(times):,.1f}), "
        f"{1e3 * seconds / FLAGS.batch_size:,.2f} ms an image{peak}"
    )


if __name__ == "__main__":
    presets.define_flag()
    flags.DEFINE_enum("program", "train", ["train", "sample"], "The program to run.")
    flags.DEFINE_integer("batch_size", 64, "Global batch.", lower_bound=1)
    flags.DEFINE_integer("rounds", 5, "Calls, of which the median counts.", lower_bound=1)
    flags.DEFINE_enum("linears", None, ["joint", "separate", "parts"], "See block_linears.form.")
    flags.DEFINE_enum("attention", "ours", ["ours", "tokamax"], "Attention of the generators.")
    flags.DEFINE_enum("products", None, PRODUCTS, "Quantized products of a training step.")
    flags.DEFINE_string("trace", None, "Folder for a profile of one more call.")
    flags.mark_flags_as_required(["config"])
    app.run(main)
