"""The Frechet distance of a model while it trains, measured by all processes together."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from nvg_jax.evaluation.features import FeatureSet
from nvg_jax.evaluation.judges import FITTED, Judge, fit_classifier, make_judge
from nvg_jax.evaluation.report import features_of, fid, reference_features
from nvg_jax.evaluation.sets import ImageSet, Split, load_split, open_reference
from nvg_jax.jobs.reconstruction import Reconstructions
from nvg_jax.jobs.sampling_runs import SamplingJob
from nvg_jax.metadata import RunMetadata
from nvg_jax.parts import Part
from nvg_jax.pipeline import Pipeline
from nvg_jax.runtime.processes import own_share
from nvg_jax.runtime.sharding import local_mesh
from nvg_jax.training.run import Run


class FidMeasurement(NamedTuple):
    """How the FID of a model is measured while it trains.

    Attributes:
        images: from the model to the images.
        reference: the judge's features to compare with.
    """

    judge: Judge
    images: Callable[[Pipeline], ImageSet]
    reference: FeatureSet

    def score(self, metadata: RunMetadata, params: dict[str, Any]) -> float:
        """FID of the images that a model makes, the same on every process.

        Collective: every process must call it.

        Args:
            params: {"tokenizer": tree} and, to sample, "content" and "structure", NumPy arrays.

        Raises:
            Preempted: SIGTERM arrived.
        """
        with jax.set_mesh(local_mesh()):
            return fid(self.images(Pipeline(metadata, params)), self.judge, self.reference)

    def seconds(self, metadata: RunMetadata, params: dict[str, Any]) -> float:
        """An estimate of the time of `score`, from one batch on this process, once compiled."""
        with jax.set_mesh(local_mesh()):
            made, start = self.images(Pipeline(metadata, params)), 0.0
            for _ in range(2):
                start = time.monotonic()
                self.judge.image_features(next(iter(made.filled([0]))))
            return (time.monotonic() - start) * len(own_share(made.num_batches))


def fid_measurements(run: Run, parts: Sequence[Part]) -> dict[Part, FidMeasurement]:
    """The measurements for the parts with a `fid_every`.

    The tokenizer's reconstructions are compared with their originals, held-out images; samples with
    `config.evaluation.reference`.

    Raises:
        UserError: a network, a file or data is missing.
    """
    config, num_classes = run.config, run.model.num_classes
    parts = [part for part in parts if config[part.section].fid_every]
    if not parts:
        return {}
    data = config.data.to_dict() | {"resize_filter": run.resize_filter}
    size = run.model.tokenizer.image_size
    train = functools.cache(lambda: load_split(data, "train", size))
    fit = functools.cache(
        lambda: fit_classifier(data["name"], train().images, train().labels, num_classes)
    )
    measurements, judge_name = {}, config.evaluation.judge
    with jax.set_mesh(local_mesh()):
        for part in parts:
            recipe = config[part.section]
            count, batch_size = recipe.fid_samples, recipe.batch_size
            batch_size = min(max(1, batch_size // jax.process_count()), count)
            judge = make_judge(judge_name, part.images, fit, config.pretrained_dir)
            if part.images == "reconstructions":
                originals = Split(data, "test", size, batch_size, count)
                reference = features_of(originals, judge, keep=0)
                images = functools.partial(Reconstructions, originals=originals)
            else:
                if judge_name in FITTED:
                    reference = features_of(train(), judge, keep=0)
                else:
                    real = open_reference(config.evaluation.reference, batch_size, size, data)
                    reference = reference_features(real, judge)
                images = functools.partial(
                    SamplingJob.cycling,
                    count=count,
                    batch_size=batch_size,
                    seed=config.seed,
                    settings={},  # the model's own
                )
            measurements[part] = FidMeasurement(judge, images, reference)
    return measurements
