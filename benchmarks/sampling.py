"""Where the time of sampling goes.

    python -m benchmarks.sampling --config=configs/imagenet256.py:d16

Times every network of the sampler by itself, compiled, with random weights and inputs: the content
generator (one call a stage), the structure generator (what a split's steps share, and `flow_steps`
evaluations, for each learned split),
adding a stage to the canvas, and the decoder. Seconds an image are their times by how often the
sampler calls them with the config's settings. Where a stage is guided, a call works on twice the
batch.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from nvg_jax import models
from nvg_jax.layers import TransformerConfig, cast_blocks
from nvg_jax.sampling.guidance import Guidance
from nvg_jax.sampling.networks import bind
from nvg_jax.sampling.settings import Settings
from nvg_jax.tokenizer import TokenizerConfig

FLAGS = flags.FLAGS
CLASSES = 1000


def random_params(sizes: TokenizerConfig, transformers: dict[str, TransformerConfig]):
    """Weights of all networks; their values do not matter for the time."""
    rng = np.random.default_rng(0)
    return {
        name: jax.tree.map(
            lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32) * 0.02),
            models.abstract_params(name, sizes, transformers.get(name), CLASSES),
        )
        for name in ("tokenizer", *models.GENERATORS)
    }


def seconds(function, *args) -> float:
    """The shortest of several calls, after one that compiles."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(FLAGS.repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return min(times)


def measure(params, sizes, transformers, dtype: str, batch: int, settings: Settings):
    """{part: its seconds for a batch}."""
    stages, length = sizes.num_stages, sizes.num_positions
    networks = {
        name: models.make_generator(name, transformers[name], sizes, CLASSES, dtype)
        for name in models.GENERATORS
    }
    # Cast once, as the sampler does.
    params = params | {name: cast_blocks(params[name], networks[name].dtype) for name in networks}
    of = functools.partial(
        bind,
        canvas_scale=jnp.ones(stages + 1),
        tokenizer=models.make_tokenizer(sizes, dtype),
        **networks,
    )
    stage = stages // 2
    labels = jnp.broadcast_to(jnp.arange(length) * 2**stage // length, (batch, length))
    canvas = jax.random.normal(jax.random.key(0), (batch, length, sizes.latent_dim))
    z = jax.random.normal(jax.random.key(1), (batch, length, stages - 1))
    classes = jnp.arange(batch) % CLASSES

    evaluations = settings.flow_steps * (2 if settings.solver == "heun" else 1)
    times = jnp.linspace(1, 0, settings.flow_steps + 1)

    def content(guidance, params, canvas, labels):
        doubled = map(guidance.double, (canvas, labels))
        return guidance(of(params)[0].logits(*doubled, stage, guidance.classes))

    def split(evaluations, guidance, params, z, canvas, labels):
        """As many evaluations of the structure generator, and what they share."""
        doubled = map(guidance.double, (labels, canvas))
        velocity, rows = of(params)[0].flow(*doubled, stage, guidance.classes, times)
        row = jax.tree.map(lambda x: x[0], rows)
        step = lambda _, z: guidance(velocity(guidance.double(z), row))
        return jax.lax.fori_loop(0, evaluations, step, z)

    def of_stages(network, scales, *inputs):
        """Seconds of a call for each stage, guided where its scale is not 1."""
        total = 0.0
        for scale, count in ((None, scales.count(1.0)), (2.0, len(scales) - scales.count(1.0))):
            if count:
                guidance = Guidance(classes, CLASSES, scale)
                call = jax.jit(functools.partial(network, guidance))
                total += count * seconds(call, params, *inputs)
        return total

    learned = settings.structure_guidance[: stages - 2]
    add = jax.jit(lambda params, canvas, labels: of(params)[0].add_stage(canvas, labels, stage))
    decode = jax.jit(lambda params, canvas: of(params)[1](canvas))
    one, two = (
        of_stages(functools.partial(split, count), learned, z, canvas, labels) for count in (1, 2)
    )
    return {
        "content": of_stages(content, settings.content_guidance, canvas, labels),
        "structure": one + (evaluations - 1) * (two - one),
        "canvas": stages * seconds(add, params, canvas, labels),
        "decoder": seconds(decode, params, canvas),
    }


def main(_):
    logging.set_verbosity(logging.WARNING)  # JAX tells which backends are not there
    config = FLAGS.config
    sizes = TokenizerConfig(**config.tokenizer)
    transformers = {name: TransformerConfig(**config[name]) for name in models.GENERATORS}
    settings = Settings.from_dict(config.sampling.to_dict())
    settings = settings.expand(sizes.num_stages, sizes.codebook_size)
    params = random_params(sizes, transformers)
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}; seconds an image (share)\n")
    print("| precision | batch | content | structure | canvas | decoder | all |")
    print("|---|---|---|---|---|---|---|")
    for dtype in FLAGS.dtypes:
        for batch in map(int, FLAGS.batches):
            parts = measure(params, sizes, transformers, dtype, batch, settings)
            times = {name: time / batch for name, time in parts.items()}
            total = sum(times.values())
            cells = [f"{t:.3g} ({t / total:.0%})" for t in times.values()]
            print(f"| {dtype} | {batch} | {' | '.join(cells)} | {total:.3g} |", flush=True)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Configuration, as for `train`.")
    flags.DEFINE_list("dtypes", "float32,bfloat16", "Types of the arithmetic.")
    flags.DEFINE_list("batches", "1,8,64", "Images at once.")
    flags.DEFINE_integer("repeats", 3, "Calls of which the shortest counts.", lower_bound=1)
    flags.mark_flags_as_required(["config"])
    app.run(main)
