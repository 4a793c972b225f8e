"""Trains the tokenizer: losses, step, task (paper, Section 3.1 and Appendix)."""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nvg_jax import models, pretrained
from nvg_jax.errors import UserError
from nvg_jax.layers import unshard
from nvg_jax.runtime import sharding
from nvg_jax.runtime.files import fingerprint
from nvg_jax.tokenizer import Tokenizer, TokenizerConfig, codebook_usage
from nvg_jax.tokenizer.diffaug import augment, discriminator_input
from nvg_jax.tokenizer.discriminator import DiscriminatorHeads, SmallFeatures
from nvg_jax.tokenizer.losses import (
    RECONSTRUCTION_LOSSES,
    LeCam,
    discriminator_loss,
    generator_loss,
)
from nvg_jax.training import programs
from nvg_jax.training.initial import start_from, with_params
from nvg_jax.training.loop import Task
from nvg_jax.training.optimizers import OptimizerConfig, learning_rate_schedule, make_optimizer
from nvg_jax.training.run import Run
from nvg_jax.training.state import TrainState
from nvg_jax.visualize import reconstruction_grid
from nvg_jax.workdir import RunMetadata

DISCRIMINATORS = ("dino", "small")
SCALE_IMAGES = 10_000  # maximum number of images for measuring the canvas scales
PICTURE_IMAGES = 16  # images in the picture of reconstructions


@dataclasses.dataclass(frozen=True)
class TokenizerLossConfig:
    """The losses of the tokenizer; a weight of 0 turns a term off and leaves it out of the program.

    reconstruction: "l1" or "l2". discriminator: "dino" trains heads on the frozen features of DINO
        ViT-S/16, for images of at least 224 x 224; "small" trains a whole network, for small
        images.

    Raises:
        UserError: an unknown name, or a negative weight.
    """

    reconstruction: str
    perceptual_weight: float
    adversarial_weight: float
    lecam_weight: float
    discriminator: str

    def __post_init__(self):
        choices_of = {"reconstruction": RECONSTRUCTION_LOSSES, "discriminator": DISCRIMINATORS}
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                raise UserError(
                    f"tokenizer_training.{name} must be one of {', '.join(choices)}, got "
                    f"{getattr(self, name)!r}."
                )
        for name in ("perceptual_weight", "adversarial_weight", "lecam_weight"):
            if not getattr(self, name) >= 0:
                raise UserError(
                    f"tokenizer_training.{name} must be 0 or more, got {getattr(self, name)}."
                )

    @property
    def pretrained(self) -> tuple[str, ...]:
        """The names of the pretrained networks that the losses need."""
        names = ("lpips",) if self.perceptual_weight else ()
        if self.adversarial_weight and self.discriminator == "dino":
            names += ("dino",)
        return names

    def make_discriminator(self, dtype) -> nn.Module | None:
        if not self.adversarial_weight:
            return None
        heads = DiscriminatorHeads(dtype=dtype)
        if self.discriminator == "dino":
            return heads
        return nn.Sequential([SmallFeatures(dtype=dtype), heads])


class DiscriminatorState(flax.struct.PyTreeNode):
    """The discriminator in training: parameters, power-iteration vectors, averaged logits."""

    params: Any
    spectral: Any
    opt_state: Any
    lecam: LeCam


class TokenizerState(TrainState):
    """The tokenizer in training, with its discriminator if it has one."""

    discriminator: DiscriminatorState | None = None


def init_state(
    key,
    *,
    model: Tokenizer,
    optimizer: optax.GradientTransformation,
    discriminator: nn.Module | None,
    discriminator_optimizer: optax.GradientTransformation,
) -> TokenizerState:
    """The state before the first step, its parameters boxed with their logical axes."""
    state = TokenizerState.create(models.init_tokenizer(model, key), optimizer)
    if discriminator is None:
        return state
    if isinstance(discriminator, DiscriminatorHeads):
        shape = (1, math.prod(pretrained.DINO_GRID), pretrained.DINO_WIDTH)
        inputs = [jnp.zeros(shape)] * pretrained.DINO_FEATURES
    else:
        inputs = jnp.zeros((1, *model.config.image_size, 3))
    variables = discriminator.init(jax.random.fold_in(key, 1), inputs)
    discriminator_state = DiscriminatorState(
        params=variables["params"],
        spectral=variables["spectral"],
        opt_state=discriminator_optimizer.init(variables["params"]),
        lecam=LeCam.create(),
    )
    return state.replace(discriminator=discriminator_state)


