"""Layers shared by the content and structure generators: transformer, rotary embedding, heads.

Parameters and activations name their logical axes; `runtime.sharding` maps the names to shardings.
Parameters are float32, arithmetic is in `dtype`, normalizations and softmax are in float32.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Int

from nvg_jax import lora
from nvg_jax.attention import attention, padded_length
from nvg_jax.errors import UserError
from nvg_jax.kernels import block_linears
from nvg_jax.kernels.rotary import Rotary
from nvg_jax.runtime.sharding import constrain, parameter, unshard

ROPE_THETA = 10_000.0
EMBEDDING_INIT = nn.initializers.normal(0.02)
ZEROS = nn.initializers.zeros
# What the backward pass keeps, in addition to the inputs of the blocks.
_LINEARS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names("attention"),
)
REMAT = {"none": None, "linears": _LINEARS, "blocks": None}
ACTIVATION_AXES = ("batch", "length", None)


def rope_split(head_dim: int, num_bits: int) -> tuple[int, ...]:
    """Channels of a head per rotary axis: token kind, two for each structure bit, row, column.

    A head of 64 channels with eight bits gives the paper's 8 | 8 x 2 | 20 | 20. Row and column are
    equal and scale with the head; the kind takes the remaining channels.

    Raises:
        UserError: head_dim is odd or too small for the number of bits.
    """
    spatial = min(20 * head_dim // 64, (head_dim - 2 * num_bits - 2) // 2) // 2 * 2
    if spatial < 2 or head_dim % 2:
        raise UserError(
            f"A head of {head_dim} channels cannot hold the rotary embedding of {num_bits} "
            "structure bits, row, column and kind: head_dim must be even and at least "
            f"{2 * num_bits + 6}. Use a larger head_dim."
        )
    kind = head_dim - 2 * num_bits - 2 * spatial
    return (kind, *(2,) * num_bits, spatial, spatial)


def rotary_tables(
    embedding: Int[Array, "B L K"], kinds: Sequence[int], grid: tuple[int, int], head_dim: int
) -> tuple[Float32[Array, "B N pairs"], Float32[Array, "B N pairs"]]:
    """(cos, sin) of `rope_angles` at the positions of `rope_positions`."""
    positions = rope_positions(embedding, kinds, grid)
    return rope_angles(positions, rope_split(head_dim, embedding.shape[-1]))


def rope_positions(
    embedding: Int[Array, "B L K"], kinds: Sequence[int], grid: tuple[int, int]
) -> Float32[Array, "B N axes"]:
    """Rotary positions of the sequence [class token, L tokens of each kind in `kinds`].

    Args:
        embedding: structure embedding, values 0, 1, 2.
        kinds: the kind of each group of L tokens (0: image or structure, 2: condition canvas).
        grid: (h, w) with h * w = L.

    Returns:
        The positions of N = 1 + L * len(kinds) tokens on 3 + K axes: kind, K structure channels,
        row, column. The class token is at 1 on every axis.
    """
    batch, length, num_bits = embedding.shape
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    row_column = np.stack([rows.ravel(), columns.ravel()], -1).astype(np.float32)
    row_column = jnp.broadcast_to(row_column, (batch, length, 2))
    embedding = embedding.astype(jnp.float32)
    groups = [jnp.ones((batch, 1, num_bits + 3), jnp.float32)]
    for kind in kinds:
        groups.append(
            jnp.concatenate(
                [jnp.full((batch, length, 1), kind, jnp.float32), embedding, row_column], axis=-1
            )
        )
    return jnp.concatenate(groups, axis=1)


def rope_angles(
    positions: Float[Array, "B N axes"], split: Sequence[int]
) -> tuple[Float32[Array, "B N pairs"], Float32[Array, "B N pairs"]]:
    """(cos, sin) of the angle by which each channel pair of a head rotates.

    On an axis with `dim` channels, pair p rotates with frequency theta ** (-2 p / dim).
    """
    axis = np.concatenate([np.full(dim // 2, i) for i, dim in enumerate(split)])
    frequency = np.concatenate(
        [ROPE_THETA ** (-np.arange(0, dim, 2, dtype=np.float64) / dim) for dim in split]
    )
    angles = positions[..., axis] * frequency.astype(np.float32)
    return jnp.cos(angles), jnp.sin(angles)


def cast_blocks(params: dict[str, Any], dtype: DTypeLike) -> dict[str, Any]:
    """Casts the blocks' weights to `dtype` once, instead of in every iteration of a loop."""

    def cast(path, leaf):
        names = [key.key for key in path]
        return leaf.astype(dtype) if "blocks" in names and names[-1] in ("kernel", "bias") else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def modulated_norm(
    x: Float[Array, "B N C"], shift: Float[Array, "B C"], scale: Float[Array, "B C"]
) -> Float[Array, "B N C"]:
    """(1 + scale) * LayerNorm(x) + shift, the same at all positions.

    The normalization, over the last axis, has no parameters and an eps of 1e-6. All is computed in
    float32, as published, and rounded once.
    """
    y, shift, scale = (a.astype(jnp.float32) for a in (x, shift[:, None], scale[:, None]))
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6)
    return ((1 + scale) * y + shift).astype(x.dtype)


