"""The structure generator: velocity of the flow that splits a structure map (Section 3.3)."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from nvg_jax import layers

CANVAS_KIND = 2  # rotary kind of condition tokens; image and structure tokens have kind 0


class StructureGenerator(nn.Module):
    """A transformer over [class token, L canvas tokens, L noisy structure tokens].

    num_classes: number of classes without the null class, whose id is `num_classes`.
    """

    grid: tuple[int, int]
    latent_dim: int
    num_classes: int
    transformer: layers.TransformerConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        t = self.transformer
        self.num_bits = (self.grid[0] * self.grid[1]).bit_length() - 1
        self.structure_embed = layers.Dense(t.width, (None, "embed"), self.dtype)
        self.canvas_embed = layers.Dense(t.width, (None, "embed"), self.dtype)
        self.class_embed = layers.Embedding(self.num_classes + 1, t.width, self.dtype)
        self.stage_embed = layers.Embedding(self.num_bits - 1, t.width, self.dtype)
        self.time_in = layers.Dense(t.width, (None, "embed"), self.dtype)
        self.time_out = layers.Dense(t.width, ("embed", "embed_out"), self.dtype)
        self.blocks = layers.Transformer(t, self.dtype)
        self.head = layers.Head(self.num_bits, self.dtype)

    def __call__(
        self,
        noisy: Array,
        time: Array,
        structure: Array,
        canvas: Array,
        stage: Array,
        class_ids: Array,
        deterministic: bool = True,
    ) -> Array:
        """The velocity noise - target, float32 (B, L, K).

        Args:
            noisy: float32 (B, L, K), the structure embedding minus 1, mixed with noise except in
                the known channels (those below `stage`, see `flow`).
            time: float32 (B,) in [0, 1]; 1 is pure noise.
            structure: int (B, L, K), the structure embedding of the stage, values 0, 1, 2.
            canvas: float32 (B, L, D), the canvas after the stage.
            stage: int32 (B,), 0 .. K-2, the stage whose clusters are split.
            class_ids: int32 (B,), `num_classes` for the null class.
            deterministic: False turns on drop path (rng "drop_path").
        """
        length = noisy.shape[1]
        class_token = self.class_embed(class_ids)
        time_embedding = layers.timestep_embedding(time).astype(self.dtype)
        vec = class_token + self.time_out(nn.silu(self.time_in(time_embedding)))
        vec = vec + self.stage_embed(stage)
        x = jnp.concatenate(
            [class_token[:, None], self.canvas_embed(canvas), self.structure_embed(noisy)], axis=1
        )
        positions = layers.rope_positions(structure, (CANVAS_KIND, 0), self.grid)
        x, _ = self.blocks(x, vec, positions, deterministic)
        return self.head(x[:, 1 + length :], vec)
