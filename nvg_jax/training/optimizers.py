"""Optimizers, the gradient clip and the learning-rate schedules (Appendix: AdamW)."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Float32, Int32

from nvg_jax.errors import UserError
from nvg_jax.training.state import Params

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("linear", "cosine", "constant")
MUON_RMS = 0.2  # of the entries of an orthogonalized update, as large as those of AdamW


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer; configs/common.py has the published values.

    learning_rate: the rate at batch size 256; it scales linearly with the batch size.
    schedule: after a linear warm-up from `warmup_start` of the rate, "linear" is constant until
        `decay_start` (a fraction of all steps) and falls linearly to `final` of it; "cosine" falls
        to `final` along a cosine; "constant" stays.
    name: "muon" orthogonalizes the updates of the linear layers of blocks (Jordan et al., 2024,
        with its momentum of 0.95; scaled as in Liu et al., arXiv 2502.16982), and only these decay.
    ema_decay: how much of the average of the parameters a step keeps.
    ema_warmup: whether this decay starts as (1 + step) / (10 + step), so that the average forgets
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
    ema_warmup: bool
    name: str = "adamw"

    def __post_init__(self):
        if self.name not in OPTIMIZERS:
            raise UserError(f"Unknown optimizer {self.name!r}; choose one of {OPTIMIZERS}.")
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


def dict_keys(path) -> list[str]:
    return [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]


def decay_mask(params: Params) -> Params:
    """True for every parameter of two or more dimensions, not counting a layer or stage axis."""

    def decays(path, leaf):
        names = dict_keys(path)
        stacked = "blocks" in names[1:] or any(name.startswith("smooth_") for name in names)
        return leaf.ndim - stacked >= 2

    return jax.tree_util.tree_map_with_path(decays, params)


def block_matrices(params: Params) -> Params:
    """The axes of every linear layer's kernel (layer, in, out) in blocks, None for all others."""

    def axes(path, _):
        names = dict_keys(path)
        inside = "blocks" in names[1:] and names[-1] == "kernel"
        return optax.contrib.MuonDimensionNumbers(1, 2) if inside else None

    return jax.tree_util.tree_map_with_path(axes, params)


def make_optimizer(
    config: OptimizerConfig, learning_rate: optax.Schedule, decay_all: bool = False
) -> optax.GradientTransformation:
    """Clip by the global norm, then the optimizer.

    Args:
        learning_rate: see `learning_rate_schedule`.
        decay_all: whether AdamW's weight decay covers biases and scales too.
    """
    if config.name == "muon":
        update = optax.contrib.muon(
            learning_rate,
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            muon_weight_dimension_numbers=block_matrices,
            consistent_rms=MUON_RMS,
        )
    else:
        update = optax.adamw(
            learning_rate,
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=True if decay_all else decay_mask,
        )
    return optax.chain(optax.clip_by_global_norm(config.clip), update)
