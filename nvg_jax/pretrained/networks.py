"""VGG16 and AlexNet with LPIPS heads, and the vision transformer of DINO and DINOv2.

Images are float (B, H, W, 3) in [-1, 1]. Parameters are float32 and come from
`nvg_jax.pretrained.load`. Everything is deterministic: no dropout, no batch statistics.
"""

import functools
from typing import Any, cast

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from nvg_jax.attention import attention
from nvg_jax.errors import UserError

VGG_CHANNELS = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
# LPIPS normalizes images in [-1, 1] with these.
LPIPS_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
LPIPS_SCALE = np.array([0.458, 0.448, 0.450], np.float32)
# Statistics of ImageNet, for images in [0, 1].
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)

DEPTH = 12  # blocks of both transformers
HEAD_DIM = 64
VIT_IMAGE = 224  # pixels of their square input
DINO_WIDTH, DINOV2_WIDTH = 384, 768  # channels of a token
SIZES: dict[str, dict[str, Any]] = {
    "dino": {"width": DINO_WIDTH, "patch": 16},
    "dinov2": {"width": DINOV2_WIDTH, "patch": 14},
}
DINO_GRID, DINOV2_GRID = ((VIT_IMAGE // size["patch"],) * 2 for size in SIZES.values())  # patches
DINO_BLOCKS = (2, 5, 8, 11)  # the discriminator sees the outputs of these, counted from 0
DINO_FEATURES = 1 + len(DINO_BLOCKS)  # sequences that `dino` returns


def lpips(params, images_a, images_b, dtype: DTypeLike = jnp.float32) -> Array:
    """Perceptual distance LPIPS v0.1 on VGG16 features (Zhang et al., arXiv 1801.03924).

    Args:
        params: parameters of "lpips".
        images_a, images_b: float (B, H, W, 3) in [-1, 1], H and W at least 16.
        dtype: dtype of the convolutions; features are compared in float32.

    Returns:
        float32 (B,), nonnegative, and 0 for equal images.

    Raises:
        UserError: images of another shape or type.
    """
    _check_pair(images_a, images_b, 16)
    distances = Lpips("vgg", dtype).apply({"params": params}, images_a, images_b)
    return cast(Array, distances)


def lpips_alex(params, images_a, images_b, dtype: DTypeLike = jnp.float32) -> Array:
    """LPIPS v0.1 on AlexNet features, the variant that most papers report.

    Like `lpips`, with the parameters of "lpips_alex", and H and W at least 31.
    """
    _check_pair(images_a, images_b, 31)
    distances = Lpips("alex", dtype).apply({"params": params}, images_a, images_b)
    return cast(Array, distances)


def dino(params, images, dtype=jnp.float32):
    """Token sequences of DINO ViT-S/16 (Caron et al., arXiv 2104.14294) for the discriminator.

    Args:
        params: parameters of "dino".
        images: float (B, 224, 224, 3) in [-1, 1].
        dtype: dtype of the computation.

    Returns:
        Five arrays `dtype` (B, 197, 384): the embedded tokens with their positions, and the outputs
        of blocks 2, 5, 8 and 11 (counted from 0), without the final norm. The class token comes
        first, then the 14 x 14 patches row by row.

    Raises:
        UserError: images of another shape or type.
    """
    check_square(images, VIT_IMAGE)
    embedded, outputs, _ = _tokens("dino", params, images, dtype, tanh_gelu=True)  # as published
    return (embedded, *(outputs[i] for i in DINO_BLOCKS))


def dinov2(params, images, dtype=jnp.float32):
    """Normalized patch tokens of DINOv2 ViT-B/14 (Oquab et al., arXiv 2304.07193), for REPA.

    Args:
        params: parameters of "dinov2".
        images: float (B, H, W, 3) in [-1, 1]; resized to 224 x 224, see `resize_bicubic`.
        dtype: dtype of the computation.

    Returns:
        float32 (B, 256, 768) after the final norm: 16 x 16 patches row by row, without the class
        token.

    Raises:
        UserError: images of another shape or type.
    """
    _check(images, True, "any number of pixels")
    images = resize_bicubic(images.astype(jnp.float32), (VIT_IMAGE, VIT_IMAGE))
    _, _, tokens = _tokens("dinov2", params, images, dtype)
    return tokens[:, 1:].astype(jnp.float32)


def _tokens(
    name: str, params, images, dtype, tanh_gelu: bool = False
) -> tuple[Array, Array, Array]:
    """What `VisionTransformer` returns for images in [-1, 1]."""
    model = VisionTransformer(**SIZES[name], tanh_gelu=tanh_gelu, dtype=dtype)
    return cast(Any, model.apply({"params": params}, imagenet_normalized(images)))


def resize_bicubic(images, size: tuple[int, int]) -> Array:
    """PyTorch's bicubic resizing of float32 (B, H, W, C): a = -0.75, and no antialiasing."""
    rows, columns = (bicubic_matrix(n, target) for n, target in zip(images.shape[1:3], size))
    images = jnp.einsum("yh,bhwc->bywc", rows, images, precision="highest")
    return jnp.einsum("xw,bywc->byxc", columns, images, precision="highest")


def bicubic_matrix(size: int, target: int) -> np.ndarray:
    """float32 (target, size): the weights of bicubic resizing along one side.

    Each target pixel sees four pixels around its center; those beyond an edge are the edge's.
    """
    a = -0.75
    centers = (np.arange(target) + 0.5) * (size / target) - 0.5
    places = np.floor(centers)[:, None] + np.arange(-1, 3)
    x = np.abs(centers[:, None] - places)
    inner = (a + 2) * x**3 - (a + 3) * x**2 + 1
    outer = a * (x**3 - 5 * x**2 + 8 * x - 4)
    matrix = np.zeros((target, size))
    rows = np.arange(target)[:, None]
    np.add.at(matrix, (rows, places.astype(int).clip(0, size - 1)), np.where(x <= 1, inner, outer))
    return matrix.astype(np.float32)


def check_square(images, size: int, resize: str = ""):
    """Raises UserError, naming what to resize with, unless images are float (B, size, size, 3)."""
    fits = images.shape[1:3] == (size, size)
    _check(images, fits, f"{size} x {size} pixels", f" Resize with {resize}." if resize else "")


def _check(images, size_fits: bool, size: str, advice: str = ""):
    floating = jnp.issubdtype(images.dtype, jnp.floating)
    if not (images.ndim == 4 and images.shape[-1] == 3 and floating and size_fits):
        raise UserError(
            f"Expected float images (B, H, W, 3) in [-1, 1] of {size}, got {images.dtype} "
            f"{images.shape}.{advice}"
        )


def _check_pair(images_a, images_b, smallest: int):
    for images in (images_a, images_b):
        fits = min(images.shape[1:3], default=0) >= smallest
        _check(images, fits, f"at least {smallest} x {smallest} pixels")
    if images_a.shape != images_b.shape:
        raise UserError(
            f"LPIPS compares images of one shape, got {images_a.shape} and {images_b.shape}."
        )


def imagenet_normalized(images):
    """Images in [-1, 1] normalized with ImageNet's statistics, float32, for the transformers."""
    return ((images.astype(jnp.float32) + 1) / 2 - IMAGENET_MEAN) / IMAGENET_STD


class VGG16(nn.Module):
    """The convolutions of VGG16 (Simonyan and Zisserman, arXiv 1409.1556)."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x):
        """x (B, H, W, 3) -> the last activations of each of the five levels, in `dtype`."""
        levels, count = [], 0
        for channels in VGG_CHANNELS:
            if levels:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for features in channels:
                conv = nn.Conv(features, (3, 3), dtype=self.dtype, name=f"conv{count}")
                x, count = nn.relu(conv(x)), count + 1
            levels.append(x)
        return levels


class AlexNet(nn.Module):
    """The convolutions of torchvision's AlexNet (Krizhevsky, arXiv 1404.5997)."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x):
        """x (B, H, W, 3) -> the activations of each of the five convolutions, in `dtype`."""
        conv = functools.partial(nn.Conv, dtype=self.dtype)
        levels = [nn.relu(conv(64, (11, 11), 4, padding=2, name="conv0")(x))]
        x = nn.max_pool(levels[-1], (3, 3), (2, 2))
        levels.append(nn.relu(conv(192, (5, 5), name="conv1")(x)))
        x = nn.max_pool(levels[-1], (3, 3), (2, 2))
        for i, features in enumerate((384, 256, 256), 2):
            x = nn.relu(conv(features, (3, 3), name=f"conv{i}")(x))
            levels.append(x)
        return levels


class Lpips(nn.Module):
    """Squared differences of unit features, weighted by channel, averaged over positions."""

    network: str  # "vgg" or "alex"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images_a, images_b):
        """Two batches (B, H, W, 3) in [-1, 1] -> float32 (B,)."""
        network = {"vgg": VGG16, "alex": AlexNet}[self.network](self.dtype, name=self.network)
        levels_a, levels_b = (
            network((x.astype(jnp.float32) - LPIPS_SHIFT) / LPIPS_SCALE)
            for x in (images_a, images_b)
        )
        distance = 0.0
        for level, (a, b) in enumerate(zip(levels_a, levels_b)):
            weights = self.param(f"head{level}", nn.initializers.ones, a.shape[-1:])
            difference = jnp.square(unit_channels(a) - unit_channels(b))
            distance += (difference * weights).sum(-1).mean((1, 2))
        return distance


def unit_channels(x):
    """x (..., C) / (norm + 1e-10), float32. Zero vectors and their gradients stay zero."""
    x = x.astype(jnp.float32)
    square = jnp.square(x).sum(-1, keepdims=True)
    length = jnp.sqrt(jnp.where(square > 0, square, 1))
    return jnp.where(square > 0, x / (length + 1e-10), 0)


class VisionTransformer(nn.Module):
    """Twelve blocks on a class token and the patches of 224 x 224 pixels."""

    width: int
    patch: int
    tanh_gelu: bool = False  # GELU by its approximation with tanh
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images):
        """Tokens of normalized images (B, 224, 224, 3), in `dtype`; N = 1 + patches.

        Returns:
            The embedded tokens (B, N, C), the output of each block (12, B, N, C), and the last
            output after the final norm (B, N, C).
        """
        zeros, size = nn.initializers.zeros, (self.patch, self.patch)
        length = 1 + (VIT_IMAGE // self.patch) ** 2
        first = self.param("class_token", zeros, (1, 1, self.width))
        position = self.param("position", zeros, (1, length, self.width))
        patches = nn.Conv(self.width, size, size, "VALID", dtype=self.dtype, name="patches")(images)
        patches = patches.reshape(images.shape[0], -1, self.width)
        first = jnp.broadcast_to(first, (images.shape[0], 1, self.width)).astype(self.dtype)
        x = embedded = jnp.concatenate([first, patches], axis=1) + position.astype(self.dtype)
        blocks = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=DEPTH
        )
        x, outputs = blocks(self.dtype, self.tanh_gelu, name="blocks")(x, None)
        return embedded, outputs, layer_norm(self.dtype, "norm")(x)


class Block(nn.Module):
    """Attention, then MLP, each after a layer norm and added to its input."""

    dtype: DTypeLike
    tanh_gelu: bool

    @nn.compact
    def __call__(self, x, _):
        """x (B, N, C) -> (y, y) of the same shape, for `nn.scan`."""
        batch, length, width = x.shape
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        q, k, v = jnp.split(
            dense(3 * width, name="qkv")(layer_norm(self.dtype, "norm1")(x)), 3, axis=-1
        )
        q, k, v = (y.reshape(batch, length, -1, HEAD_DIM) for y in (q, k, v))
        x += dense(width, name="projection")(attention(q, k, v).reshape(x.shape))
        hidden = dense(4 * width, name="mlp_in")(layer_norm(self.dtype, "norm2")(x))
        x += dense(width, name="mlp_out")(nn.gelu(hidden, approximate=self.tanh_gelu))
        return x, x


def layer_norm(dtype, name: str) -> nn.LayerNorm:
    """Layer normalization with scale and bias, eps 1e-6, statistics in float32."""
    return nn.LayerNorm(1e-6, dtype=dtype, use_fast_variance=False, name=name)
