"""The tokenizer: images to visual granularity sequences and back."""

from nvg_jax.tokenizer.model import Tokenizer, TokenizerConfig
from nvg_jax.tokenizer.quantizer import (
    GranularitySequence,
    Quantized,
    Quantizer,
    codebook_usage,
)

__all__ = [
    "GranularitySequence",
    "Quantized",
    "Quantizer",
    "Tokenizer",
    "TokenizerConfig",
    "codebook_usage",
]
