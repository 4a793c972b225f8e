"""The cheapest settings of the structure flow that sample as well as a model's own."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from nvg_jax.errors import UserError
from nvg_jax.evaluation.features import FeatureSet
from nvg_jax.evaluation.judges import Judge
from nvg_jax.evaluation.report import digits, fid
from nvg_jax.jobs.sampling_runs import SamplingJob
from nvg_jax.pipeline import Pipeline
from nvg_jax.sampling.generate import flow_evaluations
from nvg_jax.sampling.settings import Settings, text_of

logger = logging.getLogger("nvg_jax")
STEPS = (8, 4, 2, 1)  # tried beside the model's own number


class Point(NamedTuple):
    """Settings to try, and the evaluations of the structure generator for one image."""

    evaluations: int
    settings: dict[str, Any]

    def __str__(self) -> str:
        names = " ".join(f"{name}={text_of(value)}" for name, value in self.settings.items())
        return f"{names or 'own settings'} ({self.evaluations} evaluations)"


def candidates(pipe: Pipeline) -> list[Point]:
    """What can replace the model's own settings at a lower cost, cheapest first."""
    config = pipe.tokenizer.config
    splits = config.num_stages - 2  # the last split needs no flow
    solves = {tuple(range(0, splits, 2)), (0, splits // 2), (0, 1), (0,)}
    solves = {(), *(stages for stages in solves if len(stages) < splits > max(stages))}
    steps = [n for n in STEPS if n < pipe.settings.flow_steps] + [pipe.settings.flow_steps]
    points = []
    for stages in solves:
        for count in steps:
            point = {"flow_steps": count, "structure_solves": stages}
            try:
                points.append(Point(evaluations(pipe, pipe.settings.updated(point)), point))
            except UserError:  # a distilled model knows few numbers of steps
                continue
    own = evaluations(pipe, pipe.settings)
    order = lambda point: (point.evaluations, point.settings["flow_steps"])
    return sorted((point for point in points if point.evaluations < own), key=order)


def evaluations(pipe: Pipeline, settings: Settings) -> int:
    """How often the structure generator runs for one image.

    Raises:
        UserError: settings that this model does not support.
    """
    pipe.metadata.expand_settings(settings)
    plan, _ = pipe.program.plan(settings)
    return flow_evaluations(plan, pipe.tokenizer.config.num_positions)


def tune(
    points: Sequence[Point], own: Point, fids: Callable[[Point], np.ndarray]
) -> tuple[Point, list[str]]:
    """The first of `points` whose mean FID is no worse than the worst FID of `own`.

    Args:
        points: cheapest first.
        own: the settings to compare with; the answer if no point is as good.
        fids: the FID of each seed.

    Returns:
        The point, and a line of text on each that was measured.
    """
    lines = []

    def measured(point: Point) -> np.ndarray:
        values = fids(point)
        lines.append(f"FID {', '.join(map(digits, values))}: {point}")
        logger.info(lines[-1])
        return values

    limit = measured(own).max()
    best = next((point for point in points if measured(point).mean() <= limit), own)
    return best, lines


def measure_fids(
    job: SamplingJob, judge: Judge, reference: FeatureSet, seeds: int, point: Point
) -> np.ndarray:
    """The FID of a point's samples for each seed, from `job.seed` on."""
    changed = job.with_settings(point.settings)
    runs = [dataclasses.replace(changed, seed=job.seed + number) for number in range(seeds)]
    return np.array([fid(run, judge, reference) for run in runs])
