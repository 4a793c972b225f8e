"""The state of a part in training, and its update."""

from collections.abc import Iterable
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float32, Int32

Params = Any  # nested dictionaries of arrays

NORMS = 100  # gradient norms whose median a step is compared with
FAR_ABOVE = 10.0  # times this median


class Skipping(flax.struct.PyTreeNode):
    """Which steps to leave out: the last gradient norms that were finite, and two counts.

    Attributes:
        norms: of each metric that is a gradient norm, the last `NORMS` values; NaN before those.
        count: the number of norms so far.
        in_a_row: the number of steps left out since the last one that was taken.
    """

    norms: dict[str, Float32[Array, " NORMS"]]
    count: Int32[Array, ""]
    in_a_row: Int32[Array, ""]

    @classmethod
    def create(cls, names: Iterable[str]) -> Self:
        zero = jnp.zeros((), jnp.int32)
        return cls({name: jnp.full(NORMS, jnp.nan) for name in sorted(names)}, zero, zero)

    def update(self, metrics: dict[str, Array]) -> tuple[Self, Bool[Array, ""]]:
        """(the state after a step, whether to leave the step out).

        A step is left out if one of its norms is not finite or `FAR_ABOVE` times the median, once
        there are `NORMS` of them. Finite norms count for the median, taken or not, so that it
        follows a lasting change.
        """
        norms = {name: metrics[name] for name in self.norms}
        finite = jnp.stack([jnp.isfinite(norm) for norm in norms.values()]).all()
        far = jnp.stack([norms[n] > FAR_ABOVE * jnp.median(self.norms[n]) for n in norms]).any()
        left_out = ~finite | far  # the median is NaN, and nothing above it, while one is missing
        place = self.count % NORMS
        updated = self.replace(
            norms={
                n: jnp.where(finite, old.at[place].set(norms[n]), old)
                for n, old in self.norms.items()
            },
            count=self.count + finite,
            in_a_row=jnp.where(left_out, self.in_a_row + 1, 0),
        )
        return updated, left_out


class TrainState(flax.struct.PyTreeNode):
    """Parameters, their moving average, the optimizer's state and the number of steps.

    skipping: None if no step is ever left out.
    """

    step: Int32[Array, ""]
    params: Params
    ema_params: Params
    opt_state: optax.OptState
    skipping: Skipping | None = None

    @classmethod
    def create(cls, params: Params, optimizer: optax.GradientTransformation) -> Self:
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            ema_params=jax.tree.map(jnp.copy, params),
            opt_state=optimizer.init(params),
        )

    def update(
        self, grads: Params, optimizer: optax.GradientTransformation, ema_decay: float | Array
    ) -> Self:
        """The state after one step of `optimizer` along `grads`."""
        updates, opt_state = optimizer.update(grads, self.opt_state, self.params)
        params = optax.apply_updates(self.params, updates)
        ema_params = optax.incremental_update(params, self.ema_params, 1 - ema_decay)
        return self.replace(
            step=self.step + 1, params=params, ema_params=ema_params, opt_state=opt_state
        )
