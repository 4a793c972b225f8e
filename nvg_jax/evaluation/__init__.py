"""Metrics of images and features, and small classifiers. Nothing here knows NVG."""

from nvg_jax.evaluation.metrics import (
    Moments,
    class_agreement,
    copying_report,
    frechet_distance,
    inception_score,
    nearest_distances,
    precision_recall,
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
