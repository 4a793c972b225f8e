"""Evaluation: `python -m nvg_jax.evaluate --workdir=runs/digits --num_samples=1000`.

Reconstruction of held-out images, class agreement of samples by a classifier that was fitted on
real images and knows nothing of NVG, their distance to the training images, and a Frechet
distance in the classifier's features. Writes metrics.json, samples.png and stages.png. Several
processes share the reconstruction and the sampling; process 0 measures and writes.
"""

import json
import logging
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from nvg_jax import cli
from nvg_jax.data import Source, open_source
from nvg_jax.data.transforms import Transform, decode
from nvg_jax.evaluation import metrics
from nvg_jax.evaluation.classifiers import DigitClassifier, train_classifier
from nvg_jax.pipeline import Output, Pipeline
from nvg_jax.sample import (
    Samples,
    define_flags,
    gather,
    own_share,
    settings_from_flags,
    stages_picture,
)
from nvg_jax.visualize import image_grid, reconstruction_grid, replacing, save_png

FLAGS = flags.FLAGS
logger = logging.getLogger("nvg_jax")
STAGES_SHOWN = 4  # samples in the picture of the stages
MAX_BYTES = 4 << 30  # of one split's images in memory
COPY_CHECK_IMAGES = 2_000  # samples and held-out images compared with all training images