def code_counts(stage_tokens, codebook_size: int):
    """int32 (S, V): how often each token was used in each stage."""
    return jnp.stack(
        [jnp.bincount(ids.ravel(), length=codebook_size) for ids in stage_tokens]
    ).astype(jnp.int32)


def discriminator_inputs(discriminator: nn.Module, frozen, images, key, dtype):
    """The discriminator's view of images (B, H, W, 3): DiffAug, then its input size."""
    input_key, augment_key = jax.random.split(key)
    images = augment(images, augment_key)
    if not isinstance(discriminator, DiscriminatorHeads):
        return images
    tokens = pretrained.dino(frozen["dino"], discriminator_input(images, input_key), dtype)
    return [hidden[:, 1:] + hidden[:, :1] for hidden in tokens]  # each patch plus the class token


def train_step(
    state: TokenizerState,
    frozen,
    batch,
    key,
    *,
    model: Tokenizer,
    optimizer: optax.GradientTransformation,
    discriminator: nn.Module | None,
    discriminator_optimizer: optax.GradientTransformation,
    config: OptimizerConfig,
    losses: TokenizerLossConfig,
    index_backprop: bool,
):
    """One step of the tokenizer and its discriminator from one shared forward pass.

    Args:
        frozen: {name: parameters} of the networks in `losses.pretrained`.
        batch: {"image": float32 (B, H, W, 3) in [-1, 1]}.
        key: the run's key; the step number is folded in.

    Returns:
        The state and the metrics.
    """
    (_, (metrics, discriminator_state)), (grads, discriminator_grads) = jax.value_and_grad(
        loss_terms, argnums=(0, 1), has_aux=True
    )(
        state.params,
        state.discriminator and state.discriminator.params,
        state.discriminator,
        frozen,
        batch["image"],
        jax.random.fold_in(key, state.step),
        model=model,
        discriminator=discriminator,
        losses=losses,
        index_backprop=index_backprop,
    )
    metrics["grad_norm"] = optax.tree.norm(grads)
    state = state.update(grads, optimizer, config.ema_decay)
    if discriminator_state is not None:
        metrics["discriminator_grad_norm"] = optax.tree.norm(discriminator_grads)
        updates, opt_state = discriminator_optimizer.update(
            discriminator_grads, discriminator_state.opt_state, discriminator_state.params
        )
        params = optax.apply_updates(discriminator_state.params, updates)
        state = state.replace(
            discriminator=discriminator_state.replace(params=params, opt_state=opt_state)
        )
    return state, metrics


def loss_terms(
    params,
    discriminator_params,
    discriminator_state: DiscriminatorState | None,
    frozen,
    images,
    key,
    *,
    model: Tokenizer,
    discriminator: nn.Module | None,
    losses: TokenizerLossConfig,
    index_backprop: bool,
):
    """The sum of the tokenizer's and the discriminator's losses, detached from each other.

    Returns:
        (loss, (metrics, the discriminator state with new vectors and averages)).
    """
    params = jax.tree.map(unshard, params)
    restored, quantized = model.apply({"params": params}, images, index_backprop)
    terms = {
        "reconstruction": RECONSTRUCTION_LOSSES[losses.reconstruction](restored, images),
        "quantizer": quantized.losses.mean(),
    }
    loss = sum(terms.values())
    metrics = {
        "quantizer_stage_loss": quantized.losses,
        "code_counts": code_counts(quantized.stage_tokens, model.config.codebook_size),
    }
    if losses.perceptual_weight:
        distances = pretrained.lpips(frozen["lpips"], restored, images, model.dtype)
        terms["perceptual"] = distances.mean()
        loss += losses.perceptual_weight * terms["perceptual"]
    opposing_loss = 0.0
    if discriminator is not None:
        fake_key, real_key = jax.random.split(key)
        inputs = lambda images, key: discriminator_inputs(
            discriminator, frozen, images, key, model.dtype
        )
        fake_inputs, real_inputs = inputs(restored, fake_key), inputs(images, real_key)
        variables = {"params": discriminator_params, "spectral": discriminator_state.spectral}
        logits = discriminator.apply(jax.lax.stop_gradient(variables), fake_inputs)
        terms["adversarial"] = generator_loss(logits)
        loss += losses.adversarial_weight * terms["adversarial"]

        real, updated = discriminator.apply(variables, real_inputs, mutable=["spectral"])
        fake = discriminator.apply(
            {"params": discriminator_params, **updated}, jax.lax.stop_gradient(fake_inputs)
        )
        terms["discriminator"] = discriminator_loss(real, fake)
        terms["lecam"] = discriminator_state.lecam.loss(real, fake)
        opposing_loss = terms["discriminator"] + losses.lecam_weight * terms["lecam"]
        metrics |= {"logits_real": real.mean(), "logits_fake": fake.mean()}
        discriminator_state = discriminator_state.replace(
            spectral=updated["spectral"], lecam=discriminator_state.lecam.update(real, fake)
        )
    metrics |= {"loss": loss, **{f"{name}_loss": value for name, value in terms.items()}}
    return loss + opposing_loss, (metrics, discriminator_state)


