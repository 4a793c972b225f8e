"""The content generator: predicts the final canvas from the current one (paper, Section 3.2)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Int

from nvg_jax import layers
from nvg_jax.runtime.sharding import parameter


class ContentGenerator(nn.Module):
    """A transformer over [class token, L canvas tokens].

    num_classes: the number of classes, excluding the null class, whose id is `num_classes`.
    """

    grid: tuple[int, int]
    latent_dim: int
    codebook_size: int
    num_classes: int
    transformer: layers.TransformerConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        t, length = self.transformer, self.grid[0] * self.grid[1]
        self.num_stages = length.bit_length()
        shape = (1, length, self.latent_dim)
        self.start_canvas = parameter(
            self, "start_canvas", layers.EMBEDDING_INIT, shape, (None, None, None)
        )
        self.canvas_embed = layers.Dense(t.width, (None, "embed"), self.dtype)
        self.class_embed = layers.Embedding(self.num_classes + 1, t.width, self.dtype)
        self.stage_embed = layers.Embedding(self.num_stages, t.width, self.dtype)
        self.blocks = layers.Transformer(t, self.dtype)
        self.canvas_head = layers.Head(t.width, self.latent_dim, self.dtype)
        self.token_head = layers.Dense(
            self.codebook_size, (None, "vocab"), jnp.float32, precision=jax.lax.Precision.HIGHEST
        )

    def predict_canvas(
        self,
        canvas: Float[Array, "B L D"],
        embedding: Int[Array, "B L K"],
        stage: Int[Array, " B"],
        class_ids: Int[Array, " B"],
        canvas_scale: Float[Array, " K+2"],
        deterministic: bool = True,
        feature_block: int = 0,
    ) -> tuple[Float32[Array, "B L D"], Float[Array, "B L C"]]:
        """The predicted final canvas, and hidden states.

        Args:
            canvas: the canvas before the stage; stage 0 has none and takes a learned one.
            embedding: the structure embedding of the stage, values 0, 1, 2.
            stage: 0 .. K.
            class_ids: `num_classes` for the null class.
            canvas_scale: S + 1 factors. The values of the canvas grow with every stage; these
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
        cos, sin = layers.rotary_tables(embedding, (0,), self.grid, self.transformer.head_dim)
        vec = class_token + self.stage_embed(stage)
        x, features = self.blocks(x, vec, cos, sin, deterministic, feature_block)
        final = self.canvas_head(x[:, 1:], self.canvas_head.modulations(vec))
        return final / canvas_scale[-1], features[:, 1:]

    def token_logits(self, missing: Float[Array, "*batch D"]) -> Float32[Array, "*batch V"]:
        """Logits of tokens.

        Args:
            missing: the mean of (predicted final canvas - canvas before the stage) over the
                positions of a token's cluster.
        """
        return self.token_head(missing)

    def __call__(
        self,
        canvas: Float[Array, "B L D"],
        embedding: Int[Array, "B L K"],
        stage: Int[Array, " B"],
        class_ids: Int[Array, " B"],
        canvas_scale: Float[Array, " K+2"],
    ) -> Float32[Array, "B L V"]:
        """Logits at each position as if it were a cluster of its own; initializes all parameters.

        Takes the arguments of `predict_canvas`.
        """
        canvas_hat, _ = self.predict_canvas(canvas, embedding, stage, class_ids, canvas_scale)
        return self.token_logits(canvas_hat - canvas)


class RepaProjector(nn.Module):
    """Projects hidden states to DINOv2's features; in training only."""

    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "*batch C"]) -> Float[Array, "*batch width"]:
        for name in ("hidden1", "hidden2"):
            x = nn.silu(layers.Dense(2048, ("embed", "mlp"), self.dtype, name=name)(x))
        return layers.Dense(self.width, ("embed", "mlp"), self.dtype, name="out")(x)
