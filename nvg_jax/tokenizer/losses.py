"""Pixel losses of the tokenizer. The quantizer's own loss is in quantizer.py."""

import jax.numpy as jnp

RECONSTRUCTION_LOSSES = {
    "l1": lambda restored, images: jnp.abs(restored - images).mean(),
    "l2": lambda restored, images: jnp.square(restored - images).mean(),
}
