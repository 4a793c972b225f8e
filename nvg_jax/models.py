"""From the configuration dictionaries that checkpoints and configs hold to modules."""

from typing import Any

import jax.numpy as jnp

from nvg_jax.content.model import ContentGenerator
from nvg_jax.layers import TransformerConfig
from nvg_jax.steps.generators import Generator
from nvg_jax.structure.model import StructureGenerator
from nvg_jax.tokenizer import Tokenizer, TokenizerConfig

GENERATORS = ("content", "structure")


def make_tokenizer(config: TokenizerConfig, dtype: str = "float32") -> Tokenizer:
    return Tokenizer(config, jnp.dtype(dtype))


def make_generator(
    name: str,
    transformer: TransformerConfig | dict[str, Any],
    tokenizer: TokenizerConfig,
    num_classes: int,
    dtype: str = "float32",
) -> Generator:
    """The "content" or "structure" generator for a tokenizer's latents."""
    if not isinstance(transformer, TransformerConfig):
        transformer = TransformerConfig(**transformer)
    shared = dict(
        grid=tokenizer.latent_size,
        latent_dim=tokenizer.latent_dim,
        num_classes=num_classes,
        transformer=transformer,
        dtype=jnp.dtype(dtype),
    )
    if name == "content":
        return ContentGenerator(codebook_size=tokenizer.codebook_size, **shared)
    if tokenizer.num_stages < 3:
        raise ValueError(
            f"A latent of {tokenizer.num_positions} positions leaves the structure generator "
            "nothing to learn; use a latent of at least 4 positions."
        )
    return StructureGenerator(**shared)
