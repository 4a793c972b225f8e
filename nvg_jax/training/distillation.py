"""Distills a structure generator, so that each split needs fewer evaluations of the network.

The student starts as a copy of the teacher and learns from it with the guidance built in, so that
it needs no null class. By default, it learns to reach the end point of the teacher's flow along a
straight line (reflow; Liu et al., arXiv 2209.03003), which takes few steps.
"""

import dataclasses
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jaxtyping import Array, Float32, Int, Int32, PRNGKeyArray

from nvg_jax import granularity, workdir
from nvg_jax.data import SequenceSource
from nvg_jax.data.sources import default_class_names
from nvg_jax.errors import UserError, listed
from nvg_jax.metadata import RunMetadata
from nvg_jax.models import check_networks, init_generator
from nvg_jax.parts import GENERATORS, Part
from nvg_jax.runtime import sharding, storage
from nvg_jax.sampling.guidance import Guidance
from nvg_jax.sampling.settings import Settings
from nvg_jax.structure import flow
from nvg_jax.structure.losses import Teacher, draw_times, structure_losses
from nvg_jax.structure.model import StructureGenerator
from nvg_jax.tokenizer import Quantized, Tokenizer
from nvg_jax.training.generators import check_heads, encode, sampling_settings
from nvg_jax.training.initial import with_params
from nvg_jax.training.run import Run
from nvg_jax.training.state import Params, TrainState
from nvg_jax.training.trainer import Batch, Trainer

# (z (N, L, K), time () or (N,), structure embedding (N, L, K), canvas (N, L, D), stage (N,)) ->
# (N, L, K); and (noise (N, L, K), structure embedding, canvas, stage) -> (N, L, K).
Velocity = Callable[..., Float32[Array, "N L K"]]
Solution = Callable[..., Float32[Array, "N L K"]]


def guided_velocity(
    model: StructureGenerator,
    params: Params,
    class_ids: Int32[Array, " N"],
    scales: Float32[Array, " K-1"] | None,
) -> Velocity:
    """The velocity of a flow.

    Args:
        scales: the guidance scale of each stage; None for no guidance.
    """

    def velocity(z, time, embedding, canvas, stage):
        time = jnp.broadcast_to(time, class_ids.shape)
        scale = None if scales is None else scales[stage][:, None, None]
        guidance = Guidance(class_ids, model.num_classes, scale)
        inputs = map(guidance.double, (z, time, embedding, canvas, stage))
        output = model.apply({"params": params}, *inputs, guidance.classes)
        return guidance(cast(Array, output))

    return velocity


def solution(velocity: Velocity, times: Float32[np.ndarray, " steps+1"], solver: str) -> Solution:
    """The end point of a flow."""

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

    def times(self, settings: Settings) -> Float32[np.ndarray, " steps+1"]:
        """The flow's times for given sampling settings, from 1 down to 0."""
        height, width = self.model.grid
        times = flow.shifted_times(settings.flow_steps, height * width, settings.flow_shift)
        return times.astype(np.float32)

    def solver(self, settings: Settings, velocity: Velocity) -> Solution:
        """`solution` for given sampling settings."""
        return solution(velocity, self.times(settings), settings.solver)

    def draw(
        self, key: PRNGKeyArray, structure: Int[Array, "B S L"]
    ) -> tuple[Float32[Array, "B L K"], Float32[Array, "B K-1"]]:
        """The noise and the times that the loss needs.

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
        self,
        params: Params,
        teacher_params: Params,
        quantized: Quantized,
        class_ids: Int32[Array, " B"],
        noise: Float32[Array, "B L K"],
        times: Float32[Array, "B K-1"],
        weights: Float32[Array, " B"] | None = None,
        solved: Float32[Array, "K-1 B L K"] | None = None,
    ) -> Float32[Array, " K-1"]:
        """The loss of each learned split; see `structure_losses`.

        Args:
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
    def guidance(self) -> Float32[Array, " K-1"] | None:
        """The teacher's scales for the learned splits; None if all are 1."""
        scales = np.asarray(self.teacher.structure_guidance, np.float32)[:-2]
        return None if (scales == 1).all() else jnp.asarray(scales)


