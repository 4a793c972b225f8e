"""Pixel and adversarial losses of the tokenizer. The quantizer's own loss is in quantizer.py.

Logits are the discriminator's, float32 (B, P), one for each of P positions of its taps.
"""

import flax.struct
import jax
import jax.numpy as jnp

RECONSTRUCTION_LOSSES = {
    "l1": lambda restored, images: jnp.abs(restored - images).mean(),
    "l2": lambda restored, images: jnp.square(restored - images).mean(),
}


def generator_loss(fake):
    """Non-saturating: softplus(-m), m the mean logit of an image, averaged over the images."""
    return jax.nn.softplus(-fake.mean(axis=1)).mean()


def discriminator_loss(real, fake):
    """Hinge: half the sum of mean relu(1 - real) and mean relu(1 + fake), as in VQGAN."""
    return 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())


class LeCam(flax.struct.PyTreeNode):
    """Moving averages of the mean logits, for the LeCam regularizer (Tseng et al. 2021).

    They start at zero, which is what an untrained discriminator says: the first steps are held
    close to "undecided" and need no special case.
    """

    real: jax.Array  # float32 scalar
    fake: jax.Array

    @classmethod
    def create(cls) -> "LeCam":
        return cls(real=jnp.zeros(()), fake=jnp.zeros(()))

    def loss(self, real, fake):
        """Mean relu(real - average fake)^2 plus mean relu(average real - fake)^2.

        Take it from the averages before this step's update.
        """
        return (
            jnp.square(jax.nn.relu(real - self.fake)).mean()
            + jnp.square(jax.nn.relu(self.real - fake)).mean()
        )

    def update(self, real, fake, decay: float = 0.999) -> "LeCam":
        """The averages after the logits of one step; carries no gradient."""
        step = lambda average, logits: decay * average + (1 - decay) * logits.mean()
        new = LeCam(real=step(self.real, real), fake=step(self.fake, fake))
        return jax.lax.stop_gradient(new)
