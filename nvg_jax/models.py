"""Modules from their sizes, and the shapes and initial values of their parameters."""

import functools

import jax
import jax.numpy as jnp

from nvg_jax import granularity
from nvg_jax.content.model import ContentGenerator
from nvg_jax.errors import UserError
from nvg_jax.layers import TransformerConfig
from nvg_jax.runtime.sharding import unbox
from nvg_jax.structure.model import StructureGenerator
from nvg_jax.tokenizer import Tokenizer, TokenizerConfig

GENERATORS = ("content", "structure")
Generator = ContentGenerator | StructureGenerator


def make_tokenizer(config: TokenizerConfig, dtype: str = "float32") -> Tokenizer:
    return Tokenizer(config, jnp.dtype(dtype))


def make_generator(
    name: str,
    transformer: TransformerConfig,
    tokenizer: TokenizerConfig,
    num_classes: int,
    dtype: str = "float32",
) -> Generator:
    """The "content" or "structure" generator for a tokenizer's latents.

    Raises:
        UserError: the latent is too small for a structure generator.
    """
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
        raise UserError(
            f"A latent of {tokenizer.num_positions} positions leaves the structure generator "
            "nothing to learn; use a latent of at least 4 positions."
        )
    return StructureGenerator(**shared)


def init_tokenizer(model: Tokenizer, key):
    """Initial parameters, boxed with their logical axes."""
    images = jnp.zeros((1, *model.config.image_size, 3))
    return model.init(key, images)["params"]


def init_generator(model: Generator, key, codebook=None):
    """Initial parameters, boxed with their logical axes.

    Given a codebook (V, D), the content generator's token head starts as the nearest-code rule:
    for missing content m, the logit of code e is (m.e - |e|^2 / 2) divided by twice the codebook's
    variance. A small random head would take hundreds of steps to grow to that scale.
    """
    length = model.grid[0] * model.grid[1]
    num_bits = granularity.num_stages(length) - 1
    canvas = jnp.zeros((1, length, model.latent_dim))
    structure = jnp.ones((1, length, num_bits), jnp.int32)
    stage = class_ids = jnp.zeros((1,), jnp.int32)
    if isinstance(model, ContentGenerator):
        args = canvas, structure, stage, class_ids, jnp.ones(num_bits + 2)
    else:
        noisy = jnp.zeros(structure.shape)
        args = noisy, jnp.zeros((1,)), structure, canvas, stage, class_ids
    params = model.init(key, *args)["params"]
    if codebook is not None and isinstance(model, ContentGenerator):
        scale = 2 * jnp.square(codebook).mean()
        head = {"kernel": codebook.T / scale, "bias": -jnp.square(codebook).sum(1) / (2 * scale)}
        boxes = params["token_head"]
        params = params | {"token_head": {k: boxes[k].replace_boxed(v) for k, v in head.items()}}
    return params


@functools.cache
def abstract_params(
    name: str,
    tokenizer: TokenizerConfig,
    transformer: TransformerConfig | None = None,
    num_classes: int = 0,
):
    """Shapes and dtypes of the "tokenizer", "content" or "structure" parameters.

    The last two arguments are for generators.
    """
    if name == "tokenizer":
        init = functools.partial(init_tokenizer, make_tokenizer(tokenizer))
    else:
        model = make_generator(name, transformer, tokenizer, num_classes)
        init = functools.partial(init_generator, model)
    # The key is abstract too: nothing can run in the mesh of a topology that is only compiled for.
    return unbox(jax.eval_shape(init, jax.eval_shape(jax.random.key, 0)))
