"""The tokenizer against its discriminator in one step, and REPA in the content generator's loss."""

import dataclasses
import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import optimizer_config, tiny_discriminator
from jax.sharding import AbstractMesh

from configs import digits, imagenet256
from nvg_jax import layers, models, pretrained
from nvg_jax.content.losses import alignment_loss
from nvg_jax.errors import UserError
from nvg_jax.kernels import block_linears
from nvg_jax.layers import Transformer, TransformerConfig
from nvg_jax.parts import CONTENT, TOKENIZER
from nvg_jax.runtime import hardware, sharding
from nvg_jax.tokenizer import TokenizerConfig
from nvg_jax.tokenizer.losses import LeCam
from nvg_jax.training import generators, tokenizer
from nvg_jax.training.registry import make_trainer, pretrained_names

SIZES = TokenizerConfig(**digits.get_config("runlocal").tokenizer)
MODEL = models.ModelConfig(SIZES).make_tokenizer()
LOSSES = tokenizer.TokenizerLossConfig("l1", 0.0, 0.3, 0.5, "small")
DISCRIMINATOR = tiny_discriminator()
NETWORKS = tokenizer.Modules(MODEL, DISCRIMINATOR, LOSSES)
TRAINER = types.SimpleNamespace(
    modules=NETWORKS,
    optimizer=optax.sgd(0.1),
    discriminator_optimizer=optax.sgd(0.1),
    optimizer_config=optimizer_config(ema_decay=0.9),
    update=lambda state, grads: tokenizer.TokenizerTrainer.update(TRAINER, state, grads),
)


@pytest.fixture(scope="module")
def state():
    init = lambda key: sharding.unbox(
        tokenizer.TokenizerTrainer.init_state(TRAINER, key, inputs={})
    )
    state = jax.jit(init)(jax.random.key(0))
    averages = LeCam(real=jnp.float32(0.3), fake=jnp.float32(-0.2))
    return state.replace(discriminator=state.discriminator.replace(lecam=averages))


IMAGES = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 3)), jnp.float32)
KEY = jax.random.key(3)


def close(a, b):
    scale = max(np.abs(y).max() for y in jax.tree.leaves(b))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6 * scale)


def gradients(state, losses):
    """((gradients of tokenizer and discriminator), (metrics, the discriminator's new state))."""
    terms = functools.partial(tokenizer.loss_terms, NETWORKS._replace(losses=losses))
    opponent = state.discriminator
    return jax.jit(jax.grad(terms, argnums=(0, 1), has_aux=True))(
        state.params, opponent.params, opponent, {}, IMAGES, KEY
    )


@pytest.fixture(scope="module")
def plain(state):
    """The gradients that most tests compare with."""
    return gradients(state, LOSSES)


def see(images, key):
    return tokenizer.discriminator_inputs(DISCRIMINATOR, {}, images, key, jnp.float32)


@pytest.fixture(scope="module")
def alone(state):
    """((the tokenizer's loss by itself, its reconstructions), its gradients)."""
    old = {"params": state.discriminator.params, "spectral": state.discriminator.spectral}
    generator_key = jax.random.split(KEY, 3)[0]

    def tokenizer_alone(params):
        restored, quantized = MODEL.apply({"params": params}, IMAGES)
        logits = DISCRIMINATOR.apply(old, see(restored, generator_key))
        adversarial = jnp.log1p(jnp.exp(-logits.mean(1))).mean()
        loss = jnp.abs(restored - IMAGES).mean() + quantized.losses.mean() + 0.3 * adversarial
        return loss, restored

    return jax.jit(jax.value_and_grad(tokenizer_alone, has_aux=True))(state.params)


