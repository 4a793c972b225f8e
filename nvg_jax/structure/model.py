"""The structure generator: velocity of the flow that splits a structure map (Section 3.3)."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Int

from nvg_jax import layers

CANVAS_KIND = 2  # rotary kind of condition tokens; image and structure tokens have kind 0


class Condition(NamedTuple):
    """What all velocities of a split share.

    tokens: embedded class and canvas. cos, sin: from `layers.rotary_tables`.
    """

    tokens: Float[Array, "B 1+L C"]
    cos: Float32[Array, "B N pairs"]
    sin: Float32[Array, "B N pairs"]


class StructureGenerator(nn.Module):
    """A transformer over [class token, L canvas tokens, L noisy structure tokens].

    num_classes: the number of classes, excluding the null class, whose id is `num_classes`.
    """

    grid: tuple[int, int]
    latent_dim: int
    num_classes: int
    transformer: layers.TransformerConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        t = self.transformer
        self.num_bits = (self.grid[0] * self.grid[1]).bit_length() - 1
        self.structure_embed = layers.Dense(t.width, (None, "embed"), self.dtype)
        self.canvas_embed = layers.Dense(t.width, (None, "embed"), self.dtype)
        self.class_embed = layers.Embedding(self.num_classes + 1, t.width, self.dtype)
        self.stage_embed = layers.Embedding(self.num_bits - 1, t.width, self.dtype)
        self.time_in = layers.Dense(t.width, (None, "embed"), self.dtype)
        self.time_out = layers.Dense(t.width, ("embed", None), self.dtype)
        self.blocks = layers.Transformer(t, self.dtype)
        self.head = layers.Head(t.width, self.num_bits, self.dtype)

    def __call__(
        self,
        noisy: Float[Array, "B L K"],
        time: Float[Array, " B"],
        embedding: Int[Array, "B L K"],
        canvas: Float[Array, "B L D"],
        stage: Int[Array, " B"],
        class_ids: Int[Array, " B"],
        deterministic: bool = True,
    ) -> Float32[Array, "B L K"]:
        """The velocity noise - target.

        Args:
            noisy: the structure embedding minus 1, mixed with noise except in the known channels
                (those below `stage`, see `flow`).
            time: values in [0, 1]; 1 is pure noise.
            embedding: the structure embedding of the stage, values 0, 1, 2.
            canvas: the canvas after the stage.
            stage: 0 .. K-2, the stage whose clusters are split.
            class_ids: `num_classes` for the null class.
            deterministic: False turns on drop path (rng "drop_path").
        """
        condition = self.condition(embedding, canvas, class_ids)
        vec = self.vector(time, stage, class_ids)
        modulation = self.head.modulations(vec)
        return self._velocity(noisy, condition, vec, None, modulation, deterministic)

    # The sampler calls the network in three parts: what all times of a split share, what depends
    # only on the time, and the rest.

    def condition(
        self,
        embedding: Int[Array, "B L K"],
        canvas: Float[Array, "B L D"],
        class_ids: Int[Array, " B"],
    ) -> Condition:
        """What all velocities of a split share; see `__call__` for the arguments."""
        tokens = [self.class_embed(class_ids)[:, None], self.canvas_embed(canvas)]
        head_dim = self.transformer.head_dim
        tables = layers.rotary_tables(embedding, (CANVAS_KIND, 0), self.grid, head_dim)
        return Condition(jnp.concatenate(tokens, axis=1), *tables)

    def vector(
        self, time: Float[Array, "*T B"], stage: Int[Array, " B"], class_ids: Int[Array, " B"]
    ) -> Float[Array, "*T B C"]:
        """The conditioning vectors of one time or of several times for each image."""
        embedding = layers.timestep_embedding(time).astype(self.dtype)
        vec = self.class_embed(class_ids) + self.time_out(nn.silu(self.time_in(embedding)))
        return vec + self.stage_embed(stage)

    def modulations(
        self, times: Float[Array, " T"], stage: Int[Array, " B"], class_ids: Int[Array, " B"]
    ) -> tuple[Float[Array, "T depth B block_channels"], Float[Array, "T B head_channels"]]:
        """The modulations of all blocks and of the head at each time."""
        times = jnp.broadcast_to(times[:, None], (len(times), len(class_ids)))
        vec = self.vector(times, stage, class_ids)
        return self.blocks.modulations(vec).swapaxes(0, 1), self.head.modulations(vec)

    def velocity(
        self,
        noisy: Float[Array, "B L K"],
        condition: Condition,
        modulations: tuple[Float[Array, "depth B block_channels"], Float[Array, "B head_channels"]],
    ) -> Float32[Array, "B L K"]:
        """The velocity of `noisy` at one time.

        Args:
            modulations: what `modulations` returns, at this time.
        """
        return self._velocity(noisy, condition, None, *modulations, deterministic=True)

    def _velocity(
        self,
        noisy: Float[Array, "B L K"],
        condition: Condition,
        vec: Float[Array, "B C"] | None,
        of_blocks: Float[Array, "depth B block_channels"] | None,
        of_head: Float[Array, "B head_channels"],
        deterministic: bool,
    ) -> Float32[Array, "B L K"]:
        """Like `velocity`; the blocks take either vec or their modulations."""
        x = jnp.concatenate([condition.tokens, self.structure_embed(noisy)], axis=1)
        x, _ = self.blocks(
            x, vec, condition.cos, condition.sin, deterministic, modulations=of_blocks
        )
        return self.head(x[:, condition.tokens.shape[1] :], of_head)
