"""Attention for TPUs: a Pallas kernel, and another one for its gradient.

One program handles all rows of one image and the heads that share LANES channels. The sequences are
short (257 and 513 tokens), so a whole row of scores fits on the chip: no online softmax is needed,
and the backward pass recomputes the scores. The product for one head runs over all channels, with
the other heads' channels set to zero: the matrix unit works on LANES channels anyway, and no
channels have to be moved.
"""

import functools
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Float

from nvg_jax.kernels.rotary import EPSILON, Rotary
from nvg_jax.runtime.sharding import BATCH_SPEC, batch_shards, tensor_shards

LANES = 128  # lanes of a TPU vector register; they hold whole heads in each kernel block
MAX_LENGTH = 640  # longest sequence for the kernel; compiled with 513
ROWS = 16  # bfloat16 rows of a register


def fits_kernel(q: Float[Array | np.ndarray, "B N heads head_dim"]) -> bool:
    """Whether the kernel supports these queries in the current mesh.

    A row of scores must fit on the chip, whole heads must fill the lanes on every device, and the
    images must divide evenly over the devices. (`init` runs one image, which may not divide.)
    """
    mesh = jax.sharding.get_abstract_mesh()
    batch, length, heads, head_dim = q.shape
    tensor, shards = tensor_shards(), 1 if mesh.empty else batch_shards(mesh)
    whole = LANES % head_dim == 0 or head_dim % LANES == 0
    whole = whole and heads * head_dim % (tensor * LANES) == 0
    return whole and batch % shards == 0 and length <= MAX_LENGTH


def fused_attention(
    q: Float[Array, "B N heads head_dim"],
    k: Float[Array, "B N heads head_dim"],
    v: Float[Array, "B N heads head_dim"],
    rotary: Rotary | None = None,
    interpret: bool = False,
) -> Float[Array, "B N heads head_dim"]:
    """`attention` as one kernel, plus one for its gradient, on each device's images and heads.

    Args:
        interpret: run without a TPU, for tests.
    """
    batch, length, heads, head_dim = q.shape
    flat = [x.reshape(batch, length, heads * head_dim) for x in (q, k, v)]
    if rotary is not None:
        copies = max(LANES, head_dim) // head_dim
        scales = [jnp.tile(x.astype(jnp.float32), copies)[None] for x in rotary[:2]]
        angles = [jnp.tile(jnp.repeat(x, 2, axis=-1), copies) for x in rotary[2:]]
        rotary = Rotary(*scales, *angles)
    return cast(Array, _fused(head_dim, interpret, *flat, rotary)).reshape(q.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(
    head_dim: int,
    interpret: bool,
    q: Float[Array, "B N C"],
    k: Float[Array, "B N C"],
    v: Float[Array, "B N C"],
    rotary: Rotary | None,
) -> Float[Array, "B N C"]:
    """The scales in `rotary` are (1, lanes), the angles (B, N, lanes)."""
    return _on_each_device(_forward_kernel, head_dim, interpret, (q, k, v), rotary, outputs=1)[0]


def _fused_fwd(head_dim, interpret, *args):
    return _fused(head_dim, interpret, *args), args


def _fused_bwd(head_dim, interpret, args, grad):
    *arrays, rotary = args
    dq, dk, dv, *sums = _on_each_device(
        _backward_kernel, head_dim, interpret, (*arrays, grad), rotary, outputs=3
    )
    if rotary is None:
        return dq, dk, dv, None
    # The kernel returns the gradients of the scales per image and group of heads.
    scales = (x.sum((0, 1)) for x in sums)
    angles = map(jnp.zeros_like, rotary[2:])  # the positions are constants
    return dq, dk, dv, Rotary(*scales, *angles)


_fused.defvjp(_fused_fwd, _fused_bwd)


def _on_each_device(kernel, head_dim, interpret, arrays, rotary: Rotary | None, outputs: int):
    """Runs a kernel on each device's images (and, along "tensor", heads).

    Args:
        arrays: q, k, v and optionally a gradient, (B, N, C).
        outputs: number of results (B, N, C). With a gradient and `rotary`, they are followed by
            the sums for both scales, (B, groups, 1, lanes).
    """
    rotations, gradient = tuple(rotary or ()), len(arrays) > 3
    call = functools.partial(_call, kernel, head_dim, interpret, len(arrays), outputs)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1:
        images = BATCH_SPEC[0]
        channels, angles = PartitionSpec(images, None, "tensor"), PartitionSpec(images)
        scales, sums = PartitionSpec(), PartitionSpec(images, "tensor")
        call = jax.shard_map(
            call,
            in_specs=(channels,) * len(arrays) + (scales, scales, angles, angles)[: len(rotations)],
            out_specs=(channels,) * outputs + (sums, sums) * bool(rotations and gradient),
            check_vma=False,
        )
    return call(*arrays, *rotations)


def _call(kernel, head_dim: int, interpret: bool, num_arrays: int, outputs: int, q, *args):
    """Runs a kernel on one device; see `_on_each_device`."""
    (batch, length, width), rotated = q.shape, len(args) >= num_arrays
    lanes = max(LANES, head_dim)
    rows = -(-length // LANES) * LANES  # keys are the columns of the scores
    grid = batch, width // lanes
    channels = pl.BlockSpec((1, rows, lanes), lambda image, group: (image, 0, group))
    scales = pl.BlockSpec((1, lanes), lambda image, group: (0, 0))
    angles = pl.BlockSpec((1, rows, lanes), lambda image, group: (image, 0, 0))
    sums = pl.BlockSpec((1, 1, 1, lanes), lambda image, group: (image, group, 0, 0))
    summed = 2 * (rotated and num_arrays > 3)
    products = 2 if num_arrays == 3 else 5  # matrix products; the gradient recomputes the scores
    results = pl.pallas_call(
        functools.partial(kernel, length, head_dim),
        grid=grid,
        in_specs=[channels] * num_arrays + [scales, scales, angles, angles] * rotated,
        out_specs=[channels] * outputs + [sums] * summed,
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype)] * outputs
        + [jax.ShapeDtypeStruct((*grid, 1, lanes), jnp.float32)] * summed,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=products * 2 * batch * length**2 * width,
            transcendentals=batch * length**2 * width // head_dim,
            bytes_accessed=(num_arrays + outputs) * q.size * q.dtype.itemsize,
        ),
        name=kernel.__name__.strip("_"),
        interpret=interpret,
    )(q, *args)
    return tuple(results)


