"""EfficientNet-Lite0 (Tan & Le, arXiv 1905.11946), trained on ImageNet: a judge of color images.

The Lite variant has ReLU6 for swish and no squeeze-and-excitation. The published weights are
TensorFlow's, in a PyTorch file: padding is TensorFlow's "SAME", which at stride 2 pads more behind
than in front, inputs are (x - 127) / 128, and batch norms have an epsilon of 1e-3.
"""

from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from nvg_jax.pretrained.inception_v3 import SPATIAL_CHANNELS, ImageFeatures
from nvg_jax.pretrained.networks import check_square

IMAGE_SIZE = 224  # pixels of the square input
# Blocks of each stage, with their kernel, stride of the first block, expansion and channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def efficientnet_lite0(params, images) -> ImageFeatures:
    """EfficientNet-Lite0 features of images.

    Args:
        params: parameters of "efficientnet_lite0".
        images: float (B, 224, 224, 3) from `efficientnet_input`.

    Returns:
        pool (B, 1280), the mean of the last 7 x 7 positions; spatial (B, 343), their first 7
        channels; logits (B, 1000) in the order of data/imagenet_classes.txt.

    Raises:
        UserError: images of another shape or type.
    """
    check_square(images, IMAGE_SIZE, "efficientnet_input")
    images = images.astype(jnp.float32)
    return cast(ImageFeatures, EfficientNetLite0().apply({"params": params}, images))


def efficientnet_input(images):
    """Images resized to 224 x 224, bilinear and antialiased, and scaled as in training.

    Args:
        images: (B, H, W, 3) in 0..255, uint8 or float.

    Returns:
        float32 (B, 224, 224, 3): (x - 127) / 128 of the resized images.
    """
    x = jnp.asarray(images).astype(jnp.float32)
    x = jax.image.resize(x, (len(x), IMAGE_SIZE, IMAGE_SIZE, 3), "linear", antialias=True)
    return (x - 127) / 128


class EfficientNetLite0(nn.Module):
    """The network, with batch norms folded into convolutions."""

    @nn.compact
    def __call__(self, x) -> ImageFeatures:
        """x float32 (B, 224, 224, 3); see `efficientnet_lite0`."""
        x = nn.relu6(conv(x, "conv_stem", 32, 3, 2))
        number = 0
        for blocks, size, stride, expansion, channels in STAGES:
            for i in range(blocks):
                block = Block(size, 1 if i else stride, expansion, channels, name=f"block{number}")
                x, number = block(x), number + 1
        x = nn.relu6(conv(x, "conv_head", 1280))
        pool = x.mean((1, 2))
        spatial = x[..., :SPATIAL_CHANNELS].reshape(len(x), -1)
        linear = nn.Dense(1000, precision=jax.lax.Precision.HIGHEST, name="fc")
        return ImageFeatures(pool, spatial, linear(pool))


class Block(nn.Module):
    """Inverted residual: expands the channels, filters each, projects to `channels`."""

    size: int
    stride: int
    expansion: int
    channels: int

    @nn.compact
    def __call__(self, x):
        """(B, H, W, C) to (B, H / stride, W / stride, channels), rounded up."""
        y = x
        if self.expansion > 1:
            y = nn.relu6(conv(y, "expand_conv", x.shape[-1] * self.expansion))
        y = nn.relu6(Depthwise(self.size, self.stride, name="depthwise_conv")(y))
        y = conv(y, "project_conv", self.channels)
        return x + y if x.shape == y.shape else y


class Depthwise(nn.Module):
    """Depthwise convolution as a sum of shifted products; on CPUs, XLA's takes ten times longer."""

    size: int
    stride: int

    @nn.compact
    def __call__(self, x):
        """(B, H, W, C) to (B, H / stride, W / stride, C), rounded up."""
        size, stride, channels = self.size, self.stride, x.shape[-1]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (size, size, 1, channels))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        pads = jax.lax.padtype_to_pads(x.shape[1:3], (size, size), (stride, stride), "SAME")
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        height, width = (n - size + 1 for n in x.shape[1:3])
        taps = (
            kernel[i, j, 0] * x[:, i : i + height, j : j + width]
            for i in range(size)
            for j in range(size)
        )
        return sum(taps, bias)[:, ::stride, ::stride]


def conv(x, name: str, channels: int, size: int = 1, stride: int = 1):
    """Convolution with "SAME" padding, inside a compact module."""
    precision = jax.lax.Precision.HIGHEST
    return nn.Conv(channels, (size, size), stride, precision=precision, name=name)(x)
