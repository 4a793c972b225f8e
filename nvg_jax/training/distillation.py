"""Distills a structure generator, so that each split needs fewer evaluations of the network.

The student starts as a copy of the teacher and learns from it with the guidance built in, so that
it needs no null class. By default, it learns to reach the end point of the teacher's flow along a
straight line (reflow; Liu et al., arXiv 2209.03003), which takes few steps.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nvg_jax import bundled, granularity, models
from nvg_jax.data.sources import default_class_names
from nvg_jax.errors import UserError
from nvg_jax.layers import TransformerConfig
from nvg_jax.runtime import files, sharding
from nvg_jax.runtime.processes import is_main
from nvg_jax.sampling.guidance import Guidance
from nvg_jax.sampling.settings import Settings
from nvg_jax.structure import flow
from nvg_jax.structure.losses import Teacher, draw_times, structure_losses
from nvg_jax.structure.model import StructureGenerator
from nvg_jax.tokenizer import Tokenizer, TokenizerConfig
from nvg_jax.training import programs
from nvg_jax.training.generators import Sampler, encode
from nvg_jax.training.initial import with_params
from nvg_jax.training.loop import Task
from nvg_jax.training.optimizers import OptimizerConfig, learning_rate_schedule, make_optimizer
from nvg_jax.training.run import Run
from nvg_jax.training.state import TrainState
from nvg_jax.workdir import DISTILLATION, RunMetadata


def guided_velocity(model: StructureGenerator, params, class_ids, scales):
    """A flow's velocity (z (N, L, K), time () or (N,), structure embedding, canvas, stage (N,)) ->
    float32 (N, L, K).

    Args:
        class_ids: int32 (N,).
        scales: float32 (K - 1,), the guidance scale of each stage; None for no guidance.
    """

    def velocity(z, time, embedding, canvas, stage):
        time = jnp.broadcast_to(time, class_ids.shape)
        scale = None if scales is None else scales[stage][:, None, None]
        guidance = Guidance(class_ids, model.num_classes, scale)
        inputs = map(guidance.double, (z, time, embedding, canvas, stage))
        return guidance(model.apply({"params": params}, *inputs, guidance.classes))

    return velocity


def solution(velocity, times: np.ndarray, solver: str):
    """(noise, structure embedding, canvas, stage) -> a flow's end point, float32 (N, L, K)."""

    def solve(noise, embedding, canvas, stage):
        known = embedding.astype(jnp.float32) - 1
        along = lambda z, time: velocity(z, time, embedding, canvas, stage)
        return flow.solve(along, noise, known, stage, jnp.asarray(times), solver=solver)

    return solve


@dataclasses.dataclass(frozen=True)
class Distillation:
    """The networks of a distillation and how their flows are solved.

    Attributes:
        teacher, student: expanded sampling settings.
        reflow: whether the student learns the teacher's solutions, or else its velocity.
    """

    model: StructureGenerator
    tokenizer: Tokenizer
    teacher: Settings
    student: Settings
    reflow: bool

    def times(self, settings: Settings) -> np.ndarray:
        """The flow's times for given sampling settings, float32 (n + 1,), from 1 down to 0."""
        height, width = self.model.grid
        times = flow.shifted_times(settings.flow_steps, height * width, settings.flow_shift)
        return times.astype(np.float32)

    def solver(self, settings: Settings, velocity):
        """`solution` for given sampling settings."""
        return solution(velocity, self.times(settings), settings.solver)

    def draw(self, key, structure):
        """What the loss needs for maps int32 (B, S, L): noise (B, L, K) and times (B, K - 1).

        With reflow, a student learns at the times at which it will be called. The first of them,
        pure noise, matters most, and the usual training times hardly ever come near it.
        """
        batch, stages, length = structure.shape
        noise_key, time_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, (batch, length, stages - 1))
        if not self.reflow:
            return noise, draw_times(time_key, batch, stages - 2)
        return noise, jax.random.choice(
            time_key, self.times(self.student)[:-1], (batch, stages - 2)
        )

    def loss(
        self, params, teacher_params, quantized, class_ids, noise, times, weights=None, solved=None
    ):
        """The loss of each learned split, float32 (K - 1,).

        Args:
            class_ids: int32 (B,). noise, times, weights: see `structure_losses`.
            solved: the teacher's solutions from `solve_stages`, if they are already known.
        """
        class_ids = class_ids.repeat(times.shape[1])
        student = guided_velocity(self.model, params, class_ids, None)
        velocity = guided_velocity(self.model, teacher_params, class_ids, self.guidance)
        teacher = Teacher(velocity=velocity)
        if self.reflow and solved is not None:
            folded = solved.swapaxes(0, 1).reshape(-1, *solved.shape[2:])
            teacher = Teacher(solution=lambda *_: folded)
        elif self.reflow:
            teacher = Teacher(solution=self.solver(self.teacher, velocity))
        structure, canvases = quantized.sequence.structure, quantized.canvases
        return structure_losses(student, structure, canvases, noise, times, weights, teacher)

    @property
    def guidance(self):
        """float32 (K - 1,), the teacher's scales for the learned splits; None if all are 1."""
        scales = np.asarray(self.teacher.structure_guidance, np.float32)[:-2]
        return None if (scales == 1).all() else jnp.asarray(scales)


