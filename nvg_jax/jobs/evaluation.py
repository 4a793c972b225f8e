"""Evaluation by a classifier of the data set: class agreement, copying, FID and related metrics.

Several processes share the reconstruction and the sampling; process 0 measures and writes.
"""

import logging
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nvg_jax.data import Source
from nvg_jax.data.transforms import Transform
from nvg_jax.errors import UserError
from nvg_jax.evaluation import metrics
from nvg_jax.evaluation.classifiers import DigitClassifier, train_classifier
from nvg_jax.evaluation.generation import FeatureSet, generation_metrics
from nvg_jax.jobs.comparison import open_split, write_results
from nvg_jax.jobs.features import read_image
from nvg_jax.jobs.sampling import SamplingJob, stages_picture
from nvg_jax.pipeline import Pipeline, SampleOutput
from nvg_jax.runtime.processes import gather, is_main, own_share
from nvg_jax.runtime.sharding import fill_batch
from nvg_jax.visualize import image_grid, reconstruction_grid, save_png

logger = logging.getLogger("nvg_jax")
STAGES_SHOWN = 4  # samples in the picture of the stages
MAX_IMAGES = {"train": 60_000, "test": 10_000}  # per split
MAX_BYTES = 4 << 30  # of one split's images in memory
NEIGHBOR_IMAGES = 10_000  # training images compared for precision and recall
COPY_CHECK_IMAGES = 2_000  # samples and held-out images compared with all training images


class Images(NamedTuple):
    """images: float32 (N, H, W, 3) in [-1, 1]. labels: int (N,)."""

    images: np.ndarray
    labels: np.ndarray


def evaluate(
    pipeline: Pipeline,
    data: dict[str, Any],
    out: Path,
    num_samples: int,
    seed: int,
    batch_size: int,
    **settings,
) -> dict[str, Any] | None:
    """Writes metrics.json and pictures into `out`; without generators, for the tokenizer only.

    Args:
        data: "name", "data_dir", "resize" and optionally "on_bad", as in a config's `data`.
        settings: sampling settings for `Pipeline.sample`.

    Returns:
        The metrics on process 0, None on the others.

    Raises:
        UserError: the data is not what the model was trained on, or an image cannot be read.
    """
    size = pipeline.tokenizer.config.image_size
    num_classes = open_split(data, "train").num_classes
    if num_classes != pipeline.metadata.model.num_classes:
        raise UserError(
            f"The model has {pipeline.metadata.model.num_classes} classes and the data set "
            f"{data['name']!r} has {num_classes}; evaluate on the data it was trained on."
        )
    test = load_split(data, "test", size)
    restored = reconstruct(pipeline, test.images)
    if pipeline.can_sample:
        classes = np.arange(num_samples) % pipeline.metadata.model.num_classes
        job = SamplingJob(
            pipeline, classes.tolist(), 1, min(batch_size, num_samples), seed, settings
        )
        start = time.monotonic()
        samples, first_batch = draw_samples(job)
        seconds = time.monotonic() - start
    if not is_main():
        return None

    train = load_split(data, "train", size)
    classifier = make_classifier(data["name"], train, num_classes)
    results = measure_reconstructions(classifier, restored, test)
    save_png(out / "reconstructions.png", reconstruction_grid(test.images[:12], restored[:12]))
    if pipeline.can_sample:
        results |= {"samples": num_samples, "seconds_per_sample": seconds / num_samples}
        results |= measure_samples(
            classifier, Images(samples, classes), pipeline.class_names, train, test
        )
        columns = num_classes if num_classes <= 20 else 10
        save_png(out / "samples.png", image_grid(samples[: 8 * columns], columns=columns))
        picks = np.arange(min(STAGES_SHOWN, len(first_batch.images)))
        save_png(out / "stages.png", stages_picture(pipeline, first_batch, picks))
    write_results(out / "metrics.json", results)
    return results


def make_classifier(name: str, train: Images, num_classes: int):
    """The judge of a data set, fitted to its training images; `name` is as in a config's `data`."""
    if name == "digits":  # few images, which have their own classifier
        return DigitClassifier(*train)
    return train_classifier(*train, num_classes)


# Images.


def load_split(data: dict[str, Any], split: str, image_size: tuple[int, int]) -> Images:
    """The images of a split, cropped to one size; `data` as for `evaluate`.

    Raises:
        UserError: an unreadable image, unless data["on_bad"] is "skip".
    """
    transform = Transform(image_size, data["resize"] or None)
    on_bad = data.get("on_bad", "error")
    return load_images(open_split(data, split), transform, MAX_IMAGES[split], on_bad)


