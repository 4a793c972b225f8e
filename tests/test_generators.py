"""The two generators: losses against values worked by hand, what they may see, guidance dropout."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import optimizer_config, tiny_config

from nvg_jax import layers, models
from nvg_jax.content.losses import content_losses
from nvg_jax.errors import UserError
from nvg_jax.parts import BOTH_GENERATORS, CONTENT, STRUCTURE, Part
from nvg_jax.runtime import sharding
from nvg_jax.runtime.sharding import unbox
from nvg_jax.tokenizer import GranularitySequence, Quantized, TokenizerConfig
from nvg_jax.training import generators as steps
from nvg_jax.training.registry import make_trainer
from nvg_jax.training.state import TrainState

CONFIG = TokenizerConfig(
    (8, 8), (2, 2), 3, 5, base_channels=32, channel_multipliers=(1, 1, 1), blocks_per_level=1
)
SIZES = layers.TransformerConfig(32, 2, head_dim=16, drop_path=0.5)


def generator(name):
    model = models.ModelConfig(CONFIG, 3, SIZES, SIZES).make_generator(name)
    params = unbox(jax.jit(lambda key: models.init_generator(model, key))(jax.random.key(0)))
    # The heads start at zero; random weights make every input visible.
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]
    return model, jax.tree.unflatten(tree, noisy)


def quantized(batch=2):
    structure = jnp.array([[0, 0, 0, 0], [0, 1, 0, 1], [0, 2, 1, 3]])
    structure = jnp.broadcast_to(structure, (batch, 3, 4))
    ids = tuple(jnp.arange(batch * 2**i).reshape(batch, -1) % 5 for i in range(3))
    tokens = jnp.stack([jnp.take_along_axis(ids[i], structure[:, i], 1) for i in range(3)], 1)
    canvases = jax.random.normal(jax.random.key(2), (batch, 3, 4, 3))
    return Quantized(GranularitySequence(structure, tokens), canvases, ids, jnp.zeros(3))


def examples():
    return steps.Examples(quantized(), jnp.array([0, 1]), jnp.ones(4))


@pytest.mark.slow
def test_content_losses_of_a_perfect_and_of_an_empty_prediction():
    q = quantized()
    final = q.canvases[:, -1]
    uniform = lambda missing: jnp.zeros((*missing.shape[:-1], 5))
    hidden = jnp.ones((6, 4, 32))
    perfect, same = content_losses(lambda *_: (jnp.repeat(final, 3, axis=0), hidden), uniform, q)
    assert same is hidden
    np.testing.assert_allclose(perfect["canvas_loss"], 0, atol=1e-7)
    np.testing.assert_allclose(perfect["token_loss"], np.log(5), rtol=1e-6)
    empty, _ = content_losses(lambda canvas, *_: (jnp.zeros_like(canvas), hidden), uniform, q)
    np.testing.assert_allclose(empty["canvas_loss"], np.square(final).mean(), rtol=1e-5)


@pytest.mark.slow
def test_the_tokens_of_a_stage_see_the_mean_of_what_is_missing_in_their_cluster():
    q = quantized(1)
    seen = []

    def logits(missing):
        seen.append(missing)
        return jax.nn.one_hot(jnp.concatenate(q.stage_tokens, 1), 5) * 100

    out, _ = content_losses(lambda x, *_: (x + jnp.arange(4.0)[:, None], x), logits, q)
    # Positions 0..3 miss 0..3: one cluster 1.5; clusters {0, 2}, {1, 3}: 1, 2; then 0, 2, 1, 3.
    np.testing.assert_allclose(seen[0][0, :, 0], [1.5, 1, 2, 0, 2, 1, 3], rtol=1e-6)
    np.testing.assert_allclose(out["token_accuracy"], 1)
    np.testing.assert_allclose(out["token_loss"], 0, atol=1e-6)


def content_output(params, model, **changes):
    args = dict(
        canvas=jnp.ones((2, 4, 3)),
        embedding=jnp.ones((2, 4, 2), jnp.int32),
        stage=jnp.array([1, 1]),
        class_ids=jnp.array([0, 3]),
        canvas_scale=jnp.array([1.0, 2.0, 3.0, 4.0]),
    )
    apply = jax.jit(functools.partial(model.apply, method="predict_canvas"))
    return apply({"params": params}, **(args | changes))[0]


@pytest.mark.slow
def test_the_content_generator_sees_each_input_and_scales_the_canvas():
    model, params = generator("content")
    base = content_output(params, model)
    assert base.shape == (2, 4, 3) and base.dtype == jnp.float32
    for change in (
        dict(canvas=jnp.zeros((2, 4, 3))),
        dict(embedding=jnp.zeros((2, 4, 2), jnp.int32)),
        dict(stage=jnp.array([2, 2])),
        dict(class_ids=jnp.array([1, 1])),
    ):
        assert np.abs(content_output(params, model, **change) - base).max() > 1e-3
    # Half the canvas at twice the scale is the same input; the output is divided by its scale.
    scaled = content_output(
        params, model, canvas=jnp.full((2, 4, 3), 0.5), canvas_scale=jnp.array([1.0, 4, 3, 2])
    )
    np.testing.assert_allclose(scaled, 2 * base, rtol=1e-4)
    # At stage 0 the learned start canvas stands in for the canvas.
    first = dict(stage=jnp.array([0, 0]))
    np.testing.assert_array_equal(
        content_output(params, model, **first),
        content_output(params, model, canvas=jnp.full((2, 4, 3), 9.0), **first),
    )


@pytest.mark.slow
def test_the_structure_generator_sees_each_input():
    model, params = generator("structure")
    args = dict(
        noisy=jnp.zeros((2, 4, 2)),
        time=jnp.array([0.5, 0.5]),
        embedding=jnp.ones((2, 4, 2), jnp.int32),
        canvas=jnp.zeros((2, 4, 3)),
        stage=jnp.array([0, 0]),
        class_ids=jnp.array([0, 3]),
    )
    forward = jax.jit(model.apply)
    apply = lambda **changes: forward({"params": params}, **(args | changes))
    base = apply()
    assert base.shape == (2, 4, 2) and base.dtype == jnp.float32
    for change in (
        dict(noisy=jnp.ones((2, 4, 2))),
        dict(time=jnp.array([0.4, 0.4])),
        dict(embedding=jnp.zeros((2, 4, 2), jnp.int32)),
        dict(canvas=jnp.ones((2, 4, 3))),
        dict(class_ids=jnp.array([1, 1])),
    ):
        assert np.abs(apply(**change) - base).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", models.GENERATORS)
def test_drop_path_and_the_key_decide_the_loss_and_nothing_else_does(name):
    model, params = generator(name)
    loss = jax.jit(lambda key: steps.loss_terms(model, params, examples(), key)[0])
    assert loss(jax.random.key(0)) != loss(jax.random.key(1))
    whole = model.clone(transformer=dataclasses.replace(SIZES, drop_path=0.0))
    evaluate = lambda model: jax.jit(steps.loss_terms, static_argnums=0)(
        model, params, examples(), None
    )[0]
    assert SIZES.drop_path > 0
    np.testing.assert_allclose(evaluate(model), evaluate(whole), rtol=1e-6)


def test_the_token_head_starts_as_the_nearest_code_rule():
    model = models.ModelConfig(CONFIG, 3, content=SIZES).make_generator("content")
    codebook = jax.random.normal(jax.random.key(5), (5, 3))
    init = functools.partial(models.init_generator, model)
    params = unbox(jax.jit(init)(jax.random.key(0), codebook))
    missing = jax.random.normal(jax.random.key(6), (50, 3))
    logits = model.apply({"params": params}, missing, method="token_logits")
    distance = np.square(np.asarray(missing)[:, None] - np.asarray(codebook)).sum(-1)
    np.testing.assert_array_equal(logits.argmax(-1), distance.argmin(-1))
    head = jax.make_jaxpr(functools.partial(model.apply, method="token_logits"))
    (product,) = [
        e for e in head({"params": params}, missing).eqns if e.primitive.name == "dot_general"
    ]
    assert product.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2  # float32 on TPUs too


def test_the_rotary_split_is_the_published_one_and_a_small_head_gets_a_sentence():
    assert layers.rope_split(64, 8) == (8, *(2,) * 8, 20, 20)
    assert layers.rope_split(64, 4) == (16, *(2,) * 4, 20, 20)
    for head_dim, bits in ((16, 4), (32, 8), (64, 11), (24, 6)):
        split = layers.rope_split(head_dim, bits)
        assert sum(split) == head_dim and split[-1] == split[-2] >= 2 and split[0] >= 2
        assert all(share % 2 == 0 for share in split)
    with pytest.raises(UserError, match="larger head_dim"):
        layers.rope_split(16, 8)


@functools.cache
def loss_and_gradients(name, **changes):
    """Of a generator with changed fields, on the examples."""
    model, params = generator(name)
    loss = lambda params: steps.loss_terms(
        model.clone(**changes), params, examples(), jax.random.key(0)
    )[0]
    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.slow
@pytest.mark.parametrize("name", models.GENERATORS)
def test_bfloat16_arithmetic_keeps_float32_parameters_and_about_the_same_loss(name):
    losses = []
    for dtype in (jnp.float32, jnp.bfloat16):
        loss, grads = loss_and_gradients(name, dtype=dtype)
        assert all(g.dtype == jnp.float32 and np.isfinite(g).all() for g in jax.tree.leaves(grads))
        losses.append(loss)
    assert losses[0] != losses[1]
    np.testing.assert_allclose(*losses, rtol=0.05)


@pytest.mark.slow
def test_generators_that_are_trained_together_are_clipped_by_their_joint_norm():
    """Gradient descent with rate 1: a clipped step is the free one over the norm of both."""
    networks = {name: generator(name) for name in models.GENERATORS}
    params = {name: params for name, (_, params) in networks.items()}
    tokenizer, key = models.ModelConfig(CONFIG).make_tokenizer(), jax.random.key(3)
    tokenizer_params = unbox(jax.jit(lambda key: models.init_tokenizer(tokenizer, key))(key))
    images = np.random.default_rng(0).uniform(-1, 1, (2, *CONFIG.image_size, 3))
    batch = {"image": images.astype(np.float32), "label": jnp.array([0, 1])}

    inputs = {"tokenizer": tokenizer_params, "canvas_scale": jnp.ones(4)}

    @jax.jit
    def step(clip, params, inputs, batch):
        optimizer = optax.chain(optax.clip_by_global_norm(clip), optax.sgd(1.0))
        trainer = object.__new__(steps.GeneratorTrainer)  # only what a step needs
        vars(trainer).update(
            generators={name: model for name, (model, _) in networks.items()},
            optimizer=optimizer,
            optimizer_config=optimizer_config(),
            tokenizer=tokenizer,
            config=types.SimpleNamespace(class_dropout=0.0),
            rank=0,
            repa=None,
        )
        state = TrainState.create(params, optimizer)
        return trainer.train_step(state, inputs, batch, key)

    def moved(clip):
        new, metrics = step(clip, params, inputs, batch)
        return jax.tree.map(lambda a, b: np.asarray(a - b), new.params, params), metrics

    free, metrics = moved(1e9)
    norms = [np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(free[n]))) for n in networks]
    assert min(norms) > 1
    np.testing.assert_allclose(metrics["grad_norm"], np.hypot(*norms), rtol=1e-4)
    clipped, _ = moved(1.0)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6)
    jax.tree.map(close, clipped, jax.tree.map(lambda x: x / np.hypot(*norms), free))


@pytest.mark.slow
def test_the_velocity_in_parts_is_that_of_the_whole():
    model, params = generator("structure")
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(5), x.shape), params)
    apply = functools.partial(model.apply, {"params": params})
    batch, length, bits, times = 3, 4, 2, jnp.array([1.0, 0.4])
    keys = jax.random.split(jax.random.key(6), 2)
    noisy = jax.random.normal(keys[0], (batch, length, bits))
    canvas = jax.random.normal(keys[1], (batch, length, model.latent_dim))
    structure = jnp.ones((batch, length, bits), int)
    stage, classes = jnp.zeros(batch, int), jnp.arange(batch) % 3

    @jax.jit
    def both():
        condition = apply(structure, canvas, classes, method="condition")
        per_time = apply(times, stage, classes, method="modulations")
        rows = [jax.tree.map(lambda x, i=i: x[i], per_time) for i in range(2)]
        return [
            (
                apply(noisy, condition, row, method="velocity"),
                apply(noisy, jnp.full(batch, time), structure, canvas, stage, classes),
            )
            for row, time in zip(rows, times)
        ]

    (early, late) = both()
    for parts, whole in (early, late):
        np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-5)
    assert np.abs(early[0] - late[0]).max() > 1e-2


@pytest.mark.slow
def test_what_is_recomputed_changes_the_work_and_not_the_gradients():
    """A block has seven linear products and, on a CPU, two of attention to do again."""
    products, grads = {}, {}
    for remat, recomputed in (("none", 0), ("linears", 2), ("blocks", 9)):
        model, params = generator("structure")
        changes = dict(transformer=dataclasses.replace(SIZES, remat=remat))
        loss = lambda params, model=model, changes=changes: steps.loss_terms(
            model.clone(**changes), params, examples(), jax.random.key(0)
        )[0]
        products[recomputed] = str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general[")
        same = dict(dtype=jnp.float32) if remat == SIZES.remat else changes  # compiled already
        grads[remat] = loss_and_gradients("structure", **same)[1]
    assert {n: count - products[0] for n, count in products.items()} == {n: n for n in products}
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    for remat in ("linears", "blocks"):
        jax.tree.map(close, grads[remat], grads["none"])
    with pytest.raises(UserError, match="none, linears, blocks, got 'all'"):
        dataclasses.replace(SIZES, remat="all")


def trainer_of(part: Part, config, num_images: int = 100):
    mesh = sharding.make_mesh()
    with sharding.in_mesh(mesh):
        model = models.ModelConfig.from_config(config, num_classes=10)
        return make_trainer(part, config, model, mesh, num_images)


def test_equal_settings_share_a_trainer():
    """Whatever else the config says: about reporting, saving, the data or the seed."""
    config = tiny_config()
    first = trainer_of(CONTENT, config)
    config.update(seed=3, generator_training=dict(save_every=7))
    config.data.name = "fashion_mnist"
    assert trainer_of(CONTENT, config) is first
    assert trainer_of(CONTENT, config, num_images=101) is not first
    config.generator_training.optimizer.learning_rate = 0.5
    assert trainer_of(CONTENT, config) is not first


@pytest.mark.slow
@pytest.mark.parametrize("part", [CONTENT, STRUCTURE], ids=lambda part: part.name)
def test_a_generator_has_the_same_start_and_noise_alone_as_with_the_other(part):
    config, name, key = tiny_config(), part.name, jax.random.key(0)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.uniform(-1, 1, (16, 8, 8, 3)).astype(np.float32),
        "label": np.arange(16, dtype=np.int32) % 10,
    }

    def loss_of(trainer, loss):
        inputs = jax.tree.map(
            lambda x: np.random.default_rng(1).normal(size=x.shape).astype(np.float32),
            trainer.abstract_inputs,
        )
        with sharding.in_mesh(trainer.mesh):
            return float(loss(trainer.jit_init_state(key, inputs), inputs, batch, key))

    # Of the part alone, only the loss is compiled; the step of both is one that other tests need.
    alone, both = trainer_of(part, config), trainer_of(BOTH_GENERATORS, config)
    expected = loss_of(alone, jax.jit(lambda *given: alone.train_step(*given)[1][f"{name}/loss"]))
    found = loss_of(both, lambda *given: both.jit_train_step(*given)[1][f"{name}/loss"])
    assert found == pytest.approx(expected, rel=1e-6)
