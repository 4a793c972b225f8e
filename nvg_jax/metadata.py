"""The metadata of a model, and the folders that hold one; writes exports, below `hub`.

A training run's workdir has a folder of checkpoints for each trained part (`PARTS`). An export is
what `runtime.export` writes: bundled and converted models, the best of a training, a student.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from nvg_jax import lora
from nvg_jax.data.sources import composed
from nvg_jax.data.transforms import DEFAULT_FILTER, Transform
from nvg_jax.errors import UserError
from nvg_jax.layers import TransformerConfig
from nvg_jax.models import ModelConfig
from nvg_jax.parts import DISTILLATION, GENERATOR_PARTS, GENERATORS, PARTS, TOKENIZER
from nvg_jax.runtime import checkpoint, export, storage
from nvg_jax.runtime.processes import barrier, is_main
from nvg_jax.sampling.settings import Settings
from nvg_jax.tokenizer import TokenizerConfig

SIZES = ("tokenizer", *GENERATORS)  # keys of the sizes in the stored metadata


@dataclasses.dataclass(frozen=True)
class RunMetadata:
    """Everything a checkpoint says about its model, stored as JSON; None where it does not apply.

    Attributes:
        model: the sizes of what the checkpoint holds.
        class_names: the name of every class, in the order of the ids.
        fingerprint: a hash of the tokenizer's raw weights; None until its training has finished.
        canvas_scale: S + 1 values, 1 / std of the content generator's inputs and of the final
            canvas, measured when the tokenizer's training ends.
        sampling: recommended sampling settings.
        teacher: for a distilled structure generator, the fingerprint of its teacher's weights;
            such a generator has the guidance built in.
        base: of adapters, {generator: the fingerprint of the weights that they are added to}. The
            folder holds no generators, but adapters for them.
        base_workdir: of adapters, the model with those weights.
        tokenizer_workdir: the workdir of the tokenizer that the generators were trained with.
        config: the training configuration.
        steps: the length of the training.
        num_images: the size of the training data.
        changes: what was changed on purpose, oldest first: {"step", "images": those seen before,
            "settings": {dotted path: [old value, new value]}}.
        fid: the Frechet distance of a model that was kept as the best of its training.
        sources: the files that converted weights come from.
        resize_filter: how its training images were resized, see `Transform`.
        step: the training step of the weights.
    """

    model: ModelConfig
    class_names: tuple[str, ...]
    fingerprint: str | None = None
    canvas_scale: tuple[float, ...] | None = None
    sampling: Settings = Settings()
    teacher: str | None = None
    base: dict[str, str] | None = None
    base_workdir: str | None = None
    tokenizer_workdir: str | None = None
    config: dict[str, Any] | None = None
    steps: int | None = None
    num_images: int | None = None
    changes: tuple[dict[str, Any], ...] = ()
    fid: float | None = None
    sources: dict[str, Any] | None = None
    resize_filter: str = DEFAULT_FILTER
    step: int | None = None

    def images_seen(self, section: str, step: int) -> int:
        """The number of training images until `step` of the recipe in a section of the config."""
        assert self.config is not None
        last = self.changes[-1] if self.changes else {"step": 0, "images": 0}
        return last["images"] + (step - last["step"]) * self.config[section]["batch_size"]

    def went_back_to(self, step: int) -> bool:
        """Whether this is a later step of a run that last went back to `step`.

        If the checkpoint of `step` was damaged, it went on from the one before.
        """
        assert self.step is not None
        last = self.changes[-1] if self.changes else {}
        return last.get("resume_step") == step and last["step"] < self.step

    @property
    def credits(self) -> str:
        """Whom to name where samples are shown, as the training's config says; perhaps ""."""
        return (self.config or {}).get("data", {}).get("credits", "")

    @property
    def transform(self) -> Transform:
        """The preparation of the images that the model was trained with."""
        resize = (self.config or {}).get("data", {}).get("resize", 0)
        size = self.model.tokenizer.image_size
        return Transform(size, resize, resize_filter=self.resize_filter)

    def expand_settings(self, settings: Settings) -> Settings:
        """`Settings.expand`, for settings that the structure generator supports.

        The guidance of a distilled one is built in. If it learned its teacher's solutions (reflow),
        it knows only the times of its own steps, which include those of any divisor of their
        number.

        Raises:
            UserError: an invalid setting, or one that is not supported.
        """
        sizes = self.model.tokenizer
        settings = settings.expand(sizes.num_stages, sizes.codebook_size)
        if self.teacher is None:
            return settings
        if (np.asarray(settings.structure_guidance) != 1).any():
            raise UserError(
                "This model's structure generator was distilled and has its guidance inside; "
                f"structure_guidance must be 1, got {settings.structure_guidance}."
            )
        own = self.sampling
        assert self.config is not None  # a distilled generator was trained here
        recipe = self.config["distillation"]
        steps = recipe["flow_steps"]  # the model may recommend fewer
        known = [n for n in range(1, steps + 1) if steps % n == 0]
        times = lambda x: (x.solver, x.flow_shift, x.flow_restart)
        same = times(settings) == times(own)
        if recipe["reflow"] and not (same and settings.flow_steps in known):
            raise UserError(
                f"This model's structure generator was distilled for {steps} steps and "
                f"knows no other times: give solver={own.solver!r}, flow_shift={own.flow_shift:g}, "
                f"flow_restart={own.flow_restart:g} and "
                f"flow_steps={' or '.join(map(str, known))}; got {settings.solver!r}, "
                f"{settings.flow_shift!r}, {settings.flow_restart!r} and {settings.flow_steps!r}."
            )
        return settings

    def replace(self, **changes) -> "RunMetadata":
        return dataclasses.replace(self, **changes)

    def without_paths(self) -> "RunMetadata":
        """The metadata without paths that lead out of the current folder, which others lack."""
        is_path = lambda x: isinstance(x, str) and re.match(r"[/~]|\.\.|(?!hf:)\w+://", x)
        config = jax.tree.map(lambda x: "" if is_path(x) else x, self.config)
        return self.replace(config=config, tokenizer_workdir=None, base_workdir=None)

    def of_generators(self, generators: "RunMetadata") -> "RunMetadata":
        """The metadata of this tokenizer with generators, or adapters, that were trained later.

        With adapters of a model with a teacher, the distilled generator goes on with the steps that
        it knows.
        """
        names = ("class_names", "resize_filter", "steps", "step", "num_images", "changes")
        names += () if self.teacher else ("sampling", "config")
        classes = generators.model.num_classes
        return self.replace(
            model=dataclasses.replace(self.model, num_classes=classes),
            **{name: getattr(generators, name) for name in names},
        )

    def trained(self, name: str) -> Any:
        """The abstract parameters of a generator that a checkpoint holds, or of its adapters."""
        params = self.model.abstract_params(name)
        if not self.base:
            return params
        assert self.config is not None  # it was trained here
        init = functools.partial(lora.init, rank=self.config["lora"]["rank"])
        return jax.eval_shape(init, params, key=jax.eval_shape(jax.random.key, 0))

    def to_json(self) -> dict[str, Any]:
        """A JSON-serializable dictionary, unchanged by a round trip through JSON."""
        content = dataclasses.asdict(self)
        model = content.pop("model")
        content |= {name: model[name] for name in SIZES}
        return storage.as_json(content)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "RunMetadata":
        """The inverse of `to_json`.

        Raises:
            UserError: keys that are missing or unknown, or sizes that are invalid.
        """
        content = dict(content)
        if content.get("sources") and not content.get("config"):
            content = {"resize_filter": "published"} | content
        sizes = {name: content.pop(name) for name in SIZES if name in content}
        sampling = content.get("sampling", {})
        check_keys(cls, {**content, "model": sizes})
        check_keys(ModelConfig, sizes)
        check_keys(Settings, sampling)
        for name, size in sizes.items():
            if size is not None:
                check_keys(TokenizerConfig if name == "tokenizer" else TransformerConfig, size)
        scale = content.get("canvas_scale")
        return cls(
            **content
            | {
                "model": ModelConfig.from_sizes(sizes, len(content["class_names"])),
                "class_names": tuple(map(composed, content["class_names"])),
                "canvas_scale": scale and tuple(scale),
                "sampling": Settings.from_dict(sampling),
                "changes": tuple(content.get("changes", ())),
            }
        )


