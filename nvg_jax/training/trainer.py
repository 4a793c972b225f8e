"""The training of one part: the compiled step that `train` runs and `compile` lowers."""

import abc
import functools
from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, PRNGKeyArray

from nvg_jax import pretrained
from nvg_jax.metadata import RunMetadata
from nvg_jax.models import ModelConfig
from nvg_jax.parts import Part
from nvg_jax.pipeline import Pipeline
from nvg_jax.runtime import sharding
from nvg_jax.runtime.processes import is_main
from nvg_jax.training.length import START, Origin, training_length
from nvg_jax.training.optimizers import OptimizerConfig, learning_rate_schedule, make_optimizer
from nvg_jax.training.run import Run
from nvg_jax.training.state import Params, Skipping, TrainState
from nvg_jax.visualize import class_grid

PICTURE_CLASSES, PICTURE_PER_CLASS = 10, 4  # samples in the picture of an evaluation

State = TypeVar("State", bound=TrainState)

# {"image": float32 (B, H, W, 3) in [-1, 1], or "structure" and "tokens" of cached sequences;
# "label": int32 (B,); in an evaluation also "mask": bool (B,)}.
Batch = dict[str, Array]


class Trainer(abc.ABC, Generic[State]):
    """The training of one part, made from settings alone by `registry.make_trainer`.

    What belongs to a run comes as arguments: its state, its batches, and `inputs`, {name: tree} of
    all that a step reads and leaves as it is, such as the tokenizer of the generators. Arrays are
    placed on a mesh; everything is traced inside `sharding.in_mesh`.

    Attributes:
        config: the settings that shape the program. recipe: its section for this part.
        steps: the length of the training.
        schedule: step -> learning rate.
        abstract_state, abstract_inputs, abstract_batch, abstract_key: the abstract arguments of
            `train_step` with their shardings, the batch of images. They are those of the arrays of
            a run to the last detail, so that what is traced with them is not traced again.
        jit_init_state, jit_train_step, jit_eval_step: the methods of these names, compiled;
            `jit_train_step` donates the state.
    """

    SETTINGS: tuple[str, ...] = ()  # what shapes the program besides the recipe
    abstract_state: State
    jit_init_state: Callable[[PRNGKeyArray, Params], State]
    # Folded into the run's key, and added to its seed for the order of the training data.
    INIT_KEY: int
    STEP_KEY: int
    DATA_SEED: int

    def __init__(
        self,
        part: Part,
        config: ml_collections.FrozenConfigDict,
        model: ModelConfig,
        mesh: Mesh,
        num_images: int,
        origin: Origin = START,
    ):
        """
        Args:
            config: the section of the part without what may change (`changes.MAY_CHANGE`), and
                `SETTINGS`.
            num_images: the size of the training data.
            origin: where a run to resume last changed its settings.

        Raises:
            UserError: invalid settings.
        """
        self.part, self.config, self.model, self.mesh = part, config, model, mesh
        self.recipe = recipe = config[part.section]
        self.num_images, self.origin = num_images, origin
        self.steps = training_length(recipe.length, num_images, recipe.batch_size, origin)
        self.optimizer_config = OptimizerConfig(**recipe.optimizer)
        self.schedule = learning_rate_schedule(self.optimizer_config, recipe.batch_size, self.steps)
        self.optimizer = make_optimizer(self.optimizer_config, self.schedule)
        self.make_networks()
        replicated = sharding.replicated(mesh)
        batch = {
            "image": jax.ShapeDtypeStruct(
                (recipe.batch_size, *model.tokenizer.image_size, 3), jnp.float32
            ),
            "label": jax.ShapeDtypeStruct((recipe.batch_size,), jnp.int32),
        }
        self.abstract_batch = sharding.with_shardings(
            batch, NamedSharding(mesh, sharding.BATCH_SPEC)
        )
        self.abstract_key = sharding.with_shardings(jax.eval_shape(jax.random.key, 0), replicated)
        shapes = self.input_shapes()
        self.abstract_inputs = sharding.with_shardings(shapes, sharding.shardings(shapes, mesh))
        skips = bool(recipe.max_skipped_steps)
        self.jit_init_state, self.abstract_state = sharding.sharded_init(
            self.init_skipping_state if skips else self.init_state,
            mesh,
            self.abstract_key,
            self.abstract_inputs,
        )
        self.jit_train_step = jax.jit(
            self.skipping_step if skips else self.train_step,
            donate_argnums=0,
            static_argnames="index_backprop",
            out_shardings=(jax.tree.map(lambda x: x.sharding, self.abstract_state), replicated),
        )
        self.jit_eval_step = jax.jit(self.eval_step, out_shardings=replicated)

    def restated(self, origin: Origin) -> Self:
        """The trainer of a run whose settings last changed at `origin`."""
        return shared_trainer(
            type(self), self.part, self.config, self.model, self.mesh, self.num_images, origin
        )

    # The program.

    @classmethod
    @abc.abstractmethod
    def pretrained_names(cls, part: Part, config: ml_collections.ConfigDict) -> tuple[str, ...]:
        """The names of the pretrained networks that the losses need."""

    @abc.abstractmethod
    def make_networks(self):
        """Makes the modules; called before anything else that a subclass defines."""

    @abc.abstractmethod
    def input_shapes(self) -> Params:
        """The abstract `inputs`: those boxed with logical axes are sharded, others replicated."""

    @abc.abstractmethod
    def init_state(self, key: PRNGKeyArray, inputs: Params) -> State:
        """The state before the first step, its parameters boxed with their logical axes."""

    @abc.abstractmethod
    def train_step(
        self,
        state: State,
        inputs: Params,
        batch: Batch,
        key: PRNGKeyArray,
        *,
        index_backprop: bool = False,
    ) -> tuple[State, dict[str, Array]]:
        """One step.

        Args:
            key: the run's key for steps; the step number is folded in.
            index_backprop: see `Quantizer`; of a tokenizer only.
        """

    def init_skipping_state(self, key: PRNGKeyArray, inputs: Params) -> State:
        """`init_state` for `skipping_step`."""
        return self.init_state(key, inputs).replace(skipping=self.new_skipping())

    def new_skipping(self) -> Skipping:
        return Skipping.create(self.gradient_norms)

    @property
    def gradient_norms(self) -> tuple[str, ...]:
        """The metrics of `train_step` that are gradient norms."""
        return ("grad_norm",)

    def skipping_step(
        self,
        state: State,
        inputs: Params,
        batch: Batch,
        key: PRNGKeyArray,
        *,
        index_backprop: bool = False,
    ) -> tuple[State, dict[str, Array]]:
        """`train_step`, or only its counts if its gradients are not finite or too large.

        They all go on, so that the optimizer's learning rate is that of the step.

        The metrics also have "skipped", 1 if the step was left out, and "skipped_in_a_row".
        """
        assert state.skipping is not None
        taken, metrics = self.train_step(state, inputs, batch, key, index_backprop=index_backprop)
        skipping, left_out = state.skipping.update(metrics)

        def choose(old, new):
            is_count = jnp.issubdtype(new.dtype, jnp.integer)
            return new if is_count else jnp.where(left_out, old, new)

        state = jax.tree.map(choose, state, taken)
        counts = {"skipped": left_out.astype(jnp.int32), "skipped_in_a_row": skipping.in_a_row}
        return state.replace(skipping=skipping), metrics | counts

    def stored_state(self, metadata: RunMetadata) -> State:
        """The abstract state in a checkpoint of this part, whose run may not have left out steps.

        `resumed` turns what is restored to it into the state of this run.
        """
        assert metadata.config is not None
        skips = metadata.config[self.part.section]["max_skipped_steps"]
        if not skips:
            return self.abstract_state.replace(skipping=None)
        abstract = jax.eval_shape(self.new_skipping)
        placed = sharding.replicated(self.mesh)
        return self.abstract_state.replace(skipping=sharding.with_shardings(abstract, placed))

    def resumed(self, state: State) -> State:
        """A restored state, with or without `skipping` as this run needs it."""
        if self.abstract_state.skipping is None:
            return state.replace(skipping=None)
        if state.skipping is None:
            placed = sharding.replicated(self.mesh)
            return state.replace(skipping=jax.jit(self.new_skipping, out_shardings=placed)())
        return state

    @abc.abstractmethod
    def eval_step(self, params: Params, inputs: Params, batch: Batch) -> dict[str, Array]:
        """What `evaluate` needs of a batch; images whose "mask" is False do not count."""

    def update(self, state: State, grads: Params) -> State:
        """The state after one step of the optimizer along `grads`."""
        decay = self.optimizer_config.average_decay(state.step)
        return state.update(grads, self.optimizer, decay)

    def index_backprop(self, step: int) -> bool:
        """Whether `step` is one of the first, in which a tokenizer has `index_backprop`."""
        return False

    def trace(self, step: int = 0, batch: Batch | None = None) -> jax.stages.Traced:
        """The program of a step for such a batch, by default one of images."""
        return self.jit_train_step.trace(
            self.abstract_state,
            self.abstract_inputs,
            batch or self.abstract_batch,
            self.abstract_key,
            index_backprop=self.index_backprop(step),
        )

    @property
    def abstract_networks(self) -> Params:
        """{name: abstract parameters} of all networks in the program."""
        networks = {
            name: tree for name, tree in self.abstract_inputs.items() if name != "canvas_scale"
        }
        return self.trained(self.abstract_state.params) | networks

    def trained(self, params: Params) -> Params:
        """{name: parameters} of the networks in a state's parameters."""
        return params

    def abstract_pretrained(self) -> Params:
        """{name: abstract parameters} of the pretrained networks."""
        names = self.pretrained_names(self.part, self.config)
        return {name: pretrained.abstract(name) for name in names}

    # A run.

    @abc.abstractmethod
    def open(self, run: Run) -> tuple[Params, RunMetadata]:
        """(inputs, metadata) of a run; the metadata is stored with every checkpoint.

        Raises:
            UserError: what the run builds on is missing or does not fit.
        """

    def facts(self, run: Run) -> dict[str, Any]:
        """What the metadata of every part record of a run."""
        return dict(
            config=run.config_json(),
            resize_filter=run.resize_filter,
            num_images=self.num_images,
            steps=self.steps,
        )

    def rehearse(self, run: Run) -> tuple[Params, RunMetadata]:
        """`open` before anything is trained, for a few steps whose results do not count."""
        return self.open(run)

    def first_state(self, run: Run, inputs: Params) -> State:
        """The state that a run starts from: initialized, or with the weights it builds on."""
        return self.jit_init_state(jax.random.fold_in(run.key, self.INIT_KEY), inputs)

    def held_out(self, state: State, inputs: Params, batch: Batch) -> dict[str, Array]:
        """The metrics of an evaluation on one batch."""
        return self.jit_eval_step(state.ema_params, inputs, batch)

    def evaluate(
        self, run: Run, state: State, inputs: Params, metadata: RunMetadata
    ) -> tuple[dict[str, Any], np.ndarray | None]:
        """Metrics of the averaged parameters on held-out images, and a picture uint8 (H, W, 3)."""
        metrics = run.test_metrics(
            run.config[self.part.section], lambda batch: self.held_out(state, inputs, batch)
        )
        return metrics, self.picture(run, state, inputs, metadata)

    def picture(
        self, run: Run, state: State, inputs: Params, metadata: RunMetadata
    ) -> np.ndarray | None:
        """Samples of the model as trained so far, which process 0 draws; None of what has none."""
        if self.part.images != "samples":
            return None
        params = self.export(run, state, inputs)
        return sample_picture(metadata, params, run.config.seed) if is_main() else None

    def finish(self, run: Run, state: State, metadata: RunMetadata) -> RunMetadata:
        """The metadata of the last checkpoint."""
        return metadata

    @abc.abstractmethod
    def export(self, run: Run, state: State, inputs: Params) -> Params:
        """{network: NumPy parameters} of the model as trained so far."""


@functools.lru_cache(maxsize=4)
def shared_trainer(kind: type[Trainer], *arguments) -> Any:
    """A trainer; the same one for equal arguments, so that its programs compile once."""
    return kind(*arguments)


def sample_picture(metadata: RunMetadata, params: Params, seed: int) -> np.ndarray:
    """A grid of samples, uint8 (H, W, 3), the same ones of a seed, drawn by this process alone."""
    count = min(metadata.model.num_classes, PICTURE_CLASSES)
    classes = np.arange(count).repeat(PICTURE_PER_CLASS)
    with jax.set_mesh(sharding.local_mesh()):
        images = Pipeline(metadata, params).sample(classes, seed=seed).images
    return class_grid(images, [metadata.class_names[c] for c in classes], PICTURE_PER_CLASS)
