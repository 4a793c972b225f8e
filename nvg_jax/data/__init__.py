"""Labelled images, or their sequences, from a data set on disk to batches."""

from nvg_jax.data.loader import crop_batches, eval_batches, train_loader
from nvg_jax.data.sources import GranularitySource, Source, open_source

__all__ = [
    "GranularitySource",
    "Source",
    "crop_batches",
    "eval_batches",
    "open_source",
    "train_loader",
]
