"""Compares the fused attention of this machine's accelerator with XLA's or tokamax's.

    python -m benchmarks.attention
    python -m benchmarks.attention --against=tokamax    # pip install tokamax

Times `nvg_jax.attention.attention` (our kernel on TPUs, cuDNN's on GPUs, see there) and the other
attention, forward and with gradients, at the lengths of the two generators (257 tokens for the
content, 513 for the structure); ours includes padding to the length that its kernel needs. The
error is the largest absolute difference from XLA's float32 attention at the highest precision,
divided by the largest absolute value of that reference; with gradients, the worst of the result and
the three gradients.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from nvg_jax.attention import attention, padded_length
from nvg_jax.kernels.rotary import normalize_and_rotate

FLAGS = flags.FLAGS
CALLS = 20  # calls in a row hide the time to start them


def ours(q, k, v):
    batch, length, _, head_dim = q.shape
    padding = padded_length(batch, length, q.dtype, head_dim) - length
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
    return attention(q, k, v, length=length if padding else None)[:, :length]


def tokamax_attention(q, k, v, rotary=None, length=None):
    """`nvg_jax.attention.attention` by tokamax's fastest kernel for this machine."""
    import tokamax  # type: ignore[reportMissingImports]

    if rotary is not None:
        q, k = normalize_and_rotate(q, k, rotary)
    lengths = None if length is None else jnp.full(len(q), length, jnp.int32)
    return tokamax.dot_product_attention(q, k, v, key_value_seq_lengths=lengths)


OTHERS = {
    "tokamax": tokamax_attention,
    "XLA": functools.partial(jax.nn.dot_product_attention, implementation="xla"),
}


def forward(function, q, k, v, grad):
    return (function(q, k, v),)


def with_gradients(function, q, k, v, grad):
    out, pull = jax.vjp(function, q, k, v)
    return out, *pull(grad)


def seconds(function, *args) -> float:
    """The median time of a call, over several rounds of calls."""
    times = []
    for _ in range(FLAGS.rounds + 1):  # the first round compiles
        start = time.perf_counter()
        for _ in range(CALLS):
            out = function(*args)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / CALLS)
    return np.median(times[1:])


def main(_):
    logging.set_verbosity(logging.WARNING)  # JAX logs which backends are missing
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}\n")
    other = FLAGS.against
    print(f"| tokens | precision | pass | ours | {other} | ratio | error, ours | error, {other} |")
    print("|---|---|---|---|---|---|---|---|")
    for length in map(int, FLAGS.lengths):
        shape = FLAGS.batch_size, length, FLAGS.heads, FLAGS.head_dim
        exact = [jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 4)]
        for dtype in FLAGS.dtypes:
            args = [x.astype(dtype) for x in exact]
            for name, run in (("forward", forward), ("with gradients", with_gradients)):
                with jax.default_matmul_precision("highest"):
                    expected = jax.jit(functools.partial(run, OTHERS["XLA"]))(
                        *(x.astype(jnp.float32) for x in args)
                    )
                times, errors = [], []
                for function in (ours, OTHERS[other]):
                    call = jax.jit(functools.partial(run, function))
                    got = call(*args)
                    errors.append(
                        max(abs(x - y).max() / abs(y).max() for x, y in zip(got, expected))
                    )
                    times.append(seconds(call, *args))
                cells = [f"{1e3 * t:.3f} ms" for t in times]
                cells += [f"{times[0] / times[1]:.2f}", *(f"{error:.1e}" for error in errors)]
                print(f"| {length} | {dtype} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    flags.DEFINE_enum("against", "XLA", OTHERS, "The other attention.")
    flags.DEFINE_list("lengths", "257,513", "Tokens.")
    flags.DEFINE_list("dtypes", "bfloat16,float32", "Types of the arithmetic.")
    flags.DEFINE_integer("batch_size", 64, "Images at once.", lower_bound=1)
    flags.DEFINE_integer("heads", 16, "Attention heads.", lower_bound=1)
    flags.DEFINE_integer("head_dim", 64, "Channels of a head.", lower_bound=1)
    flags.DEFINE_integer("rounds", 5, "Rounds, of which the median counts.", lower_bound=1)
    app.run(main)
