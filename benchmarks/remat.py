"""Time of a small transformer's gradient with and without recomputing the blocks.

python -m benchmarks.remat [--width=64] [--depth=3] [--length=17] [--batch=320] [--repeats=10]
"""

import argparse
import time

import jax
import jax.numpy as jnp

from nvg_jax import layers
from nvg_jax.runtime.sharding import unbox


def seconds(function, argument, repeats: int) -> float:
    """The fastest of `repeats` calls after the one that compiles."""
    jax.block_until_ready(function(argument))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(argument))
        times.append(time.perf_counter() - start)
    return min(times)


def main():
    parser = argparse.ArgumentParser()
    for name, value in dict(width=64, depth=3, length=17, batch=320, repeats=10).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    x = jax.random.normal(jax.random.key(0), (args.batch, args.length, args.width))
    vec = jax.random.normal(jax.random.key(1), (args.batch, args.width))
    positions = jax.random.uniform(jax.random.key(2), (args.batch, args.length, 7))
    for remat in (False, True):
        config = layers.TransformerConfig(
            args.width, args.depth, head_dim=32, drop_path=0.0, remat=remat
        )
        model = layers.Transformer(config, jnp.float32)
        params = unbox(model.init(jax.random.key(3), x, vec, positions, True))
        gradient = jax.jit(
            jax.grad(
                lambda params, model=model: jnp.square(
                    model.apply(params, x, vec, positions, True)
                ).sum()
            )
        )
        print(f"remat={remat!s:5}  {1e3 * seconds(gradient, params, args.repeats):8.1f} ms")


if __name__ == "__main__":
    main()
