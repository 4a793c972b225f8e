"""The five metrics of a generative model, from the features of its samples and of real images."""

import logging
from typing import Any, NamedTuple

import jax
import numpy as np

from nvg_jax.evaluation import metrics

logger = logging.getLogger("nvg_jax")


class FeatureSet(NamedTuple):
    """A network's features of a set of images.

    Attributes:
        count: number of images behind the statistics.
        pool: float32 (N, D), N at most `count`.
        logits: float32 (N, C).
        pool_statistics, spatial_statistics: mean and covariance, float64.
    """

    count: int
    pool: np.ndarray
    logits: np.ndarray
    pool_statistics: tuple[np.ndarray, np.ndarray]
    spatial_statistics: tuple[np.ndarray, np.ndarray]

    @classmethod
    def of(cls, features) -> "FeatureSet":
        """From `ImageFeatures` of all images."""
        statistics = (metrics.Moments.of(x).statistics for x in (features.pool, features.spatial))
        return cls(len(features.pool), features.pool, features.logits, *statistics)


def generation_metrics(reference: FeatureSet, samples: FeatureSet) -> dict[str, Any]:
    """FID, sFID, Inception Score, precision and recall, as the ADM evaluator defines them.

    The Inception Score depends on the order of the images, so samples are first shuffled with a
    fixed permutation. Distances for precision and recall are float32.

    Returns:
        {"fid", "sfid", "inception_score", "precision", "recall"}.

    Raises:
        UserError: too few images, or features of another network.
    """
    for name, images in (("samples", samples), ("reference images", reference)):
        width = len(images.pool_statistics[0])
        if images.count <= width:
            logger.warning(
                "%d %s for %d features: the covariance is rank deficient and FID is biased upward; "
                "compare only figures from the same number of images",
                images.count,
                name,
                width,
            )
    order = np.random.default_rng(0).permutation(len(samples.logits))
    precision, recall = metrics.precision_recall(reference.pool, samples.pool)
    return {
        "fid": metrics.frechet_distance(reference.pool_statistics, samples.pool_statistics),
        "sfid": metrics.frechet_distance(reference.spatial_statistics, samples.spatial_statistics),
        "inception_score": metrics.inception_score(jax.nn.softmax(samples.logits[order])),
        "precision": precision,
        "recall": recall,
    }
