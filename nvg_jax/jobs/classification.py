"""A model in the eyes of a classifier of its data set: class agreement, copying, FID, rFID."""

import dataclasses
import itertools
import logging
from typing import Any

import numpy as np
from etils import epath

from nvg_jax.data import Source
from nvg_jax.errors import UserError
from nvg_jax.evaluation.features import METRICS, class_agreement
from nvg_jax.evaluation.image import LOW_QUANTILE, copying_report, psnr
from nvg_jax.evaluation.judges import ClassJudge, fit_classifier
from nvg_jax.evaluation.report import (
    HEADS,
    REFERENCE_IMAGES,
    digits,
    explain,
    features_of,
    measure,
    too_few,
    write_results,
)
from nvg_jax.evaluation.sets import LabeledImages, Split, load_split
from nvg_jax.jobs.reconstruction import Reconstructions
from nvg_jax.jobs.sampling_runs import SamplingJob, stages_picture
from nvg_jax.pipeline import Pipeline
from nvg_jax.runtime.processes import is_main
from nvg_jax.runtime.storage import make_folder
from nvg_jax.tokenizer import GranularitySequence
from nvg_jax.visualize import class_grid, reconstruction_grid, save_png

logger = logging.getLogger("nvg_jax")

STAGES_SHOWN = 4  # samples in the picture of the stages
CLASSES_SHOWN, COLUMNS = 20, 8  # rows and columns in the picture of samples
MIN_IMAGES = 4  # precision and recall look at the third nearest one
COPY_CHECK_IMAGES = 2_000  # samples and held-out images compared with all training images


def report(
    pipeline: Pipeline,
    data: dict[str, Any],
    job: SamplingJob | None,
    out: epath.Path,
    batch_size: int,
) -> dict[str, Any]:
    """Writes metrics.json and pictures into `out`; all processes share the work.

    Args:
        data: "name", "data_dir", "resize" and optionally "on_bad", as in a config's `data`. Images
            are resized with the filter that the model was trained with.
        job: the samples to measure, one for each entry of `classes`; None measures the tokenizer
            alone.
        batch_size: images that the tokenizer encodes and decodes at once.

    Returns:
        The metrics on process 0, {} on the others.

    Raises:
        UserError: the data is not what the model was trained on, or an image cannot be read.
    """
    data = data | {"resize_filter": pipeline.metadata.resize_filter}
    size = pipeline.tokenizer.config.image_size
    source = Split(data, "train", size).source
    num_classes = source.num_classes
    check_classes(pipeline, source)
    make_folder(out)
    test = load_split(data, "test", size)
    if len(test) < MIN_IMAGES:
        raise UserError(
            f"{data['name']} has {len(test)} held-out image{'s' if len(test) > 1 else ''}, and an "
            f"evaluation needs at least {MIN_IMAGES}; add images."
        )
    originals = dataclasses.replace(test, batch_size=batch_size)
    restored = Reconstructions(pipeline, originals).collect("reconstruction")
    restored = dataclasses.replace(test, images=restored)
    train = load_split(data, "train", size)
    if job and len(train) < len(source):
        logger.warning(
            "the samples are compared with %d of the %d training images: with those that can be "
            "read, and with no more than fit in memory",
            len(train),
            len(source),
        )
    classifier = fit_classifier(data["name"], train.images, train.labels, num_classes)
    if job:
        in_common(np.array(job.classes), test.labels, num_classes)
        samples = LabeledImages(job.collect("sampling"), np.array(job.classes))
    results = reconstruction_metrics(classifier, restored, test)
    if job:
        results["samples"] = len(job)
        results |= sample_metrics(classifier, samples, pipeline.class_names, train, test)
    if not is_main():
        return {}
    pictures = reconstruction_grid(test.images[:12], restored.images[:12])
    save_png(out / "reconstructions.png", pictures)
    if job:
        order = np.argsort(samples.labels, kind="stable")
        rows = np.unique(samples.labels)[:CLASSES_SHOWN]
        shown = (turns(samples.labels) < COLUMNS) & np.isin(samples.labels, rows)
        shown = order[shown[order]]
        names = [pipeline.class_names[label] for label in samples.labels[shown]]
        save_png(out / "samples.png", class_grid(samples.images[shown], names, COLUMNS))
        visual = GranularitySequence(*(part[:STAGES_SHOWN] for part in job.sample(0).sequence))
        names = [pipeline.class_names[job.classes[i]] for i in range(len(visual.structure))]
        save_png(out / "stages.png", stages_picture(pipeline, visual, names))
    facts = job.facts() if job else {"dtype": pipeline.dtype, "tokenizer": pipeline.fingerprint}
    results |= {"judge": classifier.name, "network": classifier.fingerprint, **facts}
    results["data"] = {name: data[name] for name in ("name", "data_dir", "resize", "resize_filter")}
    write_results(out / "metrics.json", results)
    return results


def check_classes(pipeline: Pipeline, source: Source):
    """Raises UserError unless the data have as many classes as the model; warns of other names."""
    count = pipeline.metadata.model.num_classes
    if source.num_classes != count:
        raise UserError(
            f"The model has {count} classes and the data set has {source.num_classes}; give the "
            "data that it was trained on."
        )
    warn_if_classes_differ(pipeline, source)


