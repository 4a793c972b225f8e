"""From class ids to images."""

from nvg_jax.sampling.generate import Settings

__all__ = ["Settings"]
