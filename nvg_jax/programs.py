"""The programs of training, from a configuration: what `train` runs and `compile` looks into.

All take and give arrays that are placed on a mesh, and are traced inside `jax.set_mesh` and
`nn.logical_axis_rules` of `nvg_jax.sharding`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nvg_jax import models, sharding
from nvg_jax.optimizers import OptimizerConfig, learning_rate_schedule, make_optimizer
from nvg_jax.state import TrainState
from nvg_jax.steps import generators as generator_steps
from nvg_jax.steps import tokenizer as tokenizer_steps
from nvg_jax.tokenizer import TokenizerConfig


class Program(NamedTuple):
    """One kind of training, compiled when it is first called.

    init: (key, ...) -> the initial state.
    step: (state, ...) -> (state, metrics); takes the memory of the state it is given.
    evaluate: (parameters, ...) -> metrics.
    state: the abstract state, every leaf with its sharding.
    schedule: step -> learning rate.
    """

    init: Callable
    step: Callable
    evaluate: Callable
    state: Any
    schedule: optax.Schedule


def tokenizer_training(config: ml_collections.ConfigDict, mesh: Mesh, steps: int) -> Program:
    """Training of the tokenizer over `steps` steps.

    init: (key). step: (state, batch, soft_index), soft_index a Python bool. evaluate: (raw
    parameters, batch). The arguments are those of `nvg_jax.steps.tokenizer`.
    """
    settings = config.tokenizer_training
    optimizer_config = OptimizerConfig(**settings.optimizer)
    optimizer = make_optimizer(optimizer_config, settings.batch_size, steps)
    model = models.make_tokenizer(TokenizerConfig(**config.tokenizer), config.dtype)
    init, state = sharding.initialiser(
        lambda key: TrainState.create(tokenizer_steps.init_params(model, key), optimizer),
        mesh,
        jax.eval_shape(jax.random.key, 0),
    )
    replicated = NamedSharding(mesh, PartitionSpec())
    step = functools.partial(
        tokenizer_steps.train_step,
        model=model,
        optimizer=optimizer,
        config=optimizer_config,
        reconstruction=settings.reconstruction,
    )
    evaluate = functools.partial(tokenizer_steps.eval_step, model=model)
    return Program(
        init=init,
        step=jax.jit(
            step,
            donate_argnums=0,
            static_argnames="soft_index",
            out_shardings=(jax.tree.map(lambda x: x.sharding, state), replicated),
        ),
        evaluate=jax.jit(evaluate, out_shardings=replicated),
        state=state,
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

    init: (key, codebook). step: (states, tokenizer parameters, canvas scale, batch, key).
    evaluate: (averaged parameters, tokenizer parameters, canvas scale, batch). The arguments are
    those of `nvg_jax.steps.generators`.
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
            params = generator_steps.init_params(model, name_key, codebook)
            states[name] = TrainState.create(params, optimizer)
        return states

    codebook = jax.ShapeDtypeStruct(
        (tokenizer_config.codebook_size, tokenizer_config.latent_dim), jnp.float32
    )
    init, state = sharding.initialiser(init, mesh, jax.eval_shape(jax.random.key, 0), codebook)
    replicated = NamedSharding(mesh, PartitionSpec())
    step = functools.partial(
        generator_steps.train_step,
        models=generators,
        optimizers=dict.fromkeys(names, optimizer),
        configs=dict.fromkeys(names, optimizer_config),
        tokenizer=tokenizer,
        class_dropout=config.class_dropout,
    )
    evaluate = functools.partial(generator_steps.eval_step, models=generators, tokenizer=tokenizer)
    return Program(
        init=init,
        step=jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(jax.tree.map(lambda x: x.sharding, state), replicated),
        ),
        evaluate=jax.jit(evaluate, out_shardings=replicated),
        state=state,
        schedule=learning_rate_schedule(optimizer_config, settings.batch_size, steps),
    )