def warn_if_classes_differ(pipeline: Pipeline, source: Source):
    """Warns if the classes of the data have other names than the model's, in another order maybe.

    Converted weights know only the number of their classes.
    """
    names = source.class_names, pipeline.class_names
    pairs = itertools.zip_longest(*names, fillvalue="(no class)")
    differing = [pair for pair in pairs if pair[0] != pair[1]]
    if pipeline.metadata.config and differing:
        logger.warning(
            "%d classes have other names in the data than in the model, the first %r and %r: is it "
            "the data that the model was trained on?",
            len(differing),
            *differing[0],
        )


def reconstruction_metrics(
    classifier: ClassJudge, restored: LabeledImages, test: LabeledImages
) -> dict[str, Any]:
    """PSNR, rFID and the classifier's accuracy; only process 0 has the rFID."""
    originals = features_of(test, classifier, keep=0)
    results: dict[str, Any] = {"test_psnr": float(psnr(test.images, restored.images).mean())}
    results["rfid"] = measure(restored, classifier, originals, names=("fid",)).get("fid")
    for name, images in (("real_test_images", test), ("reconstructions", restored)):
        accuracy, _ = class_agreement(classifier.predict(images.images), images.labels)
        results[f"classifier_accuracy_on_{name}"] = accuracy
    return results


def sample_metrics(
    classifier: ClassJudge,
    samples: LabeledImages,
    class_names: tuple[str, ...],
    train: LabeledImages,
    test: LabeledImages,
) -> dict[str, Any]:
    """Metrics of samples, whose labels are the requested classes; FID etc. only on process 0.

    Both sets are compared with as many images of every class: agreements are means over the
    classes with these numbers as weights, and everything else is of that many images.
    """
    counts = in_common(samples.labels, test.labels, len(class_names))
    of_samples, of_test = (
        class_agreement(classifier.predict(images.images), images.labels)[1]
        for images in (samples, test)
    )
    weighted = lambda shares: sum(counts[i] * shares[i] for i in np.flatnonzero(counts))
    samples, test = (
        images.select(np.flatnonzero(turns(images.labels) < counts[images.labels]))
        for images in (samples, test)
    )
    results = {
        "class_agreement": float(weighted(of_samples) / counts.sum()),
        "class_agreement_per_class": {class_names[i]: share for i, share in of_samples.items()},
        "class_agreement_of_real_test_images": float(weighted(of_test) / counts.sum()),
        "copying": copying_report(
            samples.images[balanced(samples.labels, COPY_CHECK_IMAGES)],
            train.images,
            test.images[balanced(test.labels, COPY_CHECK_IMAGES)],
        ),
    }
    shuffled = train.select(np.random.default_rng(0).permutation(len(train)))
    reference = features_of(shuffled, classifier, keep=REFERENCE_IMAGES)
    for name, images in (("samples", samples), ("real_test_images", test)):
        results[f"metrics_of_{name}"] = measure(images, classifier, reference)
    results |= {"metrics_images": int(counts.sum()), "features": len(reference.pool_mean)}
    return results


def in_common(samples: np.ndarray, test: np.ndarray, num_classes: int) -> np.ndarray:
    """The number of images of each class that samples and held-out images both have, int (C,).

    Classes differ more than good samples and bad ones do, so only equal numbers are compared.

    Args:
        samples, test: labels, int (N,).

    Raises:
        UserError: there are fewer than `MIN_IMAGES`.
    """
    counts = np.minimum(*(np.bincount(x, minlength=num_classes) for x in (samples, test)))
    if counts.sum() < MIN_IMAGES:
        raise UserError(
            f"The samples and the held-out images have {counts.sum()} images of the same classes, "
            f"and a comparison needs {MIN_IMAGES}; draw more samples."
        )
    return counts


def table(results: dict[str, Any], num_classes: int) -> str:
    """The metrics of `report` beside those of real held-out images, and chance, as text."""
    rows = [
        ("PSNR", results["test_psnr"], None, None),
        ("rFID", results["rfid"], None, None),
        (
            "judge's accuracy",
            results["classifier_accuracy_on_reconstructions"],
            results["classifier_accuracy_on_real_test_images"],
            1 / num_classes,
        ),
    ]
    notes = []
    if "class_agreement" in results:
        copying = results["copying"]
        rows += [
            (
                "class agreement",
                results["class_agreement"],
                results["class_agreement_of_real_test_images"],
                1 / num_classes,
            ),
            ("near copies", copying["near_share"], LOW_QUANTILE, None),
        ]
        model, real = results["metrics_of_samples"], results["metrics_of_real_test_images"]
        rows += [(head, model[name], real[name], None) for head, name in zip(HEADS, METRICS)]
        notes = too_few({"images": results["metrics_images"], "features": results["features"]})
    text = lambda value: "" if value is None else digits(value)
    lines = [f"{'':<18}{'model':>11}{'real images':>13}{'chance':>9}"]
    lines += [
        f"{name:<18}{text(a):>11}{text(b):>13}{text(c):>9}".rstrip() for name, a, b, c in rows
    ]
    return "\n".join([*lines, *notes, "", *explain([row[0] for row in rows])])


def balanced(labels: np.ndarray, count: int) -> np.ndarray:
    """Indices of at most `count` images, cycling through the classes while they last."""
    return np.lexsort((labels, turns(labels)))[:count]


def turns(labels: np.ndarray) -> np.ndarray:
    """How many of its class come before every image, int (N,)."""
    turn = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        turn[labels == label] = np.arange((labels == label).sum())
    return turn