def solve_stages(solve, structure, canvases, noise):
    """A flow's end points from the same noise at every learned stage, float32 (K - 1, B, L, K).

    Args:
        solve: a `solution`. structure: int32 (B, S, L). canvases: float32 (B, S, L, D). noise:
            float32 (B, L, K).
    """
    batch, stages, _ = structure.shape

    def at_stage(stage):
        embedding = granularity.structure_embedding(structure[:, stage], stage, stages - 1)
        return solve(noise, embedding, canvases[:, stage], jnp.full(batch, stage))

    return jax.lax.map(at_stage, jnp.arange(stages - 2))


def split_stages(structure, solved):
    """The map that each learned stage is split into, int32 (K - 1, B, L), from `solve_stages`."""

    def at_stage(labels, z, stage):
        bit = jax.lax.dynamic_index_in_dim(z, stage, axis=2, keepdims=False)
        return granularity.split(labels, bit, stage)

    learned = len(solved)
    return jax.vmap(at_stage)(structure[:, :learned].swapaxes(0, 1), solved, jnp.arange(learned))


def train_step(
    state: TrainState,
    teacher_params,
    tokenizer_params,
    batch,
    key,
    *,
    distillation: Distillation,
    optimizer: optax.GradientTransformation,
    config: OptimizerConfig,
):
    """One step of the student on a batch: the input of `generators.encode`, and "label".

    Args:
        state: its parameters are {"structure": tree}, like the teacher's.
        key: the run's key; the step number is folded in.

    Returns:
        (state, metrics).
    """
    quantized = encode(distillation.tokenizer, tokenizer_params, batch)
    step_key = jax.random.fold_in(key, state.step)
    noise, times = distillation.draw(step_key, quantized.sequence.structure)

    def loss_of(params):
        losses = distillation.loss(
            params["structure"],
            teacher_params["structure"],
            quantized,
            batch["label"],
            noise,
            times,
        )
        return losses.mean(), losses

    (loss, losses), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    metrics = {
        "structure/loss": loss,
        "structure/flow_loss": losses,
        "grad_norm": optax.tree.norm(grads),
    }
    return state.update(grads, optimizer, config.ema_decay), metrics


def eval_step(params, teacher_params, tokenizer_params, batch, *, distillation: Distillation):
    """The loss, and the share of positions split as by the teacher, on held-out images.

    Images where the batch's "mask", bool (B,), is False do not count.
    """
    quantized = encode(distillation.tokenizer, tokenizer_params, batch)
    weights = batch["mask"] / jnp.maximum(batch["mask"].sum(), 1)
    structure, class_ids = quantized.sequence.structure, batch["label"]
    noise, times = distillation.draw(jax.random.key(0), structure)
    student, teacher = params["structure"], teacher_params["structure"]

    def solved(params, guidance, settings):
        velocity = guided_velocity(distillation.model, params, class_ids, guidance)
        solve = distillation.solver(settings, velocity)
        return solve_stages(solve, structure, quantized.canvases, noise)

    wanted = solved(teacher, distillation.guidance, distillation.teacher)
    found = solved(student, None, distillation.student)
    losses = distillation.loss(
        student, teacher, quantized, class_ids, noise, times, weights, wanted
    )
    same = split_stages(structure, found) == split_stages(structure, wanted)
    agreement = jnp.average(same.mean(2), axis=1, weights=weights)
    return {
        "structure/loss": losses.mean(),
        "structure/flow_loss": losses,
        "structure/agreement": agreement.mean(),
        "structure/agreement_of_splits": agreement,
    }


# The program and the task.


def student_settings(config: ml_collections.ConfigDict, teacher: Settings) -> Settings:
    """The student's recommended settings: few steps, and no guidance, which is built in."""
    recipe = config.distillation
    return dataclasses.replace(
        teacher,
        structure_guidance=1.0,
        flow_steps=recipe.flow_steps,
        solver="euler" if recipe.reflow else teacher.solver,
    )


def teacher_settings(config: ml_collections.ConfigDict, recommended: Settings) -> Settings:
    """How the teacher's flow is solved: its folder's settings, overridden by the config's."""
    recipe = config.distillation
    changes = {
        "flow_steps": recipe.teacher_steps or None,
        "structure_guidance": tuple(recipe.structure_guidance) or None,
    }
    return recommended.updated(changes)


