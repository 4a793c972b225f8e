"""From a set of images, a judge and a reference to numbers; all processes share the work.

The unit of work is a batch. A command stores the features of each batch in a folder, so that a run
that was killed resumes where it stopped; during training, nothing is stored.
"""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from nvg_jax import pretrained
from nvg_jax.evaluation.features import METRICS, FeatureSet, Moments, generation_metrics
from nvg_jax.evaluation.judges import Judge
from nvg_jax.evaluation.sets import Archive, ImageSet
from nvg_jax.pretrained import ImageFeatures
from nvg_jax.runtime.files import atomic_write, digest
from nvg_jax.runtime.parts import own_parts, read_arrays
from nvg_jax.runtime.processes import barrier, gather, gather_rows, is_main

logger = logging.getLogger("nvg_jax")
REFERENCE_IMAGES = 10_000  # images of a data set used for precision and recall


def measure(
    images: ImageSet,
    judge: Judge,
    reference: FeatureSet,
    folder: Path | None = None,
    names: Sequence[str] = METRICS,
) -> dict[str, float]:
    """The metrics `names` of a set of images.

    Args:
        reference: the same judge's features of the images to compare with.
        folder: stores the features of finished batches; see `features_of`.

    Returns:
        {name: value} on process 0, {} on the others.

    Raises:
        UserError: images that cannot be read, or too few of them.
        Preempted: SIGTERM arrived.
    """
    keep = None if set(names) - {"fid", "sfid"} else 0
    samples = features_of(images, judge, folder, keep)
    return generation_metrics(reference, samples, names) if is_main() else {}


def features_of(
    images: ImageSet, judge: Judge, folder: Path | None = None, keep: int | None = None
) -> FeatureSet:
    """The features of all images, on every process.

    Args:
        folder: stores the features of each batch; it is kept, so that repeating the call takes no
            time. None stores nothing.
        keep: the number of images, from the first on, whose features the result has besides the
            statistics of all; None is all.

    Raises:
        UserError: an image cannot be read, or `folder` holds features of other images.
        Preempted: SIGTERM arrived.
    """
    size, count = images.batch_size, len(images)
    pool_moments, spatial_moments, kept = Moments(), Moments(), []
    keep = count if keep is None else min(keep, count)
    keep_batches = -(-keep // size)
    compute = lambda numbers: map(judge.image_features, images.filled(numbers))
    description = folder and {
        "network": judge.fingerprint,
        "batch_size": size,
        **images.describe(),
    }
    for number, part in own_parts(
        compute, images.num_batches, min(size, count), "features", folder, description
    ):
        real = min(size, count - number * size)
        features = ImageFeatures(**part)
        pool_moments += Moments.of(features.pool[:real])
        spatial_moments += Moments.of(features.spatial[:real])
        if number < keep_batches:
            kept.append(np.concatenate([features.pool, features.logits], axis=1))
    statistics = [gather_moments(x).statistics for x in (pool_moments, spatial_moments)]
    if not keep:
        return FeatureSet(count, None, None, *statistics)
    kept, width = gather_rows(kept, keep_batches)[:keep], len(statistics[0][0])
    return FeatureSet(count, kept[:, :width], kept[:, width:], *statistics)


def gather_moments(own: Moments) -> Moments:
    """The moments of all processes' features."""
    if jax.process_count() == 1:
        return own
    width = gather(np.array([np.size(own.mean) if own.count else 0]), jax.process_count()).max()
    own_row = np.zeros((1, 1 + width + width * width))
    if own.count:
        own_row[0] = np.concatenate([[own.count], own.mean, own.scatter.ravel()])
    total = Moments()
    for row in gather(own_row, jax.process_count()):
        if row[0]:
            mean, scatter = row[1 : 1 + width], row[1 + width :].reshape(width, width)
            total += Moments(int(row[0]), mean, scatter)
    return total


def reference_features(images: ImageSet, judge: Judge) -> FeatureSet:
    """The features to compare with, cached for the next call with the same images.

    Statistics stored in a reference file take precedence over those of its images. For a data set,
    statistics are computed from all images, and precision and recall from 10,000.
    """
    description = {"network": judge.fingerprint, **images.describe()}
    folder = pretrained.cache_folder() / "references" / digest(description)[:16]
    keep = None if isinstance(images, Archive) else REFERENCE_IMAGES
    file = folder.with_suffix(".npz")
    stored = read_arrays(file) if file.exists() else None
    # Each machine may have its own cache, but all processes must take the same branch.
    if gather(np.array([stored is not None]), jax.process_count()).all():
        logger.info("features of the reference: %s", file)
        pairs = [
            (stored[f"{name}_mean"], stored[f"{name}_covariance"]) for name in ("pool", "spatial")
        ]
        features = FeatureSet(int(stored["count"]), stored["pool"], stored["logits"], *pairs)
    else:
        features = features_of(images, judge, folder, keep)
        if is_main():
            with atomic_write(file) as out:
                np.savez(
                    out, count=features.count, pool=features.pool, logits=features.logits,
                    pool_mean=features.pool_statistics[0],
                    pool_covariance=features.pool_statistics[1],
                    spatial_mean=features.spatial_statistics[0],
                    spatial_covariance=features.spatial_statistics[1],
                )  # fmt: skip
            shutil.rmtree(folder, ignore_errors=True)
    barrier("the features of the reference are there")
    if isinstance(images, Archive):
        features = features._replace(**images.statistics())
    return features
