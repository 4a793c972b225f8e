"""AdamW with the decay mask, the gradient clip and the learning-rate schedules (Appendix)."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, Int32

from nvg_jax.errors import UserError
from nvg_jax.training.state import Params

SCHEDULES = ("linear", "cosine", "constant")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer; configs/common.py has the published values.

    learning_rate: the rate at batch size 256; it scales linearly with the batch size.
    schedule: after a linear warm-up from `warmup_start` of the rate, "linear" is constant until
        `decay_start` (a fraction of all steps) and falls linearly to `final` of it; "cosine" falls
        to `final` along a cosine; "constant" stays.
    ema_warmup: whether the decay starts as (1 + step) / (10 + step), so that the average forgets
        the initial parameters.
    """

    learning_rate: float
    schedule: str
    warmup_steps: int
    warmup_start: float
    decay_start: float
    final: float
    b1: float
    b2: float
    weight_decay: float
    clip: float
    ema_decay: float
    ema_warmup: bool = False

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise UserError(
                f"Unknown learning-rate schedule {self.schedule!r}; choose one of {SCHEDULES}."
            )

    def peak_rate(self, batch_size: int) -> float:
        """The learning rate after the warm-up at a global batch size."""
        return self.learning_rate * batch_size / 256

    def average_decay(self, step: Int32[Array, ""]) -> float | Float32[Array, ""]:
        """The decay of the average in the step after `step` others."""
        if not self.ema_warmup:
            return self.ema_decay
        return jnp.minimum(self.ema_decay, (1 + step) / (10 + step))


def learning_rate_schedule(config: OptimizerConfig, batch_size: int, steps: int) -> optax.Schedule:
    """The learning rate of each step of a run of `steps` steps at a global batch size."""
    rate = config.peak_rate(batch_size)
    warmup = min(config.warmup_steps, steps)
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(rate, max(steps - warmup, 1), alpha=config.final)
    elif config.schedule == "constant":
        main = optax.constant_schedule(rate)
    else:
        decay_start = max(int(config.decay_start * steps), warmup)
        main = optax.linear_schedule(
            rate, config.final * rate, max(steps - decay_start, 1), decay_start - warmup
        )
    ramp = optax.linear_schedule(config.warmup_start * rate, rate, max(warmup, 1))
    return optax.join_schedules([ramp, main], [warmup])


def decay_mask(params: Params) -> Params:
    """True for every parameter of two or more dimensions, not counting a layer or stage axis."""

    def decays(path, leaf):
        names = [getattr(key, "key", "") for key in path]
        stacked = "blocks" in names[1:] or any(name.startswith("smooth_") for name in names)
        return leaf.ndim - stacked >= 2

    return jax.tree_util.tree_map_with_path(decays, params)


def every_parameter(params: Params) -> Params:
    """True for every parameter."""
    return jax.tree.map(lambda _: True, params)


def make_optimizer(
    config: OptimizerConfig, learning_rate: optax.Schedule, decay_all: bool = False
) -> optax.GradientTransformation:
    """Clip by the global norm, then AdamW.

    Args:
        learning_rate: see `learning_rate_schedule`.
        decay_all: whether weight decay covers biases and scales too.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            learning_rate,
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=every_parameter if decay_all else decay_mask,
        ),
    )
