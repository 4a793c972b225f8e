"""The length of a training run: steps, epochs, limits, errors, and what follows from it."""

import importlib

import pytest

from nvg_jax.errors import UserError
from nvg_jax.training.length import resolved, training_length, warn_if_too_short


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
        ("250steps", 250),
        ("2 epochs, at least 50 steps, at most 90 steps", 50),
        ("7 epochs, at least 50 steps, at most 90 steps", 70),
        ("200 epochs, at least 50 steps, at most 90 steps", 90),
        ("200 epochs,at most 90steps", 90),
    ],
)
def test_steps_and_epochs(length, steps):
    assert training_length(length, num_images=100, batch_size=10) == steps


def test_published_length():
    assert training_length("200 epochs", num_images=1_281_167, batch_size=768) == 333_637


@pytest.mark.parametrize(
    "length",
    ["", "800", "steps", "0 steps", "0 epochs", "-3 steps", "1.5 steps", "10 hours"]
    + ["1e3 steps", "9 epochs, at least 9", "9 epochs, at least 9 steps, at most 8 steps"]
    + ["2 epochs 5 steps", "nan epochs", 800, None],
)
def test_anything_else_gets_a_sentence(length):
    with pytest.raises(UserError, match='write for example "800 steps" or "200 epochs"') as error:
        training_length(length, num_images=100, batch_size=10)
    assert f"got {length!r};" in str(error.value)


def image_folder(variant):
    return importlib.import_module("configs.image_folder").get_config(variant)


@pytest.mark.parametrize("variant", ["small", "64", "finetune"])
@pytest.mark.parametrize("num_images", [270, 2_700, 90_000])
def test_a_small_and_a_large_folder_are_trained_seen_and_saved(variant, num_images):
    """270 images once meant 210 steps of a warm-up of 1,000, and no picture and no checkpoint."""
    recipe = resolved(image_folder(variant).generator_training, num_images)
    steps = training_length(recipe.length, num_images, recipe.batch_size)
    assert steps >= 1000
    assert recipe.optimizer.warmup_steps <= steps / 20
    assert recipe.optimizer.ema_decay**steps < 1e-6  # what is left of the initial weights
    assert 10 <= steps / recipe.eval_every and 20 <= steps / recipe.save_every
    assert 100 <= steps / recipe.log_every


def test_what_follows_from_the_length():
    recipe = image_folder("small").generator_training
    recipe.update(length="2000 steps", save_every=7)
    recipe.optimizer.ema_decay = 0.9
    chosen = resolved(recipe, 10)
    assert (chosen.log_every, chosen.eval_every, chosen.save_every) == (20, 200, 7)
    assert (chosen.optimizer.warmup_steps, chosen.optimizer.ema_decay) == (100, 0.9)
    assert recipe.eval_every == -1
    recipe.update(length="333637 steps", save_every=-1)
    recipe.optimizer.ema_decay = -1
    chosen = resolved(recipe, 10)
    assert (chosen.log_every, chosen.eval_every, chosen.save_every) == (100, 5000, 2500)
    # As published, for this length.
    assert (chosen.optimizer.warmup_steps, chosen.optimizer.ema_decay) == (1000, 0.9999)


def test_the_published_recipe_is_left_as_it_is():
    recipe = importlib.import_module("configs.imagenet256").get_config().generator_training
    assert resolved(recipe, 270) == recipe
    assert not recipe.optimizer.ema_warmup


def test_a_warmup_or_an_average_that_cannot_work_is_named(caplog):
    recipe = importlib.import_module("configs.common").base().generator_training
    recipe.length = "210 steps"
    warn_if_too_short("generator_training", recipe, 210)
    assert len(caplog.messages) == 2
    assert (
        "generator_training.optimizer.warmup_steps=1000 is longer than the training, 210 steps"
        in (caplog.messages[0])
    )
    # 0.9999 ** 210 = 0.979
    assert (
        "generator_training.optimizer.ema_decay=0.9999 leaves the averaged weights 98% "
        in (caplog.messages[1])
    )
    caplog.clear()
    warn_if_too_short("generator_training", recipe, 333_637)
    recipe.optimizer.update(warmup_steps=20, ema_warmup=True)
    warn_if_too_short("generator_training", recipe, 210)
    assert not caplog.messages