@pytest.mark.slow
def test_one_step_has_the_gradients_of_two(state, plain, alone):
    """The combined loss against a step of the tokenizer alone, then one of the discriminator."""
    opponent = state.discriminator
    both, (metrics, _) = plain
    (value, restored), grads = alone
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    close(both[0], grads)
    old = {"params": opponent.params, "spectral": opponent.spectral}
    _, real_key, fake_key = jax.random.split(KEY, 3)

    def discriminator_alone(params):
        real, new = DISCRIMINATOR.apply(
            {**old, "params": params}, see(IMAGES, real_key), mutable=["spectral"]
        )
        fake = DISCRIMINATOR.apply({"params": params, **new}, see(restored, fake_key))
        hinge = (jnp.maximum(1 - real, 0).mean() + jnp.maximum(1 + fake, 0).mean()) / 2
        # The averages, 0.3 and -0.2, are updated first.
        average_real, average_fake = (
            0.3 * 0.999 + real.mean() / 1000,
            -0.2 * 0.999 + fake.mean() / 1000,
        )
        average_real, average_fake = jax.lax.stop_gradient((average_real, average_fake))
        lecam = (jnp.maximum(real - average_fake, 0) ** 2).mean()
        lecam += (jnp.maximum(average_real - fake, 0) ** 2).mean()
        return hinge + 0.5 * lecam

    value, grads = jax.jit(jax.value_and_grad(discriminator_alone))(opponent.params)
    np.testing.assert_allclose(
        metrics["discriminator_loss"] + 0.5 * metrics["lecam_loss"], value, rtol=1e-5
    )
    close(both[1], grads)
    assert min(np.abs(g).max() for g in jax.tree.leaves(both[0])) > 0


@pytest.mark.slow
def test_the_discriminator_may_see_the_generator_loss(state, plain, alone):
    """Its gradient then has 0.3 times that of the adversarial loss in addition; no other has."""
    opponent = state.discriminator
    (own, less), (metrics, new) = plain
    (same, more), (same_metrics, same_new) = gradients(
        state, dataclasses.replace(LOSSES, discriminator_sees_generator_loss=True)
    )
    close(same, own)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), same_metrics, metrics)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), same_new, new)
    seen = see(alone[0][1], jax.random.split(KEY, 3)[0])

    def adversarial(params):
        logits = DISCRIMINATOR.apply({"params": params, "spectral": opponent.spectral}, seen)
        return jnp.log1p(jnp.exp(-logits.mean(1))).mean()

    extra = jax.tree.map(lambda x: 0.3 * x, jax.jit(jax.grad(adversarial))(opponent.params))
    close(jax.tree.map(jnp.subtract, more, less), extra)
    assert max(np.abs(x).max() for x in jax.tree.leaves(extra)) > 1e-3


@pytest.mark.slow
def test_lpips_is_added_with_its_weight(state, monkeypatch):
    """With a distance in its place that is easily worked out."""
    monkeypatch.setattr(
        pretrained, "lpips", lambda params, a, b, dtype: params * jnp.square(a - b).mean((1, 2, 3))
    )
    losses = tokenizer.TokenizerLossConfig("l2", 0.7, 0.0, 0.0, "small")
    terms = functools.partial(tokenizer.loss_terms, tokenizer.Modules(MODEL, None, losses))
    terms = jax.jit(terms)
    plain, (metrics, _) = terms(state.params, None, None, {"lpips": 0.0}, IMAGES, KEY)
    weighted, (more, _) = terms(state.params, None, None, {"lpips": 3.0}, IMAGES, KEY)
    assert metrics["perceptual_loss"] == 0 and metrics["loss"] == plain
    np.testing.assert_allclose(more["perceptual_loss"], 3 * metrics["reconstruction_loss"], 1e-5)
    np.testing.assert_allclose(weighted - plain, 0.7 * more["perceptual_loss"], 1e-4)


