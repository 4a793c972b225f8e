"""How long a whole run still takes: the steps, evaluations and measurements of FID of all parts."""

import collections
import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

from jax.extend import core

from nvg_jax.training.run import Run
from nvg_jax.training.trainer import Trainer

RECENT = 9  # measurements whose median counts: a moment of other work on the machine does not


@dataclasses.dataclass(frozen=True)
class Work:
    """What one part has to do.

    Attributes:
        step_flops: of a training step.
        eval_share: an evaluation, in training steps, as long as none is measured: a third of a step
            for each batch.
    """

    name: str
    steps: int
    step_flops: float
    eval_every: int
    fid_every: int
    eval_share: float


class Forecast:
    """Learns how long a step, an evaluation and a measurement of FID take, and looks ahead.

    Before a part has begun, its step is expected to take as long per FLOP as that of the part that
    runs, and its compilation as long; so is the compilation of what an evaluation needs.
    """

    def __init__(self, works: Sequence[Work]):
        self._works = list(works)
        self._seconds = collections.defaultdict(lambda: collections.deque(maxlen=RECENT))

    def measured(self, part: str, kind: str, seconds: float):
        """Notes the time of one "step", "compilation", "evaluation" or "fid"."""
        self._seconds[part, kind].append(seconds)

    def _time(self, part: str, kind: str) -> float | None:
        recent = self._seconds[part, kind]
        return statistics.median(recent) if recent else None

    def remaining(self, part: str, step: int) -> float | None:
        """Seconds until the last part ends; None before a step is measured.

        FID counts once it has been measured; see `covers`.
        """
        ahead = self._ahead(part, step)
        own = self._time(part, "step")
        if not ahead or own is None:
            return None
        (current, _), total = ahead[0], 0.0
        compilation = self._time(part, "compilation") or 0.0
        for work, done in ahead:
            one = self._time(work.name, "step") or own * work.step_flops / current.step_flops
            evaluation = self._time(work.name, "evaluation")
            evaluations = due(done, work.steps, work.eval_every)
            if work is not current:
                total += compilation
            if evaluation is None:
                total += compilation if evaluations else 0.0
                evaluation = work.eval_share * one
            total += (work.steps - done) * one + evaluations * evaluation
            fid = self._time(work.name, "fid") or 0.0
            total += due(done, work.steps, work.fid_every) * fid
        return total

    def covers(self, part: str, step: int) -> str:
        """What `remaining` is of, such as "with generators, without FID"; empty: of this part.

        FID is left out if a measurement lies ahead whose time is not known yet.
        """
        ahead = self._ahead(part, step)
        said = [f"with {' and '.join(work.name for work, _ in ahead[1:])}"] if ahead[1:] else []
        if any(
            due(done, work.steps, work.fid_every) and self._time(work.name, "fid") is None
            for work, done in ahead
        ):
            said.append("without FID")
        return ", ".join(said)

    def _ahead(self, part: str, step: int) -> list[tuple[Work, int]]:
        """(work, steps done) of this part and of those after it."""
        names = [work.name for work in self._works]
        works = self._works[names.index(part) :] if part in names else []
        return [(work, step if work.name == part else 0) for work in works]


def due(done: int, steps: int, every: int) -> int:
    """How often something is due after `done` steps: every `every` steps, and at the end."""
    return math.ceil(steps / every) - done // every if every and done < steps else 0


def forecast(run: Run, trainers: Sequence[Trainer]) -> Forecast:
    """The forecast of a run of these trainers."""
    works = []
    for trainer in trainers:
        recipe = run.config[trainer.part.section]
        images = min(recipe.eval_images or len(run.test_source), len(run.test_source))
        share = math.ceil(images / recipe.batch_size) / 3
        intervals = recipe.eval_every, recipe.fid_every
        flops = step_flops(trainer) if len(trainers) > 1 else 1.0
        works.append(Work(trainer.part.name, trainer.steps, flops, *intervals, share))
    return Forecast(works)


def step_flops(trainer: Trainer) -> float:
    """The FLOPs of all matrix products and convolutions of the last step, as nearly all are."""
    return flops(trainer.trace(trainer.steps - 1).jaxpr.jaxpr)


def flops(jaxpr: core.Jaxpr) -> float:
    """The FLOPs of all matrix products and convolutions; loops of unknown length count once."""
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape: Any = equation.invars[0].aval
            inner = math.prod(shape.shape[axis] for axis in contracted)
            total += 2 * inner * size(equation.outvars[0])
        elif name == "conv_general_dilated":
            kernel: Any = equation.invars[1].aval
            features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            total += 2 * size(equation.outvars[0]) * size(equation.invars[1]) / features
        else:
            times = params.get("length", 1) if name == "scan" else 1
            total += times * sum(map(flops, core.jaxprs_in_params(params)))
    return total


def size(variable) -> int:
    return math.prod(variable.aval.shape)