def check_keys(kind: type, content: Any):
    """Raises UserError if stored content lacks a field of a dataclass, or has an unknown one."""
    if not isinstance(content, Mapping):
        raise UserError(f"The metadata are damaged: {content!r} is no {kind.__name__}.")
    fields = dataclasses.fields(kind)
    needed = {field.name for field in fields if field.default is dataclasses.MISSING}
    wrong = needed - content.keys() | content.keys() - {field.name for field in fields}
    if wrong:
        raise UserError(
            f"The metadata is not what this version of nvg_jax writes ({kind.__name__}: missing or "
            f"unknown {', '.join(sorted(wrong))}). Read the folder with the version that wrote it."
        )


def read_checkpoint(
    folder: str | os.PathLike, wanted: Callable[[RunMetadata], Any], last: int | None = None
) -> tuple[RunMetadata, Any] | None:
    """The metadata and part of the state of a folder's newest undamaged checkpoint.

    Args:
        wanted: metadata -> abstract tree of the leaves to read.
        last: ignores checkpoints of later steps.

    Returns:
        (metadata, tree of NumPy arrays), or None if the folder has no checkpoint.

    Raises:
        UserError: all checkpoints are damaged, or hold other leaves.
    """
    stored = checkpoint.read(folder, lambda content: wanted(RunMetadata.from_json(content)), last)
    return stored and (RunMetadata.from_json(stored[0]), stored[1])


