"""Convolutions whose gradients are fast on a CPU."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32

from nvg_jax.runtime import hardware

LARGE = 2**19  # values of an image, before or after, from which on XLA's gradient is slower
BLOCK = 2048  # positions whose inputs are gathered at once: they fit the cache

Pairs = tuple[tuple[int, int], ...]
LAYOUT = ("NHWC", "HWIO", "NHWC")
plain = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=LAYOUT)


def convolution() -> Callable[..., Array]:
    """`jax.lax.conv_general_dilated` in `LAYOUT`, as this platform computes it fastest.

    XLA for CPUs computes the kernel's gradient as a convolution with windows as large as the image,
    in up to five times the time of the convolution itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.empty or mesh.size == 1
    return _on_cpu if alone and hardware.platform() == "cpu" else jax.lax.conv_general_dilated


def _on_cpu(x: Array, kernel: Array, strides: Sequence[int], padding, **_) -> Array:
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    values = x.shape[1] * x.shape[2] * max(kernel.shape[2:])
    compute = _convolve if values >= LARGE else plain
    return compute(x, kernel, tuple(strides), tuple((low, high) for low, high in padding))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x: Array, kernel: Array, strides: tuple[int, ...], padding: Pairs) -> Array:
    return plain(x, kernel, strides, padding)


def _gradients(
    strides: tuple[int, ...], padding: Pairs, saved: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    (of_x,) = jax.vjp(lambda x: plain(x, kernel, strides, padding), x)[1](g)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    return of_x, kernel_gradient(x, g, kernel.shape, strides).astype(kernel.dtype)


_convolve.defvjp(lambda x, kernel, *how: (plain(x, kernel, *how), (x, kernel)), _gradients)


def kernel_gradient(
    x: Float[Array, "B H W C"],
    g: Float[Array, "B h w D"],
    shape: tuple[int, ...],
    strides: tuple[int, ...],
) -> Float32[Array, "kh kw C D"]:
    """The gradient of a kernel of this shape: for a block of rows after the other, one product.

    Args:
        x: the input with its padding. g: the gradient of the output.
    """
    batch, height, width, _ = g.shape
    fits = [n for n in range(1, height + 1) if height % n == 0 and batch * n * width <= BLOCK]
    rows = max(fits, default=1)
    (high, wide, *channels), (down, right) = shape, strides

    def add(total, first):
        part = jax.lax.dynamic_slice_in_dim(x, first * down, (rows - 1) * down + high, axis=1)
        seen = [
            part[:, i : i + (rows - 1) * down + 1 : down, j : j + (width - 1) * right + 1 : right]
            for i in range(high)
            for j in range(wide)
        ]
        own = jax.lax.dynamic_slice_in_dim(g, first, rows, axis=1)
        product = jnp.einsum(
            "bhwi,bhwo->io", jnp.concatenate(seen, -1), own, preferred_element_type=jnp.float32
        )
        return total + product, None

    start = jnp.zeros((high * wide * channels[0], channels[1]), jnp.float32)
    total, _ = jax.lax.scan(add, start, jnp.arange(0, height, rows))
    return total.reshape(shape)