class Dense(nn.Module):
    """A linear layer with bias; `axes` are the logical axes of the stored kernel (in, out).

    precision: of the product, as in `jax.lax`; None is the fastest of the device, which rounds
        factors of float32 to bfloat16 on TPUs and to TF32 on GPUs.
    """

    features: int
    axes: tuple[str | None, str | None]
    dtype: DTypeLike
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    precision: jax.lax.Precision | None = None

    @nn.compact
    def parameters(
        self, width: int
    ) -> tuple[Float[Array, "width features"], Float[Array, " features"]]:
        """The unsharded kernel and bias in `dtype`."""
        shape = (width, self.features)
        kernel = parameter(self, "kernel", self.kernel_init, shape, self.axes)
        bias = parameter(self, "bias", ZEROS, shape[1:], self.axes[1:])
        kernel = lora.add(kernel, "kernel", self.variables["params"])
        return unshard(kernel.astype(self.dtype)), unshard(bias.astype(self.dtype))

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch features"]:
        """The linear layer in `dtype`."""
        kernel, bias = self.parameters(x.shape[-1])
        product = jnp.matmul(x.astype(self.dtype), kernel, precision=self.precision)
        return block_linears.add_bias(product, bias)


class Embedding(nn.Module):
    """A table of `count` learned vectors of `width` channels."""

    count: int
    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch width"]:
        """The vectors of these ids in `dtype`."""
        shape = (self.count, self.width)
        table = parameter(self, "embedding", EMBEDDING_INIT, shape, (None, "embed"))
        table = lora.add(table, "embedding", self.variables["params"])
        return unshard(table)[ids].astype(self.dtype)  # gradients of a row are summed in float32


class HeadScale(nn.Module):
    """The learned scale of the normalization of a head's queries or keys."""

    @nn.compact
    def __call__(self, head_dim: int) -> Float32[Array, " head_dim"]:
        return parameter(self, "scale", nn.initializers.ones, (head_dim,), (None,))