@pytest.mark.slow
def test_all_losses_see_the_clamped_reconstruction(state, monkeypatch):
    """A decoder that answers (2, -0.5, -3) everywhere: only green, inside, gets a gradient.

    Its gradient of L1 is the mean sign of the difference, of which green is one channel in three.
    """
    monkeypatch.setattr(
        pretrained, "lpips", lambda params, a, b, dtype: params * jnp.square(a).mean((1, 2, 3))
    )
    decoder = state.params["decoder"]

    def with_bias(bias):
        answer = {"kernel": 0 * decoder["conv_out"]["kernel"], "bias": bias}
        return state.params | {"decoder": decoder | {"conv_out": answer}}

    @functools.cache
    def program(*weights):
        losses = tokenizer.TokenizerLossConfig("l1", *weights, 0.0, "small")
        opponent = state.discriminator if losses.adversarial_weight else None
        networks = NETWORKS._replace(discriminator=opponent and DISCRIMINATOR, losses=losses)
        others = opponent and opponent.params, opponent
        terms = lambda bias, lpips: tokenizer.loss_terms(
            networks, with_bias(bias), *others, {"lpips": lpips}, IMAGES, KEY
        )
        return jax.jit(jax.grad(terms, has_aux=True))

    def bias_gradient(*weights, lpips):
        grads, (metrics, _) = program(*weights)(jnp.array([2, -0.5, -3]), lpips)
        return grads, metrics

    grads, metrics = bias_gradient(1.0, 0.0, lpips=0.0)
    distance = np.abs(np.array([1, -0.5, -1]) - IMAGES).mean()
    np.testing.assert_allclose(metrics["reconstruction_loss"], distance, rtol=1e-5)
    np.testing.assert_allclose(
        grads, [0, np.sign(-0.5 - IMAGES[..., 1]).mean() / 3, 0], rtol=1e-4, atol=1e-8
    )
    for weights in ((1.0, 0.0), (0.0, 0.3)):
        more, metrics = bias_gradient(*weights, lpips=1.0)
        assert more[0] == more[2] == 0 and abs(more[1] - grads[1]) > 1e-4
        if weights[0]:
            np.testing.assert_allclose(metrics["perceptual_loss"], (1 + 0.25 + 1) / 3, rtol=1e-5)