def solve_stages(
    solve: Solution,
    structure: Int[Array, "B S L"],
    canvases: Float32[Array, "B S L D"],
    noise: Float32[Array, "B L K"],
) -> Float32[Array, "K-1 B L K"]:
    """A flow's end points from the same noise at every learned stage."""
    batch, stages, _ = structure.shape

    def at_stage(stage):
        embedding = granularity.structure_embedding(structure[:, stage], stage, stages - 1)
        return solve(noise, embedding, canvases[:, stage], jnp.full(batch, stage))

    return jax.lax.map(at_stage, jnp.arange(stages - 2))


def split_stages(
    structure: Int[Array, "B S L"], solved: Float32[Array, "K-1 B L K"]
) -> Int[Array, "K-1 B L"]:
    """The map that each learned stage is split into, from `solve_stages`."""

    def at_stage(maps, z, stage):
        bit = jax.lax.dynamic_index_in_dim(z, stage, axis=2, keepdims=False)
        return granularity.split(maps, bit, stage)

    learned = len(solved)
    return jax.vmap(at_stage)(structure[:, :learned].swapaxes(0, 1), solved, jnp.arange(learned))


# The trainer.


class DistillationTrainer(Trainer[TrainState]):
    """Trains a student. Inputs: "teacher", its structure generator, and "tokenizer".

    The config has the teacher's sizes and sampling settings, see `with_teacher`.
    """

    SETTINGS = ("sampling",)
    INIT_KEY, STEP_KEY, DATA_SEED = 1, 3, 2

    @classmethod
    def pretrained_names(cls, part: Part, config: ml_collections.ConfigDict) -> tuple[str, ...]:
        return ()

    def make_networks(self):
        check_heads(self.model, self.part.networks, self.mesh)
        sizes = self.model.tokenizer.num_stages, self.model.tokenizer.codebook_size
        self.distillation = Distillation(
            self.model.make_generator("structure"),
            self.model.make_tokenizer(),
            teacher_settings(self.config).expand(*sizes),
            student_settings(self.config).expand(*sizes),
            self.recipe.reflow,
        )

    def input_shapes(self) -> Params:
        return {
            "teacher": self.model.boxed_params("structure"),
            "tokenizer": self.model.abstract_params("tokenizer"),
        }

    def init_state(self, key: PRNGKeyArray, inputs: Params) -> TrainState:
        params = init_generator(self.distillation.model, key)  # replaced by the teacher's
        return TrainState.create({"structure": params}, self.optimizer)

    def train_step(
        self,
        state: TrainState,
        inputs: Params,
        batch: Batch,
        key: PRNGKeyArray,
        *,
        index_backprop: bool = False,
    ) -> tuple[TrainState, dict[str, Array]]:
        """One step of the student on a batch: the input of `generators.encode`, and "label".

        Its parameters are {"structure": tree}, like the teacher's.
        """
        quantized = encode(self.distillation.tokenizer, inputs["tokenizer"], batch)
        step_key = jax.random.fold_in(key, state.step)
        noise, times = self.distillation.draw(step_key, quantized.sequence.structure)

        def loss_of(params):
            losses = self.distillation.loss(
                params["structure"], inputs["teacher"], quantized, batch["label"], noise, times
            )
            return losses.mean(), losses

        (loss, losses), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        metrics = {
            "structure/loss": loss,
            "structure/flow_loss": losses,
            "grad_norm": optax.tree.norm(grads),
        }
        return self.update(state, grads), metrics

    def eval_step(self, params: Params, inputs: Params, batch: Batch) -> dict[str, Array]:
        """The loss, and the share of positions split as by the teacher."""
        distillation, teacher = self.distillation, inputs["teacher"]
        quantized = encode(distillation.tokenizer, inputs["tokenizer"], batch)
        weights = batch["mask"] / jnp.maximum(batch["mask"].sum(), 1)
        structure, class_ids = quantized.sequence.structure, batch["label"]
        noise, times = distillation.draw(jax.random.key(0), structure)

        def solved(params, guidance, settings):
            velocity = guided_velocity(distillation.model, params, class_ids, guidance)
            solve = distillation.solver(settings, velocity)
            return solve_stages(solve, structure, quantized.canvases, noise)

        by_teacher = solved(teacher, distillation.guidance, distillation.teacher)
        by_student = solved(params["structure"], None, distillation.student)
        losses = distillation.loss(
            params["structure"], teacher, quantized, class_ids, noise, times, weights, by_teacher
        )
        same = split_stages(structure, by_student) == split_stages(structure, by_teacher)
        agreement = (same.mean(2) * weights).sum(1)  # 0 without images
        return {
            "structure/loss": losses.mean(),
            "structure/flow_loss": losses,
            "structure/agreement": agreement.mean(),
            "structure/agreement_of_splits": agreement,
        }

    # A run.

    def open(self, run: Run) -> tuple[Params, RunMetadata]:
        """
        Raises:
            UserError: the data have other classes, or the teacher does not know the settings.
        """
        assert run.teacher is not None
        teacher, params = run.teacher
        classes = run.train_source.class_names
        if teacher.class_names not in (classes, default_class_names(len(classes))):
            raise UserError(
                f"The teacher knows {len(teacher.class_names)} classes "
                f"({listed(teacher.class_names, 3)}) and the data have {len(classes)} "
                f"({listed(classes, 3)}). Use the data set that it was trained on."
            )
        if isinstance(run.train_source, SequenceSource):
            assert teacher.fingerprint is not None  # the model can sample
            run.train_source.check_tokenizer(teacher.fingerprint)
        teacher.expand_settings(teacher_settings(run.config))
        metadata = teacher.replace(
            model=self.model,
            sampling=student_settings(run.config),
            teacher=storage.fingerprint(params["structure"]),
            changes=(),
            step=None,
            fid=None,
            **self.facts(run),
        )
        inputs = {"teacher": params["structure"], "tokenizer": params["tokenizer"]}
        place = lambda x, like: jax.device_put(x, like.sharding)
        return jax.tree.map(place, inputs, self.abstract_inputs), metadata

    def first_state(self, run: Run, inputs: Params) -> TrainState:
        params = jax.tree.map(jnp.copy, {"structure": inputs["teacher"]})
        return with_params(super().first_state(run, inputs), params)

    def export(self, run: Run, state: TrainState, inputs: Params) -> Params:
        assert run.teacher is not None
        return run.teacher[1] | jax.tree.map(sharding.to_host, state.ema_params)


