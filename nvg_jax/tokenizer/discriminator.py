"""The discriminator: heads over frozen features, and a small trainable stand-in for the features.

Spectral normalization keeps the vectors u and v of every weight in the collection "spectral".
Applied with mutable=["spectral"] the discriminator makes one power iteration and returns the new
vectors; applied without, it uses the stored ones unchanged. So a training step is:

    generator's loss        apply({params, spectral}, fake)                       frozen
    discriminator's loss    apply({params, spectral}, real, mutable=["spectral"]) updates
                            apply({params, spectral of the line above}, fake)     frozen

Batch normalization takes the statistics of the batch it is given. Real and fake images are
separate calls in the discriminator's loss, because the generator's loss sees fake images alone:
so a fake image is normalized alike in both. The discriminator is only used in training, so no
running statistics are kept. Under jit with the batch split over a mesh the means are those of the
whole global batch. Vectors are small and lie whole on every device.
"""

import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from nvg_jax import layers

INITIAL_POWER_ITERATIONS = 15

matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def unit(x):
    """x at length 1; a zero vector stays zero."""
    return x / jnp.maximum(jnp.linalg.norm(x), 1e-12)


def power_iterations(matrix, u, v, rounds: int):
    """u and v nearer to the first singular vectors of the matrix; no gradient."""
    matrix = jax.lax.stop_gradient(matrix)

    def once(_, vectors):
        v = unit(matmul(vectors[0], matrix))
        return unit(matmul(matrix, v)), v

    return jax.lax.fori_loop(0, rounds, once, (u, v))


class SpectralConv(nn.Module):
    """A convolution with bias whose kernel is divided by its largest singular value, estimated.

    The kernel (*size, in, out) counts as the matrix (out, in * size), sigma = u^T W v with a
    gradient to W and none to u and v (Miyato et al. 2018).
    """

    features: int
    kernel_size: tuple[int, ...]
    padding: str  # "CIRCULAR", "SAME" (zeros) or "VALID"
    dtype: jnp.dtype
    strides: int = 1

    @nn.compact
    def __call__(self, x):
        """x (B, *positions, in) -> (B, *positions, features) in `dtype`."""
        shape = (*self.kernel_size, x.shape[-1], self.features)
        axes = (*(None,) * len(self.kernel_size), "conv_in", "conv_out")
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes)
        kernel = self.param("kernel", init, shape)
        bias = self.param("bias", nn.initializers.zeros, shape[-1:])
        # Left split along both channel axes, XLA (as of jax 0.10.2) makes wrong gradients of it.
        kernel = layers.unshard(kernel)

        rows, columns = self.features, math.prod(shape[:-1])
        matrix = jnp.moveaxis(kernel, (-1, -2), (0, 1)).reshape(rows, columns)
        start = lambda: unit(jax.random.normal(self.make_rng("params"), (rows,)))
        u = self.variable("spectral", "u", start)
        v = self.variable("spectral", "v", jnp.zeros, (columns,))
        if self.is_mutable_collection("spectral"):
            # Several at the start: even before the first update sigma is about right.
            rounds = INITIAL_POWER_ITERATIONS if self.is_initializing() else 1
            u.value, v.value = power_iterations(matrix, u.value, v.value, rounds)
        left, right = jax.lax.stop_gradient((u.value, v.value))
        sigma = matmul(left, matmul(matrix, right))

        conv = nn.Conv(
            self.features,
            self.kernel_size,
            strides=self.strides,
            padding=self.padding,
            dtype=self.dtype,
            parent=None,
        )
        return conv.apply({"params": {"kernel": kernel / sigma, "bias": bias}}, x)


class BatchNorm(nn.Module):
    """Normalizes every channel of x (B, ..., C) over all other axes; eps 1e-6, in float32."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        others = tuple(range(x.ndim - 1))
        y = x.astype(jnp.float32)
        y = y - y.mean(others)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(others) + 1e-6)
        return (y * scale + bias).astype(x.dtype)


class Block(nn.Module):
    """Convolution that keeps the shape, batch norm, leaky ReLU: (B, ..., C) -> (B, ..., C)."""

    kernel_size: tuple[int, ...]
    padding: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        x = SpectralConv(x.shape[-1], self.kernel_size, self.padding, self.dtype, name="conv")(x)
        return nn.leaky_relu(BatchNorm(name="norm")(x), 0.2)


def residual(x, y):
    """The sum of two branches at the variance of one."""
    return (x + y) * math.sqrt(0.5)


class Head(nn.Module):
    """One tap (B, N, C) -> logits float32 (B, N)."""

    kernel_size: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        x = Block((1,), "CIRCULAR", self.dtype, name="block")(x)
        x = residual(x, Block((self.kernel_size,), "CIRCULAR", self.dtype, name="residual")(x))
        logits = SpectralConv(1, (1,), "CIRCULAR", self.dtype, name="logit")(x)
        return logits[..., 0].astype(jnp.float32)


class DiscriminatorHeads(nn.Module):
    """One head for every tap of a feature network; published: five taps of 384 channels.

    Parameters are float32, the arithmetic is in `dtype`, normalizations in float32.
    """

    kernel_size: int = 9
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, taps: Sequence[jax.Array]):
        """Taps float (B, N, C), N row-major positions -> logits float32 (B, sum of the N)."""
        heads = [Head(self.kernel_size, self.dtype, name=f"head{i}") for i in range(len(taps))]
        return jnp.concatenate([head(tap) for head, tap in zip(heads, taps)], axis=1)


class SmallFeatures(nn.Module):
    """Trainable features for small images, in the place of a frozen feature network.

    A patch embedding and residual 3x3 blocks, each a tap. With
    nn.Sequential([SmallFeatures(), DiscriminatorHeads()]) it makes a small discriminator.
    """

    width: int = 64
    num_taps: int = 3
    patch_size: int = 4
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images) -> list[jax.Array]:
        """Images float (B, H, W, 3) in [-1, 1] -> `num_taps` taps (B, H W / patch_size^2, width).

        Raises:
            ValueError: H or W is no multiple of patch_size.
        """
        batch, *size, _ = images.shape
        if any(n % self.patch_size for n in size):
            raise ValueError(
                f"The discriminator cuts images into patches of {self.patch_size} x "
                f"{self.patch_size}; its input of {size[0]} x {size[1]} is no multiple of it. "
                "Choose a patch_size that divides both sides."
            )
        patch = (self.patch_size,) * 2
        embed = SpectralConv(
            self.width, patch, "VALID", self.dtype, strides=self.patch_size, name="patch_embedding"
        )
        taps = [embed(images)]
        for i in range(1, self.num_taps):
            block = Block((3, 3), "SAME", self.dtype, name=f"block{i}")
            taps.append(residual(taps[-1], block(taps[-1])))
        return [x.reshape(batch, -1, self.width) for x in taps]
