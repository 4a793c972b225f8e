"""The content generator: predicts the final canvas from the current one (paper, Section 3.2)."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from nvg_jax import layers


class ContentGenerator(nn.Module):
    """A transformer over [class token, L canvas tokens].

    num_classes: the number of classes, excluding the null class, whose id is `num_classes`.
    """

    grid: tuple[int, int]
    latent_dim: int
    codebook_size: int
    num_classes: int
    transformer: layers.TransformerConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        t, length = self.transformer, self.grid[0] * self.grid[1]
        self.num_stages = length.bit_length()
        self.start_canvas = self.param(
            "start_canvas",
            nn.with_logical_partitioning(layers.EMBEDDING_INIT, (None, None, None)),
            (1, length, self.latent_dim),
        )
        self.canvas_embed = layers.Dense(t.width, (None, "embed"), self.dtype)
        self.class_embed = layers.Embedding(self.num_classes + 1, t.width, self.dtype)
        self.stage_embed = layers.Embedding(self.num_stages, t.width, self.dtype)
        self.blocks = layers.Transformer(t, self.dtype)
        self.canvas_head = layers.Head(t.width, self.latent_dim, self.dtype)
        self.token_head = layers.Dense(self.codebook_size, (None, "vocab"), jnp.float32)

    def predict_canvas(
        self,
        canvas: Array,
        structure: Array,
        stage: Array,
        class_ids: Array,
        canvas_scale: Array,
        deterministic: bool = True,
        feature_block: int = 0,
    ) -> tuple[Array, Array]:
        """The predicted final canvas, float32 (B, L, D), and hidden states (B, L, C).

        Args:
            canvas: float32 (B, L, D), the canvas before the stage; stage 0 has none and takes a
                learned one.
            structure: int (B, L, K), the structure embedding of the stage, values 0, 1, 2.
            stage: int32 (B,), 0 .. K.
            class_ids: int32 (B,), `num_classes` for the null class.
            canvas_scale: float32 (S + 1,). The values of the canvas grow with every stage; these
                factors, 1 / std over training images, bring them to unit variance. Entry i < S
                scales the input of stage i (1 for stage 0, whose input is learned); entry S is for
                the final canvas, which the network predicts at unit variance.
            deterministic: False turns on drop path (rng "drop_path").
            feature_block: the number of blocks, 0 .. depth, after which the hidden states are
                taken; 0 is the embedded input. REPA aligns them with DINOv2's features.
        """
        scaled = canvas * canvas_scale[stage][:, None, None]
        scaled = jnp.where((stage == 0)[:, None, None], self.start_canvas, scaled)
        class_token = self.class_embed(class_ids)
        x = jnp.concatenate([class_token[:, None], self.canvas_embed(scaled)], axis=1)
        cos, sin = layers.rotary_tables(structure, (0,), self.grid, self.transformer.head_dim)
        vec = class_token + self.stage_embed(stage)
        x, features = self.blocks(x, vec, cos, sin, deterministic, feature_block)
        final = self.canvas_head(x[:, 1:], self.canvas_head.modulations(vec))
        return final / canvas_scale[-1], features[:, 1:]

    def token_logits(self, missing: Array) -> Array:
        """Logits of a token, float32 (..., V).

        Args:
            missing: float32 (..., D), the mean of (predicted final canvas - canvas before the
                stage) over the positions of the token's cluster.
        """
        return self.token_head(missing)

    def __call__(
        self, canvas: Array, structure: Array, stage: Array, class_ids: Array, canvas_scale: Array
    ) -> Array:
        """Logits at each position as if it were a cluster of its own; initializes all parameters.

        Takes the arguments of `predict_canvas`, returns float32 (B, L, V).
        """
        canvas_hat, _ = self.predict_canvas(canvas, structure, stage, class_ids, canvas_scale)
        return self.token_logits(canvas_hat - canvas)


class RepaProjector(nn.Module):
    """Projects hidden states (..., C) to DINOv2's features (..., width); in training only."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for name in ("hidden1", "hidden2"):
            x = nn.silu(layers.Dense(2048, ("embed", "mlp"), self.dtype, name=name)(x))
        return layers.Dense(self.width, ("embed", "mlp"), self.dtype, name="out")(x)