@programs.shared
def make_program(
    config: ml_collections.FrozenConfigDict,
    mesh: Mesh,
    steps: int,
    num_classes: int,
    teacher: Settings,
) -> programs.TrainProgram:
    """The training of a student over `steps` steps.

    init: (key,), random parameters. step: (state, teacher's parameters, tokenizer parameters,
    batch, key). evaluate: (averaged parameters, teacher's parameters, tokenizer parameters, batch).
    See `train_step` and `eval_step`.

    Args:
        teacher: the teacher's sampling settings.

    Raises:
        UserError: invalid settings.
    """
    programs.check_heads(config, ("structure",), mesh)
    recipe, tokenizer = config.distillation, TokenizerConfig(**config.tokenizer)
    sizes = tokenizer.num_stages, tokenizer.codebook_size
    optimizer_config = OptimizerConfig(**recipe.optimizer)
    optimizer = make_optimizer(optimizer_config, recipe.batch_size, steps)
    model = models.make_generator(
        "structure", TransformerConfig(**config.structure), tokenizer, num_classes, config.dtype
    )
    distillation = Distillation(
        model,
        models.make_tokenizer(tokenizer, config.dtype),
        teacher.expand(*sizes),
        student_settings(config, teacher).expand(*sizes),
        recipe.reflow,
    )

    def init(key):
        return TrainState.create({"structure": models.init_generator(model, key)}, optimizer)

    key = programs.abstract_key()
    init, state = sharding.sharded_init(init, mesh, key)
    replicated = NamedSharding(mesh, PartitionSpec())
    step = functools.partial(
        train_step, distillation=distillation, optimizer=optimizer, config=optimizer_config
    )
    return programs.TrainProgram(
        init=init,
        step=jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(jax.tree.map(lambda x: x.sharding, state), replicated),
        ),
        evaluate=jax.jit(
            functools.partial(eval_step, distillation=distillation), out_shardings=replicated
        ),
        arguments=(
            state,
            state.params,
            sharding.with_shardings(models.abstract_params("tokenizer", tokenizer), replicated),
            programs.abstract_batch(tokenizer, recipe.batch_size, mesh),
            key,
        ),
        schedule=learning_rate_schedule(optimizer_config, recipe.batch_size, steps),
    )


def read_teacher(folder: str) -> tuple[RunMetadata, dict[str, Any]]:
    """(metadata, parameters) of a model to distill.

    Raises:
        UserError: there is no model, or it cannot sample.
    """
    metadata, params = bundled.read_model(folder)
    missing = [name for name in models.GENERATORS if name not in params]
    if missing:
        raise UserError(
            f"--teacher={folder} has no {' and no '.join(missing)} generator; distillation needs a "
            "model that can sample."
        )
    return metadata, params


def with_sizes(
    config: ml_collections.ConfigDict, teacher: RunMetadata
) -> ml_collections.ConfigDict:
    """The config with the sizes of a teacher; remat stays as in the config."""
    config = config.copy_and_resolve_references()
    config.tokenizer.update(dataclasses.asdict(teacher.tokenizer))
    for name, sizes in teacher.generators.items():
        config[name].update(dataclasses.asdict(sizes) | {"remat": config[name].remat})
    return config


def task(run: Run, teacher: RunMetadata, params: dict[str, Any]) -> Task:
    """The distillation of a teacher's structure generator as a task.

    Args:
        run: its config has the teacher's sizes, see `with_sizes`.
        teacher, params: from `read_teacher`.

    Raises:
        UserError: the data have other classes, or a setting is invalid.
    """
    config, recipe = run.config, run.config.distillation
    classes = run.train_source.class_names
    if teacher.class_names not in (classes, default_class_names(len(classes))):
        raise UserError(
            f"The teacher knows {teacher.num_classes} classes "
            f"({', '.join(teacher.class_names[:3])}, ...) and the data have {len(classes)} "
            f"({', '.join(classes[:3])}, ...). Use the data set that it was trained on."
        )
    if run.cached_sequences:
        run.train_source.check_tokenizer(teacher.fingerprint)
    settings = teacher_settings(config, teacher.sampling)
    teacher.check_settings(settings)
    steps = run.num_steps(recipe)
    program = make_program(config, run.mesh, steps, teacher.num_classes, settings)
    key = jax.random.fold_in(run.key, 3)
    place = lambda tree, like: jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), tree, like)
    teacher_params = place({"structure": params["structure"]}, program.state.params)
    tokenizer_params = jax.device_put(params["tokenizer"], run.replicated)
    metadata = teacher.replace(
        structure=TransformerConfig(**config.structure),
        sampling=student_settings(config, settings),
        teacher=files.fingerprint(params["structure"]),
        config=run.config_json(),
        steps=steps,
        step=None,
        fid=None,
    )
    sampler = Sampler(metadata, config.seed)

    def model(state):
        return params | jax.tree.map(sharding.to_host, state.ema_params)

    def evaluate(state):
        metrics = run.test_metrics(
            recipe,
            lambda batch: program.evaluate(
                state.ema_params, teacher_params, tokenizer_params, batch
            ),
        )
        student = model(state)
        return metrics, sampler.picture(student) if is_main() else None

    def init():
        state = program.init(jax.random.fold_in(run.key, 1))
        return with_params(state, place({"structure": params["structure"]}, state.params))

    return Task(
        name=DISTILLATION,
        recipe=recipe,
        steps=steps,
        state=program.state,
        learning_rate=program.schedule,
        metadata=metadata,
        batches=run.train_batches(recipe.batch_size, config.seed + 2),
        init=init,
        update=lambda state, batch, step: program.step(
            state, teacher_params, tokenizer_params, batch, key
        ),
        evaluate=evaluate,
        finish=lambda state: metadata,
        model=model,
    )
