"""Images with class labels, from a data set on disk to batches: sources, transforms, loader."""

from nvg_jax.data.loader import eval_batches, train_loader
from nvg_jax.data.sources import Source, open_source

__all__ = ["Source", "eval_batches", "open_source", "train_loader"]
