"""What becomes of a measurement: metrics.json, tables and warnings."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nvg_jax.evaluation.features import METRICS, FeatureSet
from nvg_jax.evaluation.judges import Judge
from nvg_jax.evaluation.measure import measure
from nvg_jax.evaluation.sets import ImageSet
from nvg_jax.runtime.files import atomic_write, digest
from nvg_jax.runtime.processes import is_main
from nvg_jax.sampling.settings import text_of

logger = logging.getLogger("nvg_jax")


def compare(
    images: ImageSet, reference: FeatureSet, judge: Judge, out: Path, facts: dict[str, Any]
) -> dict[str, Any]:
    """The five metrics of a set of images; writes metrics.json into `out`.

    Args:
        facts: how the images were made, to be included in the result.

    Returns:
        {"fid", "sfid", "inception_score", "precision", "recall", "images", ...} on process 0, {} on
        the others.

    Raises:
        UserError: images that cannot be read, or too few of them.
    """
    results = measure(images, judge, reference, out / "features")
    if not is_main():
        return {}
    results |= {"images": len(images), "reference_images": reference.count}
    results |= {"judge": judge.name, "network": judge.fingerprint, **facts}
    write_results(out / "metrics.json", results)
    return results


def compare_all(
    points: Sequence[tuple[dict[str, Any], ImageSet, dict[str, Any]]],
    reference: FeatureSet,
    judge: Judge,
    out: Path,
) -> list[dict[str, Any]]:
    """`compare` for every point of a sweep, each in its own folder; writes metrics.json.

    Args:
        points: for each point its settings, its images, and how they were made.

    Returns:
        The results of all points, each with its settings as "sweep"; [] on all processes but 0.
    """
    results = []
    for number, (point, images, facts) in enumerate(points, 1):
        logger.info("sweep: %d of %d: %s", number, len(points), point)
        folder = out / digest(json.loads(json.dumps(point)))[:8]
        results.append({"sweep": point, **compare(images, reference, judge, folder, facts)})
    if not is_main():
        return []
    write_results(out / "metrics.json", results)
    return results


def write_results(path: Path, results: dict[str, Any] | list[dict[str, Any]]):
    with atomic_write(path) as file:
        file.write((json.dumps(results, indent=1) + "\n").encode())


def check_sizes(images: ImageSet, reference: ImageSet):
    """Warns if two sets have images of different sizes, which the network's resizing would hide."""
    if tuple(images.image_size) != tuple(reference.image_size):
        logger.warning(
            "the samples have %d x %d pixels and the reference %d x %d: both are resized to the "
            "network's input, so the figures also measure the difference in resolution",
            *images.image_size,
            *reference.image_size,
        )


def table(results: Sequence[dict[str, Any]]) -> str:
    """Results as lines of text; if there are several, the one with the lowest FID is marked."""
    heads = ("FID", "sFID", "IS", "precision", "recall")  # of METRICS
    best = min(range(len(results)), key=lambda i: results[i]["fid"])
    lines = ["".join(f"{head:>11}" for head in heads)]
    for index, result in enumerate(results):
        line = "".join(f"{result[name]:11.4f}" for name in METRICS)
        if "sweep" in result:
            line += "  " + " ".join(f"{k}={text_of(v)}" for k, v in result["sweep"].items())
            line += "  <- lowest FID" if index == best else ""
        lines.append(line)
    return "\n".join(lines)