class _Heads:
    """The lanes of a block: the head that each belongs to, and its place in a channel pair."""

    def __init__(self, head_dim: int, lanes: int):
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, lanes), 1)
        self.head_dim = head_dim
        self.masks = [lane // head_dim == head for head in range(lanes // head_dim)]
        self.even = lane % 2 == 0

    def mean(self, x):
        """The mean over the channels of each head, broadcast to them; float32 (N, lanes)."""
        sums = (jnp.where(mask, x, 0).sum(-1, keepdims=True) for mask in self.masks)
        return sum(jnp.where(mask, x, 0) for mask, x in zip(self.masks, sums)) / self.head_dim

    def swap(self, x):
        """(-odd, even) of each pair of channels (even, odd)."""
        after, before = pltpu.roll(x, x.shape[-1] - 1, 1), pltpu.roll(x, 1, 1)
        return jnp.where(self.even, -after, before)


class _Prepared:
    """Normalized, rotated queries or keys, `x` float32 (N, lanes), and their backward pass.

    Args:
        rows: the raw queries or keys, (N, lanes).
        rotary: None, or (scale (1, lanes), cos (N, lanes), sin (N, lanes)).
        factor: multiplies the scores.
    """

    def __init__(self, heads: _Heads, rows, rotary, factor: float = 1.0):
        self.heads, self.rotary, self.factor = heads, rotary, factor
        self.x = rows.astype(jnp.float32) * factor
        if rotary is not None:
            scale, cos, sin = rotary
            rows = rows.astype(jnp.float32)
            self.inverse = jax.lax.rsqrt(heads.mean(rows * rows) + EPSILON)
            self.normal = rows * self.inverse
            y = self.normal * (scale * factor)
            self.x = cos * y + sin * heads.swap(y)

    def gradients(self, grad):
        """The gradients with respect to the rows and, summed over them, the scale (or None)."""
        grad = grad * self.factor
        if self.rotary is None:
            return grad, None
        scale, cos, sin = self.rotary
        grad = cos * grad - sin * self.heads.swap(grad)
        for_scale = (grad * self.normal).sum(0, keepdims=True)
        grad = grad * scale
        mean = self.heads.mean(grad * self.normal)
        return self.inverse * (grad - self.normal * mean), for_scale


def _rows(ref, count: int, length: int):
    """The first `count` rows of a block; rows past the end of the sequence are zero."""
    row = jax.lax.broadcasted_iota(jnp.int32, (count, 1), 0)
    x = ref[0, :count]
    return jnp.where(row < length, x, jnp.zeros_like(x))


def _dot(a, b, contract: tuple[int, int]):
    """Product over one axis of each operand, float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = ((contract[:1], contract[1:]), ((), ()))
    return jax.lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def _softmax(q, k, length: int):
    """(exponentials, 1 / their sum) of the scores of q (M, lanes) and k (N, lanes), float32."""
    scores = _dot(q, k, (1, 1))
    column = jax.lax.broadcasted_iota(jnp.int32, (1, scores.shape[1]), 1)
    scores = jnp.where(column < length, scores, -jnp.inf)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    return weights, 1 / weights.sum(-1, keepdims=True)


def _prepare(length, head_dim, q_ref, k_ref, rotary_refs):
    """(heads, queries, keys)."""
    heads = _Heads(head_dim, q_ref.shape[-1])
    queries, keys = -(-length // ROWS) * ROWS, k_ref.shape[1]
    q_rotary = k_rotary = None
    if rotary_refs:
        q_scale, k_scale = (ref[...] for ref in rotary_refs[:2])
        cos, sin = (_rows(ref, keys, length) for ref in rotary_refs[2:])
        q_rotary, k_rotary = (q_scale, cos[:queries], sin[:queries]), (k_scale, cos, sin)
    q = _Prepared(heads, _rows(q_ref, queries, length), q_rotary, head_dim**-0.5)
    return heads, q, _Prepared(heads, _rows(k_ref, keys, length), k_rotary)


def _forward_kernel(length, head_dim, q_ref, k_ref, v_ref, *refs):
    *rotary_refs, out_ref = refs
    dtype = q_ref.dtype
    heads, q, k = _prepare(length, head_dim, q_ref, k_ref, rotary_refs)
    q, k = q.x.astype(dtype), k.x.astype(dtype)
    v = _rows(v_ref, len(k), length)
    out = jnp.zeros(q.shape, jnp.float32)
    for mask in heads.masks:
        weights, inverse = _softmax(jnp.where(mask, q, 0), k, length)
        out += _dot(weights.astype(dtype), jnp.where(mask, v, 0), (1, 0)) * inverse
    out_ref[0, : len(out)] = out.astype(dtype)


def _backward_kernel(length, head_dim, q_ref, k_ref, v_ref, grad_ref, *refs):
    # refs: three results; or the four arrays of a Rotary, three results and two sums.
    rotary_refs, (dq_ref, dk_ref, dv_ref, *dscale_refs) = (
        ((), refs) if len(refs) == 3 else (refs[:4], refs[4:])
    )
    dtype = q_ref.dtype
    heads, queries, keys = _prepare(length, head_dim, q_ref, k_ref, rotary_refs)
    q, k = queries.x.astype(dtype), keys.x.astype(dtype)
    v, grad = _rows(v_ref, len(k), length), _rows(grad_ref, len(q), length)
    dq, dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    for mask in heads.masks:
        own_q, own_k, own_grad = (jnp.where(mask, x, 0) for x in (q, k, grad))
        weights, inverse = _softmax(own_q, k, length)
        weights = weights * inverse
        dv += _dot(weights.astype(dtype), own_grad, (0, 0))
        dweights = _dot(own_grad, v, (1, 1))
        dscores = weights * (dweights - (weights * dweights).sum(-1, keepdims=True))
        dscores = dscores.astype(dtype)
        dq += _dot(dscores, own_k, (1, 0))
        dk += _dot(dscores, own_q, (0, 0))
    dq, dq_scale = queries.gradients(dq)
    dk, dk_scale = keys.gradients(dk)
    dq_ref[0, : len(dq)] = dq.astype(dtype)
    dk_ref[0], dv_ref[0] = dk.astype(dtype), dv.astype(dtype)
    for ref, dscale in zip(dscale_refs, (dq_scale, dk_scale)):
        ref[0, 0] = dscale
