"""Lowers and compiles what `train` and `sample` run, from a config and abstract arrays."""

import functools
import math
import re
import time
from typing import Any, NamedTuple

import jax
import ml_collections
from jax.sharding import Mesh

from nvg_jax.aot import hlo
from nvg_jax.aot.chips import Chip, Target
from nvg_jax.data import open_source
from nvg_jax.errors import UserError
from nvg_jax.models import ModelConfig
from nvg_jax.parts import BOTH_GENERATORS, GENERATORS, PARTS, Part
from nvg_jax.runtime import sharding
from nvg_jax.sampling.networks import sampling_program
from nvg_jax.sampling.settings import check_dtype
from nvg_jax.training.checks import check_recipes, check_sizes
from nvg_jax.training.generators import sampling_settings
from nvg_jax.training.registry import make_trainer
from nvg_jax.training.run import resolve_lengths

IMAGENET = (1_281_167, 1000)  # training images and classes of tfds:imagenet2012
BYTES = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}  # units in XLA's messages


class DoesNotFitError(UserError):
    """The program needs more memory than a device has.

    missing: the number of bytes missing, if the compiler reports it; else infinite.
    """

    def __init__(self, message: str, missing: float = math.inf):
        super().__init__(message)
        self.missing = missing


def data_size(data: ml_collections.ConfigDict) -> tuple[int, int]:
    """The number of training images and of classes; for ImageNet, known without the data."""
    if data.name.split(":")[:2] == ["tfds", "imagenet2012"]:  # a version may follow
        return IMAGENET
    source = open_source(data.name, "train", data_dir=data.data_dir or None)
    return len(source), source.num_classes


def training_part(config: ml_collections.ConfigDict) -> Part:
    """The part that `config.part` trains in one program; for "all", the generators."""
    name = BOTH_GENERATORS.name if config.part == "all" else config.part
    if name not in PARTS:
        raise UserError(
            f"--config.part={config.part} is not a single program; choose one of "
            f"{', '.join(PARTS)}."
        )
    return PARTS[name]


class Compiled(NamedTuple):
    """A compiled program, its networks' abstract parameters, and the compile time in seconds."""

    program: jax.stages.Compiled
    params: dict[str, Any]
    seconds: float


class Compiler:
    """Compiles one program ("train" or "sample") of a config for a target, at any batch size."""

    def __init__(self, config: ml_collections.ConfigDict, target: Target, program: str):
        self.target, self.program = target, program
        self.part = training_part(config) if program == "train" else None
        if self.part:
            check_recipes(config, (self.part,))
            check_sizes(config, (self.part,))
        else:
            check_dtype(config.dtype)
        self.images, self._num_classes = data_size(config.data)
        self.config = resolve_lengths(config, self.images)

    @property
    def device(self) -> Chip:
        """A device at this program's precision."""
        recipe = self.config[self.part.section] if self.part else {}
        device = self.target.device
        return device._replace(flops=device.peak(recipe.get("dtype") or self.config.dtype))

    def lower(self, config: ml_collections.ConfigDict, batch_size: int, mesh: Mesh):
        """The program for a global batch -> (lowered, {network: abstract parameters}).

        A tokenizer is lowered as in its first steps, with `index_backprop` if it has any: the
        larger program.
        """
        model = ModelConfig.from_config(config, self._num_classes)
        if self.part is None:
            program = sampling_program(model)
            plan, values = program.plan(sampling_settings(config))
            with jax.set_mesh(mesh):
                arguments = program.arguments(batch_size, values, mesh)
                return program.sample.lower(*arguments, plan=plan), arguments[0]
        config = config.copy_and_resolve_references()
        config[self.part.section].batch_size = batch_size
        with sharding.in_mesh(mesh):  # run nothing eagerly inside: the devices do not exist
            trainer = make_trainer(self.part, config, model, mesh, self.images)
            return trainer.trace().lower(), trainer.abstract_networks

    # Keeps the last program: the one that --find_batch compiles last is usually reported.
    @functools.lru_cache(maxsize=1)  # noqa: B019
    def compile(self, batch_size: int) -> Compiled:
        """Compiles the program for a global batch.

        Raises:
            DoesNotFitError: it does not fit; holds the missing memory if the compiler reports it.
        """
        started = time.monotonic()
        lowered, params = self.lower(self.config, batch_size, self.target.mesh)
        try:
            program = lowered.compile(compiler_options=self.target.options)
            return Compiled(program, params, time.monotonic() - started)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise does_not_fit(str(error), batch_size, self.target.topology) from error

    def model_flops(self, batch_size: int) -> int:
        """FLOPs of the program on all devices together, without rematerialization.

        Counted in the program for one CPU: accelerator kernels hide their products or recompute
        some.
        """
        config = self.config.copy_and_resolve_references()
        for name in GENERATORS:
            config[name].remat = "none"
        mesh = sharding.make_mesh(devices=jax.devices("cpu")[:1])
        text = self.lower(config, batch_size, mesh)[0].as_text("hlo")
        return hlo.cost(hlo.parse(text)).flops


def does_not_fit(message: str, batch_size: int, topology: str) -> DoesNotFitError:
    """The error for a message of the compiler."""
    sizes = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", message)
    needs, missing = "the compiler ran out of memory", math.inf
    if sizes:
        used, used_unit, limit, limit_unit = sizes.groups()
        needs = f"it needs {used}{used_unit} of {limit}{limit_unit}"
        missing = float(used) * BYTES[used_unit] - float(limit) * BYTES[limit_unit]
        missing = max(missing, 1.0)  # the message is rounded
    return DoesNotFitError(
        f"A global batch of {batch_size} does not fit in the memory of a {topology} device: "
        f"{needs}. Try a larger --config.mesh.fsdp, more devices, a smaller --batch_size, or "
        "--find_batch.",
        missing,
    )