def test_what_the_heads_on_dino_see(monkeypatch):
    """Augmented images, then cut to size, through DINO; patches with the class token added."""
    monkeypatch.setattr(tokenizer, "augment", lambda images, key: images + 1)
    monkeypatch.setattr(
        tokenizer, "discriminator_input", lambda images, key: 2 * images[:, :224, :224]
    )

    def dino(params, images, dtype):
        patches = images[:, ::16, ::16, :1].reshape(len(images), 196, 1)
        return [
            params * tap + jnp.concatenate([100 * patches[:, :1] ** 0, patches], 1)
            for tap in range(5)
        ]

    monkeypatch.setattr(pretrained, "dino", dino)
    heads = tokenizer.TokenizerLossConfig("l1", 0.0, 0.1, 0.0, "dino").make_discriminator(
        jnp.float32
    )
    images = np.random.default_rng(0).uniform(-1, 1, (2, 256, 256, 3))
    taps = tokenizer.discriminator_inputs(heads, {"dino": 1000.0}, images, KEY, jnp.float32)
    patches = 2 * (images[:, :224:16, :224:16, :1] + 1).reshape(2, 196, 1)
    for feature_block, found in enumerate(taps):
        np.testing.assert_allclose(found, patches + 100 + 2000 * feature_block, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("own, expected", [("", "bfloat16"), ("float32", "float32")])
def test_the_tokenizer_trains_in_its_own_precision(own, expected):
    config = digits.get_config("runlocal")
    config.update(dtype="bfloat16", tokenizer_training=dict(dtype=own, adversarial_weight=0.1))
    config.tokenizer_training.discriminator = "small"
    model = models.ModelConfig.from_config(config, num_classes=10)
    trainer = make_trainer(TOKENIZER, config, model, sharding.make_mesh(), num_images=100)
    features = trainer.modules.discriminator.layers[0]
    assert trainer.modules.tokenizer.dtype == features.dtype == expected
    assert trainer.model.dtype == "bfloat16"


def test_wrong_losses_get_a_sentence():
    config = digits.get_config("runlocal")
    for change, message in (
        (dict(reconstruction="l3"), "reconstruction must be one of l1, l2, got 'l3'"),
        (dict(discriminator="big"), "discriminator must be one of dino, small"),
    ):
        changed = config.copy_and_resolve_references()
        changed.tokenizer_training.update(change)
        with pytest.raises(UserError, match=message):
            tokenizer.loss_config(changed)
    for change, message in (
        (dict(repa_weight=1.0, repa_block=3), r"one of the content generator's 2 blocks, .* got 3"),
        (dict(repa_weight=1.0, repa_block=1), "needs a latent of that size, not 4 x 4"),
    ):
        changed = config.copy_and_resolve_references()
        changed.generator_training.update(change)
        model = models.ModelConfig.from_config(changed, num_classes=10)
        with pytest.raises(UserError, match=message):
            make_trainer(CONTENT, changed, model, sharding.make_mesh(), num_images=100)


# REPA.


def test_alignment_is_one_minus_the_cosine_of_each_stage():
    targets = jnp.array([[[3.0, 0.0], [0.0, 2.0]]])  # one image, two positions
    projected = jnp.array(
        [
            [[1.0, 0.0], [0.0, 5.0]],  # the same directions
            [[-2.0, 0.0], [0.0, 1.0]],  # one opposite
            [[0.0, 7.0], [1.0, 0.0]],  # all at right angles
        ]
    )
    np.testing.assert_allclose(alignment_loss(projected, targets), [0, 1, 1], atol=1e-6)
    both = alignment_loss(jnp.concatenate([projected, projected[::-1]]), targets.repeat(2, axis=0))
    np.testing.assert_allclose(both, [0.5, 1, 0.5], atol=1e-6)


@pytest.mark.slow
def test_the_feature_block_is_the_output_of_a_transformer_of_so_many_blocks():
    rng = np.random.default_rng(0)
    x, vec, angles = (jnp.asarray(rng.normal(size=n)) for n in ((2, 5, 32), (2, 32), (2, 5, 8)))
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    deep = Transformer(TransformerConfig(32, 3, head_dim=16), jnp.float32)
    init = functools.partial(deep.init, deterministic=True)
    variables = sharding.unbox(jax.eval_shape(init, jax.random.key(0), x, vec, cos, sin))
    leaves, tree = jax.tree.flatten(variables)
    leaves = [rng.normal(size=leaf.shape, scale=0.1) for leaf in leaves]
    variables = jax.tree.unflatten(tree, leaves)
    for count in (1, 2, 3):
        shallow = Transformer(TransformerConfig(32, count, head_dim=16), jnp.float32)
        first = jax.tree.map(lambda leaf, count=count: leaf[:count], variables)
        expected = shallow.apply(first, x, vec, cos, sin, True)[0]
        last, tapped = deep.apply(variables, x, vec, cos, sin, True, count)
        np.testing.assert_allclose(tapped, expected, rtol=2e-5, atol=2e-5)
        assert (count == 3) == bool(np.allclose(tapped, last, atol=1e-4))


@pytest.mark.slow
def test_what_depends_on_the_platform_changes_neither_results_nor_gradients(monkeypatch):
    """One product or several, hidden channels as one axis or two, and padding for a kernel."""
    rng = np.random.default_rng(0)
    shapes = (2, 5, 32), (2, 32), (2, 5, 32), (2, 5, 8)
    x, vec, grad, angles = (jnp.asarray(rng.normal(size=shape)) for shape in shapes)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    model = Transformer(TransformerConfig(32, 2, head_dim=16), jnp.float32)
    apply = lambda variables, x: model.apply(variables, x, vec, cos, sin, True, 1)
    init = functools.partial(model.init, deterministic=True)
    variables = sharding.unbox(jax.eval_shape(init, jax.random.key(0), x, vec, cos, sin))
    variables = jax.tree.map(lambda leaf: rng.normal(0.5, 0.2, leaf.shape), variables)
    results = []
    cases = ("tpu", 0, "parts"), ("cpu", 0, "separate"), ("gpu", 3, "separate"), ("gpu", 3, "joint")
    for device, extra, form in cases:
        monkeypatch.setattr(hardware, "platform", lambda: device)
        monkeypatch.setattr(layers, "padded_length", lambda _, length, *__: length + extra)
        monkeypatch.setattr(block_linears, "form", lambda *_: form)
        out, backward = jax.vjp(apply, variables, x)
        results.append((out, backward((grad, grad))))
    for expected, *others in zip(*map(jax.tree.leaves, results)):
        for found in others:
            assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["parts", "separate", "joint"])
