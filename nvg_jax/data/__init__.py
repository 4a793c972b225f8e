"""Labeled images, or their sequences, from a data set on disk to batches."""

from nvg_jax.data.loader import crop_batches, eval_batches, train_batches
from nvg_jax.data.sources import SequenceSource, Source, open_source

__all__ = [
    "SequenceSource",
    "Source",
    "crop_batches",
    "eval_batches",
    "open_source",
    "train_batches",
]
