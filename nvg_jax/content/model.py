"""The content generator: predicts the final canvas from the canvas so far (paper, Section 3.2)."""

import flax.linen as nn
import jax.numpy as jnp

from nvg_jax import layers


class ContentGenerator(nn.Module):
    """A transformer over [class token, L canvas tokens].

    num_classes: classes without the null class, whose id is `num_classes`.
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
        self.canvas_head = layers.Head(self.latent_dim, self.dtype)
        self.token_head = layers.Dense(self.codebook_size, (None, "vocab"), jnp.float32)

    def predict_canvas(
        self,
        canvas,
        structure,
        stage,
        class_ids,
        canvas_scale,
        deterministic: bool = True,
        feature_block: int = 0,
    ):
        """The predicted final canvas, float32 (B, L, D), and features (B, L, C) on the way to it.

        Args:
            canvas: float32 (B, L, D) before the stage.
            structure: structure embedding of the stage, int (B, L, K), values 0, 1, 2.
            stage: int32 (B,).
            class_ids: int32 (B,), `num_classes` for the null class.
            canvas_scale: float32 (S + 1,), 1 / std of the inputs of all stages and of the final
                canvas; the network sees and predicts canvases of unit variance.
            deterministic: False turns drop path on (rng "drop_path").
            feature_block: number of blocks after which the features are taken; 0 is the input.
        """
        scaled = canvas * canvas_scale[stage][:, None, None]
        scaled = jnp.where((stage == 0)[:, None, None], self.start_canvas, scaled)
        class_token = self.class_embed(class_ids)
        x = jnp.concatenate([class_token[:, None], self.canvas_embed(scaled)], axis=1)
        positions = layers.rope_positions(structure, (0,), self.grid)
        vec = class_token + self.stage_embed(stage)
        x, tapped = self.blocks(x, vec, positions, deterministic, feature_block)
        return self.canvas_head(x[:, 1:], vec) / canvas_scale[-1], tapped[:, 1:]

    def token_logits(self, missing):
        """float32 (..., V), logits of the token that brings what is missing.

        Args:
            missing: float32 (..., D), mean over the token's cluster of (predicted final canvas -
                canvas before the stage).
        """
        return self.token_head(missing)

    def __call__(self, canvas, structure, stage, class_ids, canvas_scale):
        canvas_hat, _ = self.predict_canvas(canvas, structure, stage, class_ids, canvas_scale)
        return self.token_logits(canvas_hat - canvas)


class RepaProjector(nn.Module):
    """From the content generator's features (..., C) to DINOv2's (..., 768), for training alone."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        for name in ("hidden1", "hidden2"):
            x = nn.silu(layers.Dense(2048, ("embed", "mlp"), self.dtype, name=name)(x))
        return layers.Dense(768, ("embed", "mlp"), self.dtype, name="out")(x)
