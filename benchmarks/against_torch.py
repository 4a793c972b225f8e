"""Compares our networks with the same networks in PyTorch, on a CPU or an NVIDIA GPU.

    pip install torch
    python -m benchmarks.against_torch --config=configs/imagenet256.py:d16
    XLA_CLIENT_MEM_FRACTION=0.5 python -m benchmarks.against_torch \\
        --config=configs/imagenet256.py:d16 --dtype=bfloat16 --batch_size=64

Both run the same random weights on the same inputs in one process, alternating: ours compiled,
PyTorch's eager or, with --torch_compile, compiled too. The PyTorch networks are written here from
the paper and use PyTorch's fused operations. A time is the median over the rounds; first, both are
checked to give the same numbers. Gradients are of the sum of squares with respect to all weights.
With --dtype=bfloat16, weights are cast beforehand, except for gradients, where ours computes in
bfloat16 with float32 weights and PyTorch's in `torch.autocast`, as in training.

The memory is that of results and temporaries, without weights and inputs. On a CPU, it is the most
that the process holds during a call, beyond what it held before (read from /proc, so this needs
Linux); on a GPU, what XLA plans and what PyTorch's allocator reports.

The last row is the sum over the networks for a batch of samples: `flow_steps` evaluations of the
structure generator for each learned split, one of the content generator for each stage, and
decoding. All evaluations count as guided, also those that the settings do not guide.
"""

import ctypes
import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch  # type: ignore[reportMissingImports]
import torch.nn.functional as F  # type: ignore[reportMissingImports]
from absl import app, flags, logging
from flax.traverse_util import flatten_dict

from benchmarks.sampling import random_params, read_config
from nvg_jax import granularity, layers, presets
from nvg_jax.layers import TransformerConfig
from nvg_jax.models import ModelConfig
from nvg_jax.sampling.generate import flow_solutions, make_plan
from nvg_jax.structure.model import CANVAS_KIND
from nvg_jax.tokenizer import TokenizerConfig
from nvg_jax.tokenizer.autoencoder import group_count

FLAGS = flags.FLAGS
ROWS = [
    *("structure guided", "content guided", "encoder", "decoder"),
    *("structure gradient", "content gradient", "encoder gradient", "decoder gradient"),
]
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}  # relative norm of the difference


def device() -> str:
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def to_torch(params, gradients: bool, dtype: str = "float32") -> dict[str, torch.Tensor]:
    """Our weights as PyTorch's: {"blocks/linear1/kernel": tensor}, kernels (out, in, ...)."""
    weights = {}
    for path, x in flatten_dict(params, sep="/").items():
        x = torch.from_numpy(np.array(x, np.float32)).to(device(), getattr(torch, dtype))
        if path.endswith("kernel"):
            x = x.permute(3, 2, 0, 1) if x.ndim == 4 else x.transpose(-1, -2)
        weights[path] = x.contiguous().requires_grad_(gradients)
    return weights


# The transformers.