def read_metadata(folder: str | os.PathLike, last: int | None = None) -> RunMetadata | None:
    """The metadata of a folder's newest undamaged checkpoint, None if there is no checkpoint.

    Args:
        last: ignores checkpoints of later steps.
    """
    stored = read_checkpoint(folder, lambda metadata: {}, last)
    return stored and stored[0]


def read_export_metadata(folder: epath.Path) -> RunMetadata | None:
    """The metadata of an export, None if the folder holds none.

    Raises:
        UserError: it is damaged.
    """
    stored = export.read_config(folder)
    return stored and RunMetadata.from_json(stored[0])


def read_model_metadata(folder: str | os.PathLike) -> RunMetadata | None:
    """The metadata of the model in a folder, None if it holds no model."""
    folder = storage.storage_path(folder)
    metadata = read_export_metadata(folder)
    for part in (*GENERATOR_PARTS, TOKENIZER):
        metadata = metadata or read_metadata(folder / part.name)
    return metadata


def holds_model(folder: epath.Path) -> bool:
    """Whether this is the folder of an export or of a training run."""
    return (folder / export.CONFIG).is_file() or any((folder / name).is_dir() for name in PARTS)


def check_export(folder: epath.Path):
    """Raises UserError for a folder that is not for an export.

    It would hide the checkpoints of a training, or replace another program's model.
    """
    if any((folder / name).is_dir() for name in PARTS if name != DISTILLATION.name):
        raise UserError(f"{folder} holds a training run; export to another folder.")
    if (folder / export.CONFIG).exists() and export.read_config(folder) is None:
        raise UserError(f"{folder} holds a model of another program; export to another folder.")


def write_export(
    folder: str | os.PathLike,
    metadata: RunMetadata,
    params: dict[str, Any],
    dtype: str = "float32",
):
    """Writes a model for `workdir.read_model`; an earlier export stays until it is complete.

    Args:
        params: the weights, on this host or replicated on its devices.
        dtype: of the weights in the files, see `export.DTYPES`.

    Raises:
        UserError: as `check_export`; an unknown dtype, or weights that do not fit it; or no space
            or no permission.
    """
    folder = storage.storage_path(folder)
    check_export(folder)
    if is_main():
        params = export.rounded(params, dtype)
        if dtype != "float32" and metadata.fingerprint and not metadata.base:  # as it will be read
            tokenizer = jax.tree.map(lambda x: x.astype(np.float32), params["tokenizer"])
            metadata = metadata.replace(fingerprint=storage.fingerprint(tokenizer))
        export.write(folder, metadata.to_json(), params)
    barrier(f"{folder} is written")