def load_images(
    source: Source, transform: Transform, limit: int, on_bad: str = "error"
) -> tuple[np.ndarray, np.ndarray]:
    """At most `limit` images of a split, drawn once and for all, and their labels.

    Args:
        on_bad: what an unreadable image does: "error" stops, "skip" leaves it out with a warning.

    Returns:
        float32 (N, H, W, 3) in [-1, 1] and int (N,). N is also bounded by MAX_BYTES.

    Raises:
        ValueError: an unreadable image, with its name.
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
                    f"{name}: {error}. Mend it or take it out of the data set to evaluate."
                ) from error
            logger.warning("left out %s: %s", name, error)
            continue
        images[count], labels[count] = transform(image), item["label"]
        count += 1
    if count == 0:
        raise ValueError(f"None of the {limit} images to evaluate with can be read.")
    return images[:count], labels[:count]


def balanced(labels: np.ndarray, count: int) -> np.ndarray:
    """Indices of at most `count` images, the classes in turn as far as they go."""
    turn = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        turn[labels == label] = np.arange((labels == label).sum())
    return np.argsort(turn, kind="stable")[:count]


def reconstruct(pipeline: Pipeline, images: np.ndarray, batch_size: int = 100) -> np.ndarray:
    """All images through the tokenizer and back, the work dealt out to the processes."""
    num_batches = -(-len(images) // batch_size)
    own = own_share(num_batches)
    restored = np.empty((len(own), batch_size, *images.shape[1:]), np.float32)
    for place, batch in enumerate(own):
        part = images[batch * batch_size : (batch + 1) * batch_size]
        filled = np.concatenate([part, np.repeat(part[-1:], batch_size - len(part), axis=0)])
        restored[place] = pipeline.reconstruct(filled)
    return gather(restored, num_batches).reshape(-1, *images.shape[1:])[: len(images)]


def draw(samples: Samples) -> tuple[np.ndarray, Output | None]:
    """The images of all samples, the work dealt out to the processes.

    Returns:
        float32 (N, H, W, 3) in [-1, 1], and the process's first batch.
    """
    own, first = own_share(samples.num_batches), None
    images = np.zeros((len(own), samples.batch_size, *samples.image_shape), np.float32)
    for place, (_, output) in enumerate(samples.make_all(own)):
        images[place, : len(output.images)] = output.images
        first = first or output
    images = gather(images, samples.num_batches)
    return images.reshape(-1, *samples.image_shape)[: len(samples)], first


def evaluate(
    pipeline: Pipeline,
    data: dict,
    out: Path,
    num_samples: int,
    seed: int,
    batch_size: int,
    **settings,
) -> dict | None:
    """Writes pictures and metrics.json into `out`; without generators, of the tokenizer alone.

    Args:
        data: "name", "data_dir", "resize" and, if there, "on_bad" as in the section `data` of a
            config.
        settings: of `Pipeline.sample`.

    Returns:
        The metrics in process 0, None in the others.

    Raises:
        ValueError: the data is not what the model was trained on, or an image cannot be read.
    """
    transform = Transform(pipeline.tokenizer.config.image_size, data["resize"] or None)
    sources = [
        open_source(data["name"], split, data_dir=data["data_dir"] or None)
        for split in ("train", "test")
    ]
    if sources[0].num_classes != len(pipeline.class_names):
        raise ValueError(
            f"The model has {len(pipeline.class_names)} classes and the data set {data['name']!r} "
            f"has {sources[0].num_classes}; evaluate on the data it was trained on."
        )
    on_bad = data.get("on_bad", "error")
    if jax.process_index() == 0:
        train_images, train_labels = load_images(sources[0], transform, 60_000, on_bad)
    test_images, test_labels = load_images(sources[1], transform, 10_000, on_bad)

    restored = reconstruct(pipeline, test_images)
    results = {"test_psnr": float(metrics.psnr(test_images, restored).mean())}

    if pipeline.can_sample:
        classes = np.arange(num_samples) % len(pipeline.class_names)
        start = time.monotonic()
        batch_size = min(batch_size, num_samples)
        samples = Samples(pipeline, classes.tolist(), 1, batch_size, seed, settings)
        images, first = draw(samples)
        results["samples"] = num_samples
        results["seconds_per_sample"] = (time.monotonic() - start) / num_samples
    if jax.process_index():
        return None

    if data["name"] == "digits":
        classifier = DigitClassifier(train_images, train_labels)
    else:
        classifier = train_classifier(train_images, train_labels, len(pipeline.class_names))
        results["frechet_of_reconstructions"] = metrics.frechet_distance(
            classifier.features(restored), classifier.features(test_images)
        )
    real, _ = metrics.class_agreement(classifier.predict(test_images), test_labels)
    results["classifier_accuracy_on_real_test_images"] = real
    kept, _ = metrics.class_agreement(classifier.predict(restored), test_labels)
    results["classifier_accuracy_on_reconstructions"] = kept
    save_png(out / "reconstructions.png", reconstruction_grid(test_images[:12], restored[:12]))
    if pipeline.can_sample:
        results |= judge_samples(
            classifier,
            images,
            classes,
            pipeline.class_names,
            train_images,
            test_images,
            test_labels,
        )
        columns = len(pipeline.class_names) if len(pipeline.class_names) <= 20 else 10
        save_png(out / "samples.png", image_grid(images[: 8 * columns], columns=columns))
        stages_shown = min(STAGES_SHOWN, len(first.images))
        save_png(out / "stages.png", stages_picture(pipeline, first, np.arange(stages_shown)))
    with replacing(out / "metrics.json") as file:
        file.write((json.dumps(results, indent=1) + "\n").encode())
    return results


def judge_samples(
    classifier, images, classes, class_names, train_images, test_images, test_labels
) -> dict:
    """Metrics of samples, float32 (N, H, W, 3), that were drawn for `classes`, int (N,)."""
    agreement, per_class = metrics.class_agreement(classifier.predict(images), classes)
    results = {
        "class_agreement": agreement,
        "class_agreement_per_class": {
            class_names[label]: share for label, share in per_class.items()
        },
        "copying": metrics.copying_report(
            images[:COPY_CHECK_IMAGES], train_images, test_images[:COPY_CHECK_IMAGES]
        ),
    }
    if not isinstance(classifier, DigitClassifier):  # the digits are too few for it
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
    return results


def main(_):
    pipeline = Pipeline.from_pretrained(FLAGS.workdir)
    out = Path(FLAGS.out or Path(FLAGS.workdir) / "evaluation")
    out.mkdir(parents=True, exist_ok=True)
    data = pipeline.meta.get("config", {}).get("data")
    if FLAGS.data_name:
        data = {"name": FLAGS.data_name, "data_dir": FLAGS.data_dir, "resize": FLAGS.resize}
    if data is None:
        raise ValueError(
            "This folder does not say what data it was trained on (converted weights do not); "
            "give --data_name, for example tfds:imagenet2012, and --data_dir."
        )
    results = evaluate(
        pipeline,
        data,
        out,
        FLAGS.num_samples,
        FLAGS.seed,
        FLAGS.batch_size,
        **settings_from_flags(),
    )
    if results is not None:
        print(json.dumps(results, indent=1))
        print(f"metrics.json and pictures: {out}")
    multihost_utils.sync_global_devices("the metrics are written")


if __name__ == "__main__":
    define_flags()
    flags.DEFINE_integer("num_samples", 1000, "Samples, the classes in turn.", lower_bound=10)
    flags.DEFINE_string("data_name", None, "Data set, if not the one it was trained on.")
    flags.DEFINE_string("data_dir", "", "Folder of --data_name.")
    flags.DEFINE_integer("resize", 0, "Short side before the crop; 0 is image size * 288 / 256.")
    flags.mark_flags_as_required(["workdir"])
    cli.main(main)
