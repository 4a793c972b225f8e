"""The Frechet distance of a model while it trains, measured by all processes together."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from nvg_jax import pretrained
from nvg_jax.evaluation.metrics import Moments, frechet_distance
from nvg_jax.jobs.comparison import open_reference, split_images
from nvg_jax.jobs.evaluation import load_split, make_classifier
from nvg_jax.jobs.features import Inception, gather_moments, reference_features
from nvg_jax.jobs.sampling import SamplingJob
from nvg_jax.parts import Part
from nvg_jax.pipeline import Pipeline
from nvg_jax.runtime import preemption
from nvg_jax.runtime.processes import gather, own_share
from nvg_jax.runtime.progress import Progress
from nvg_jax.runtime.sharding import fill_batch, make_mesh
from nvg_jax.visualize import to_uint8
from nvg_jax.workdir import RunMetadata

Statistics = tuple[np.ndarray, np.ndarray]  # mean (D,) and covariance (D, D)


class Scorer:
    """FID of the images that a model generates, at several steps of its training.

    Args:
        judge: the network whose features are compared; has `image_features`.
        count: number of images.
        batch_size: this process's batch size.
        images: (pipeline, number) -> batch `number` of the images, uint8 (B, H, W, 3).
        reference: statistics of the features to compare with.
    """

    def __init__(
        self,
        judge,
        count: int,
        batch_size: int,
        images: Callable[[Pipeline, int], np.ndarray],
        reference: Statistics,
    ):
        self._judge, self._count, self._batch_size = judge, count, batch_size
        self._images, self._reference = images, reference

    def __call__(self, metadata: RunMetadata, params: dict[str, Any]) -> float:
        """The distance for the given weights, the same on every process.

        Collective: every process must call it.

        Args:
            params: {"tokenizer": tree} and, to sample, "content" and "structure", NumPy arrays.

        Raises:
            Preempted: SIGTERM arrived.
        """
        # Not in the mesh of all processes, where every operation would wait for the others.
        with jax.set_mesh(make_mesh(devices=jax.local_devices())):
            pipeline = Pipeline(metadata, params)
            found = statistics(
                self._judge,
                self._count,
                self._batch_size,
                lambda number: self._images(pipeline, number),
            )
        own = frechet_distance(self._reference, found)
        # The last digits may differ between machines, but all must make the same decision.
        return float(gather(np.array([own]), jax.process_count())[0])


def statistics(
    judge, count: int, batch_size: int, images: Callable[[int], np.ndarray]
) -> Statistics:
    """The statistics of the features of `count` images; each process computes its share of batches.

    Args:
        images: batch number -> uint8 (batch_size, H, W, 3); the last batch may be smaller.

    Raises:
        Preempted: SIGTERM arrived.
    """
    num_batches, moments = -(-count // batch_size), Moments()
    own = own_share(num_batches)
    sizes = [min(batch_size, count - number * batch_size) for number in own]
    progress = Progress("FID", sum(sizes), "images")
    for row in range(-(-num_batches // jax.process_count())):
        if preemption.noticed():
            raise preemption.Preempted("preempted during an evaluation")
        if row < len(own):
            batch = fill_batch(images(own[row])[: sizes[row]], batch_size)
            moments += Moments.of(judge.image_features(batch).pool[: sizes[row]])
            progress.update(moments.count)
    return gather_moments(moments).statistics


def make_scorers(
    config: ml_collections.ConfigDict, parts: Sequence[Part], num_classes: int
) -> dict[Part, Scorer]:
    """{part: its scorer} for the parts with a `fid_every`.

    The tokenizer's reconstructions are compared with their originals, held-out images; samples with
    `config.evaluation.reference`.

    Raises:
        UserError: a network, a file or data is missing.
    """
    parts = [part for part in parts if config[part.section].fid_every]
    if not parts:
        return {}
    data, size = config.data.to_dict(), tuple(config.tokenizer.image_size)
    scorers, classifier = {}, None
    # Not in the mesh of all processes: a judge works on this process's devices.
    with jax.set_mesh(make_mesh(devices=jax.local_devices())):
        if config.evaluation.judge == "classifier":
            train = load_split(data, "train", size)
            classifier = make_classifier(data["name"], train, num_classes)
        for part in parts:
            recipe = config[part.section]
            count, batch_size = recipe.fid_samples, recipe.batch_size
            batch_size = min(max(1, batch_size // jax.process_count()), count)
            if part.images == "reconstructions":
                judge = classifier or Inception(pretrained.antialiased_inception_input)
                held_out = split_images(data, "test", size, batch_size)
                scorers[part] = reconstruction_scorer(judge, count, held_out)
                continue
            if classifier:
                judge = classifier
                reference = Moments.of(judge.image_features(train.images).pool).statistics
            else:
                judge = Inception()
                images = open_reference(config.evaluation.reference, batch_size, size, data)
                reference = reference_features(images, judge).pool_statistics
            scorers[part] = sample_scorer(judge, count, batch_size, config.seed, reference)
    return scorers


def reconstruction_scorer(judge, count: int, originals) -> Scorer:
    """rFID of the first `count` images of a split, or of all if there are fewer."""
    count, batch_size = min(count, len(originals)), min(originals.batch_size, len(originals))
    batch = lambda number: fill_batch(next(originals.batches([number])), batch_size)
    reference = statistics(judge, count, batch_size, batch)
    restored = lambda pipeline, number: to_uint8(pipeline.reconstruct(batch(number)))
    return Scorer(judge, count, batch_size, restored, reference)


def sample_scorer(judge, count: int, batch_size: int, seed: int, reference: Statistics) -> Scorer:
    """FID of `count` samples, cycling through the classes, drawn with the model's settings."""

    def samples(pipeline, number):
        classes = [index % pipeline.metadata.model.num_classes for index in range(count)]
        return next(SamplingJob(pipeline, classes, 1, batch_size, seed, {}).batches([number]))

    return Scorer(judge, count, batch_size, samples, reference)
