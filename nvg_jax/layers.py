"""What the content and the structure generator share: attention block, rotary embedding, heads.

Every parameter and activation names its axes; `runtime.sharding` turns names into shardings.
Parameters are float32, the arithmetic is in `dtype`, normalizations and softmax in float32.
"""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

ROPE_THETA = 10_000.0
EMBEDDING_INIT = nn.initializers.normal(0.02)
ZEROS = nn.initializers.zeros
ACTIVATION_AXES = ("batch", "length", None)


def rope_split(head_dim: int, num_bits: int) -> tuple[int, ...]:
    """Channels of a head given to each rotary axis: kind, one pair a structure bit, row, column.

    A head of 64 with eight bits gives the paper's 8 | 8 x 2 | 20 | 20. Row and column scale with
    the head and stay equal, the kind takes what is left.

    Raises:
        ValueError: the head is too small for the number of bits.
    """
    spatial = min(20 * head_dim // 64, (head_dim - 2 * num_bits - 2) // 2) // 2 * 2
    if spatial < 2 or head_dim % 2:
        raise ValueError(
            f"A head of {head_dim} channels cannot carry the rotary embedding of {num_bits} "
            f"structure bits with row, column and kind: it needs an even number of channels, at "
            f"least {2 * num_bits + 6}. Use a larger head_dim."
        )
    kind = head_dim - 2 * num_bits - 2 * spatial
    return (kind, *(2,) * num_bits, spatial, spatial)


def rope_positions(structure, kinds: Sequence[int], grid: tuple[int, int]):
    """Rotary positions of [class token, L tokens of each kind in `kinds`].

    Args:
        structure: structure embedding, int (B, L, K), values 0, 1, 2.
        kinds: the kind of each group of L tokens (0 image or structure, 2 condition canvas).
        grid: (h, w) with h * w = L.

    Returns:
        float32 (B, 1 + L * len(kinds), 3 + K), (kind, K structure channels, row, column);
        the class token has 1 on every axis.
    """
    batch, length, num_bits = structure.shape
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    place = np.stack([rows.ravel(), columns.ravel()], -1).astype(np.float32)
    place = jnp.broadcast_to(place, (batch, length, 2))
    structure = structure.astype(jnp.float32)
    groups = [jnp.ones((batch, 1, num_bits + 3), jnp.float32)]
    for kind in kinds:
        groups.append(
            jnp.concatenate(
                [jnp.full((batch, length, 1), kind, jnp.float32), structure, place], axis=-1
            )
        )
    return jnp.concatenate(groups, axis=1)


def rope_angles(positions, split: Sequence[int]):
    """(cos, sin), each float32 (B, N, head_dim / 2), of positions (B, N, len(split)).

    Within a share of `dim` channels pair p turns with frequency theta ** (-2 p / dim).
    """
    axis = np.concatenate([np.full(dim // 2, i) for i, dim in enumerate(split)])
    frequency = np.concatenate(
        [ROPE_THETA ** (-np.arange(0, dim, 2, dtype=np.float64) / dim) for dim in split]
    )
    angles = positions[..., axis] * frequency.astype(np.float32)
    return jnp.cos(angles), jnp.sin(angles)


def platform() -> str:
    """cpu, gpu or tpu: what is compiled for."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def rotate(x, cos, sin):
    """Turns the interleaved channel pairs of x (B, N, heads, head_dim) by the angles (B, N, .).

    Each pair (even, odd) becomes (cos * even - sin * odd, sin * even + cos * odd). For a GPU or TPU
    the other channel of every pair comes from an exact product with a fixed matrix: taking the
    pairs apart costs a TPU a quarter of all memory traffic of a block.
    """
    cos, sin = cos[:, :, None], sin[:, :, None]
    if platform() == "cpu":
        pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
        even, odd = pairs[..., 0], pairs[..., 1]
        turned = jnp.stack([cos * even - sin * odd, sin * even + cos * odd], axis=-1)
        return turned.reshape(x.shape).astype(x.dtype)
    even = np.arange(0, x.shape[-1], 2)
    other = np.zeros((x.shape[-1],) * 2, np.float32)
    other[even + 1, even], other[even, even + 1] = -1, 1
    partner = jnp.einsum(
        "bnhc,cd->bnhd", x, other.astype(x.dtype), precision=jax.lax.Precision.HIGHEST
    )
    cos, sin = jnp.repeat(cos, 2, axis=-1), jnp.repeat(sin, 2, axis=-1)
    turned = cos * x.astype(jnp.float32) + sin * partner.astype(jnp.float32)
    return turned.astype(x.dtype)


def attention(q, k, v):
    """Softmax attention over the whole sequence, no mask; q, k, v (B, N, heads, head_dim).

    For a GPU or TPU XLA's own attention. For a CPU batch and heads are folded into one axis and the
    softmax is divided by its sum after the product with the values, which is faster there; only
    where each device has all heads, as split ones cannot be folded in place.
    """
    split = jax.sharding.get_abstract_mesh().shape.get("tensor", 1) > 1
    if platform() != "cpu" or split:
        return jax.nn.dot_product_attention(q, k, v)
    batch, length, heads, head_dim = q.shape
    q, k, v = (x.transpose(0, 2, 1, 3).reshape(batch * heads, length, head_dim) for x in (q, k, v))
    scores = jnp.einsum("bqd,bkd->bqk", q * head_dim**-0.5, k).astype(jnp.float32)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    out = jnp.einsum("bqk,bkd->bqd", weights.astype(v.dtype), v)
    out = out / weights.sum(-1, keepdims=True).astype(v.dtype)
    return out.reshape(batch, heads, length, head_dim).transpose(0, 2, 1, 3)


def layer_norm(x):
    """Layer normalization over the last axis without parameters, eps 1e-6, in float32."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6)
    return y.astype(x.dtype)


def modulate(x, shift, scale):
    """(1 + scale) * x + shift with one shift and scale (B, C) for all positions of x (B, N, C)."""
    return (1 + scale[:, None]) * x + shift[:, None]


def unshard(parameter, axes: Sequence[str | None] | None = None):
    """A parameter as the arithmetic wants it: collected from the devices that share its storage.

    Said where a parameter is used, so that the compiler moves parameters and not activations, one
    layer at a time. `axes` names what stays split.
    """
    return nn.with_logical_constraint(parameter, axes or (None,) * parameter.ndim)


class Dense(nn.Module):
    """A linear layer with bias; `axes` are the logical axes of its kernel (in, out) in storage."""

    features: int
    axes: tuple[str | None, str | None]
    dtype: jnp.dtype
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()

    @nn.compact
    def parameters(self, width: int):
        """The kernel (width, features) and bias (features,) in `dtype`, whole."""
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(self.kernel_init, self.axes),
            (width, self.features),
        )
        bias_init = nn.with_logical_partitioning(ZEROS, self.axes[1:])
        bias = self.param("bias", bias_init, (self.features,))
        return unshard(kernel.astype(self.dtype)), unshard(bias.astype(self.dtype))

    def __call__(self, x):
        """x (..., width) -> (..., features) in `dtype`."""
        kernel, bias = self.parameters(x.shape[-1])
        return x.astype(self.dtype) @ kernel + bias


class Embedding(nn.Module):
    """A table (count, width) of learned vectors."""

    count: int
    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, ids):
        """ids int (...) -> (..., width) in `dtype`."""
        init = nn.with_logical_partitioning(EMBEDDING_INIT, (None, "embed"))
        table = self.param("embedding", init, (self.count, self.width))
        return unshard(table.astype(self.dtype))[ids]


class HeadNorm(nn.Module):
    """RMS normalization of every head (..., head_dim) with a learned scale, eps 1e-6, float32."""

    @nn.compact
    def __call__(self, x):
        init = nn.with_logical_partitioning(nn.initializers.ones, (None,))
        scale = self.param("scale", init, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6)
        return (y * scale).astype(x.dtype)


class Block(nn.Module):
    """Parallel attention and MLP, modulated by a conditioning vector (paper, Section 3.3).

    One linear makes [q k v | mlp hidden], one linear joins [attention | gelu(hidden)].
    """

    num_heads: int
    mlp_ratio: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, drop_rate, vec, cos, sin, deterministic: bool):
        """x (B, N, C), drop_rate scalar, vec (B, C) -> x (B, N, C)."""
        batch, length, width = x.shape
        x = nn.with_logical_constraint(x, ACTIVATION_AXES)
        modulation = Dense(3 * width, ("embed", "mlp"), self.dtype, ZEROS, name="modulation")
        shift, scale, gate = jnp.split(modulation(nn.silu(vec)), 3, axis=-1)

        # q, k, v and the hidden channels as parts (P) of the same width, so that a "tensor" axis
        # splits each part, and attention by whole heads.
        parts = 3 + self.mlp_ratio
        linear1 = Dense(parts * width, ("embed", "mlp"), self.dtype, name="linear1")
        kernel, bias = linear1.parameters(width)
        kernel = unshard(kernel.reshape(width, parts, width), (None, None, "mlp"))
        bias = unshard(bias.reshape(parts, width), (None, "mlp"))
        hidden = jnp.einsum("bnc,cpd->bnpd", modulate(layer_norm(x), shift, scale), kernel) + bias
        hidden = nn.with_logical_constraint(hidden, ("batch", "length", None, "mlp"))
        q, k, v = (
            hidden[:, :, part].reshape(batch, length, self.num_heads, -1) for part in range(3)
        )
        q = rotate(HeadNorm(name="query_norm")(q), cos, sin)
        k = rotate(HeadNorm(name="key_norm")(k), cos, sin)
        attended = attention(q, k, v).reshape(batch, length, 1, width)
        joined = jnp.concatenate([attended, nn.gelu(hidden[:, :, 3:], approximate=True)], axis=2)
        linear2 = Dense(width, ("mlp", "embed"), self.dtype, name="linear2")
        kernel, bias = linear2.parameters((1 + self.mlp_ratio) * width)
        kernel = unshard(kernel.reshape(-1, width, width), (None, "mlp", None))
        out = gate[:, None] * (jnp.einsum("bnpd,pdc->bnc", joined, kernel) + bias)
        if not deterministic:
            keep = 1 - drop_rate
            kept = jax.random.bernoulli(self.make_rng("drop_path"), keep, (batch, 1, 1))
            out = jnp.where(kept, out / keep.astype(out.dtype), 0)
        return nn.with_logical_constraint(x + out, ACTIVATION_AXES)


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a transformer; published: content width 64 * depth, structure width 32 * depth.

    drop_path: drop rate of the last block; negative is the published 0.1 * depth / 24.
    remat: recompute the blocks in the backward pass (less memory, more time).

    Raises:
        ValueError: a width that is no multiple of head_dim.
    """

    width: int
    depth: int
    head_dim: int = 64
    mlp_ratio: int = 4
    drop_path: float = -1.0
    remat: bool = False

    def __post_init__(self):
        if self.drop_path < 0:
            object.__setattr__(self, "drop_path", 0.1 * self.depth / 24)
        if min(self.width, self.depth, self.head_dim, self.mlp_ratio) < 1:
            raise ValueError(f"A transformer's sizes must be at least 1, got {self}.")
        if self.width % self.head_dim:
            raise ValueError(
                f"A transformer's width must be a multiple of its head_dim; {self.width} is none "
                f"of {self.head_dim}."
            )


class Transformer(nn.Module):
    """The blocks as one scanned layer; every parameter has a leading axis "layers".

    Drop path (whole samples of a block's output) rises linearly over depth.
    """

    config: TransformerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, vec, positions, deterministic: bool, feature_block: int = 0):
        """x (B, N, C), vec (B, C), positions (B, N, 3 + K) -> two of (B, N, C).

        After all blocks, and after the first `tap` of them.
        """
        c = self.config
        cos, sin = rope_angles(positions, rope_split(c.head_dim, positions.shape[-1] - 3))
        block = Block
        if c.remat:
            block = nn.remat(block, prevent_cse=False, static_argnums=(6,))

        def apply(block, carry, layer):
            (x, tapped), (number, drop_rate) = carry, layer
            x = block(x, drop_rate, vec, cos, sin, deterministic)
            return (x, jnp.where(number == feature_block, x, tapped)), None

        blocks = nn.scan(
            apply,
            variable_axes={"params": 0},
            split_rngs={"params": True, "drop_path": True},
            length=c.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        block = block(c.width // c.head_dim, c.mlp_ratio, self.dtype, name="blocks")
        layers = 1 + jnp.arange(c.depth), jnp.linspace(0.0, c.drop_path, c.depth)
        return blocks(block, (x, x), layers)[0]


class Head(nn.Module):
    """Modulated layer norm and a linear to `features`."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, vec):
        """x (B, N, C), vec (B, C) -> float32 (B, N, features)."""
        modulation = Dense(2 * x.shape[-1], ("embed", "mlp"), self.dtype, ZEROS, name="modulation")
        shift, scale = jnp.split(modulation(nn.silu(vec)), 2, axis=-1)
        x = modulate(layer_norm(x), shift, scale)
        linear = Dense(self.features, ("embed", None), self.dtype, ZEROS, name="linear")
        return linear(x).astype(jnp.float32)


def timestep_embedding(t, dim: int = 64):
    """Sinusoid embedding of 1000 * t, cosines first: t float (B,) -> float32 (B, dim)."""
    frequency = np.exp(-np.log(10_000.0) * np.arange(dim // 2) / (dim // 2)).astype(np.float32)
    angles = 1000.0 * t.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
