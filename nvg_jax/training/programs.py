"""The programs of training, from a configuration: what `train` runs and `compile` looks into.

All take and give arrays that are placed on a mesh, and are traced inside `jax.set_mesh` and
`nn.logical_axis_rules` of `nvg_jax.runtime.sharding`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nvg_jax import models, pretrained
from nvg_jax.runtime import sharding
from nvg_jax.tokenizer import TokenizerConfig
from nvg_jax.training import generators as generator_steps
from nvg_jax.training import tokenizer as tokenizer_steps
from nvg_jax.training.optimizers import OptimizerConfig, learning_rate_schedule, make_optimizer
from nvg_jax.training.state import TrainState


class Program(NamedTuple):
    """One kind of training, compiled when it is first called.

    init: (key, ...) -> the initial state.
    step: (state, ...) -> (state, metrics); takes the memory of the state it is given.
    evaluate: (parameters, ...) -> metrics.
    arguments: the abstract arguments of `step` at the configured batch size, with their shardings;
        `step.lower(*arguments)` compiles it without any data. The first is the state.
    schedule: step -> learning rate.
    """

    init: Callable
    step: Callable
    evaluate: Callable
    arguments: tuple
    schedule: optax.Schedule

    @property
    def state(self) -> Any:
        """The abstract state, every leaf with its sharding."""
        return self.arguments[0]


def tokenizer_losses(config: ml_collections.ConfigDict) -> tokenizer_steps.Losses:
    """The losses that a configuration's tokenizer is trained with, checked."""
    fields = dataclasses.fields(tokenizer_steps.Losses)
    return tokenizer_steps.Losses(**{f.name: config.tokenizer_training[f.name] for f in fields})


def representation_alignment(
    config: ml_collections.ConfigDict,
) -> generator_steps.RepaConfig | None:
    """How a configuration's content generator is aligned, checked; None if it is not."""
    settings = config.generator_training
    repa = generator_steps.RepaConfig(settings.repa_weight, settings.repa_block)
    repa.check(config.content.depth, tuple(config.tokenizer.latent_size))
    return repa if repa.weight else None


def pretrained_names(config: ml_collections.ConfigDict, run: str) -> tuple[str, ...]:
    """The pretrained networks that a run ("tokenizer", "content", ...) looks through."""
    if run == "tokenizer":
        return tokenizer_losses(config).pretrained
    return ("dinov2",) if run != "structure" and representation_alignment(config) else ()


def abstract_batch(tokenizer: TokenizerConfig, batch_size: int, mesh: Mesh):
    """The abstract training batch of images and labels."""
    batch = {
        "image": jax.ShapeDtypeStruct((batch_size, *tokenizer.image_size, 3), jnp.float32),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }
    return sharding.with_shardings(batch, NamedSharding(mesh, sharding.BATCH_SPEC))


def abstract_frozen(names: Sequence[str], mesh: Mesh):
    """The abstract parameters of pretrained networks, whole on every device."""
    return sharding.with_shardings(
        {name: pretrained.abstract(name) for name in names}, NamedSharding(mesh, PartitionSpec())
    )


