"""Metrics of images and of features, judges, image sets, reports. Nothing here knows a model."""

from nvg_jax.evaluation.features import (
    Moments,
    class_agreement,
    frechet_distance,
    inception_score,
    precision_recall,
)
from nvg_jax.evaluation.image import (
    copying_report,
    nearest_distances,
    psnr,
    structural_similarity,
)

__all__ = [
    "Moments",
    "class_agreement",
    "copying_report",
    "frechet_distance",
    "inception_score",
    "nearest_distances",
    "precision_recall",
    "psnr",
    "structural_similarity",
]
