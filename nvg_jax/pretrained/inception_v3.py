"""Inception v3 of 2015-12-05: its features define FID and related metrics.

This is the network of TensorFlow's classify_image example, with 1008 logits. It differs from
torchvision's Inception v3 in its weights, in average pools that do not count the padding, and in
a max pool where the last block should average. Modules carry torchvision's names.

Results are compared with published ones, so everything is computed in float32, on accelerators too.
"""

from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nvg_jax.pretrained.networks import check_square

IMAGE_SIZE = 299  # pixels of the square input
NUM_LOGITS = 1008
SPATIAL_CHANNELS = 7  # sFID uses the first 7 of 192 channels of Mixed_6d's 1x1 branch


class ImageFeatures(NamedTuple):
    """The features from which the metrics of a generative model are computed, float32.

    Attributes:
        pool: (B, D), for FID, precision and recall.
        spatial: (B, D'), for sFID: channels of a feature map in the order row, column, channel.
        logits: (B, C), for the Inception Score.
    """

    pool: Any
    spatial: Any
    logits: Any


def inception(params, images) -> ImageFeatures:
    """Inception features of images.

    Args:
        params: parameters of "inception".
        images: float (B, 299, 299, 3) in [-1, 1], from `tf1_inception_input` or
            `antialiased_inception_input`.

    Returns:
        pool (B, 2048), the mean of the last 8 x 8 positions; spatial (B, 2023), the first 7
        channels of Mixed_6d's 1x1 branch after its ReLU at 17 x 17 positions; logits (B, 1008)
        without the bias, as the Inception Score is defined.

    Raises:
        UserError: images of another shape or type.
    """
    check_square(images, IMAGE_SIZE, "tf1_inception_input or antialiased_inception_input")
    return cast(ImageFeatures, Inception().apply({"params": params}, images.astype(jnp.float32)))


def tf1_inception_input(images):
    """Images resized and scaled as in TensorFlow 1's graph, for the metrics of the ADM evaluator.

    Bilinear: target pixel i reads source position i * in / out, without half-pixel offset, corner
    alignment or antialiasing (shrinking skips pixels).

    Args:
        images: (B, H, W, 3) in 0..255, uint8 or float.

    Returns:
        float32 (B, 299, 299, 3): (x - 128) / 128 of the resized images.
    """
    x = jnp.asarray(images).astype(jnp.float32)
    for axis in (2, 1):
        size = x.shape[axis]
        source = np.arange(IMAGE_SIZE, dtype=np.float32) * np.float32(size / IMAGE_SIZE)
        low = source.astype(np.int32)
        high = np.minimum(low + 1, size - 1)
        weight = np.expand_dims(source - low, tuple(i for i in range(4) if i != axis))
        first, second = jnp.take(x, low, axis), jnp.take(x, high, axis)
        x = first + (second - first) * weight
    return (x - 128) / 128


def antialiased_inception_input(images):
    """Images resized as in PyTorch's antialiased bilinear mode, for rFID as published.

    Args:
        images: (B, H, W, 3), uint8 or float in [-1, 1].

    Returns:
        float32 (B, 299, 299, 3) in [-1, 1]; pixel centers are at half positions.
    """
    x = jnp.asarray(images).astype(jnp.float32)
    if not jnp.issubdtype(images.dtype, jnp.floating):
        x = x / 127.5 - 1
    shape = (x.shape[0], IMAGE_SIZE, IMAGE_SIZE, 3)
    return jax.image.resize(x, shape, "linear", antialias=True)


class Inception(nn.Module):
    """Inception v3 (Szegedy et al., arXiv 1512.00567) with batch norm folded into convolutions."""

    @nn.compact
    def __call__(self, x) -> ImageFeatures:
        """x float32 (B, 299, 299, 3) in [-1, 1]; see `inception`."""
        x = conv(x, "Conv2d_1a_3x3", 32, 3, 2, "VALID")
        x = conv(x, "Conv2d_2a_3x3", 32, 3, 1, "VALID")
        x = conv(x, "Conv2d_2b_3x3", 64, 3)
        x = halve(x)
        x = conv(x, "Conv2d_3b_1x1", 80, 1)
        x = conv(x, "Conv2d_4a_3x3", 192, 3, 1, "VALID")
        x = halve(x)
        x = BlockA(32, name="Mixed_5b")(x)
        x = BlockA(64, name="Mixed_5c")(x)
        x = BlockA(64, name="Mixed_5d")(x)
        x = BlockB(name="Mixed_6a")(x)
        x = BlockC(128, name="Mixed_6b")(x)
        x = BlockC(160, name="Mixed_6c")(x)
        x = BlockC(160, name="Mixed_6d")(x)
        spatial = x[..., :SPATIAL_CHANNELS]  # the 1x1 branch comes first
        x = BlockC(192, name="Mixed_6e")(x)
        x = BlockD(name="Mixed_7a")(x)
        x = BlockE(average_pool, name="Mixed_7b")(x)
        x = BlockE(max_pool, name="Mixed_7c")(x)
        pool = x.mean((1, 2))
        linear = nn.Dense(
            NUM_LOGITS, use_bias=False, precision=jax.lax.Precision.HIGHEST, name="fc"
        )
        return ImageFeatures(pool, spatial.reshape(len(x), -1), linear(pool))