class Block(nn.Module):
    """Parallel attention and MLP, modulated by a conditioning vector (paper, Section 3.3).

    One linear layer computes [q k v | MLP hidden], one projects [attention | gelu(hidden)].
    """

    num_heads: int
    mlp_ratio: int
    dtype: DTypeLike
    length: int | None = None  # number of tokens without padding, see `attention`

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N C"],
        drop_rate: Float[Array, ""],
        vec: Float[Array, "B C"] | None,
        cos: Float[Array, "B N pairs"],
        sin: Float[Array, "B N pairs"],
        deterministic: bool,
        modulation: Float[Array, "B 3*C"] | None = None,
    ) -> Float[Array, "B N C"]:
        """The hidden states after this block.

        Args:
            vec: the conditioning vector.
            cos, sin: from `rope_angles`.
            modulation: precomputed from vec, which is then None.
        """
        width = x.shape[-1]
        x = constrain(x, ACTIVATION_AXES)
        if modulation is None:
            assert vec is not None
            dense = Dense(3 * width, ("embed", "mlp"), self.dtype, ZEROS, name="modulation")
            modulation = dense(nn.silu(vec))
        shift, scale, gate = jnp.split(modulation, 3, axis=-1)
        linear1 = Dense((3 + self.mlp_ratio) * width, ("embed", "mlp"), self.dtype, name="linear1")
        linear2 = Dense(width, ("mlp", "embed"), self.dtype, name="linear2")
        weights1 = linear1.parameters(width)
        weights2 = linear2.parameters((1 + self.mlp_ratio) * width)
        head_dim = width // self.num_heads
        q_scale, k_scale = (HeadScale(name=name)(head_dim) for name in ("query_norm", "key_norm"))

        y, gate = modulated_norm(x, shift, scale), gate[:, None]
        q, k, v, hidden = block_linears.linear1(y, *weights1)
        attended = self.attend(q, k, v, Rotary(q_scale, k_scale, cos, sin))
        hidden = nn.gelu(hidden, approximate=True)
        out = block_linears.linear2(attended, hidden, gate, *weights2)
        if not deterministic:
            keep = 1 - drop_rate
            kept = jax.random.bernoulli(self.make_rng("drop_path"), keep, (len(x), 1, 1))
            out = jnp.where(kept, (out / keep).astype(out.dtype), 0)
        return constrain(x + out, ACTIVATION_AXES)

    def attend(
        self,
        q: Float[Array, "B N C"],
        k: Float[Array, "B N C"],
        v: Float[Array, "B N C"],
        rotary: Rotary,
    ) -> Float[Array, "B N C"]:
        """Attention of all heads."""
        q, k, v = (x.reshape(*x.shape[:2], self.num_heads, -1) for x in (q, k, v))
        attended = attention(q, k, v, rotary, self.length)
        return checkpoint_name(attended, "attention").reshape(*attended.shape[:2], -1)


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a transformer; published: content width 64 * depth, structure width 32 * depth.

    drop_path: drop rate of the last block; a negative rate means the published 0.1 * depth / 24.
    remat: what the backward pass recomputes to save memory. "none": nothing; "linears": all but the
    results of linear layers and of attention; "blocks": everything but the inputs of the blocks.

    Raises:
        UserError: a size below 1, a width that is not a multiple of head_dim, or unknown remat.
    """

    width: int
    depth: int
    head_dim: int = 64
    mlp_ratio: int = 4
    drop_path: float = -1.0
    remat: str = "none"

    def __post_init__(self):
        if self.drop_path < 0:
            object.__setattr__(self, "drop_path", 0.1 * self.depth / 24)
        if min(self.width, self.depth, self.head_dim, self.mlp_ratio) < 1:
            raise UserError(f"All sizes of a transformer must be at least 1, got {self}.")
        if self.width % self.head_dim:
            raise UserError(
                f"The width of a transformer must be a multiple of its head_dim; {self.width} is "
                f"not a multiple of {self.head_dim}."
            )
        if self.remat not in REMAT:
            raise UserError(f"remat must be one of {', '.join(REMAT)}, got {self.remat!r}.")


class Transformer(nn.Module):
    """All blocks as one scanned layer; every parameter has a leading axis "layers".

    Drop path drops the output of a block for whole samples; its rate rises linearly with depth.
    """

    config: TransformerConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N C"],
        vec: Float[Array, "B C"] | None,
        cos: Float[Array, "B N pairs"],
        sin: Float[Array, "B N pairs"],
        deterministic: bool,
        feature_block: int = 0,
        modulations: Float[Array, "depth B 3*C"] | None = None,
    ) -> tuple[Float[Array, "B N C"], Float[Array, "B N C"]]:
        """The hidden states after all blocks, and after the first `feature_block` blocks.

        Args:
            x: the embedded tokens.
            vec: the conditioning vector that modulates every block.
            cos, sin: from `rotary_tables`.
            deterministic: False turns on drop path (rng "drop_path").
            feature_block: 0 .. depth; 0 gives x itself. REPA aligns these hidden states.
            modulations: precomputed from vec, which is then None.
        """
        c = self.config
        block = Block
        if c.remat != "none":
            policy = REMAT[c.remat]
            block = nn.remat(block, prevent_cse=False, static_argnums=(6,), policy=policy)

        def apply(block, carry, layer):
            (x, features), (number, drop_rate, modulation) = carry, layer
            x = block(x, drop_rate, vec, cos, sin, deterministic, modulation)
            return (x, jnp.where(number == feature_block, x, features)), None

        blocks = nn.scan(
            apply,
            variable_axes={"params": 0},
            split_rngs={"params": True, "drop_path": True},
            length=c.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        batch, length = x.shape[:2]
        padding = padded_length(batch, length, self.dtype, c.head_dim) - length
        if padding:
            x, cos, sin = (jnp.pad(y, ((0, 0), (0, padding), (0, 0))) for y in (x, cos, sin))
        sizes = c.width // c.head_dim, c.mlp_ratio, self.dtype, length if padding else None
        numbers, drop_rates = 1 + jnp.arange(c.depth), jnp.linspace(0.0, c.drop_path, c.depth)
        x, features = blocks(
            block(*sizes, name="blocks"), (x, x), (numbers, drop_rates, modulations)
        )[0]
        return x[:, :length], features[:, :length]

    def modulations(self, vec: Float[Array, "*batch C"]) -> Float[Array, "depth *batch 3*C"]:
        """The modulations of all blocks for conditioning vectors."""
        weights = self.variables["params"]["blocks"]["modulation"]
        kernel, bias = (unshard(weights[k].astype(self.dtype)) for k in ("kernel", "bias"))
        product = jnp.einsum("...c,ncd->n...d", nn.silu(vec), kernel)
        return product + jnp.expand_dims(bias, range(1, vec.ndim))


class Head(nn.Module):
    """Modulated layer normalization and a linear layer from `width` to `features` channels."""

    width: int
    features: int
    dtype: DTypeLike

    def setup(self):
        self.modulation = Dense(2 * self.width, ("embed", "mlp"), self.dtype, ZEROS)
        self.linear = Dense(self.features, ("embed", None), self.dtype, ZEROS)

    def modulations(self, vec: Float[Array, "*batch C"]) -> Float[Array, "*batch 2*C"]:
        """The modulation for conditioning vectors."""
        return self.modulation(nn.silu(vec))

    def __call__(
        self, x: Float[Array, "B N C"], modulation: Float[Array, "B 2*C"]
    ) -> Float32[Array, "B N features"]:
        """The outputs at all positions."""
        shift, scale = jnp.split(modulation, 2, axis=-1)
        return self.linear(modulated_norm(x, shift, scale)).astype(jnp.float32)


def timestep_embedding(
    t: Float[Array, "*batch"], dim: int = 64
) -> Float32[Array, "*batch channels"]:
    """Sinusoidal embedding of 1000 * t in `dim` channels, cosines first."""
    frequency = np.exp(-np.log(10_000.0) * np.arange(dim // 2) / (dim // 2)).astype(np.float32)
    angles = 1000.0 * t.astype(jnp.float32)[..., None] * frequency
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
