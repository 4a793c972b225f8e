"""The state of one network in training, and its update."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax


class TrainState(flax.struct.PyTreeNode):
    """Parameters, their moving average, the optimizer's state and the number of steps taken."""

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any

    @classmethod
    def create(cls, params, optimizer: optax.GradientTransformation) -> "TrainState":
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            ema_params=jax.tree.map(jnp.copy, params),
            opt_state=optimizer.init(params),
        )

    def update(
        self, grads, optimizer: optax.GradientTransformation, ema_decay: float
    ) -> "TrainState":
        """The state after one step of the optimizer along `grads`."""
        updates, opt_state = optimizer.update(grads, self.opt_state, self.params)
        params = optax.apply_updates(self.params, updates)
        ema_params = optax.incremental_update(params, self.ema_params, 1 - ema_decay)
        return self.replace(
            step=self.step + 1, params=params, ema_params=ema_params, opt_state=opt_state
        )