def eval_step(params, frozen, batch, *, model: Tokenizer):
    """Reconstructions of a batch {"image", "mask"}, their quality and how often each code is used.

    Returns:
        {"psnr": float32 (B,) in dB (peak-to-peak range 2), "lpips": float32 (B,) if `frozen` has
        it, "restored": float32 (B, H, W, 3), "code_counts": int32 (S, V) for the images whose mask
        is True}.
    """

    def run(tokenizer):
        quantized = tokenizer.encode(batch["image"])
        return tokenizer.decode(quantized.canvases[:, -1]), quantized

    restored, quantized = model.apply({"params": params}, method=run)
    error = jnp.square(restored - batch["image"]).mean((1, 2, 3))
    size = model.config.codebook_size
    counted = [jnp.where(batch["mask"][:, None], ids, size) for ids in quantized.stage_tokens]
    quality = {"psnr": 10 * jnp.log10(4.0 / error)}
    if "lpips" in frozen:
        quality["lpips"] = pretrained.lpips(frozen["lpips"], restored, batch["image"], model.dtype)
    return quality | {
        "restored": restored,
        "code_counts": code_counts(counted, size + 1)[:, :size],
    }


# The program and the task.


def loss_config(config: ml_collections.ConfigDict) -> TokenizerLossConfig:
    """The losses of a configuration; raises UserError if they are invalid."""
    fields = dataclasses.fields(TokenizerLossConfig)
    return TokenizerLossConfig(**{f.name: config.tokenizer_training[f.name] for f in fields})


def build_program(run: Run) -> programs.TrainProgram:
    """The program of a run.

    Raises:
        UserError: invalid settings, or a batch that does not fit the mesh or the data set.
    """
    recipe = run.config.tokenizer_training
    run.check_batch_size(recipe.batch_size)
    return make_program(run.config, run.mesh, run.num_steps(recipe))


@programs.shared
def make_program(
    config: ml_collections.FrozenConfigDict, mesh: Mesh, steps: int
) -> programs.TrainProgram:
    """The training of the tokenizer over `steps` steps.

    init: (key). step: (state, frozen, batch, key, index_backprop), index_backprop a Python bool.
    evaluate: (raw parameters, frozen, batch). See `train_step` and `eval_step`.
    """
    recipe, losses = config.tokenizer_training, loss_config(config)
    optimizer_config = OptimizerConfig(**recipe.optimizer)
    optimizers = dict(
        optimizer=make_optimizer(optimizer_config, recipe.batch_size, steps),
        discriminator_optimizer=make_optimizer(
            dataclasses.replace(optimizer_config, weight_decay=recipe.discriminator_weight_decay),
            recipe.batch_size,
            steps,
        ),
    )
    tokenizer_config = TokenizerConfig(**config.tokenizer)
    networks = dict(
        model=models.make_tokenizer(tokenizer_config, config.dtype),
        discriminator=losses.make_discriminator(jnp.dtype(config.dtype)),
    )
    key = programs.abstract_key()
    init, state = sharding.sharded_init(
        functools.partial(init_state, **networks, **optimizers), mesh, key
    )
    replicated = NamedSharding(mesh, PartitionSpec())
    return programs.TrainProgram(
        init=init,
        step=jax.jit(
            functools.partial(
                train_step, config=optimizer_config, losses=losses, **networks, **optimizers
            ),
            donate_argnums=0,
            static_argnames="index_backprop",
            out_shardings=(jax.tree.map(lambda x: x.sharding, state), replicated),
        ),
        evaluate=jax.jit(
            functools.partial(eval_step, model=networks["model"]), out_shardings=replicated
        ),
        arguments=(
            state,
            programs.abstract_frozen(losses.pretrained, mesh),
            programs.abstract_batch(tokenizer_config, recipe.batch_size, mesh),
            key,
        ),
        schedule=learning_rate_schedule(optimizer_config, recipe.batch_size, steps),
    )