def test_gradients_are_summed_over_positions_in_float32(monkeypatch, form):
    """2,048 gradients of one; in bfloat16, 256 + 1 is 256."""
    monkeypatch.setattr(block_linears, "form", lambda *_: form)
    filled = lambda value, *shape: jnp.full(shape, value, jnp.bfloat16)
    x, hidden = filled(0, 1, 2048, 4), filled(0, 1, 2048, *((2, 4) if form == "parts" else (8,)))
    linear1 = lambda bias: block_linears.linear1(x, filled(0, 4, 20), bias)
    linear2 = lambda gate, bias: block_linears.linear2(x, hidden, gate, filled(0, 12, 4), bias)
    dense, table = layers.Dense(4, (None, None), x.dtype), layers.Embedding(3, 4, x.dtype)
    linear = lambda bias: dense.apply({"params": {"kernel": jnp.ones((4, 4)), "bias": bias}}, x)
    rows = lambda rows: table.apply({"params": {"embedding": rows}}, jnp.zeros((1, 2048), int))
    for function, arguments in (
        (linear1, [filled(1, 20)]),
        (linear2, [filled(1, 1, 1, 4), filled(1, 4)]),
        (linear, [jnp.ones(4)]),
        (rows, [jnp.ones((3, 4))]),
    ):
        out, backward = jax.vjp(function, *arguments)
        for gradient in backward(jax.tree.map(jnp.ones_like, out)):
            np.testing.assert_array_equal(gradient.ravel()[:4], 2048)


def test_how_linear_layers_are_computed_where(monkeypatch):
    chosen = {}
    for device in ("cpu", "gpu", "tpu"):
        monkeypatch.setattr(hardware, "platform", lambda: device)
        chosen[device] = [block_linears.form(tokens, width=8) for tokens in (32, 33)]
        with jax.sharding.use_abstract_mesh(AbstractMesh((1, 1, 2), sharding.MESH_AXES)):
            assert block_linears.form(32, width=8) == "parts"
    assert chosen == {"cpu": ["separate"] * 2, "gpu": ["joint", "separate"], "tpu": ["parts"] * 2}


