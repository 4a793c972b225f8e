"""The length of a training run: steps, epochs, errors."""

import pytest

from nvg_jax.errors import UserError
from nvg_jax.training.length import training_length


@pytest.mark.parametrize(
    "length, steps",
    [
        ("800 steps", 800),
        ("1 step", 1),
        (" 12  steps ", 12),
        ("200 epochs", 2000),  # 100 images in batches of 10
        ("1 epoch", 10),
        ("0.5 epochs", 5),
        ("1.26 epochs", 13),  # 12.6 rounded
        ("0.001 epochs", 1),  # at least one step
    ],
)
def test_steps_and_epochs(length, steps):
    assert training_length(length, num_images=100, batch_size=10) == steps


def test_published_length():
    assert training_length("200 epochs", num_images=1_281_167, batch_size=768) == 333_637


@pytest.mark.parametrize(
    "length",
    ["", "800", "steps", "0 steps", "0 epochs", "-3 steps", "1.5 steps", "10 hours", "10steps"]
    + ["1e3 steps", "2 epochs 5 steps", "nan epochs", 800, None],
)
def test_anything_else_gets_a_sentence(length):
    with pytest.raises(UserError, match='write for example "800 steps" or "200 epochs"') as error:
        training_length(length, num_images=100, batch_size=10)
    assert f"got {length!r};" in str(error.value)
