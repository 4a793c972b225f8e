"""Convolutional encoder and decoder between images and latents (paper, Section 3.1)."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Float32

from nvg_jax.errors import UserError
from nvg_jax.kernels import convolution
from nvg_jax.runtime.sharding import constrain, parameter


def group_count(channels: int) -> int:
    """The number of groups of a group normalization: 32, or 24 if 32 does not divide the channels.

    Raises:
        UserError: neither divides the channels.
    """
    for groups in (32, 24):
        if channels % groups == 0:
            return groups
    raise UserError(
        f"Group normalization needs channels divisible by 32 or by 24, got {channels}. Choose "
        "base_channels so that the width of every level is a multiple of 32 (or of 24)."
    )


KERNEL_AXES = (None, None, "conv_in", "conv_out")
KERNEL_INIT = nn.with_logical_partitioning(nn.initializers.lecun_normal(), KERNEL_AXES)
BIAS_INIT = nn.with_logical_partitioning(nn.initializers.zeros, KERNEL_AXES[-1:])


def conv(features: int, size: int, dtype, name: str, **kwargs) -> nn.Conv:
    """A convolution with bias; zero padding keeps the size unless `padding` is given."""
    return nn.Conv(
        features,
        (size, size),
        dtype=dtype,
        kernel_init=KERNEL_INIT,
        bias_init=BIAS_INIT,
        name=name,
        conv_general_dilated_cls=convolution.convolution,
        **kwargs,
    )


def group_norm(channels: int, dtype, name: str) -> nn.GroupNorm:
    return nn.GroupNorm(
        group_count(channels),
        epsilon=1e-6,
        dtype=dtype,
        use_fast_variance=False,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("conv_out",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("conv_out",)),
        name=name,
    )


class ResidualBlock(nn.Module):
    """GroupNorm, swish and 3x3 convolution, twice; a 1x1 shortcut if the width changes."""

    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W features"]:
        h = nn.silu(group_norm(x.shape[-1], self.dtype, "norm1")(x))
        h = conv(self.features, 3, self.dtype, "conv1")(h)
        h = nn.silu(group_norm(self.features, self.dtype, "norm2")(h))
        h = conv(self.features, 3, self.dtype, "conv2")(h)
        if x.shape[-1] != self.features:
            x = conv(self.features, 1, self.dtype, "shortcut")(x)
        return constrain(x + h, ("batch", "height", "width", None))


class Upsample(nn.Module):
    """Doubles height and width (nearest neighbor), followed by a 3x3 convolution.

    The enlarged image is never computed. An output pixel sees only 2x2 pixels of the input, because
    two of the three rows of the kernel fall on the same row of the input, and so do two of its
    columns. Adding the weights that meet gives a 2x2 kernel for each of the four pixels into which
    an input pixel is divided, and 4/9 of the arithmetic.
    """

    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B 2*H 2*W features"]:
        batch, height, width, channels = x.shape
        shape = (3, 3, channels, self.features)
        kernel = parameter(self, "kernel", nn.initializers.lecun_normal(), shape, KERNEL_AXES)
        bias = parameter(self, "bias", nn.initializers.zeros, shape[-1:], KERNEL_AXES[-1:])
        x = x.astype(self.dtype)

        def halves(weights, axis):
            """The weights of two taps, for even and for odd positions along an axis."""
            first, middle, last = jnp.split(weights, 3, axis)
            return (
                jnp.concatenate([first, middle + last], axis),
                jnp.concatenate([first + middle, last], axis),
            )

        rows = []
        for row, weights in enumerate(halves(kernel, axis=0)):
            pixels = [
                convolution.convolution()(
                    x,
                    window.astype(self.dtype),
                    (1, 1),
                    ((1 - row, row), (1 - column, column)),
                    dimension_numbers=convolution.LAYOUT,
                )
                for column, window in enumerate(halves(weights, axis=1))
            ]
            rows.append(jnp.stack(pixels, axis=3))
        out = jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, self.features)
        return out + bias.astype(self.dtype)


class Encoder(nn.Module):
    """From images in [-1, 1] to latents."""

    base_width: int  # channels after the first convolution
    widths: Sequence[int]  # channels of each level, finest first
    num_downsamples: int
    blocks_per_level: int
    latent_dim: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"]) -> Float32[Array, "B h w D"]:
        x = conv(self.base_width, 3, self.dtype, "conv_in")(images)
        for level, width in enumerate(self.widths):
            for block in range(self.blocks_per_level):
                x = ResidualBlock(width, self.dtype, name=f"level{level}_block{block}")(x)
            if level < self.num_downsamples:
                x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
                x = conv(
                    width, 3, self.dtype, f"level{level}_downsample", strides=2, padding="VALID"
                )(x)
        for block in range(2):
            x = ResidualBlock(self.widths[-1], self.dtype, name=f"middle_block{block}")(x)
        x = nn.silu(group_norm(x.shape[-1], self.dtype, "norm_out")(x))
        return conv(self.latent_dim, 3, self.dtype, "conv_out")(x).astype(jnp.float32)


class Decoder(nn.Module):
    """From latents to images, not clamped."""

    widths: Sequence[int]
    num_downsamples: int
    blocks_per_level: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, latents: Float[Array, "B h w D"]) -> Float32[Array, "B H W 3"]:
        x = conv(self.widths[-1], 3, self.dtype, "conv_in")(latents)
        for block in range(2):
            x = ResidualBlock(self.widths[-1], self.dtype, name=f"middle_block{block}")(x)
        for level in reversed(range(len(self.widths))):
            for block in range(self.blocks_per_level + 1):
                x = ResidualBlock(
                    self.widths[level], self.dtype, name=f"level{level}_block{block}"
                )(x)
            if 1 <= level <= self.num_downsamples:  # mirrors the encoder's level - 1
                x = Upsample(self.widths[level], self.dtype, name=f"level{level}_upsample")(x)
        x = nn.silu(group_norm(x.shape[-1], self.dtype, "norm_out")(x))
        return conv(3, 3, self.dtype, "conv_out")(x).astype(jnp.float32)
