"""The tokenizer: images <-> latents <-> visual granularity sequences."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Int, Int32

from nvg_jax import clustering, granularity
from nvg_jax.errors import UserError
from nvg_jax.tokenizer.autoencoder import Decoder, Encoder, group_count
from nvg_jax.tokenizer.quantizer import GranularitySequence, Quantized, Quantizer


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """All sizes of a tokenizer.

    Raises:
        UserError: invalid sizes; the message names valid ones.
    """

    image_size: tuple[int, int]  # H, W
    latent_size: tuple[int, int]  # h, w; h * w is a power of two
    latent_dim: int
    codebook_size: int
    base_channels: int
    channel_multipliers: tuple[int, ...]
    blocks_per_level: int
    structure: str = "latent"  # clusters the latent of an image; "grid": halves the grid, for all

    def __post_init__(self):
        for field in ("image_size", "latent_size", "channel_multipliers"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        for field in ("image_size", "latent_size"):
            if len(getattr(self, field)) != 2:
                raise UserError(
                    f"{field} is a height and a width, such as 64,64; got {getattr(self, field)}."
                )
        granularity.num_stages(self.num_positions)
        ratios = {size / latent for size, latent in zip(self.image_size, self.latent_size)}
        ratio = ratios.pop()
        if ratios or ratio < 1 or not math.log2(ratio).is_integer():
            raise UserError(
                f"image_size {self.image_size} must be latent_size {self.latent_size} times one "
                "power of two (1, 2, 4, 8, ...), the same in both directions; for example "
                f"{tuple(16 * n for n in self.latent_size)}."
            )
        if self.num_downsamples >= len(self.channel_multipliers):
            raise UserError(
                f"Going from image_size {self.image_size} to latent_size {self.latent_size} takes "
                f"{self.num_downsamples} downsamplings and at least {self.num_downsamples + 1} "
                f"channel_multipliers; got {self.channel_multipliers}."
            )
        for width in (self.base_channels, *self.widths):
            group_count(width)
        if self.structure not in ("latent", "grid"):
            raise UserError(f"tokenizer.structure must be latent or grid, got {self.structure!r}.")

    @property
    def num_positions(self) -> int:
        return self.latent_size[0] * self.latent_size[1]

    @property
    def num_stages(self) -> int:
        return granularity.num_stages(self.num_positions)

    @property
    def fixed_structure(self) -> Int32[np.ndarray, "S L"] | None:
        """The maps of all images, None if they depend on the image."""
        return granularity.grid_structure(self.latent_size) if self.structure == "grid" else None

    @property
    def num_downsamples(self) -> int:
        return int(math.log2(self.image_size[0] // self.latent_size[0]))

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.base_channels * m for m in self.channel_multipliers)


class Tokenizer(nn.Module):
    """Encoder, decoder and quantizer. Latents and canvases are (B, L, D), L row-major."""

    config: TokenizerConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        c = self.config
        shared: dict[str, Any] = dict(
            widths=c.widths,
            num_downsamples=c.num_downsamples,
            blocks_per_level=c.blocks_per_level,
            dtype=self.dtype,
        )
        self.encoder = Encoder(base_width=c.base_channels, latent_dim=c.latent_dim, **shared)
        self.decoder = Decoder(**shared)
        self.quantizer = Quantizer(c.latent_size, c.codebook_size, c.latent_dim)

    def latents(self, images: Float[Array, "B H W 3"]) -> Float32[Array, "B L D"]:
        """The latents of images in [-1, 1]."""
        z = self.encoder(images)
        return z.reshape(z.shape[0], self.config.num_positions, self.config.latent_dim)

    def decode_unclamped(self, canvas: Float[Array, "B L D"]) -> Float32[Array, "B H W 3"]:
        """The images of final canvases, not clamped."""
        grid = canvas.reshape(-1, *self.config.latent_size, self.config.latent_dim)
        return self.decoder(grid)

    def quantize(self, latents: Float[Array, "B L D"], index_backprop: bool = False) -> Quantized:
        """Quantizes latents along their structure maps: of clusters, unless these are fixed."""
        structure = self.config.fixed_structure
        if structure is None:
            structure = clustering.greedy_hierarchy(latents)
        else:
            structure = jnp.broadcast_to(structure, (len(latents), *structure.shape))
        return self.quantizer(latents, structure, index_backprop)

    def encode(self, images: Float[Array, "B H W 3"]) -> Quantized:
        """The sequences and canvases of images in [-1, 1]."""
        return self.quantize(self.latents(images))

    def canvases(self, sequence: GranularitySequence) -> Float32[Array, "B S L D"]:
        """The canvas after each stage of a sequence."""
        return self.quantizer.canvases(sequence)

    def add_stage(
        self, canvas: Float[Array, "B L D"], tokens: Int[Array, "B L"], stage: int | Int[Array, ""]
    ) -> Float[Array, "B L D"]:
        """The canvas after adding a stage's tokens, one per position."""
        return self.quantizer.add_stage(canvas, tokens, stage)

    def decode(self, canvas: Float[Array, "B L D"]) -> Float32[Array, "B H W 3"]:
        """The images of final canvases, clamped to [-1, 1]."""
        return jnp.clip(self.decode_unclamped(canvas), -1, 1)

    def __call__(
        self, images: Float[Array, "B H W 3"], index_backprop: bool = False
    ) -> tuple[Float32[Array, "B H W 3"], Quantized]:
        """The training pass.

        Args:
            images: values in [-1, 1].
            index_backprop: see `Quantizer`.

        Returns:
            The reconstruction, clamped to [-1, 1], with straight-through gradients to the latents
            but none through clamped values; and the quantized latents.
        """
        latents = self.latents(images)
        quantized = self.quantize(latents, index_backprop)
        final = latents + jax.lax.stop_gradient(quantized.canvases[:, -1] - latents)
        return self.decode(final), quantized
