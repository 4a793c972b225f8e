"""The discriminator: heads on frozen features, and a small trainable network in their place.

Spectral normalization keeps the vectors u and v of each kernel in the collection "spectral". With
mutable=["spectral"], `apply` runs one power iteration and returns the new vectors; without, it uses
the stored vectors unchanged. A training step makes three calls:

    generator loss        apply({params, spectral}, fake)                        frozen
    discriminator loss    apply({params, spectral}, real, mutable=["spectral"])  updates
                          apply({params, spectral of the line above}, fake)      frozen

Batch normalization uses the statistics of the batch in the call. Under jit, with the batch sharded
over a mesh, that is the whole global batch. The discriminator loss makes separate calls for real
and fake images, because the generator loss sees fake images alone: this way both losses normalize
fake images identically. There are no running statistics, since the discriminator is only used in
training. Vectors are small and replicated on every device.
"""

import functools
import math
from collections.abc import Sequence
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Float32

from nvg_jax.errors import UserError
from nvg_jax.runtime.sharding import parameter, unshard

INITIAL_POWER_ITERATIONS = 15

matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def unit(x: Float[Array, " n"]) -> Float[Array, " n"]:
    """x scaled to length 1; a zero vector stays zero."""
    return x / jnp.maximum(jnp.linalg.norm(x), 1e-12)


def power_iterations(
    matrix: Float[Array, "rows columns"],
    u: Float[Array, " rows"],
    v: Float[Array, " columns"],
    rounds: int,
) -> tuple[Float[Array, " rows"], Float[Array, " columns"]]:
    """u and v after power iterations toward the leading singular vectors; no gradients."""
    matrix = jax.lax.stop_gradient(matrix)

    def once(_, vectors):
        v = unit(matmul(vectors[0], matrix))
        return unit(matmul(matrix, v)), v

    return jax.lax.fori_loop(0, rounds, once, (u, v))


class SpectralConv(nn.Module):
    """A convolution with bias; its kernel is divided by its estimated largest singular value.

    The kernel (*size, in, out) is taken as the matrix W (out, in * size). The estimate is
    sigma = u^T W v, with gradients to W but not to u and v (Miyato et al. 2018).
    """

    features: int
    kernel_size: tuple[int, ...]
    padding: str  # "CIRCULAR", "SAME" (zeros) or "VALID"
    dtype: DTypeLike
    strides: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "B *positions C"]) -> Float[Array, "B *moved features"]:
        """The convolution in `dtype`."""
        shape = (*self.kernel_size, x.shape[-1], self.features)
        axes = (*(None,) * len(self.kernel_size), "conv_in", "conv_out")
        kernel = parameter(self, "kernel", nn.initializers.lecun_normal(), shape, axes)
        bias = self.param("bias", nn.initializers.zeros, shape[-1:])
        # Workaround: sharded along both channel axes, XLA (jax 0.10.2) computes wrong gradients.
        kernel = unshard(kernel)

        rows, columns = self.features, math.prod(shape[:-1])
        matrix = jnp.moveaxis(kernel, (-1, -2), (0, 1)).reshape(rows, columns)
        start = lambda: unit(jax.random.normal(self.make_rng("params"), (rows,)))
        u = self.variable("spectral", "u", start)
        v = self.variable("spectral", "v", jnp.zeros, (columns,))
        if self.is_mutable_collection("spectral"):
            # Several iterations at initialization, so that sigma is about right from the start.
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
        weights = {"kernel": kernel / sigma, "bias": bias}
        return cast(Array, conv.apply({"params": weights}, x))


class BatchNorm(nn.Module):
    """Normalizes each channel over all other axes; eps 1e-6, in float32."""

    @nn.compact
    def __call__(self, x: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        others = tuple(range(x.ndim - 1))
        y = x.astype(jnp.float32)
        y = y - y.mean(others)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(others) + 1e-6)
        return (y * scale + bias).astype(x.dtype)


class Block(nn.Module):
    """Shape-preserving convolution, batch norm and leaky ReLU."""

    kernel_size: tuple[int, ...]
    padding: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
        x = SpectralConv(x.shape[-1], self.kernel_size, self.padding, self.dtype, name="conv")(x)
        return nn.leaky_relu(BatchNorm(name="norm")(x), 0.2)


def residual(x: Float[Array, "*batch"], y: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """The sum of two branches, scaled to the variance of one."""
    return (x + y) * math.sqrt(0.5)


class Head(nn.Module):
    """The logits of the features of one layer."""

    kernel_size: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"]) -> Float32[Array, "B N"]:
        x = Block((1,), "CIRCULAR", self.dtype, name="block")(x)
        x = residual(x, Block((self.kernel_size,), "CIRCULAR", self.dtype, name="residual")(x))
        logits = SpectralConv(1, (1,), "CIRCULAR", self.dtype, name="logit")(x)
        return logits[..., 0].astype(jnp.float32)


class DiscriminatorHeads(nn.Module):
    """One head for each of several layers of a feature network; published: five with 384 channels.

    Parameters are float32, arithmetic is in `dtype`, normalizations are in float32.
    """

    kernel_size: int = 9
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, features: Sequence[Float[Array, "B _ _"]]) -> Float32[Array, "B positions"]:
        """The logits at all positions of all layers; the positions of a layer are row-major."""
        heads = [Head(self.kernel_size, self.dtype, name=f"head{i}") for i in range(len(features))]
        return jnp.concatenate([head(x) for head, x in zip(heads, features)], axis=1)


class SmallFeatures(nn.Module):
    """Trainable features for small images, in place of a frozen feature network.

    `num_layers` layers: a patch embedding, then residual 3x3 blocks. A small discriminator is
    nn.Sequential([SmallFeatures(), DiscriminatorHeads()]).
    """

    width: int = 64
    num_layers: int = 3
    patch_size: int = 4
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"]) -> list[Float[Array, "B N width"]]:
        """The features of each layer at N = H W / patch_size^2 positions.

        Args:
            images: values in [-1, 1].

        Raises:
            UserError: H or W is not a multiple of patch_size.
        """
        batch, *size, _ = images.shape
        if any(n % self.patch_size for n in size):
            raise UserError(
                f"The discriminator cuts images into patches of {self.patch_size} x "
                f"{self.patch_size}; its input of {size[0]} x {size[1]} is not a multiple of that. "
                "Choose a patch_size that divides both sides."
            )
        patch = (self.patch_size,) * 2
        embed = SpectralConv(
            self.width, patch, "VALID", self.dtype, strides=self.patch_size, name="patch_embedding"
        )
        features = [embed(images)]
        for i in range(1, self.num_layers):
            block = Block((3, 3), "SAME", self.dtype, name=f"block{i}")
            features.append(residual(features[-1], block(features[-1])))
        return [x.reshape(batch, -1, self.width) for x in features]
