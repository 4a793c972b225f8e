"""The state of a part in training, and its update."""

from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

Params = Any  # nested dictionaries of arrays


class TrainState(flax.struct.PyTreeNode):
    """Parameters, their moving average, the optimizer's state and the number of steps taken."""

    step: Int32[Array, ""]
    params: Params
    ema_params: Params
    opt_state: optax.OptState

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