@pytest.mark.slow
def test_the_gradient_of_one_image_does_not_depend_on_what_is_recomputed():
    """At this size XLA once summed the gradient of the gates over the wrong products."""
    rng = np.random.default_rng(0)
    x, vec, angles = (jnp.asarray(rng.normal(size=n)) for n in ((1, 65, 96), (1, 96), (1, 65, 16)))
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    sizes = TransformerConfig(96, 2, head_dim=32)
    init = functools.partial(Transformer(sizes, jnp.float32).init, deterministic=True)
    variables = sharding.unbox(jax.eval_shape(init, jax.random.key(0), x, vec, cos, sin))
    variables = jax.tree.map(lambda leaf: rng.normal(0.5, 0.2, leaf.shape), variables)
    grads = []
    for remat in ("none", "blocks"):
        model = Transformer(dataclasses.replace(sizes, remat=remat), jnp.float32)
        loss = lambda v, model=model: jnp.square(model.apply(v, x, vec, cos, sin, True)[0]).sum()
        grads.append(jax.jit(jax.grad(loss))(variables))
    for found, expected in zip(*map(jax.tree.leaves, grads)):
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.slow
def test_repa_reaches_the_blocks_up_to_its_own_and_no_later_one():
    sizes = TokenizerConfig(
        image_size=(32, 32), latent_size=(16, 16), latent_dim=4, codebook_size=16,
        base_channels=32, channel_multipliers=(1, 1), blocks_per_level=1,
    )  # fmt: skip
    transformer = TransformerConfig(32, 3, head_dim=32)
    model = models.ModelConfig(sizes, 2, content=transformer).make_generator("content")
    init = lambda key: {
        **models.init_generator(model, key),
        "repa": generators.init_projector(model, key),
    }
    params = sharding.unbox(jax.eval_shape(init, jax.random.key(0)))
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    params = jax.tree.unflatten(
        tree, [rng.normal(size=x.shape, scale=0.1).astype(np.float32) for x in leaves]
    )
    encoder = models.ModelConfig(sizes).make_tokenizer()
    images = rng.uniform(-1, 1, (1, 32, 32, 3)).astype(np.float32)
    init = functools.partial(models.init_tokenizer, encoder)
    weights = jax.jit(lambda key: sharding.unbox(init(key)))(jax.random.key(1))
    encode = jax.jit(functools.partial(generators.encode, encoder))
    quantized = encode(weights, {"image": images})
    targets = jnp.asarray(rng.normal(size=(1, 256, 768)), jnp.float32)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def alignment(params):
        examples = generators.Examples(quantized, jnp.array([1]), jnp.ones(10), targets=targets)
        loss, terms = generators.loss_terms(
            model, params, examples, jax.random.key(0), generators.RepaConfig(0.5, 2)
        )
        return terms["repa_loss"].mean(), (loss, terms)

    grads, (loss, terms) = alignment(params)
    others = terms["canvas_loss"] + terms["token_loss"]
    np.testing.assert_allclose(loss, others.mean() + 0.5 * terms["repa_loss"].mean(), rtol=1e-6)
    by_block = np.abs(grads["blocks"]["blocks"]["linear1"]["kernel"]).max((1, 2))
    assert by_block[0] > 1e-6 and by_block[1] > 1e-6 and by_block[2] == 0
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads["repa"]))
    assert np.abs(grads["token_head"]["kernel"]).max() == 0


@pytest.mark.parametrize(
    ("part", "expected", "networks"),
    [
        (
            TOKENIZER,
            {"perceptual_loss", "adversarial_loss", "discriminator_loss", "lecam_loss"},
            {"lpips", "dino"},
        ),
        (CONTENT, {"content/repa_loss"}, {"dinov2"}),
    ],
    ids=["tokenizer", "content"],
)
@pytest.mark.slow
def test_the_published_presets_train_with_every_loss(part, expected, networks):
    """Traced in full size, nothing is computed; the weights of the frozen networks are not here."""
    config = imagenet256.get_config("d16")
    config.tokenizer_training.batch_size = config.generator_training.batch_size = 2
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        model = models.ModelConfig.from_config(config, num_classes=1000)
        trainer = make_trainer(part, config, model, mesh, num_images=100)
        state, metrics = jax.eval_shape(
            functools.partial(trainer.jit_train_step, index_backprop=True),
            trainer.abstract_state,
            trainer.abstract_inputs,
            trainer.abstract_batch,
            trainer.abstract_key,
        )
    assert expected <= metrics.keys()
    assert pretrained_names((part,), config) == networks <= set(pretrained.NAMES)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(state) == shapes(trainer.abstract_state)