def student_settings(config: ml_collections.ConfigDict) -> Settings:
    """The student's recommended settings: few steps, and no guidance, which is built in."""
    recipe, teacher = config.distillation, teacher_settings(config)
    return dataclasses.replace(
        teacher,
        structure_guidance=1.0,
        flow_steps=recipe.flow_steps,
        solver="euler" if recipe.reflow else teacher.solver,
        # Reflow teaches only the times of a flow that starts from noise.
        flow_restart=1.0 if recipe.reflow else teacher.flow_restart,
    )


def teacher_settings(config: ml_collections.ConfigDict) -> Settings:
    """How the teacher's flow is solved: its sampling settings, overridden by the recipe's."""
    recipe = config.distillation
    changes = {
        "flow_steps": recipe.teacher_steps or None,
        "structure_guidance": tuple(recipe.structure_guidance) or None,
    }
    return sampling_settings(config).updated(changes)


def read_teacher(folder: str) -> tuple[RunMetadata, Params]:
    """(metadata, parameters) of a model to distill.

    Raises:
        UserError: there is no model, or it cannot sample.
    """
    metadata, params = workdir.read_model(folder)
    remedy = "Distillation needs a model with both generators."
    check_networks(f"--teacher={folder}", params, GENERATORS, remedy)
    return metadata, params


def with_teacher(
    config: ml_collections.ConfigDict, teacher: RunMetadata
) -> ml_collections.ConfigDict:
    """The config with the sizes and sampling settings of a teacher; remat stays as it is."""
    config = config.copy_and_resolve_references()
    config.tokenizer.update(dataclasses.asdict(teacher.model.tokenizer))
    for name, sizes in teacher.model.generators.items():
        config[name].update(dataclasses.asdict(sizes) | {"remat": config[name].remat})
    config.sampling = dataclasses.asdict(teacher.sampling)
    return config
