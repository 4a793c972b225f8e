"""Learning rate and regularization of the digits' generators, on one tokenizer.

    python -m nvg_jax.train --config=configs/digits.py --config.part=tokenizer --workdir=runs/digits
    python launch/sweep.py --sweep=configs/sweeps/digits_generators.py --workdir=runs/sweep --submit

Long trainings memorize the 1,497 images. The sweep therefore varies the regularization (drop path,
decay of the weight average) together with the learning rate.
"""

from configs.sweeps import product

CONFIG = "configs/digits.py"
FIXED = {"part": "generators", "tokenizer_workdir": "runs/digits"}


def get_sweep():
    return product(
        {
            "generator_training.optimizer.learning_rate": [8e-3, 1.6e-2, 3.2e-2],
            "generator_training.optimizer.ema_decay": [0.995, 0.998],
            "content.drop_path": [0.0, 0.1],
        }
    )
