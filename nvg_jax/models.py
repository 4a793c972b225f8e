"""The sizes of a model, its modules, and the shapes and initial values of its parameters."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from nvg_jax import granularity
from nvg_jax.content.model import ContentGenerator
from nvg_jax.errors import UserError
from nvg_jax.layers import TransformerConfig
from nvg_jax.parts import GENERATORS
from nvg_jax.runtime.sharding import unbox
from nvg_jax.structure.model import StructureGenerator
from nvg_jax.tokenizer import Tokenizer, TokenizerConfig

if TYPE_CHECKING:  # sampling does not import it
    import ml_collections

Generator = ContentGenerator | StructureGenerator


def check_networks(model: str, params: dict[str, Any], needed: Iterable[str], remedy: str):
    """Raises UserError if {network: tree} of a model lacks a needed one.

    Args:
        model: what the message calls the model. remedy: a sentence that ends the message.
    """
    missing = [name for name in needed if name not in params]
    if missing:
        raise UserError(
            f"{model} has no {' and no '.join(missing)}"
            f"{' generator' if missing[-1] in GENERATORS else ''}; it has "
            f"{', '.join(sorted(params))}. {remedy}"
        )


def parameter_counts(params: Mapping[str, Any]) -> dict[str, int]:
    """{network: how many parameters it has}; the parameters may be abstract."""
    return {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in params.items()}


def generators_for(tokenizer: TokenizerConfig) -> tuple[str, ...]:
    """The generators that sampling needs: without "structure" if the maps are fixed."""
    return GENERATORS if tokenizer.fixed_structure is None else ("content",)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The sizes of a model.

    Attributes:
        content, structure: None for a generator that the model does not have.
        dtype: of the computation; parameters are float32.
    """

    tokenizer: TokenizerConfig
    num_classes: int = 0
    content: TransformerConfig | None = None
    structure: TransformerConfig | None = None
    dtype: str = "float32"

    @classmethod
    def from_sizes(
        cls,
        sizes: "Mapping[str, Any] | ml_collections.ConfigDict",
        num_classes: int = 0,
        dtype: str = "float32",
    ) -> "ModelConfig":
        """The model with these sizes.

        Args:
            sizes: {network: its sizes}, such as a training config or metadata; a generator that is
                None or missing is one that the model does not have.

        Raises:
            UserError: invalid sizes.
        """
        tokenizer = TokenizerConfig(**sizes["tokenizer"])
        generators = {
            name: TransformerConfig(**sizes[name])
            for name in generators_for(tokenizer)
            if sizes.get(name)
        }
        return cls(tokenizer, num_classes, dtype=dtype, **generators)

    @classmethod
    def from_config(cls, config: "ml_collections.ConfigDict", num_classes: int) -> "ModelConfig":
        """The model of a training config; raises like `from_sizes`."""
        return cls.from_sizes(config, num_classes, config.dtype)

    @property
    def generators(self) -> dict[str, TransformerConfig]:
        """{name: sizes} of the generators that the model has."""
        sizes = {name: getattr(self, name) for name in GENERATORS}
        return {name: size for name, size in sizes.items() if size is not None}

    @property
    def networks(self) -> tuple[str, ...]:
        """The names of its networks."""
        return ("tokenizer", *self.generators)

    def only(self, *generators: str) -> "ModelConfig":
        """The model without its other generators."""
        return dataclasses.replace(
            self, **{name: None for name in GENERATORS if name not in generators}
        )

    def make_tokenizer(self) -> Tokenizer:
        return Tokenizer(self.tokenizer, jnp.dtype(self.dtype))

    @overload
    def make_generator(self, name: Literal["content"]) -> ContentGenerator: ...
    @overload
    def make_generator(self, name: Literal["structure"]) -> StructureGenerator: ...
    @overload
    def make_generator(self, name: str) -> Generator: ...
    def make_generator(self, name: str) -> Generator:
        """The "content" or "structure" generator.

        Raises:
            UserError: the latent is too small for a structure generator.
        """
        shared: dict[str, Any] = dict(
            grid=self.tokenizer.latent_size,
            latent_dim=self.tokenizer.latent_dim,
            num_classes=self.num_classes,
            transformer=getattr(self, name),
            dtype=jnp.dtype(self.dtype),
        )
        if name == "content":
            return ContentGenerator(codebook_size=self.tokenizer.codebook_size, **shared)
        assert name == "structure", name
        if self.tokenizer.num_stages < 3:
            raise UserError(
                f"A latent of {self.tokenizer.num_positions} positions leaves the structure "
                "generator nothing to learn; use a latent of at least 4 positions."
            )
        return StructureGenerator(**shared)

    def abstract_params(self, name: str) -> dict[str, Any]:
        """Shapes and dtypes of the "tokenizer", "content" or "structure" parameters."""
        return unbox(self.boxed_params(name))

    @functools.cache  # noqa: B019 (few models are made, and these trees are small)
    def boxed_params(self, name: str) -> dict[str, Any]:
        """`abstract_params`, boxed with their logical axes."""
        if name == "tokenizer":
            init = functools.partial(init_tokenizer, self.make_tokenizer())
        else:
            init = functools.partial(init_generator, self.make_generator(name))
        # The key is abstract too: nothing can run in the mesh of a topology that is only compiled
        # for.
        return jax.eval_shape(init, jax.eval_shape(jax.random.key, 0))


def init_tokenizer(model: Tokenizer, key: PRNGKeyArray) -> dict[str, Any]:
    """Initial parameters, boxed with their logical axes."""
    images = jnp.zeros((1, *model.config.image_size, 3))
    return cast(dict[str, Any], model.init(key, images)["params"])


def init_generator(
    model: Generator, key: PRNGKeyArray, codebook: Float[Array, "V D"] | None = None
) -> dict[str, Any]:
    """Initial parameters, boxed with their logical axes.

    Given a codebook, the content generator's token head starts as the nearest-code rule:
    for missing content m, the logit of code e is (m.e - |e|^2 / 2) divided by twice the codebook's
    variance. A small random head would take hundreds of steps to grow to that scale.
    """
    length = model.grid[0] * model.grid[1]
    num_bits = granularity.num_stages(length) - 1
    canvas = jnp.zeros((1, length, model.latent_dim))
    embedding = jnp.ones((1, length, num_bits), jnp.int32)
    stage = class_ids = jnp.zeros((1,), jnp.int32)
    if isinstance(model, ContentGenerator):
        args = canvas, embedding, stage, class_ids, jnp.ones(num_bits + 2)
    else:
        assert isinstance(model, StructureGenerator)
        noisy = jnp.zeros(embedding.shape)
        args = noisy, jnp.zeros((1,)), embedding, canvas, stage, class_ids
    params = cast(dict[str, Any], model.init(key, *args)["params"])
    if codebook is not None and isinstance(model, ContentGenerator):
        scale = 2 * jnp.square(codebook).mean()
        head = {"kernel": codebook.T / scale, "bias": -jnp.square(codebook).sum(1) / (2 * scale)}
        boxes = params["token_head"]
        params = params | {"token_head": {k: boxes[k].replace_boxed(v) for k, v in head.items()}}
    return params
