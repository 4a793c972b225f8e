"""Residual quantization of a latent along its hierarchy of structure maps (paper, Section 3.1)."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float32, Int, Int32, Real, Shaped

from nvg_jax import granularity
from nvg_jax.runtime.sharding import parameter

SMOOTHING_RATIO = 0.5
COMMITMENT_WEIGHT = 0.25
FLOAT32_MATMUL = jax.lax.Precision.HIGHEST


class GranularitySequence(NamedTuple):
    """A visual granularity sequence: the structure map and the tokens of every stage.

    structure: the cluster of each position, 0 .. 2**i - 1 in stage i.
    tokens: the token id at each position, equal within a cluster.

    Arrays of JAX in the networks, of NumPy from a `Pipeline`.
    """

    structure: Int32[Any, "B S L"]
    tokens: Int32[Any, "B S L"]


class Quantized(NamedTuple):
    """The result of quantizing latents.

    sequence: the visual granularity sequence.
    canvases: the canvas after each stage.
    stage_tokens: the id of each unique token, an array for each stage.
    losses: the training loss of the quantizer in each stage; None if the latent is not known.
    """

    sequence: GranularitySequence
    canvases: Float32[Array, "B S L D"]
    stage_tokens: tuple[Int32[Array, "B N_i"], ...]
    losses: Float32[Array, " S"] | None


def at_positions(
    cluster_values: Shaped[Array, "B N *value"], maps: Int[Array, "B L"]
) -> Shaped[Array, "B L *value"]:
    """Gathers the values of clusters to the positions of their maps."""
    index = maps.reshape(*maps.shape, *(1,) * (cluster_values.ndim - 2))
    return jnp.take_along_axis(cluster_values, index, axis=1)


class Quantizer(nn.Module):
    """One codebook (V, D) shared by all stages, and one 3x3 smoothing convolution per stage."""

    grid: tuple[int, int]
    codebook_size: int
    latent_dim: int

    def setup(self):
        stages = granularity.num_stages(self.grid[0] * self.grid[1])
        bound = 1.0 / self.codebook_size
        uniform = lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        shape = (self.codebook_size, self.latent_dim)
        self.codebook = parameter(self, "codebook", uniform, shape, ("vocab", None))
        kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=0)
        shape = (stages, 3, 3, self.latent_dim, self.latent_dim)
        self.smooth_kernel = parameter(self, "smooth_kernel", kernel_init, shape, (None,) * 5)
        shape = (stages, self.latent_dim)
        zeros = nn.initializers.zeros
        self.smooth_bias = parameter(self, "smooth_bias", zeros, shape, (None, None))

    def smooth(
        self, vectors: Float[Array, "B L D"], stage: int | Int[Array, ""]
    ) -> Float[Array, "B L D"]:
        """The contribution of stage i to the canvas: H + 0.5 * conv3x3_i(H).

        Args:
            vectors: H, the codebook vector of the token at each position.
            stage: i.
        """
        grid = vectors.reshape(-1, *self.grid, self.latent_dim)
        mixed = jax.lax.conv_general_dilated(
            grid,
            self.smooth_kernel[stage],
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=FLOAT32_MATMUL,
        )
        mixed = (mixed + self.smooth_bias[stage]).reshape(vectors.shape)
        return vectors + SMOOTHING_RATIO * mixed

    def add_stage(
        self, canvas: Float[Array, "B L D"], tokens: Int[Array, "B L"], stage: int | Int[Array, ""]
    ) -> Float[Array, "B L D"]:
        """The canvas after adding a stage's tokens, one per position."""
        return canvas + self.smooth(self.codebook[tokens], stage)

    def canvases(self, sequence: GranularitySequence) -> Float32[Array, "B S L D"]:
        """The canvas after each stage of a sequence."""
        batch, stages, length = sequence.tokens.shape
        canvas = jnp.zeros((batch, length, self.latent_dim), jnp.float32)
        after = []
        for stage in range(stages):
            canvas = self.add_stage(canvas, sequence.tokens[:, stage], stage)
            after.append(canvas)
        return jnp.stack(after, axis=1)

    def squared_distances(self, vectors: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Squared Euclidean distances of vectors to all codes."""
        dot = jnp.einsum("...d,vd->...v", vectors, self.codebook, precision=FLOAT32_MATMUL)
        norms = jnp.square(vectors).sum(-1, keepdims=True) + jnp.square(self.codebook).sum(-1)
        return norms - 2 * dot

    def __call__(
        self,
        latents: Float[Array, "B L D"],
        structure: Int[Array, "B S L"],
        index_backprop: bool = False,
    ) -> Quantized:
        """Quantizes latents along structure maps.

        `index_backprop` (of IBQ) backpropagates through the choice of the token, one-hot +
        soft - stop_gradient(soft) with soft = softmax(-squared distances), and through the residual
        that earlier stages leave. The values are the same either way.
        """
        residual = jax.lax.stop_gradient(latents)
        canvas = jnp.zeros_like(latents)
        tokens, stage_tokens, canvases, losses = [], [], [], []
        for stage in range(structure.shape[1]):
            maps = structure[:, stage]
            means = granularity.cluster_means(residual, maps, 2**stage)
            distances = self.squared_distances(means)
            ids = distances.argmin(-1).astype(jnp.int32)
            if index_backprop:
                soft = nn.softmax(-distances)
                choice = jax.nn.one_hot(ids, self.codebook_size) + soft
                choice = choice - jax.lax.stop_gradient(soft)
                vectors = at_positions(
                    jnp.einsum("bnv,vd->bnd", choice, self.codebook, precision=FLOAT32_MATMUL),
                    maps,
                )
            else:
                vectors = self.codebook[at_positions(ids, maps)]
            content = self.smooth(vectors, stage)
            canvas = canvas + content
            residual = residual - (content if index_backprop else jax.lax.stop_gradient(content))
            tokens.append(at_positions(ids, maps))
            stage_tokens.append(ids)
            canvases.append(canvas)
            losses.append(
                COMMITMENT_WEIGHT * jnp.square(jax.lax.stop_gradient(canvas) - latents).mean()
                + jnp.square(canvas - jax.lax.stop_gradient(latents)).mean()
            )
        return Quantized(
            GranularitySequence(structure, jnp.stack(tokens, axis=1)),
            jnp.stack(canvases, axis=1),
            tuple(stage_tokens),
            jnp.stack(losses),
        )


def codebook_usage(counts: Real[np.ndarray, "S V"]) -> dict[str, np.ndarray]:
    """The share of the codebook in use, per stage and over all stages."""
    used = counts > 0
    return {"codebook_usage_stage": used.mean(1), "codebook_usage": used.any(0).mean()}
