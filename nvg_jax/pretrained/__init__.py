"""Frozen networks that the training losses look through: LPIPS, DINO ViT-S/16, DINOv2 ViT-B/14.

`load` gives the parameters, which `convert` has stored from published files. Each network is a
pure function of them and of images, and takes the type of its arithmetic:

    distance = lpips(load("lpips"), images_a, images_b, dtype=jnp.bfloat16)
"""

from nvg_jax.pretrained.networks import dino, dinov2, lpips
from nvg_jax.pretrained.weights import NAMES, abstract, convert, load

__all__ = ["NAMES", "abstract", "convert", "dino", "dinov2", "load", "lpips"]
