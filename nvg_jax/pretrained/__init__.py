"""Frozen networks for the training losses and for evaluation.

LPIPS on VGG16 and AlexNet, DINO ViT-S/16, DINOv2 ViT-B/14, Inception v3 and EfficientNet-Lite0.
`convert` imports the parameters from published files, `load` reads them. Each network is a pure
function of its parameters and of images:

    distance = lpips(load("lpips"), images_a, images_b, dtype=jnp.bfloat16)
"""

from nvg_jax.pretrained.efficientnet import efficientnet_input, efficientnet_lite0
from nvg_jax.pretrained.inception_v3 import (
    ImageFeatures,
    antialiased_inception_input,
    inception,
    tf1_inception_input,
)
from nvg_jax.pretrained.networks import (
    DINO_FEATURES,
    DINO_GRID,
    DINO_WIDTH,
    DINOV2_GRID,
    DINOV2_WIDTH,
    dino,
    dinov2,
    lpips,
    lpips_alex,
)
from nvg_jax.pretrained.weights import NAMES, abstract, cache_folder, convert, keeping, load

__all__ = [
    "DINOV2_GRID",
    "DINOV2_WIDTH",
    "DINO_FEATURES",
    "DINO_GRID",
    "DINO_WIDTH",
    "NAMES",
    "ImageFeatures",
    "abstract",
    "antialiased_inception_input",
    "cache_folder",
    "convert",
    "dino",
    "dinov2",
    "efficientnet_input",
    "efficientnet_lite0",
    "inception",
    "keeping",
    "load",
    "lpips",
    "lpips_alex",
    "tf1_inception_input",
]