def task(run: Run) -> Task:
    """The tokenizer as a task for `fit`."""
    recipe = run.config.tokenizer_training
    steps = run.num_steps(recipe)
    warmup = round(recipe.index_backprop_epochs * len(run.train_source) / recipe.batch_size)
    program = build_program(run)
    frozen = run.frozen(loss_config(run.config).pretrained)
    key = jax.random.fold_in(run.key, 3)
    metadata = RunMetadata(
        tokenizer=run.tokenizer_config,
        class_names=run.train_source.class_names,
        config=run.config_json(),
        steps=steps,
    )

    def evaluate(state):
        quality, counts, shown = {}, 0, None
        for batch in run.test_batches(recipe):
            out = program.evaluate(state.params, frozen, batch)
            mask = sharding.to_host(batch["mask"])
            for name in {"psnr", "lpips"} & out.keys():
                quality.setdefault(name, []).append(np.asarray(out[name])[mask])
            counts = counts + np.asarray(out["code_counts"])
            if shown is None:
                pair = sharding.to_host(batch["image"]), np.asarray(out["restored"])
                shown = [images[mask][:PICTURE_IMAGES] for images in pair]
        metrics = {name: np.concatenate(parts).mean() for name, parts in quality.items()}
        return metrics | codebook_usage(counts), reconstruction_grid(*shown)

    def finish(state):
        return metadata.replace(
            canvas_scale=measure_canvas_scale(run, state.params),
            fingerprint=fingerprint(jax.tree.map(sharding.to_host, state.params)),
        )

    def init():
        state = program.init(jax.random.fold_in(run.key, 0))
        if not run.config.init_from:
            return state
        return with_params(
            state, start_from(run.config.init_from, {"tokenizer": state.params}, ())["tokenizer"]
        )

    return Task(
        name="tokenizer",
        recipe=recipe,
        steps=steps,
        state=program.state,
        learning_rate=program.schedule,
        metadata=metadata,
        batches=run.train_batches(recipe.batch_size, run.config.seed),
        init=init,
        update=lambda state, batch, step: program.step(
            state, frozen, batch, key, index_backprop=step < warmup
        ),
        evaluate=evaluate,
        finish=finish,
        model=lambda state: {"tokenizer": jax.tree.map(sharding.to_host, state.params)},
    )


def measure_canvas_scale(run: Run, params) -> tuple[float, ...]:
    """1 / std of the inputs of all stages (1 for the first) and of the final canvas, S + 1 values.

    Raises:
        UserError: the canvases after a stage are all equal.
    """
    model = models.make_tokenizer(run.tokenizer_config, run.config.dtype)
    batch_size = run.config.tokenizer_training.batch_size
    count = math.ceil(min(len(run.train_source), SCALE_IMAGES) / batch_size)
    batches = run.train_batches(batch_size, run.config.seed)
    totals = 0
    for _ in range(count):
        images = sharding.global_batch(next(batches), run.mesh)["image"]
        moments = jax.device_get(canvas_moments(model, params, images))
        totals = totals + np.asarray(moments, np.float64)
    batches.close()
    mean, square = totals / count
    variance = square - mean**2
    if not (variance > 0).all():
        raise UserError(
            f"The canvases after some stage are all equal (variances {variance}): the tokenizer "
            "has collapsed. Train it longer or with a lower learning rate."
        )
    return 1.0, *(1 / np.sqrt(variance)).tolist()


@functools.partial(jax.jit, static_argnames="model")
def canvas_moments(model: Tokenizer, params, images):
    """Mean and mean square of the canvases after each stage: float32 (2, S), unsharded."""
    canvases = model.apply({"params": params}, images, method="encode").canvases
    return unshard(jnp.stack([canvases.mean((0, 2, 3)), jnp.square(canvases).mean((0, 2, 3))]))
