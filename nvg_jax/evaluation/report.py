"""From a judge, a set of images and a reference to numbers, and to JSON files and tables.

All processes share the work; its unit is a batch. A command stores the features of each batch in a
folder, so that a run that was killed resumes where it stopped; during training, nothing is stored.
"""

import contextlib
import json
import logging
import math
import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from nvg_jax import pretrained
from nvg_jax.errors import reported
from nvg_jax.evaluation.features import METRICS, FeatureSet, Moments, generation_metrics
from nvg_jax.evaluation.judges import Judge
from nvg_jax.evaluation.sets import Archive, ImageSet
from nvg_jax.pretrained import ImageFeatures
from nvg_jax.runtime.processes import (
    barrier,
    everywhere,
    from_all,
    from_main,
    gather_rows,
    is_main,
)
from nvg_jax.runtime.resumable import own_parts, read_kept, write_arrays
from nvg_jax.runtime.storage import digest, locked, make_folder, write_file
from nvg_jax.sampling.settings import text_of

logger = logging.getLogger("nvg_jax")
HEADS = ("FID", "sFID", "IS", "precision", "recall")  # what tables call METRICS
REFERENCE_IMAGES = 10_000  # images of a data set used for precision and recall


def measure(
    images: ImageSet,
    judge: Judge,
    reference: FeatureSet,
    folder: Path | epath.Path | None = None,
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


def fid(images: ImageSet, judge: Judge, reference: FeatureSet) -> float:
    """FID of a set of images, the same on every process, so that all decide alike."""
    results = measure(images, judge, reference, names=("fid",))
    return float(from_main(results.get("fid", np.nan)))


def features_of(
    images: ImageSet,
    judge: Judge,
    folder: Path | epath.Path | None = None,
    keep: int | None = None,
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
    pool_statistics = gather_moments(pool_moments).statistics
    statistics = *pool_statistics, *gather_moments(spatial_moments).statistics
    if not keep:
        return FeatureSet(count, None, None, *statistics)
    kept, width = gather_rows(kept, keep_batches)[:keep], len(pool_statistics[0])
    return FeatureSet(count, kept[:, :width], kept[:, width:], *statistics)


def gather_moments(own: Moments) -> Moments:
    """The moments of all processes' features."""
    if jax.process_count() == 1:
        return own
    width = from_all(np.size(own.mean) if own.count else 0).max()
    own_row = np.zeros(1 + width + width * width)
    if own.count:
        own_row[:] = np.concatenate([[own.count], own.mean, np.ravel(own.scatter)])
    total = Moments()
    for row in from_all(own_row):
        if row[0]:
            mean, scatter = row[1 : 1 + width], row[1 + width :].reshape(width, width)
            total += Moments(int(row[0]), mean, scatter)
    return total


def reference_features(images: ImageSet, judge: Judge) -> FeatureSet:
    """The features to compare with, cached for the next call with the same images if it can be.

    Statistics stored in a reference file, Inception's, take precedence over those of its images.
    For a data set, statistics are of all images, and precision and recall of 10,000.
    """
    description = {"network": judge.fingerprint, **images.describe()}
    folder = pretrained.cache_folder() / "references" / digest(description)[:16]
    keep = None if isinstance(images, Archive) else REFERENCE_IMAGES
    file = folder.with_suffix(".npz")
    stored = read_kept(file)
    # Each machine may have its own cache, but all processes must take the same branch.
    if everywhere(stored is not None):
        assert stored is not None
        logger.info("features of the reference: %s", file)
        count = int(stored.pop("count"))
        features = FeatureSet(count=count, **stored)
    else:
        if is_main():
            with pretrained.keeping("these features are"):
                make_folder(folder)
        kept = bool(from_main(os.path.isdir(folder)))
        with locked(folder) if kept else contextlib.nullcontext(False) as free:
            # A folder of this name may have been left in the own cache of any machine.
            new = folder / f"shared_{int(from_main(secrets.randbits(48)))}"
            if is_main() and free:
                with pretrained.keeping("parts are"), reported(f"{new} cannot be written"):
                    new.touch()
            barrier("it is known whether the cache is shared")
            parts = folder / "parts" if everywhere(os.path.exists(new)) else None
            features = features_of(images, judge, parts, keep)
            if is_main() and kept:
                _keep(file, features)
                if free:
                    shutil.rmtree(folder, ignore_errors=True)
        barrier("the features of the reference are there")
        # On another machine.
        if not is_main() and read_kept(file) is None:
            _keep(file, features)
    if isinstance(images, Archive) and judge.name == "inception":
        features = features._replace(**images.statistics())
    return features


def _keep(file: Path, features: FeatureSet):
    with pretrained.keeping("these features are"):
        make_folder(file.parent)
        write_arrays(file, features._asdict(), shared=True)


# Files and tables.


def compare(
    images: ImageSet, reference: FeatureSet, judge: Judge, file: epath.Path, facts: dict[str, Any]
) -> dict[str, Any]:
    """The five metrics of a set of images; writes them as JSON.

    Args:
        file: to write; beside it, "features" keeps the features of the images.
        facts: how the images were made, and what they are compared with, to be included.

    Returns:
        {"fid", "sfid", "inception_score", "precision", "recall", "images", ...} on process 0, {} on
        the others.

    Raises:
        UserError: images that cannot be read, or too few of them.
    """
    results = measure(images, judge, reference, file.parent / "features")
    if not is_main():
        return {}
    results |= {"images": len(images), "reference_images": reference.count}
    results |= {"features": len(reference.pool_mean)}
    results |= {"judge": judge.name, "network": judge.fingerprint, **facts}
    write_results(file, results)
    return results


def sweep(
    points: Sequence[tuple[dict[str, Any], ImageSet, dict[str, Any]]],
    reference: FeatureSet,
    judge: Judge,
    file: epath.Path,
) -> list[dict[str, Any]]:
    """`compare` for every point of a sweep, each in a folder of its own beside the file of all.

    Args:
        points: for each point its settings, its images, and its facts.

    Returns:
        The results of all points, each with its settings as "sweep"; [] on all processes but 0.
    """
    results = []
    for number, (point, images, facts) in enumerate(points, 1):
        logger.info("sweep: %d of %d: %s", number, len(points), point)
        own = file.parent / digest(point)[:8] / file.name
        results.append({"sweep": point, **compare(images, reference, judge, own, facts)})
    if not is_main():
        return []
    write_results(file, results)
    return results


def write_results(path: epath.Path, results: dict[str, Any] | list[dict[str, Any]]):
    write_file(path, json.dumps(results, indent=1) + "\n")


def warn_if_sizes_differ(images: ImageSet, reference: ImageSet):
    """Warns if two sets have images of different sizes, which the network's resizing would hide."""
    if tuple(images.image_size) != tuple(reference.image_size):
        logger.warning(
            "the samples have %d x %d pixels and the reference %d x %d: both are resized to the "
            "network's input, so the metrics also measure the difference in resolution",
            *images.image_size,
            *reference.image_size,
        )


def digits(value: float) -> str:
    """A number with three significant digits; "inf" and "nan" as they are."""
    value = float(f"{value:.3g}")
    if not math.isfinite(value):
        return str(value)
    decimals = 2 - math.floor(math.log10(abs(value))) if value else 2
    return f"{value:.{max(decimals, 0)}f}"


# What the numbers mean, below every table that has them.
MEANINGS = {
    "FID": "Frechet distance of the judge's features from those of the reference; lower is better",
    "sFID": "the same of features that keep their place in the image",
    "rFID": "FID of reconstructions from their originals",
    "IS": "Inception Score: how surely and how evenly the judge sees its classes; higher is better",
    "precision": "share of images as close to the reference as its own images are to each other",
    "recall": "share of the reference as close to the images as they are to each other",
    "class agreement": "share of samples that the judge takes for the class they were asked for",
    "judge's accuracy": "share of reconstructions, or of real images, taken for their class",
    "PSNR": "likeness of pixels in dB; higher is better",
    "SSIM": "likeness of small patches, at most 1",
    "LPIPS": "distance in the features of a network that agrees with people; lower is better",
    "codebook usage": "share of the tokens that occur",
    "near copies": "share of samples nearer to a training image than 95% of unseen real images are",
}


def explain(names: Sequence[str]) -> list[str]:
    """One line on each of these names."""
    return [f"{name}: {MEANINGS[name]}" for name in names]


def table(results: Sequence[dict[str, Any]]) -> str:
    """Results as lines of text; if there are several, the one with the lowest FID is marked."""
    best = min(range(len(results)), key=lambda i: results[i]["fid"])
    lines = ["".join(f"{head:>11}" for head in HEADS)]
    for index, result in enumerate(results):
        line = "".join(f"{digits(result[name]):>11}" for name in METRICS)
        if "sweep" in result:
            line += "  " + " ".join(f"{k}={text_of(v)}" for k, v in result["sweep"].items())
            line += "  <- lowest FID" if index == best else ""
        lines.append(line)
    if real := results[0].get("metrics_of_real_test_images"):
        line = "".join(f"{digits(real[name]):>11}" for name in METRICS)
        lines.append(f"{line}  {real['images']:,} held-out images")
    lines += too_few(results[0])
    return "\n".join([*lines, "", *explain(HEADS)])


def too_few(result: dict[str, Any]) -> list[str]:
    """A line if the FID of a result is of fewer images than it needs."""
    if result["images"] > result["features"]:
        return []
    return [
        f"too few images for FID: {result['images']:,}, which is not more than the "
        f"{result['features']:,} features; compare it only with one of as many images"
    ]
