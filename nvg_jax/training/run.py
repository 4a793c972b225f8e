"""What all parts trained in one run share: configuration, mesh, data, frozen networks."""

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath, epy
from jax.sharding import Mesh, NamedSharding

from nvg_jax import bundled, hub, pretrained
from nvg_jax.data import (
    LoaderOptions,
    SequenceSource,
    Source,
    Transform,
    eval_batches,
    open_source,
    train_batches,
)
from nvg_jax.data.transforms import DEFAULT_FILTER
from nvg_jax.errors import UserError, comes_with
from nvg_jax.metadata import RunMetadata, read_model_metadata
from nvg_jax.models import ModelConfig
from nvg_jax.parts import PARTS
from nvg_jax.runtime import heartbeat, preemption, sharding, watchdog
from nvg_jax.runtime.processes import from_all
from nvg_jax.runtime.storage import digest, storage_path
from nvg_jax.training import length
from nvg_jax.training.changes import NEWEST, Resume

logger = logging.getLogger("nvg_jax")

with epy.lazy_imports(error_callback=comes_with("train")):
    import grain


@dataclasses.dataclass(frozen=True)
class Run:
    """An opened run; see `open_run`.

    Attributes:
        workdir: the folder with a subfolder for each trained part.
        pretrained: {name: parameters} of the pretrained networks that the losses need.
        resize_filter: how images are resized, see `Transform`.
        teacher: the metadata and parameters of the model to distill, if one is distilled.
        resume: how to go on with what the workdir holds.
    """

    config: ml_collections.ConfigDict
    workdir: epath.Path
    mesh: Mesh
    train_source: Source
    test_source: Source
    pretrained: dict[str, Any]
    model: ModelConfig
    resize_filter: str
    teacher: tuple[RunMetadata, dict[str, Any]] | None = None
    resume: Resume = NEWEST

    @property
    def key(self):
        """The random key of the whole run."""
        return jax.random.key(self.config.seed)

    @property
    def tokenizer_workdir(self) -> str:
        """The workdir with the tokenizer that the generators use, or a bundled model's name."""
        return located(self.config.tokenizer_workdir or self.workdir)

    @property
    def replicated(self) -> NamedSharding:
        return sharding.replicated(self.mesh)

    def config_json(self) -> dict[str, Any]:
        return json.loads(self.config.to_json_best_effort())

    def frozen(self, names: Iterable[str]) -> dict[str, Any]:
        """The pretrained networks with these names, replicated on every device."""
        return jax.device_put({name: self.pretrained[name] for name in names}, self.replicated)

    # Batches.

    def process_batch_size(self, batch_size: int) -> int:
        """This process's share of a global batch.

        Raises:
            UserError: the batch does not divide over the mesh, or the mesh not over the processes.
        """
        shards = sharding.batch_shards(self.mesh)
        sharding.check_batch(batch_size, shards)
        if not sharding.processes_split_batch(self.mesh):
            raise UserError(
                f"The mesh (data, fsdp, tensor) = {tuple(self.mesh.shape.values())} spreads tensor "
                f"over devices of several of the {jax.process_count()} processes, which would need "
                "the same images. Use a smaller mesh.tensor, and fsdp for the rest."
            )
        return batch_size // jax.process_count()

    def loader_options(self, batch_size: int) -> LoaderOptions:
        data = self.config.data
        size = self.model.tokenizer.image_size
        return LoaderOptions(
            Transform(size, data.resize, data.pad, self.resize_filter),
            self.process_batch_size(batch_size),
            on_bad=data.on_bad,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_threads=data.num_threads,
            num_workers=data.num_workers,
            prefetch=data.prefetch,
        )

    def train_batches(self, batch_size: int, seed: int, skip: int = 0) -> "grain.DatasetIterator":
        """Endless training batches, this process's share of each, without the first images."""
        return train_batches(self.train_source, self.loader_options(batch_size), seed, skip)

    def test_batches(self, recipe: ml_collections.ConfigDict) -> Iterator[dict[str, jax.Array]]:
        """Yields `recipe.eval_images` test images, each once, as global batches.

        Raises:
            Preempted: SIGTERM arrived. (An evaluation can take longer than the grace period.)
        """
        shards = sharding.batch_shards(self.mesh)
        batch_size = min(recipe.batch_size, max(shards, len(self.test_source) // shards * shards))
        options = self.loader_options(batch_size)
        with contextlib.closing(
            eval_batches(self.test_source, options, recipe.eval_images)
        ) as batches:
            for batch in batches:
                if preemption.noticed():
                    raise preemption.Preempted("preempted during an evaluation")
                watchdog.reset(slow=True)
                heartbeat.again()
                yield sharding.global_batch(batch, self.mesh)

    def test_metrics(
        self,
        recipe: ml_collections.ConfigDict,
        evaluate: Callable[[dict[str, jax.Array]], dict[str, jax.Array]],
    ) -> dict[str, Any]:
        """Averages `evaluate(batch)` over all test images."""
        totals, count = {}, 0
        for batch in self.test_batches(recipe):
            metrics = jax.device_get(evaluate(batch))
            images = sharding.to_host(batch["mask"]).sum()
            if not images:  # all of this batch are unreadable
                continue
            totals = {name: totals.get(name, 0) + mean * images for name, mean in metrics.items()}
            count += images
        self.check_readable(count > 0)
        return {name: total / count for name, total in totals.items()}

    def check_readable(self, any_image: bool):
        """Raises UserError if an evaluation has found no image."""
        if not any_image:
            raise UserError(
                "None of the held-out images to evaluate can be read; repair or replace them. "
                "data.on_bad=skip leaves out those that are unreadable."
            )


def located(folder: str | os.PathLike) -> str:
    """A model's folder as an absolute path; the name of a bundled model or a hub's stays."""
    if hub.is_remote(folder):
        return os.fspath(folder)
    place = storage_path(folder)
    return os.fspath(place if bundled.find(folder) == place else folder)


def open_run(
    config: ml_collections.ConfigDict,
    workdir: epath.Path,
    mesh: Mesh,
    pretrained_names: Iterable[str] = (),
    teacher: tuple[RunMetadata, dict[str, Any]] | None = None,
    resume: Resume = NEWEST,
) -> Run:
    """Opens the data and the pretrained networks of a run.

    Args:
        pretrained_names: the pretrained networks of all parts, so that a missing file is
            reported at once and not after days of training.

    Raises:
        UserError: data or a network is missing.
    """
    loaded = {
        name: pretrained.load(name, config.pretrained_dir or None)
        for name in sorted(set(pretrained_names))
    }
    data_dir = config.data.data_dir and os.fspath(storage_path(config.data.data_dir))
    train_source = open_source(config.data.name, "train", data_dir=data_dir)
    config = resolve_lengths(config, len(train_source))
    config.data.data_dir = data_dir
    if isinstance(train_source, SequenceSource):
        config.data.resize = train_source.resize
    test_source = open_source(
        config.data.name, "test", data_dir=data_dir, class_names=train_source.class_names
    )
    check_same_data(train_source, test_source)
    model = ModelConfig.from_config(config, train_source.num_classes)
    resize_filter = choose_resize_filter(config, workdir, train_source, teacher and teacher[0])
    return Run(
        config, workdir, mesh, train_source, test_source, loaded, model, resize_filter, teacher,
        resume,
    )  # fmt: skip


def check_same_data(train: Source, test: Source):
    """Raises UserError if the processes see different data; every process must call it."""
    if jax.process_count() == 1:
        return
    listing = digest({"classes": train.class_names, "files": [train.listing(), test.listing()]})
    found = from_all(np.array([len(train), len(test), train.num_classes, int(listing[:7], 16)]))
    others = (found != found[0]).any(1).nonzero()[0]
    if len(others):
        say = lambda x: f"{x[0]} training and {x[1]} held-out images of {x[2]} classes"
        raise UserError(
            f"Process {others[0]} sees other data than process 0: {say(found[others[0]])}, and "
            f"{say(found[0])}. Give every machine the same files."
        )


def resolve_lengths(
    config: ml_collections.ConfigDict, num_images: int
) -> ml_collections.ConfigDict:
    """A config whose recipes say numbers for everything that follows from the length."""
    config = config.copy_and_resolve_references()
    for section in {part.section for part in PARTS.values()}:
        config[section] = length.resolved(config[section], num_images)
    return config


def choose_resize_filter(
    config: ml_collections.ConfigDict,
    workdir: epath.Path,
    source: Source,
    teacher: RunMetadata | None = None,
) -> str:
    """How a run resizes its images: as configured, or else as the model that it builds on.

    That model is the teacher, what the workdir holds already, the tokenizer of the generators, or
    the model that the weights start from. Cached sequences keep the filter of their images.
    """
    if isinstance(source, SequenceSource):
        if config.data.resize_filter not in ("", source.resize_filter):
            logger.warning(
                "data.resize_filter=%s has no effect: the images of these sequences were resized "
                "with %s",
                config.data.resize_filter,
                source.resize_filter,
            )
        return source.resize_filter
    if config.data.resize_filter:
        return config.data.resize_filter
    if teacher is not None:
        return teacher.resize_filter
    for folder in (workdir, config.tokenizer_workdir, config.init_from):
        stored = read_model_metadata(bundled.find(folder)) if folder else None
        if stored:
            return stored.resize_filter
    return DEFAULT_FILTER
