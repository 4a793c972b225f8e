"""Evaluation: `python -m nvg_jax.evaluate --workdir=runs/digits --num_samples=1000`.

Reconstruction of held-out images, class agreement of samples by a classifier that was fitted on
real images and knows nothing of NVG, their distance to the training images, and a Frechet
distance in the classifier's features. Writes metrics.json, samples.png and stages.png.
"""

import json
import time
from pathlib import Path

import numpy as np
from absl import flags

from nvg_jax import cli
from nvg_jax.data import Source, eval_batches, open_source
from nvg_jax.evaluation import metrics
from nvg_jax.evaluation.classifiers import DigitClassifier, train_classifier
from nvg_jax.pictures import image_grid, reconstruction_grid, save_png
from nvg_jax.pipeline import Pipeline
from nvg_jax.sample import define_flags, sample_batches, settings_from_flags, stages_picture

FLAGS = flags.FLAGS
COPY_CHECK_IMAGES = 2_000  # samples and held-out images compared with all training images


def load_images(source: Source, data: dict, image_size, limit: int) -> tuple[np.ndarray, ...]:
    """The first `limit` images of a split, float32 (N, H, W, 3) in [-1, 1], and their labels."""
    images, labels = [], []
    batches = eval_batches(
        source,
        image_size=image_size,
        resize=data["resize"] or None,
        batch_size=min(100, len(source)),
        on_bad=data["on_bad"],
    )
    for batch in batches:
        images.append(batch["image"][batch["mask"]])
        labels.append(batch["label"][batch["mask"]])
        if sum(map(len, labels)) >= limit:
            break
    return np.concatenate(images)[:limit], np.concatenate(labels)[:limit]


def balanced(labels: np.ndarray, count: int) -> np.ndarray:
    """Indices of at most `count` images, the classes in turn as far as they go."""
    turn = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        turn[labels == label] = np.arange((labels == label).sum())
    return np.argsort(turn, kind="stable")[:count]


def reconstruct(pipeline: Pipeline, images: np.ndarray, batch_size: int = 100) -> np.ndarray:
    parts = []
    for first in range(0, len(images), batch_size):
        part = images[first : first + batch_size]
        filled = np.concatenate([part, np.repeat(part[-1:], batch_size - len(part), axis=0)])
        parts.append(pipeline.reconstruct(filled)[: len(part)])
    return np.concatenate(parts)


def evaluate(pipeline: Pipeline, out: Path, num_samples: int, seed: int, batch_size: int, **kwargs):
    """Writes pictures and metrics.json into `out`; returns the metrics."""
    data = pipeline.meta["config"]["data"]
    size = pipeline.tokenizer.config.image_size
    open_split = lambda split: open_source(
        data["name"], split, data_dir=data["data_dir"] or None, class_names=pipeline.class_names
    )
    train_images, train_labels = load_images(open_split("train"), data, size, 60_000)
    test_images, test_labels = load_images(open_split("test"), data, size, 10_000)

    restored = reconstruct(pipeline, test_images)
    results = {"test_psnr": float(metrics.psnr(test_images, restored).mean())}
    save_png(out / "reconstructions.png", reconstruction_grid(test_images[:12], restored[:12]))

    if data["name"] == "digits":
        classifier = DigitClassifier(train_images, train_labels)
    else:
        classifier = train_classifier(train_images, train_labels, len(pipeline.class_names))
    real, _ = metrics.class_agreement(classifier.predict(test_images), test_labels)
    results["classifier_accuracy_on_real_test_images"] = real

    classes = np.arange(num_samples) % len(pipeline.class_names)
    start, images, first = time.monotonic(), [], None
    for batch in sample_batches(
        pipeline, classes.tolist(), min(batch_size, num_samples), seed, **kwargs
    ):
        first = first or batch
        images.append(batch.images)
    images = np.concatenate(images)
    results["samples"] = num_samples
    results["seconds_per_sample"] = (time.monotonic() - start) / num_samples
    agreement, per_class = metrics.class_agreement(classifier.predict(images), classes)
    results["class_agreement"] = agreement
    results["class_agreement_per_class"] = {
        pipeline.class_names[label]: share for label, share in per_class.items()
    }
    results["copying"] = metrics.copying_report(
        images[:COPY_CHECK_IMAGES], train_images, test_images[:COPY_CHECK_IMAGES]
    )
    if data["name"] != "digits":  # the digits are too few for it
        chosen = balanced(test_labels, len(images))
        features = classifier.features(train_images)
        for name, part in (
            ("samples", images[: len(chosen)]),
            ("real_test_images", test_images[chosen]),
        ):
            results[f"frechet_of_{name}"] = metrics.frechet_distance(
                classifier.features(part), features
            )
        results["frechet_images"] = len(chosen)

    columns = len(pipeline.class_names) if len(pipeline.class_names) <= 20 else 10
    save_png(out / "samples.png", image_grid(images[: 8 * columns], columns=columns))
    save_png(out / "stages.png", stages_picture(pipeline, first, count=6))
    (out / "metrics.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


def main(_):
    pipeline = Pipeline.from_pretrained(FLAGS.workdir)
    out = Path(FLAGS.out or Path(FLAGS.workdir) / "evaluation")
    out.mkdir(parents=True, exist_ok=True)
    results = evaluate(
        pipeline, out, FLAGS.num_samples, FLAGS.seed, FLAGS.batch_size, **settings_from_flags()
    )
    print(json.dumps(results, indent=1))
    print(f"metrics.json, samples.png, stages.png and reconstructions.png: {out}")


if __name__ == "__main__":
    define_flags()
    flags.DEFINE_integer("num_samples", 1000, "Samples, the classes in turn.", lower_bound=10)
    flags.mark_flags_as_required(["workdir"])
    cli.run(main)
