"""The training of one part: the compiled step that `train` runs and `compile` lowers."""

import abc
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PRNGKeyArray

from nvg_jax import pretrained
from nvg_jax.models import ModelConfig
from nvg_jax.parts import Part
from nvg_jax.pipeline import Pipeline
from nvg_jax.runtime import sharding
from nvg_jax.runtime.processes import is_main
from nvg_jax.training.length import training_length
from nvg_jax.training.optimizers import OptimizerConfig, learning_rate_schedule, make_optimizer
from nvg_jax.training.run import Run
from nvg_jax.training.state import Params, TrainState
from nvg_jax.visualize import image_grid
from nvg_jax.workdir import RunMetadata

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
        steps: the length of the training.
        learning_rate: step -> rate.
        abstract_state, abstract_inputs, abstract_batch: the abstract arguments of `train_step` with
            their shardings.
        jit_init_state, jit_train_step, jit_eval_step: the methods of these names, compiled;
            `jit_train_step` donates the state.
    """

    SETTINGS: tuple[str, ...] = ()  # of the config, besides the recipe, that shape the program
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
    ):
        """
        Args:
            config: the section of the part and `SETTINGS`, nothing else.
            num_images: the size of the training data.

        Raises:
            UserError: invalid settings.
        """
        self.part, self.config, self.model, self.mesh = part, config, model, mesh
        self.recipe = recipe = config[part.section]
        self.num_images = num_images
        self.steps = training_length(recipe.length, num_images, recipe.batch_size)
        self.optimizer_config = OptimizerConfig(**recipe.optimizer)
        self.learning_rate = learning_rate_schedule(
            self.optimizer_config, recipe.batch_size, self.steps
        )
        self.optimizer = make_optimizer(self.optimizer_config, self.learning_rate)
        self.make_networks()
        replicated = NamedSharding(mesh, PartitionSpec())
        batch = {
            "image": jax.ShapeDtypeStruct(
                (recipe.batch_size, *model.tokenizer.image_size, 3), jnp.float32
            ),
            "label": jax.ShapeDtypeStruct((recipe.batch_size,), jnp.int32),
        }
        self.abstract_batch = sharding.with_shardings(
            batch, NamedSharding(mesh, sharding.BATCH_SPEC)
        )
        self.abstract_inputs = sharding.with_shardings(self.input_shapes(), replicated)
        self.jit_init_state, self.abstract_state = sharding.sharded_init(
            self.init_state, mesh, abstract_key(), self.abstract_inputs
        )
        self.jit_train_step = jax.jit(
            self.train_step,
            donate_argnums=0,
            static_argnames="warming_up",
            out_shardings=(jax.tree.map(lambda x: x.sharding, self.abstract_state), replicated),
        )
        self.jit_eval_step = jax.jit(self.eval_step, out_shardings=replicated)

    # The program.

    @classmethod
    @abc.abstractmethod
    def pretrained(cls, part: Part, config: ml_collections.ConfigDict) -> tuple[str, ...]:
        """The names of the pretrained networks that the losses need."""

    @abc.abstractmethod
    def make_networks(self):
        """Makes the modules; called before anything else that a subclass defines."""

    @abc.abstractmethod
    def input_shapes(self) -> Params:
        """The abstract `inputs`, without shardings."""

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
        warming_up: bool = False,
    ) -> tuple[State, dict[str, Array]]:
        """One step.

        Args:
            key: the run's key for steps; the step number is folded in.
            warming_up: whether this is a step of the IBQ warm-up (a tokenizer's).
        """

    @abc.abstractmethod
    def eval_step(self, params: Params, inputs: Params, batch: Batch) -> dict[str, Array]:
        """What `evaluate` needs of a batch; images whose "mask" is False do not count."""

    def update(self, state: State, grads: Params) -> State:
        """The state after one step of the optimizer along `grads`."""
        decay = self.optimizer_config.average_decay(state.step)
        return state.update(grads, self.optimizer, decay)

    def warming_up(self, step: int) -> bool:
        """Whether `step` is in the IBQ warm-up."""
        return False

    def lower(self) -> jax.stages.Lowered:
        """The step at the configured batch size, without any data; in a warm-up if there is one."""
        return self.jit_train_step.lower(
            self.abstract_state,
            self.abstract_inputs,
            self.abstract_batch,
            abstract_key(),
            warming_up=self.warming_up(0),
        )

    @property
    def networks(self) -> Params:
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
        names = self.pretrained(self.part, self.config)
        return {name: pretrained.abstract(name) for name in names}

    # A run.

    @abc.abstractmethod
    def open(self, run: Run) -> tuple[Params, RunMetadata]:
        """(inputs, metadata) of a run; the metadata is stored with every checkpoint.

        Raises:
            UserError: what the run builds on is missing or does not fit.
        """

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
        if self.part.images != "samples":
            return metrics, None
        params = self.export(run, state, inputs)
        return metrics, sample_picture(metadata, params, run.config.seed) if is_main() else None

    def finish(self, run: Run, state: State, metadata: RunMetadata) -> RunMetadata:
        """The metadata of the last checkpoint."""
        return metadata

    @abc.abstractmethod
    def export(self, run: Run, state: State, inputs: Params) -> Params:
        """{network: NumPy parameters} of the model as trained so far."""


def sample_picture(metadata: RunMetadata, params: Params, seed: int) -> np.ndarray:
    """A grid of samples, uint8 (H, W, 3), the same ones of a seed, drawn by this process alone."""
    count = min(metadata.model.num_classes, PICTURE_CLASSES)
    classes = np.arange(count).repeat(PICTURE_PER_CLASS)
    with jax.set_mesh(sharding.local_mesh()):
        return image_grid(Pipeline(metadata, params).sample(classes, seed=seed).images, columns=8)


def abstract_key():
    return jax.eval_shape(jax.random.key, 0)
