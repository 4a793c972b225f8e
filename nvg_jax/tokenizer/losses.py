"""Pixel and adversarial losses of the tokenizer; the quantizer loss is in quantizer.py.

Logits are the discriminator's output at all positions of all its heads.
`training.tokenizer.loss_terms` weights and adds the losses.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

RECONSTRUCTION_LOSSES = {
    "l1": lambda restored, images: jnp.abs(restored - images).mean(),
    "l2": lambda restored, images: jnp.square(restored - images).mean(),
}


def adversarial_loss(fake: Float[Array, "B positions"]) -> Float[Array, ""]:
    """Non-saturating loss: mean over the images of softplus(-m), with m an image's mean logit."""
    return jax.nn.softplus(-fake.mean(axis=1)).mean()


def discriminator_loss(
    real: Float[Array, "B positions"], fake: Float[Array, "B positions"]
) -> Float[Array, ""]:
    """Hinge loss: half the sum of mean relu(1 - real) and mean relu(1 + fake), as in VQGAN."""
    return 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())


class LeCam(flax.struct.PyTreeNode):
    """Moving averages of the mean logits, for the LeCam regularizer (Tseng et al. 2021).

    They start at zero, the mean logit of an untrained discriminator. This holds the logits of the
    first steps near "undecided" without a special case.
    """

    real: Any  # float32 scalar, or what takes its place in an abstract state
    fake: Any

    @classmethod
    def create(cls) -> "LeCam":
        return cls(real=jnp.zeros(()), fake=jnp.zeros(()))

    def loss(
        self, real: Float[Array, "B positions"], fake: Float[Array, "B positions"]
    ) -> Float[Array, ""]:
        """Mean relu(real - average fake)^2 plus mean relu(average real - fake)^2.

        The averages include the same logits already: call this on what `update` returns.
        """
        return (
            jnp.square(jax.nn.relu(real - self.fake)).mean()
            + jnp.square(jax.nn.relu(self.real - fake)).mean()
        )

    def update(
        self,
        real: Float[Array, "B positions"],
        fake: Float[Array, "B positions"],
        decay: float = 0.999,
    ) -> "LeCam":
        """The averages after one step's logits; gradients are stopped."""
        step = lambda average, logits: decay * average + (1 - decay) * logits.mean()
        new = LeCam(real=step(self.real, real), fake=step(self.fake, fake))
        return jax.lax.stop_gradient(new)
