"""Labeled images, or their granularity sequences, from a data set on disk to batches."""

from nvg_jax.data.loader import (
    LoaderOptions,
    check_batch_size,
    crop_batches,
    eval_batches,
    train_batches,
)
from nvg_jax.data.sources import SequenceSource, Source, open_source
from nvg_jax.data.transforms import Transform

__all__ = [
    "LoaderOptions",
    "SequenceSource",
    "Source",
    "Transform",
    "check_batch_size",
    "crop_batches",
    "eval_batches",
    "open_source",
    "train_batches",
]
