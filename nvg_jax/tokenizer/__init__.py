"""Images to visual granularity sequences and back."""

from nvg_jax.tokenizer.model import Tokenizer, TokenizerConfig
from nvg_jax.tokenizer.quantizer import Quantized, Quantizer, Sequence

__all__ = ["Quantized", "Quantizer", "Sequence", "Tokenizer", "TokenizerConfig"]