def cast(x, weight):
    """x in the dtype of a weight, unless autocast chooses it."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)


def linear(weights, name: str, x):
    kernel = weights[f"{name}/kernel"]
    return F.linear(cast(x, kernel), kernel, weights[f"{name}/bias"])


def modulated(x, shift, scale):
    return (1 + scale[:, None]) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + shift[:, None]


def rotate(x, cos, sin):
    """x (B, heads, N, head_dim); cos, sin float32 (B, 1, N, head_dim / 2)."""
    even, odd = x[..., ::2], x[..., 1::2]
    turned = torch.stack([cos * even - sin * odd, sin * even + cos * odd], -1)
    return turned.flatten(-2).to(x.dtype)


def block(weights, x, vec, cos, sin, head_dim: int):
    batch, length, width = x.shape
    shift, scale, gate = linear(weights, "modulation", F.silu(vec)).chunk(3, -1)
    hidden = linear(weights, "linear1", modulated(x, shift, scale))
    *qkv, hidden = hidden.split([width] * 3 + [hidden.shape[-1] - 3 * width], -1)
    q, k, v = (y.view(batch, length, -1, head_dim).transpose(1, 2) for y in qkv)
    q = rotate(F.rms_norm(q, (head_dim,), weights["query_norm/scale"].to(q.dtype), 1e-6), cos, sin)
    k = rotate(F.rms_norm(k, (head_dim,), weights["key_norm/scale"].to(k.dtype), 1e-6), cos, sin)
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
    joined = torch.cat([attended, F.gelu(hidden, approximate="tanh")], -1)
    return x + gate[:, None] * linear(weights, "linear2", joined)


def transformer(weights, sizes: TransformerConfig, x, vec, structure, kinds, grid):
    """All blocks; `structure` is the structure embedding (B, L, K)."""
    batch, length, bits = structure.shape
    on = dict(device=x.device)
    rows, columns = torch.meshgrid(*(torch.arange(size, **on) for size in grid), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], -1).expand(batch, -1, -1)
    positions = [torch.ones(batch, 1, bits + 3, **on)]
    for kind in kinds:
        kinds_of = torch.full((batch, length, 1), kind, **on)
        positions.append(torch.cat([kinds_of, structure, places], -1))
    split = layers.rope_split(sizes.head_dim, bits)
    axis = np.concatenate([[i] * (dim // 2) for i, dim in enumerate(split)])
    frequency = np.concatenate([1e4 ** (-np.arange(0, dim, 2) / dim) for dim in split])
    angles = torch.cat(positions, 1)[:, None, :, axis] * torch.tensor(
        frequency, dtype=torch.float32, **on
    )
    cos, sin = angles.cos(), angles.sin()
    prefix = "blocks/blocks/"
    stacked = {k.removeprefix(prefix): w.unbind() for k, w in weights.items() if prefix in k}
    for layer in range(sizes.depth):
        own = {name: parts[layer] for name, parts in stacked.items()}
        x = block(own, x, vec, cos, sin, sizes.head_dim)
    return x


def head(weights, name: str, x, vec):
    shift, scale = linear(weights, f"{name}/modulation", F.silu(vec)).chunk(2, -1)
    return linear(weights, f"{name}/linear", modulated(x, shift, scale))


def content(weights, sizes: TransformerConfig, grid, canvas, structure, stage, class_ids, factors):
    scaled = canvas * factors[stage][:, None, None]
    scaled = torch.where((stage == 0)[:, None, None], weights["start_canvas"], scaled)
    token = weights["class_embed/embedding"][class_ids]
    x = torch.cat([token[:, None], linear(weights, "canvas_embed", scaled)], 1)
    vec = token + weights["stage_embed/embedding"][stage]
    x = transformer(weights, sizes, x, vec, structure, (0,), grid)
    return head(weights, "canvas_head", x[:, 1:], vec) / factors[-1]


def structure(
    weights, sizes: TransformerConfig, grid, noisy, moment, embedding, canvas, stage, class_ids
):
    frequency = torch.exp(-np.log(10_000.0) * torch.arange(32, device=moment.device) / 32)
    angles = 1000 * moment[:, None] * frequency
    waves = torch.cat([angles.cos(), angles.sin()], -1)
    token = weights["class_embed/embedding"][class_ids]
    vec = token + linear(weights, "time_out", F.silu(linear(weights, "time_in", waves)))
    vec = vec + weights["stage_embed/embedding"][stage]
    embedded = linear(weights, "canvas_embed", canvas), linear(weights, "structure_embed", noisy)
    x = torch.cat([token[:, None], *embedded], 1)
    x = transformer(weights, sizes, x, vec, embedding, (CANVAS_KIND, 0), grid)
    return head(weights, "head", x[:, 1 + noisy.shape[1] :], vec)


# The autoencoder; images and latents (B, C, H, W).


def conv(weights, name: str, x, **kwargs):
    kernel = weights[f"{name}/kernel"]
    kwargs = {"padding": kernel.shape[-1] // 2, **kwargs}
    return F.conv2d(cast(x, kernel), kernel, weights[f"{name}/bias"], **kwargs)


def norm(weights, name: str, x):
    scale, bias = weights[f"{name}/scale"], weights[f"{name}/bias"]
    return F.silu(F.group_norm(x, group_count(x.shape[1]), scale, bias, eps=1e-6))


def residual(weights, name: str, x):
    y = conv(weights, f"{name}/conv1", norm(weights, f"{name}/norm1", x))
    y = conv(weights, f"{name}/conv2", norm(weights, f"{name}/norm2", y))
    if f"{name}/shortcut/kernel" in weights:
        x = conv(weights, f"{name}/shortcut", x)
    return x + y


def encoder(weights, sizes: TokenizerConfig, images):
    x = conv(weights, "encoder/conv_in", images)
    for level in range(len(sizes.widths)):
        for number in range(sizes.blocks_per_level):
            x = residual(weights, f"encoder/level{level}_block{number}", x)
        if level < sizes.num_downsamples:
            name = f"encoder/level{level}_downsample"
            x = conv(weights, name, F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
    for number in range(2):
        x = residual(weights, f"encoder/middle_block{number}", x)
    return conv(weights, "encoder/conv_out", norm(weights, "encoder/norm_out", x))


def decoder(weights, sizes: TokenizerConfig, latents):
    x = conv(weights, "decoder/conv_in", latents)
    for number in range(2):
        x = residual(weights, f"decoder/middle_block{number}", x)
    for level in reversed(range(len(sizes.widths))):
        for number in range(sizes.blocks_per_level + 1):
            x = residual(weights, f"decoder/level{level}_block{number}", x)
        if 1 <= level <= sizes.num_downsamples:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = conv(weights, f"decoder/level{level}_upsample", x)
    return conv(weights, "decoder/conv_out", norm(weights, "decoder/norm_out", x))


# The comparison.


def peak_memory(function) -> int:
    """The bytes that a call needs at most, beyond what the process held before it."""

    def held(name):
        status = Path("/proc/self/status").read_text()
        return int(status.split(f"{name}:")[1].split()[0]) * 1024

    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # from now on counts the peak
    before = held("VmRSS")
    jax.block_until_ready(function())
    return held("VmHWM") - before


class Row:
    """One network in both frameworks.

    ours: (params, *inputs) -> array. theirs: (weights, *inputs) -> tensor of the same values.
    images: whether inputs and outputs are (B, H, W, C), which PyTorch takes as (B, C, H, W).
    """

    def __init__(self, ours, theirs, params, inputs, gradients: bool, images: bool = False):
        if gradients:
            program = jax.jit(jax.grad(lambda *args: jnp.square(ours(*args)).sum()))
        else:
            program = jax.jit(ours)
            params = jax.tree.map(lambda x: x.astype(FLAGS.dtype), params)
        self.compiled = program.lower(params, *inputs).compile()
        self.ours = functools.partial(self.compiled, params, *inputs)
        half = FLAGS.dtype == "bfloat16"
        weights = to_torch(params, gradients, "float32" if gradients else FLAGS.dtype)
        tensors = [torch.from_numpy(np.array(x)).to(device()) for x in inputs]
        tensors = [x.long() if x.dtype == torch.int32 else x for x in tensors]
        if images:
            tensors = [x.permute(0, 3, 1, 2).contiguous() for x in tensors]
        if FLAGS.torch_compile:
            theirs = torch.compile(theirs)

        def call() -> Any:
            if not gradients:
                with torch.inference_mode():
                    out = theirs(weights, *tensors)
                return out.permute(0, 2, 3, 1) if images else out
            with torch.autocast(device(), torch.bfloat16, enabled=half):
                out = theirs(weights, *tensors)
            out.float().square().sum().backward()
            found = {name: w.grad for name, w in weights.items() if w.grad is not None}
            for weight in weights.values():
                weight.grad = None
            return found

        def run():
            out = call()
            if device() == "cuda":
                torch.cuda.synchronize()
            return out

        self.theirs = run
        result, reference = self.ours(), run()
        if gradients:
            values = to_torch(result, False)
            expected = {name: reference.get(name, torch.zeros(())) for name in values}
        else:
            values = {"output": torch.from_numpy(np.array(result, np.float32))}
            expected = {"output": reference}
        # Gradients that vanish, such as of a bias before a normalization, are rounding errors; in
        # bfloat16, so are those that are sums of many terms, and all are compared together.
        norms = {name: float(y.float().norm()) for name, y in expected.items()}
        errors = {
            name: float((values[name].to(y.device) - y).norm()) for name, y in expected.items()
        }
        least = 1e-3 * max(norms.values())
        if FLAGS.dtype == "bfloat16":
            least = np.linalg.norm(list(norms.values()))
        worst = max(errors, key=lambda name: errors[name] / max(norms[name], least))
        error = errors[worst] / max(norms[worst], least)
        if not error < TOLERANCE[FLAGS.dtype]:
            raise AssertionError(f"{worst} differs from PyTorch by {error:.2g} of its norm.")

    def seconds(self, rounds: int) -> tuple[float, float]:
        """(ours, theirs), the medians over alternating rounds."""
        times = ([], [])
        for _ in range(rounds):
            for function, kept in zip((self.ours, self.theirs), times):
                start = time.perf_counter()
                jax.block_until_ready(function())
                kept.append(time.perf_counter() - start)
        return tuple(map(np.median, times))

    def memory(self) -> tuple[int, int]:
        """(ours, theirs), in bytes."""
        if device() == "cpu":
            return peak_memory(self.ours), peak_memory(self.theirs)
        stats = self.compiled.memory_analysis()
        assert stats is not None  # GPUs have it
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.theirs()
        return (
            stats.temp_size_in_bytes + stats.output_size_in_bytes,
            torch.cuda.max_memory_allocated() - before,
        )


def rows(params, model: ModelConfig):
    """{name: (gradients, batch) -> Row}."""
    sizes, transformers = model.tokenizer, model.generators
    length, bits = sizes.num_positions, sizes.num_stages - 1
    stage = bits // 2
    keys = iter(jax.random.split(jax.random.key(0), 16))

    def generator(name, gradients, batch):
        network_of_ours = model.make_generator(name)
        canvas = jax.random.normal(next(keys), (batch, length, sizes.latent_dim))
        labels = jnp.broadcast_to(jnp.arange(length) * 2**stage // length, (batch, length))
        embedding = granularity.structure_embedding(labels, stage, bits)
        stages, ids = jnp.full(batch, stage), jnp.arange(batch)
        if name == "content":
            network, inputs = content, (canvas, embedding, stages, ids, jnp.ones(bits + 2))
            ours = lambda params, *args: network_of_ours.apply(
                {"params": params}, *args, method="predict_canvas"
            )[0]
        else:
            noisy = jax.random.normal(next(keys), (batch, length, bits))
            moment = jnp.linspace(0.1, 0.9, batch)
            network, inputs = structure, (noisy, moment, embedding, canvas, stages, ids)
            ours = lambda params, *args: network_of_ours.apply({"params": params}, *args)
        theirs = lambda weights, *args: network(
            weights, transformers[name], sizes.latent_size, *args
        )
        return Row(ours, theirs, params[name], inputs, gradients)

    def autoencoder(encode, gradients, batch):
        tokenizer: Any = model.make_tokenizer()
        size, channels = (sizes.image_size, 3) if encode else (sizes.latent_size, sizes.latent_dim)
        x = jax.random.normal(next(keys), (batch, *size, channels))
        method = "latents" if encode else "decode_unclamped"
        grid = (batch, *sizes.latent_size, sizes.latent_dim)

        def ours(params, x):
            if not encode:
                x = x.reshape(batch, length, sizes.latent_dim)
            out = tokenizer.apply({"params": params}, x, method=method)
            return out.reshape(grid) if encode else out

        network = encoder if encode else decoder
        theirs = lambda weights, x: network(weights, sizes, x)
        return Row(ours, theirs, params["tokenizer"], (x,), gradients, images=True)

    return {
        "structure": functools.partial(generator, "structure"),
        "content": functools.partial(generator, "content"),
        "encoder": functools.partial(autoencoder, True),
        "decoder": functools.partial(autoencoder, False),
    }


def main(_):
    logging.set_verbosity(logging.WARNING)  # JAX logs which backends are missing
    model, settings = read_config(FLAGS.config)
    model = dataclasses.replace(model, dtype=FLAGS.dtype)
    params, sizes = random_params(model), model.tokenizer
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # on GPUs, as JAX's default
    where = jax.devices()[0].device_kind
    if device() == "cpu":
        where = f"{torch.get_num_threads()} threads"
    compiled = " compiled" if FLAGS.torch_compile else ""
    print(f"JAX {jax.__version__}, PyTorch {torch.__version__}{compiled}, {FLAGS.dtype}, {where}\n")
    print("| network | images | ours | PyTorch | ratio | memory, ours | memory, PyTorch |")
    print("|---|---|---|---|---|---|---|")

    def report(name, images, ours, theirs, *memory):
        times = f"{ours:.3g} s | {theirs:.3g} s | {ours / theirs:.2f}"
        held = " | ".join(f"{size / 1e9:.2f} GB" for size in memory) or " | "
        print(f"| {name} | {images} | {times} | {held} |", flush=True)

    times = {}
    makers = rows(params, model)
    for label in FLAGS.rows:
        name, _, kind = label.partition(" ")
        images, gradients = FLAGS.batch_size, kind == "gradient"
        # A guided evaluation processes each image twice.
        row = makers[name](gradients, images * (2 if kind == "guided" else 1))
        times[label] = np.array(row.seconds(FLAGS.rounds))
        report(label, images, *times[label], *row.memory())
    plan = make_plan(settings, fixed=sizes.fixed_structure is not None)
    calls = {
        "structure guided": sum(count for _, count in flow_solutions(plan, sizes.num_positions)),
        "content guided": sizes.num_stages,
        "decoder": 1,
    }
    if set(calls) <= set(times):
        total = sum((n * times[label] for label, n in calls.items()), start=np.zeros(2))
        report("samples (sum)", FLAGS.batch_size, *total)


if __name__ == "__main__":
    presets.define_flag()
    flags.DEFINE_integer("batch_size", 1, "Images at once.", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", list(TOLERANCE), "Type of the arithmetic.")
    flags.DEFINE_multi_enum("rows", ROWS, ROWS, "What to compare; may be given several times.")
    flags.DEFINE_boolean("torch_compile", False, "Compile PyTorch's networks too.")
    flags.DEFINE_integer("rounds", 5, "Calls in turns, of which the median counts.", lower_bound=1)
    flags.mark_flags_as_required(["config"])
    app.run(main)