def conv(x, name: str, channels: int, size: int | tuple[int, int], stride=1, padding="SAME"):
    """Convolution and ReLU, inside a compact module."""
    size = (size, size) if isinstance(size, int) else size
    precision = jax.lax.Precision.HIGHEST
    layer = nn.Conv(channels, size, stride, padding, precision=precision, name=name)
    return nn.relu(layer(x))


def convs(x, name: str, *layers):
    """A sequence of convolutions (channels, size), called name_1, name_2, ..."""
    for number, layer in enumerate(layers, 1):
        x = conv(x, f"{name}_{number}", *layer)
    return x


def average_pool(x):
    """Mean of the 3 x 3 neighborhood; at the border, of the existing pixels only."""
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def max_pool(x):
    return nn.max_pool(x, (3, 3), (1, 1), "SAME")


def halve(x):
    return nn.max_pool(x, (3, 3), (2, 2))


class BlockA(nn.Module):
    """35 x 35 positions."""

    pool_channels: int

    @nn.compact
    def __call__(self, x):
        branches = (
            conv(x, "branch1x1", 64, 1),
            convs(x, "branch5x5", (48, 1), (64, 5)),
            convs(x, "branch3x3dbl", (64, 1), (96, 3), (96, 3)),
            conv(average_pool(x), "branch_pool", self.pool_channels, 1),
        )
        return jnp.concatenate(branches, axis=-1)


class BlockB(nn.Module):
    """35 x 35 -> 17 x 17 positions."""

    @nn.compact
    def __call__(self, x):
        branches = (
            conv(x, "branch3x3", 384, 3, 2, "VALID"),
            convs(x, "branch3x3dbl", (64, 1), (96, 3), (96, 3, 2, "VALID")),
            halve(x),
        )
        return jnp.concatenate(branches, axis=-1)


class BlockC(nn.Module):
    """17 x 17 positions; 7 x 7 convolutions factored into rows and columns."""

    channels: int

    @nn.compact
    def __call__(self, x):
        c, row, column = self.channels, (1, 7), (7, 1)
        branches = (
            conv(x, "branch1x1", 192, 1),
            convs(x, "branch7x7", (c, 1), (c, row), (192, column)),
            convs(x, "branch7x7dbl", (c, 1), (c, column), (c, row), (c, column), (192, row)),
            conv(average_pool(x), "branch_pool", 192, 1),
        )
        return jnp.concatenate(branches, axis=-1)


class BlockD(nn.Module):
    """17 x 17 -> 8 x 8 positions."""

    @nn.compact
    def __call__(self, x):
        branches = (
            convs(x, "branch3x3", (192, 1), (320, 3, 2, "VALID")),
            convs(x, "branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2, "VALID")),
            halve(x),
        )
        return jnp.concatenate(branches, axis=-1)


class BlockE(nn.Module):
    """8 x 8 positions; `pool` is the pooling of the last branch."""

    pool: Any

    @nn.compact
    def __call__(self, x):
        split = convs(x, "branch3x3", (384, 1))
        double = convs(x, "branch3x3dbl", (448, 1), (384, 3))
        branches = (
            conv(x, "branch1x1", 320, 1),
            conv(split, "branch3x3_2a", 384, (1, 3)),
            conv(split, "branch3x3_2b", 384, (3, 1)),
            conv(double, "branch3x3dbl_3a", 384, (1, 3)),
            conv(double, "branch3x3dbl_3b", 384, (3, 1)),
            conv(self.pool(x), "branch_pool", 192, 1),
        )
        return jnp.concatenate(branches, axis=-1)
