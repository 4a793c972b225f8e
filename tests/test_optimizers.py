"""Schedules, weight decay, clip and moving average against values worked by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from helpers import optimizer_config, tiny_config

from nvg_jax import layers, models
from nvg_jax.errors import UserError
from nvg_jax.parts import TOKENIZER
from nvg_jax.runtime.sharding import make_mesh, shardings, unbox
from nvg_jax.tokenizer import TokenizerConfig
from nvg_jax.training.optimizers import (
    decay_mask,
    learning_rate_schedule,
    make_optimizer,
)
from nvg_jax.training.registry import make_trainer
from nvg_jax.training.state import TrainState

SIZES = TokenizerConfig(
    (4, 4), (4, 4), 3, 5, base_channels=32, channel_multipliers=(1,), blocks_per_level=1
)


def rates(config, batch_size, steps, at):
    schedule = learning_rate_schedule(config, batch_size, steps)
    return [float(schedule(step)) for step in at]


def test_the_published_schedule():
    # 1e-4 at batch 256 is 3e-4 at 768. Warm-up from 0.005 of it, then constant to 80% of the steps
    # and down to 0.1 of it.
    at = (0, 500, 1000, 5000, 8000, 9000, 10_000, 12_000)
    expected = [1.5e-6, 3e-4 * (0.005 + 0.995 / 2), 3e-4, 3e-4, 3e-4, 3e-4 * 0.55, 3e-5, 3e-5]
    np.testing.assert_allclose(rates(optimizer_config(), 768, 10_000, at), expected, rtol=1e-5)


def test_a_run_shorter_than_its_warmup_only_warms_up():
    got = rates(optimizer_config(), 256, 10, range(11))
    np.testing.assert_allclose(got, np.linspace(5e-7, 1e-4, 11), rtol=1e-5)


def test_a_cosine_without_warmup():
    config = optimizer_config(learning_rate=2.0, schedule="cosine", warmup_steps=0, final=0.0)
    expected = [2, 1 + math.sqrt(0.5), 1, 1 - math.sqrt(0.5), 0]
    got = rates(config, 256, 100, (0, 25, 50, 75, 100))
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_a_cosine_falls_to_its_final_rate_after_the_warmup():
    config = optimizer_config(learning_rate=2.0, schedule="cosine", warmup_steps=20, final=0.1)
    got = rates(config, 128, 120, (0, 10, 20, 70, 120))
    np.testing.assert_allclose(got, [0.005, 0.5025, 1, 0.55, 0.1], atol=1e-6)


def test_a_constant_rate():
    config = optimizer_config(learning_rate=2.0, schedule="constant", warmup_steps=2)
    got = rates(config, 256, 100, (0, 1, 2, 50, 1000))
    np.testing.assert_allclose(got, [0.01, 1.005, 2, 2, 2], rtol=1e-6)


def test_an_unknown_schedule_gets_a_sentence():
    with pytest.raises(UserError, match="schedule 'step'; choose one of .*linear.*cosine"):
        optimizer_config(schedule="step")


def init(name):
    """The parameters of one of the three models, with names on their axes."""
    if name == "tokenizer":
        return lambda key: models.init_tokenizer(models.ModelConfig(SIZES).make_tokenizer(), key)
    transformer = layers.TransformerConfig(32, 2, head_dim=16)
    model = models.ModelConfig(SIZES, 3, transformer, transformer).make_generator(name)
    return lambda key: models.init_generator(model, key)


@pytest.mark.parametrize("name", models.GENERATORS)
def test_what_a_generator_decays(name):
    """All matrices and tables; no bias and no scale, though the scanned layers stack theirs."""
    params = jax.eval_shape(init(name), jax.random.key(0))
    leaves = flatten_dict(unbox(params), sep="/")
    mask = flatten_dict(unbox(decay_mask(params)), sep="/")
    decayed = {path for path in mask if mask[path]}
    kinds = ("kernel", "embedding", "start_canvas")
    assert decayed == {path for path in leaves if path.endswith(kinds)}
    assert {path.split("/")[-1] for path in leaves.keys() - decayed} == {"bias", "scale"}
    stacked = [path for path in leaves.keys() - decayed if leaves[path].ndim > 1]
    assert len(stacked) == 5  # three biases and two scales of the blocks
    assert decay_mask(unbox(params)) == unbox(decay_mask(params))  # boxed or not


@pytest.mark.slow
def test_without_a_gradient_only_the_decay_moves_a_parameter():
    params = {"matrix": jnp.full((2, 2), 8.0), "bias": jnp.full(2, 8.0)}
    config = optimizer_config(
        learning_rate=0.5, schedule="constant", warmup_steps=0, weight_decay=0.25
    )
    rate = learning_rate_schedule(config, batch_size=512, steps=10)  # 1
    optimizer = make_optimizer(config, rate)
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(updates["matrix"], np.full((2, 2), -2.0))
    np.testing.assert_array_equal(updates["bias"], np.zeros(2))
    optimizer = make_optimizer(config, rate, decay_all=True)  # discriminators
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(updates["bias"], np.full(2, -2.0))


@pytest.mark.slow
def test_the_tokenizers_trainer_decays_the_discriminators_biases_too():
    config = tiny_config(part="tokenizer")
    config.tokenizer_training.update(
        adversarial_weight=0.1, discriminator="small", discriminator_weight_decay=0.25
    )
    config.tokenizer_training.optimizer.warmup_steps = 0
    model = models.ModelConfig.from_config(config, num_classes=10)
    trainer = make_trainer(TOKENIZER, config, model, make_mesh(devices=jax.devices()[:1]), 100)
    params, grads = {"bias": jnp.full(2, 8.0)}, {"bias": jnp.zeros(2)}
    optimizer = trainer.discriminator_optimizer
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    assert (updates["bias"] < 0).all()


@pytest.mark.slow
def test_muon_orthogonalizes_the_updates_of_each_layer_in_blocks():
    config = optimizer_config(
        name="muon", learning_rate=1.0, schedule="constant", warmup_steps=0, clip=1e9
    )
    optimizer = make_optimizer(config, learning_rate_schedule(config, 256, steps=10))
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    blocks = {"linear1": {"kernel": draw(2, 6, 24), "bias": draw(2, 24)}}
    grads = {"content": {"blocks": {"blocks": blocks}, "head": {"kernel": draw(6, 24)}}}
    # Along the first singular vectors a hundred times as large.
    u, s, v = np.linalg.svd(blocks["linear1"]["kernel"], full_matrices=False)
    s[:, 0] *= 100
    blocks["linear1"]["kernel"] = jnp.asarray(u * s[:, None] @ v)
    params = jax.tree.map(jnp.zeros_like, grads)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    found = updates["content"]["blocks"]["blocks"]["linear1"]["kernel"]
    exact = -0.2 * math.sqrt(24) * u @ v
    for layer in range(2):
        values = np.linalg.svd(found[layer], compute_uv=False) / (0.2 * math.sqrt(24))
        assert values.max() < 1.25 and values[0] / values[-1] < 2  # five steps come this near
        assert np.corrcoef(found[layer].ravel(), exact[layer].ravel())[0, 1] > 0.95
    assert np.linalg.norm(updates["content"]["blocks"]["blocks"]["linear1"]["bias"][0]) > 0
    head = updates["content"]["head"]["kernel"]
    np.testing.assert_array_equal(jnp.sign(head), -jnp.sign(grads["content"]["head"]["kernel"]))
    np.testing.assert_allclose(jnp.abs(head), jnp.abs(head).max(), rtol=1e-3)  # as Adam's


@pytest.mark.slow
def test_only_block_matrices_decay_with_muon_and_its_state_is_sharded_as_they_are():
    config = optimizer_config(name="muon", learning_rate=0.5, schedule="constant", warmup_steps=0)
    optimizer = make_optimizer(config, learning_rate_schedule(config, 256, steps=10))
    boxed = {"structure": jax.eval_shape(init("structure"), jax.random.key(0))}
    params = jax.tree.map(lambda x: jnp.ones(x.shape), unbox(boxed))
    state = optimizer.init(params)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
    for path, change in flatten_dict(updates, sep="/").items():
        decays = "/blocks/" in path and path.endswith("kernel")
        np.testing.assert_allclose(change, -0.5 * 0.05 if decays else 0, atol=1e-6, err_msg=path)
    abstract = jax.eval_shape(optimizer.init, boxed)
    placed = shardings(abstract, make_mesh(devices=jax.devices()[:1]))
    assert jax.tree.structure(placed) == jax.tree.structure(state)


def test_an_unknown_optimizer():
    with pytest.raises(UserError, match=r"Unknown optimizer 'sgd'; choose one of \('adamw', 'muon"):
        optimizer_config(name="sgd")


def test_gradients_are_clipped_by_their_norm_over_all_parameters():
    # Without momentum and with b2 = 1/2 Adam's second step is g2 / sqrt((g1^2 + 2 g2^2) / 3).
    config = optimizer_config(
        learning_rate=1.0, schedule="constant", warmup_steps=0, weight_decay=0.0, b1=0.0, b2=0.5
    )
    optimizer = make_optimizer(config, learning_rate_schedule(config, 256, steps=10))
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    state = optimizer.init(params)
    _, state = optimizer.update({"a": jnp.array([30.0]), "b": jnp.array([40.0])}, state, params)
    second = {"a": jnp.array([0.6]), "b": jnp.array([0.1])}
    updates, _ = optimizer.update(second, state, params)
    # The first gradient, of norm 50, counts as (0.6, 0.8); the second, of norm 0.6, as it is.
    np.testing.assert_allclose(updates["a"], -1, rtol=1e-5)
    np.testing.assert_allclose(updates["b"], -0.1 / math.sqrt((0.64 + 0.02) / 3), rtol=1e-5)


def test_the_moving_average_follows_the_parameters():
    optimizer = optax.sgd(1.0)
    state = TrainState.create({"x": jnp.zeros(2)}, optimizer)
    grads = {"x": jnp.array([-1.0, 2.0])}
    averages = []
    for _ in range(3):
        state = state.update(grads, optimizer, ema_decay=0.75)
        averages.append(state.ema_params["x"][0])
    # Parameters 1, 2, 3; averages 1/4, 3/4 * 1/4 + 2/4, 3/4 * 11/16 + 3/4.
    np.testing.assert_allclose(state.params["x"], [3, -6])
    np.testing.assert_allclose(averages, [0.25, 0.6875, 1.265625])
    np.testing.assert_allclose(state.ema_params["x"][1], -2 * 1.265625)
    assert state.step == 3 and state.step.dtype == jnp.int32


def test_an_average_that_warms_up_forgets_the_initial_parameters():
    config = optimizer_config(ema_decay=0.3, ema_warmup=True)
    decays = [float(config.average_decay(step)) for step in range(5)]
    np.testing.assert_allclose(decays, [1 / 10, 2 / 11, 3 / 12, 0.3, 0.3], rtol=1e-6)
    assert optimizer_config(ema_decay=0.3).average_decay(jnp.zeros((), jnp.int32)) == 0.3


def test_the_average_starts_at_the_parameters_in_memory_of_its_own():
    state = TrainState.create({"x": jnp.arange(3.0)}, optax.sgd(1.0))
    np.testing.assert_array_equal(state.ema_params["x"], [0, 1, 2])
    assert state.ema_params["x"] is not state.params["x"]
    # A step that is given its state's memory would find one buffer twice.
    step = jax.jit(lambda s: s.update(s.params, optax.sgd(1.0), 0.5), donate_argnums=0)
    np.testing.assert_array_equal(step(state).ema_params["x"], [0, 0.5, 1])
