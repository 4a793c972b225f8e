"""Evaluates a model against held-out images; several processes share the work."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nvg_jax.data import Source, open_source
from nvg_jax.data.transforms import Transform, decode
from nvg_jax.evaluation import metrics
from nvg_jax.jobs.sampling import SamplingJob, draw, draw_stages
from nvg_jax.pipeline import Pipeline
from nvg_jax.runtime import processes
from nvg_jax.runtime.files import atomic_write
from nvg_jax.runtime.sharding import fill_batch
from nvg_jax.visualize import image_grid, reconstruction_grid, save_png

TRAIN_IMAGES, TEST_IMAGES = 60_000, 10_000  # images read of each split, at most
MAX_BYTES = 4 << 30  # of one split's images in memory
COPY_CHECK_IMAGES = 2_000  # samples and held-out images compared with all training images
STAGES_LIMIT = 4  # samples in stages.png

logger = logging.getLogger("nvg_jax")


class LabeledImages(NamedTuple):
    """images: float32 (N, H, W, 3) in [-1, 1]. labels: int (N,)."""

    images: np.ndarray
    labels: np.ndarray


def load_images(
    source: Source, transform: Transform, limit: int, on_bad: str = "error"
) -> LabeledImages:
    """A fixed random choice of at most `limit` images of a split, in the split's order.

    Args:
        limit: the number of images; MAX_BYTES is a further bound.
        on_bad: "error" stops at an unreadable image, "skip" leaves it out with a warning.

    Raises:
        ValueError: an unreadable image (the message names it), or no readable one.
    """
    height, width = transform.image_size
    limit = min(limit, len(source), MAX_BYTES // (height * width * 3 * 4))
    indices = np.sort(np.random.default_rng(0).permutation(len(source))[:limit])
    images, labels = np.empty((limit, height, width, 3), np.float32), np.empty(limit, np.int64)
    count = 0
    for index in indices:
        name = f"record {index}"
        try:
            item = source[int(index)]
            name = item["name"]
            image = decode(item["image"])
        except Exception as error:  # readers of damaged files raise errors of many kinds
            if on_bad != "skip":
                raise ValueError(
                    f"{name}: {error}. Repair it or remove it from the data set."
                ) from error
            logger.warning("skipped %s: %s", name, error)
            continue
        images[count], labels[count] = transform(image), item["label"]
        count += 1
    if count == 0:
        raise ValueError(f"None of the {limit} images to evaluate with can be read.")
    return LabeledImages(images[:count], labels[:count])


def balanced(labels: np.ndarray, count: int) -> np.ndarray:
    """Indices of at most `count` images, taken from each class in turn while it has images left."""
    turn = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        turn[labels == label] = np.arange((labels == label).sum())
    return np.argsort(turn, kind="stable")[:count]


def reconstruct(pipeline: Pipeline, images: np.ndarray, batch_size: int = 100) -> np.ndarray:
    """Reconstructs all images, each process its share; every process gets all of them."""
    num_batches = -(-len(images) // batch_size)
    own = processes.own_share(num_batches)
    restored = np.empty((len(own), batch_size, *images.shape[1:]), np.float32)
    for row, batch in enumerate(own):
        part = images[batch * batch_size : (batch + 1) * batch_size]
        restored[row] = pipeline.reconstruct(fill_batch(part, batch_size))
    restored = processes.gather(restored, num_batches)
    return restored.reshape(-1, *images.shape[1:])[: len(images)]


def measure(
    classifier,
    class_names: tuple[str, ...],
    train: LabeledImages,
    test: LabeledImages,
    restored: np.ndarray,
    samples: LabeledImages | None,
    frechet: bool,
) -> dict[str, Any]:
    """The metrics of reconstructions and samples.

    Args:
        classifier: fitted on `train`; has `predict` and, for `frechet`, `features`.
        restored: the reconstructions of `test.images`.
        samples: generated images, labeled with the classes they were generated for; None measures
            the tokenizer alone.
        frechet: whether to compute Frechet distances, which need thousands of test images.
    """
    agreement = lambda images, labels: metrics.class_agreement(classifier.predict(images), labels)
    results = {
        "test_psnr": float(metrics.psnr(test.images, restored).mean()),
        "classifier_accuracy_on_real_test_images": agreement(test.images, test.labels)[0],
        "classifier_accuracy_on_reconstructions": agreement(restored, test.labels)[0],
    }
    if frechet:
        results["frechet_of_reconstructions"] = metrics.frechet_distance(
            classifier.features(restored), classifier.features(test.images)
        )
    if samples is None:
        return results
    results["samples"] = len(samples.images)
    results["class_agreement"], per_class = agreement(samples.images, samples.labels)
    results["class_agreement_per_class"] = {
        class_names[label]: share for label, share in per_class.items()
    }
    results["copying"] = metrics.copying_report(
        samples.images[:COPY_CHECK_IMAGES], train.images, test.images[:COPY_CHECK_IMAGES]
    )
    if frechet:
        chosen = balanced(test.labels, len(samples.images))
        features = classifier.features(train.images)
        distance = lambda images: metrics.frechet_distance(classifier.features(images), features)
        results["frechet_of_samples"] = distance(samples.images[: len(chosen)])
        results["frechet_of_real_test_images"] = distance(test.images[chosen])
        results["frechet_images"] = len(chosen)
    return results


def evaluate(
    pipeline: Pipeline,
    data: dict[str, Any],
    out: Path,
    *,
    fit_classifier: Callable,
    frechet: bool,
    num_samples: int,
    seed: int,
    batch_size: int,
    settings: dict[str, Any],
) -> dict[str, Any] | None:
    """Writes metrics.json and images to a folder. Collective: every process must call it.

    A model without generators is evaluated as a tokenizer.

    Args:
        data: "name", "data_dir", "resize" and, optionally, "on_bad", as in the section `data` of
            a config.
        fit_classifier: (images, labels) -> classifier; see `measure`.
        frechet: see `measure`.
        num_samples: samples to make, one of each class in turn.
        settings: sampling settings, keyword arguments of `Pipeline.sample`.

    Returns:
        The metrics on process 0, None on the others.

    Raises:
        ValueError: the model was trained on other classes, or an image is unreadable.
    """
    transform = Transform(pipeline.tokenizer.config.image_size, data["resize"] or None)
    train_source, test_source = (
        open_source(data["name"], split, data_dir=data["data_dir"] or None)
        for split in ("train", "test")
    )
    class_names = pipeline.class_names
    if train_source.num_classes != len(class_names):
        raise ValueError(
            f"The model has {len(class_names)} classes and the data set {data['name']!r} has "
            f"{train_source.num_classes}. Evaluate on the data set it was trained on."
        )
    on_bad = data.get("on_bad", "error")
    # Read before any sampling, so that an unreadable image stops the command at once.
    train = (
        load_images(train_source, transform, TRAIN_IMAGES, on_bad) if processes.is_main() else None
    )
    test = load_images(test_source, transform, TEST_IMAGES, on_bad)

    restored = reconstruct(pipeline, test.images)
    samples, first, seconds = None, None, 0.0
    if pipeline.can_sample:
        classes = np.arange(num_samples) % len(class_names)
        batch_size = min(batch_size, num_samples)
        start = time.monotonic()
        images, first = draw(SamplingJob(pipeline, classes.tolist(), 1, batch_size, seed, settings))
        seconds = time.monotonic() - start
        samples = LabeledImages(images, classes)
    if not processes.is_main():
        return None

    classifier = fit_classifier(*train)
    results = measure(classifier, class_names, train, test, restored, samples, frechet)
    save_png(out / "reconstructions.png", reconstruction_grid(test.images[:12], restored[:12]))
    if samples is not None:
        results["seconds_per_sample"] = seconds / num_samples
        columns = len(class_names) if len(class_names) <= 20 else 10
        save_png(out / "samples.png", image_grid(samples.images[: 8 * columns], columns))
        shown = np.arange(min(STAGES_LIMIT, len(first.images)))
        save_png(out / "stages.png", draw_stages(pipeline, first, shown))
    with atomic_write(out / "metrics.json") as file:
        file.write((json.dumps(results, indent=1) + "\n").encode())
    return results