def load_images(source: Source, transform: Transform, limit: int, on_bad: str = "error") -> Images:
    """At most `limit` images of a split, a fixed random choice, bounded by MAX_BYTES.

    Args:
        on_bad: for an unreadable image, "error" stops and "skip" leaves it out with a warning.

    Raises:
        UserError: an image is unreadable; the message names it.
    """
    height, width = transform.image_size
    limit = min(limit, len(source), MAX_BYTES // (height * width * 3 * 4))
    indices = np.sort(np.random.default_rng(0).permutation(len(source))[:limit])
    images, labels = np.empty((limit, height, width, 3), np.float32), np.empty(limit, np.int64)
    count = 0
    for index in indices:
        try:
            images[count], labels[count] = read_image(source, index, transform)
        except UserError as error:
            if on_bad != "skip":
                raise
            logger.warning("left out %s", error)
            continue
        count += 1
    if count == 0:
        raise UserError(f"None of the {limit} images to evaluate with can be read.")
    return Images(images[:count], labels[:count])


def reconstruct(pipeline: Pipeline, images: np.ndarray, batch_size: int = 100) -> np.ndarray:
    """Reconstructs all images with the tokenizer; all processes share the work."""
    num_batches = -(-len(images) // batch_size)
    own = own_share(num_batches)
    restored = np.empty((len(own), batch_size, *images.shape[1:]), np.float32)
    for row, batch in enumerate(own):
        part = images[batch * batch_size : (batch + 1) * batch_size]
        restored[row] = pipeline.reconstruct(fill_batch(part, batch_size))
    return gather(restored, num_batches).reshape(-1, *images.shape[1:])[: len(images)]


def draw_samples(job: SamplingJob) -> tuple[np.ndarray, SampleOutput | None]:
    """The images of all samples; all processes share the work.

    Returns:
        float32 (N, H, W, 3) in [-1, 1], and this process's first batch.
    """
    own, first = own_share(job.num_batches), None
    images = np.zeros((len(own), job.batch_size, *job.image_shape), np.float32)
    for row, (_, output) in enumerate(job.sample_all(own)):
        images[row, : len(output.images)] = output.images
        first = first or output
    images = gather(images, job.num_batches)
    return images.reshape(-1, *job.image_shape)[: len(job)], first


def balanced(labels: np.ndarray, count: int) -> np.ndarray:
    """Indices of at most `count` images, cycling through the classes while they last."""
    turn = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        turn[labels == label] = np.arange((labels == label).sum())
    return np.argsort(turn, kind="stable")[:count]


# Measuring: functions of arrays and a classifier.


def measure_reconstructions(classifier, restored: np.ndarray, test: Images) -> dict[str, Any]:
    """Metrics of reconstructions (N, H, W, 3) of test images."""
    results = {"test_psnr": float(metrics.psnr(test.images, restored).mean())}
    results["rfid"] = metrics.frechet_distance(
        classifier.image_features(restored).pool, classifier.image_features(test.images).pool
    )
    for name, images in (("real_test_images", test.images), ("reconstructions", restored)):
        accuracy, _ = metrics.class_agreement(classifier.predict(images), test.labels)
        results[f"classifier_accuracy_on_{name}"] = accuracy
    return results


def measure_samples(
    classifier, samples: Images, class_names: tuple[str, ...], train: Images, test: Images
) -> dict[str, Any]:
    """Metrics of samples, whose labels are the requested classes."""
    agreement, per_class = metrics.class_agreement(
        classifier.predict(samples.images), samples.labels
    )
    results = {
        "class_agreement": agreement,
        "class_agreement_per_class": {class_names[i]: share for i, share in per_class.items()},
        "copying": metrics.copying_report(
            samples.images[:COPY_CHECK_IMAGES], train.images, test.images[:COPY_CHECK_IMAGES]
        ),
    }
    reference = FeatureSet.of(classifier.image_features(train.images))
    shuffled = np.random.default_rng(0).permutation(len(train.images))[:NEIGHBOR_IMAGES]
    reference = reference._replace(pool=reference.pool[shuffled])
    chosen = balanced(test.labels, len(samples.images))
    for name, images in (
        ("samples", samples.images[: len(chosen)]),
        ("real_test_images", test.images[chosen]),
    ):
        found = FeatureSet.of(classifier.image_features(images))
        results[f"figures_of_{name}"] = generation_metrics(reference, found)
    results["figures_images"] = len(chosen)
    return results