def tokenizer_training(config: ml_collections.ConfigDict, mesh: Mesh, steps: int) -> Program:
    """Training of the tokenizer over `steps` steps.

    init: (key). step: (state, frozen, batch, key, index_backprop), index_backprop a Python bool.
    evaluate: (raw parameters, frozen, batch). They are those of `nvg_jax.training.tokenizer`.
    """
    settings, losses = config.tokenizer_training, tokenizer_losses(config)
    optimizer_config = OptimizerConfig(**settings.optimizer)
    optimizers = dict(
        optimizer=make_optimizer(optimizer_config, settings.batch_size, steps),
        discriminator_optimizer=make_optimizer(
            dataclasses.replace(optimizer_config, weight_decay=settings.discriminator_weight_decay),
            settings.batch_size,
            steps,
        ),
    )
    tokenizer_config = TokenizerConfig(**config.tokenizer)
    model = models.make_tokenizer(tokenizer_config, config.dtype)
    discriminator = losses.make_discriminator(jnp.dtype(config.dtype))
    key = jax.eval_shape(jax.random.key, 0)
    init, state = sharding.sharded_init(
        functools.partial(
            tokenizer_steps.init_state, model, discriminator=discriminator, **optimizers
        ),
        mesh,
        key,
    )
    replicated = NamedSharding(mesh, PartitionSpec())
    step = functools.partial(
        tokenizer_steps.train_step,
        model=model,
        discriminator=discriminator,
        config=optimizer_config,
        losses=losses,
        **optimizers,
    )
    batch = abstract_batch(tokenizer_config, settings.batch_size, mesh)
    return Program(
        init=init,
        step=jax.jit(
            step,
            donate_argnums=0,
            static_argnames="index_backprop",
            out_shardings=(jax.tree.map(lambda x: x.sharding, state), replicated),
        ),
        evaluate=jax.jit(
            functools.partial(tokenizer_steps.eval_step, model=model), out_shardings=replicated
        ),
        arguments=(state, abstract_frozen(losses.pretrained, mesh), batch, key),
        schedule=learning_rate_schedule(optimizer_config, settings.batch_size, steps),
    )


def generator_training(
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    steps: int,
    names: Sequence[str],
    num_classes: int,
) -> Program:
    """Training of the generators `names` ("content", "structure", or both) over `steps` steps.

    init: (key, codebook). step: (states, tokenizer parameters, frozen, canvas scale, batch, key).
    evaluate: (averaged parameters, tokenizer parameters, canvas scale, batch). The arguments are
    those of `nvg_jax.training.generators`.
    """
    for name in names:
        heads = config[name].width // config[name].head_dim
        if heads % mesh.shape["tensor"]:
            raise ValueError(
                f"The {heads} attention heads of the {name} generator do not split over "
                f"mesh.tensor={mesh.shape['tensor']}; use a divisor of {heads}."
            )
    settings = config.generator_training
    optimizer_config = OptimizerConfig(**settings.optimizer)
    optimizer = make_optimizer(optimizer_config, settings.batch_size, steps)
    tokenizer_config = TokenizerConfig(**config.tokenizer)
    repa = representation_alignment(config) if "content" in names else None
    tokenizer = models.make_tokenizer(tokenizer_config, config.dtype)
    generators = {
        name: models.make_generator(
            name, config[name].to_dict(), tokenizer_config, num_classes, config.dtype
        )
        for name in names
    }

    def init(key, codebook):
        states = {}
        for name, model in generators.items():
            name_key = jax.random.fold_in(key, models.GENERATORS.index(name))
            params = models.init_generator(model, name_key, codebook, repa is not None)
            states[name] = TrainState.create(params, optimizer)
        return states

    codebook = jax.ShapeDtypeStruct(
        (tokenizer_config.codebook_size, tokenizer_config.latent_dim), jnp.float32
    )
    key = jax.eval_shape(jax.random.key, 0)
    init, state = sharding.sharded_init(init, mesh, key, codebook)
    replicated = NamedSharding(mesh, PartitionSpec())
    step = functools.partial(
        generator_steps.train_step,
        models=generators,
        optimizers=dict.fromkeys(names, optimizer),
        configs=dict.fromkeys(names, optimizer_config),
        tokenizer=tokenizer,
        class_dropout=config.class_dropout,
        repa=repa,
    )
    tokenizer_params = sharding.with_shardings(
        jax.eval_shape(functools.partial(models.init_tokenizer, tokenizer), key), replicated
    )
    canvas_scale = jax.ShapeDtypeStruct((tokenizer_config.num_stages + 1,), jnp.float32)
    evaluate = functools.partial(generator_steps.eval_step, models=generators, tokenizer=tokenizer)
    return Program(
        init=init,
        step=jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(jax.tree.map(lambda x: x.sharding, state), replicated),
        ),
        evaluate=jax.jit(evaluate, out_shardings=replicated),
        arguments=(
            state,
            tokenizer_params,
            abstract_frozen(("dinov2",) if repa else (), mesh),
            canvas_scale,
            abstract_batch(tokenizer_config, settings.batch_size, mesh),
            key,
        ),
        schedule=learning_rate_schedule(optimizer_config, settings.batch_size, steps),
    )
