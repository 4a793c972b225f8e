"""Where the time of sampling goes.

    python -m benchmarks.sampling --config=configs/imagenet256.py:d16

Times every part of the sampler separately, compiled, with random weights and inputs: the content
generator (one call per stage), the structure generator (for each solution of the flow, what its
steps share and its evaluations), drawing tokens from filtered logits, adding a stage to the
canvas, and the decoder. Seconds per image are the time of a call multiplied by the number of calls
with the config's settings. In a guided stage, a call works on twice the batch.
"""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from nvg_jax import presets
from nvg_jax.layers import cast_blocks
from nvg_jax.models import ModelConfig
from nvg_jax.sampling.generate import flow_solutions, make_plan
from nvg_jax.sampling.guidance import Guidance, filter_logits
from nvg_jax.sampling.networks import bind
from nvg_jax.sampling.settings import Settings

FLAGS = flags.FLAGS
CLASSES = 1000


def read_config(config) -> tuple[ModelConfig, Settings]:
    """(the model, the expanded sampling settings)."""
    model = ModelConfig.from_config(config, CLASSES)
    settings = Settings.from_dict(config.sampling.to_dict())
    return model, settings.expand(model.tokenizer.num_stages, model.tokenizer.codebook_size)


def random_weights(abstract):
    """Random weights of a network, such that every part of it affects its result."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        x = rng.standard_normal(leaf.shape, np.float32)
        kind = path[-1].key
        if kind == "scale":
            return jnp.asarray(1 + 0.1 * x)
        if kind == "kernel":  # (..., in, out) of a linear layer, (h, w, in, out) of a convolution
            convolution = leaf.ndim == 4 and leaf.shape[0] == leaf.shape[1] <= 3
            x = x / np.sqrt(np.prod(leaf.shape[:-1]) if convolution else leaf.shape[-2])
        return jnp.asarray(x)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def random_params(model: ModelConfig):
    """Random weights of all networks of a model."""
    return {name: random_weights(model.abstract_params(name)) for name in model.networks}


def seconds(function, *args) -> float:
    """The time of the fastest of several calls, after one that compiles."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(FLAGS.repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return min(times)


def measure(params, model: ModelConfig, batch: int, settings: Settings):
    """{part: seconds for a batch}."""
    sizes = model.tokenizer
    stages, length = sizes.num_stages, sizes.num_positions
    # Cast once, as the sampler does.
    params = params | {n: cast_blocks(params[n], model.dtype) for n in model.generators}
    of = functools.partial(bind, canvas_scale=jnp.ones(stages + 1), model=model)
    stage = stages // 2
    labels = jnp.broadcast_to(jnp.arange(length) * 2**stage // length, (batch, length))
    canvas = jax.random.normal(jax.random.key(0), (batch, length, sizes.latent_dim))
    z = jax.random.normal(jax.random.key(1), (batch, length, stages - 1))
    classes = jnp.arange(batch) % CLASSES

    plan = make_plan(settings, fixed=sizes.fixed_structure is not None)
    solutions = flow_solutions(plan, length)
    times = jnp.linspace(1, 0, 2, endpoint=False)

    def content(guidance, params, canvas, labels):
        doubled = map(guidance.double, (canvas, labels))
        return guidance(of(params)[0].logits(*doubled, stage, guidance.classes))

    def split(evaluations, guidance, params, z, canvas, labels):
        """`evaluations` evaluations of the structure generator, and what they share."""
        doubled = map(guidance.double, (canvas, labels))
        velocity, per_time = of(params)[0].flow_velocity(*doubled, stage, guidance.classes, times)
        at = lambda index: jax.tree.map(lambda x: x[index], per_time)
        step = lambda index, z: guidance(velocity(guidance.double(z), at(index)))
        return jax.lax.fori_loop(0, evaluations, step, z)

    def of_calls(network, guided: list[bool], *inputs):
        """Total seconds of some calls, each guided or not."""
        total = 0.0
        for scale, count in ((None, guided.count(False)), (2.0, guided.count(True))):
            if count:
                guidance = Guidance(classes, CLASSES, scale)
                call = jax.jit(functools.partial(network, guidance))
                total += count * seconds(call, params, *inputs)
        return total

    @jax.jit
    def tokens(logits):
        top_k, top_p = int(max(settings.per_stage("top_k"))), min(settings.per_stage("top_p"))
        filtered = filter_logits(logits, top_k or None, top_p if top_p < 1 else None)
        keys = jax.random.split(jax.random.key(2), batch)
        return jax.vmap(jax.random.categorical)(keys, filtered)

    logits = jax.random.normal(jax.random.key(3), (batch, length, sizes.codebook_size))
    add = jax.jit(lambda params, canvas, labels: of(params)[0].add_stage(canvas, labels, stage))
    decode = jax.jit(lambda params, canvas: of(params)[1](canvas))
    # Every solution once, with its first evaluation, and again for each of the others.
    once = [guided for guided, _ in solutions]
    others = [guided for guided, evaluations in solutions for _ in range(evaluations - 1)]
    of_splits = lambda count, calls: of_calls(
        functools.partial(split, count), calls, z, canvas, labels
    )
    guided_content = [stage.content == "guided" for stage in plan.stages]
    return {
        "content": of_calls(content, guided_content, canvas, labels),
        "structure": of_splits(1, once) + of_splits(2, others) - of_splits(1, others),
        "tokens": stages * seconds(tokens, logits),
        "canvas": stages * seconds(add, params, canvas, labels),
        "decoder": seconds(decode, params, canvas),
    }


def main(_):
    logging.set_verbosity(logging.WARNING)  # JAX logs which backends are missing
    model, settings = read_config(FLAGS.config)
    params = random_params(model)
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}; seconds an image (share)\n")
    print("| precision | batch | content | structure | tokens | canvas | decoder | all |")
    print("|---|---|---|---|---|---|---|---|")
    for dtype in FLAGS.dtypes:
        for batch in map(int, FLAGS.batches):
            in_dtype = dataclasses.replace(model, dtype=dtype)
            parts = measure(params, in_dtype, batch, settings)
            times = {name: time / batch for name, time in parts.items()}
            total = sum(times.values())
            cells = [f"{t:.3g} ({t / total:.0%})" for t in times.values()]
            print(f"| {dtype} | {batch} | {' | '.join(cells)} | {total:.3g} |", flush=True)


if __name__ == "__main__":
    presets.define_flag()
    flags.DEFINE_list("dtypes", "float32,bfloat16", "Types of the arithmetic.")
    flags.DEFINE_list("batches", "1,8,64", "Images at once.")
    flags.DEFINE_integer("repeats", 3, "Calls of which the shortest counts.", lower_bound=1)
    flags.mark_flags_as_required(["config"])
    app.run(main)
