"""What a folder holds: the metadata of its checkpoints, and the model in them.

A training run's workdir has a folder of checkpoints for each trained part (`PARTS`). An export is
what `runtime.export` writes: bundled and converted models, the best of a training, a student.
"""

import dataclasses
import functools
import json
import os
import re
import reprlib
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath, epy

from nvg_jax import lora
from nvg_jax.data.transforms import Transform
from nvg_jax.errors import UserError
from nvg_jax.layers import TransformerConfig
from nvg_jax.models import ModelConfig
from nvg_jax.parts import DISTILLATION, GENERATOR_PARTS, GENERATORS, PARTS, TOKENIZER
from nvg_jax.runtime import checkpoint, export, storage
from nvg_jax.runtime.processes import barrier, is_main
from nvg_jax.sampling.settings import Settings
from nvg_jax.tokenizer import TokenizerConfig

with epy.lazy_imports():  # it imports this module
    from nvg_jax import bundled

SIZES = ("tokenizer", *GENERATORS)  # keys of the sizes in the stored metadata
# Settings that may differ on resume: logging, saving, and how and where the same data is read.
MAY_CHANGE = frozenset(
    ("log_every", "eval_every", "eval_images", "save_every", "keep", "fid_every", "fid_samples")
    + ("data_dir", "num_threads", "prefetch", "on_bad")
    + ("resize_filter",)  # what it comes to, `RunMetadata.resize_filter`, may not
)
LENGTH = ("length", "batch_size", "num_images")
FOLLOW = ("warmup_steps", "ema_decay")  # may change with these, which they follow from if -1
# Metadata that never change, and a section of the config: what the weights fit.
FIXED = (*SIZES, "teacher", "base", "class_names")
NEVER_CHANGE = (*FIXED, "lora", "optimizer.name")


@dataclasses.dataclass(frozen=True)
class RunMetadata:
    """Everything a checkpoint says about its model, stored as JSON; None where it does not apply.

    Attributes:
        model: the sizes of what the checkpoint holds, in float32.
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
    resize_filter: str = "lanczos"
    step: int | None = None

    def images_seen(self, section: str, step: int) -> int:
        """The number of training images until `step` of the recipe in a section of the config."""
        assert self.config is not None
        last = self.changes[-1] if self.changes else {"step": 0, "images": 0}
        return last["images"] + (step - last["step"]) * self.config[section]["batch_size"]

    def went_back_to(self, step: int) -> bool:
        """Whether this is a later step of a run whose last change was at `step`."""
        assert self.step is not None
        return bool(self.changes) and self.changes[-1]["step"] == step < self.step

    @property
    def transform(self) -> Transform:
        """The preparation of the images that the model was trained with."""
        resize = (self.config or {}).get("data", {}).get("resize")
        size = self.model.tokenizer.image_size
        return Transform(size, resize or None, resize_filter=self.resize_filter)

    def check_settings(self, settings: Settings):
        """Raises UserError for settings that a distilled structure generator does not support.

        Its guidance is built in. If it learned its teacher's solutions (reflow), it knows only the
        times of its own steps, which include those of any divisor of their number.
        """
        if self.teacher is None:
            return
        if (np.asarray(settings.structure_guidance) != 1).any():
            raise UserError(
                "This model's structure generator was distilled and has its guidance inside; "
                f"structure_guidance must be 1, got {settings.structure_guidance}."
            )
        own = self.sampling
        known = [n for n in range(1, own.flow_steps + 1) if own.flow_steps % n == 0]
        times = lambda x: (x.solver, x.flow_shift, x.flow_restart)
        same = times(settings) == times(own)
        assert self.config is not None  # a distilled generator was trained here
        if self.config["distillation"]["reflow"] and not (same and settings.flow_steps in known):
            raise UserError(
                f"This model's structure generator was distilled for {own.flow_steps} steps and "
                f"knows no other times: give solver={own.solver!r}, flow_shift={own.flow_shift:g}, "
                f"flow_restart={own.flow_restart:g} and "
                f"flow_steps={' or '.join(map(str, known))}; got {settings.solver!r}, "
                f"{settings.flow_shift!r}, {settings.flow_restart!r} and {settings.flow_steps!r}."
            )

    def replace(self, **changes) -> "RunMetadata":
        return dataclasses.replace(self, **changes)

    def without_paths(self) -> "RunMetadata":
        """The metadata without absolute and home paths, for those who do not have them."""
        is_path = lambda x: isinstance(x, str) and re.match(r"[/~]|(?!hf:)\w+://", x)
        config = jax.tree.map(lambda x: "" if is_path(x) else x, self.config)
        return self.replace(config=config, tokenizer_workdir=None, base_workdir=None)

    def of_generators(self, generators: "RunMetadata") -> "RunMetadata":
        """The metadata of this tokenizer with generators, or adapters, that were trained later."""
        names = ("class_names", "sampling", "config", "resize_filter", "steps", "step")
        names += ("num_images", "changes")
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
        return json.loads(json.dumps(content))

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
                "class_names": tuple(content["class_names"]),
                "canvas_scale": scale and tuple(scale),
                "sampling": Settings.from_dict(sampling),
                "changes": tuple(content.get("changes", ())),
            }
        )


def check_keys(kind: type, content: Mapping[str, Any]):
    """Raises UserError if stored content lacks a field of a dataclass, or has an unknown one."""
    fields = dataclasses.fields(kind)
    needed = {field.name for field in fields if field.default is dataclasses.MISSING}
    wrong = needed - content.keys() | content.keys() - {field.name for field in fields}
    if wrong:
        raise UserError(
            f"The metadata is not what this version of nvg_jax writes ({kind.__name__}: missing or "
            f"unknown {', '.join(sorted(wrong))}). Read the folder with the version that wrote it."
        )


def read(
    folder: str | os.PathLike, part: Callable[[RunMetadata], Any], last: int | None = None
) -> tuple[RunMetadata, Any] | None:
    """The metadata and part of the state of a folder's newest undamaged checkpoint.

    Args:
        part: metadata -> abstract tree of the leaves to read.
        last: ignores checkpoints of later steps.

    Returns:
        (metadata, tree of NumPy arrays), or None if the folder has no checkpoint.

    Raises:
        UserError: all checkpoints are damaged, or hold other leaves.
    """
    stored = checkpoint.read(folder, lambda content: part(RunMetadata.from_json(content)), last)
    return stored and (RunMetadata.from_json(stored[0]), stored[1])


def read_model_metadata(folder: str | os.PathLike) -> RunMetadata | None:
    """The metadata of the model in a folder, None if it holds no model."""
    folder = storage.storage_path(folder)
    metadata = read_export_metadata(folder)
    for part in (*GENERATOR_PARTS, TOKENIZER):
        metadata = metadata or read_metadata(folder / part.name)
    return metadata


def read_metadata(folder: str | os.PathLike, last: int | None = None) -> RunMetadata | None:
    """The metadata of a folder's newest undamaged checkpoint, None if there is no checkpoint.

    Args:
        last: ignores checkpoints of later steps.
    """
    stored = read(folder, lambda metadata: {}, last)
    return stored and stored[0]


# Models to sample from.


def read_export_metadata(folder: epath.Path) -> RunMetadata | None:
    """The metadata of an export, None if the folder holds none.

    Raises:
        UserError: it is damaged.
    """
    stored = export.read_config(folder)
    return stored and RunMetadata.from_json(stored[0])


def read_export(folder: epath.Path, *networks: str) -> tuple[RunMetadata, dict[str, Any]] | None:
    """(metadata, parameters) of an export, None if the folder holds none.

    Args:
        networks: what to read; by default all that the model has.

    Raises:
        UserError: it is damaged.
    """
    stored = export.read_config(folder)
    if stored is None:
        return None
    content, checksums = stored
    metadata = RunMetadata.from_json(content)
    if metadata.base:
        raise UserError(
            f"{folder} holds adapters. Open the model that they were trained on, and add them with "
            "Pipeline.load_lora."
        )
    return metadata, export.read(folder, checksums, networks or metadata.model.networks)


def read_model(folder: str | os.PathLike) -> tuple[RunMetadata, dict[str, Any]]:
    """(metadata, parameters) of an exported or converted folder, or of a training run's workdir.

    Raises:
        UserError: there is no such folder, or no model in it.
    """
    folder = storage.storage_path(folder)
    return read_export(folder) or read_workdir(folder)


def read_workdir(folder: epath.Path) -> tuple[RunMetadata, dict[str, Any]]:
    """(metadata, parameters) of a workdir's latest checkpoints: raw tokenizer, averaged generators.

    The tokenizer is the workdir's own, or the one that its generators name.

    Raises:
        UserError: there is no such folder, no tokenizer, or a generator that was trained with
            another tokenizer.
    """
    if not folder.is_dir():
        raise UserError(
            f"There is no folder {folder}. Give the --workdir of a training run, a folder that "
            "was exported or converted, or the name of a bundled model, such as fashion_mnist."
        )
    generators = trained_generators(folder)
    for place in (folder, *(m.tokenizer_workdir or folder for _, m in generators.values())):
        tokenizer = read_tokenizer(place)
        if tokenizer is not None:
            break
    else:
        if (folder / DISTILLATION.name).is_dir():
            raise UserError(
                f"The distillation in {folder} has not finished; run `python -m nvg_jax.distill` "
                "with the same flags again."
            )
        if generators:
            raise UserError(
                f"The generators in {folder} were trained with the tokenizer in {place}, which is "
                f"no longer there. Move it back, or copy its folder tokenizer/ into {folder}."
            )
        raise UserError(
            f"{folder} holds no trained tokenizer. Train one with `python -m nvg_jax.train "
            f"--config=... --workdir={shlex.quote(os.fspath(folder))}`."
        )
    metadata, params = tokenizer[0], {"tokenizer": tokenizer[1]}
    if generators and metadata.fingerprint is None:
        raise UserError(
            f"The tokenizer in {place} is at step {metadata.step}, before the end of its "
            "training, and the generators need the finished one. Restore a copy of its "
            "last checkpoint, or let `python -m nvg_jax.train` finish it."
        )
    metadata = metadata.replace(step=None, steps=None, fid=None)
    read_base = functools.cache(bundled.read_model)  # once for both generators
    for name, (part_folder, part_metadata) in generators.items():
        check_tokenizer(part_metadata, metadata, part_folder)
        part_metadata, params[name] = read_averages(part_folder, name)
        if part_metadata.base:
            assert part_metadata.base_workdir is not None  # only an export has no paths
            base, weights = read_base(part_metadata.base_workdir)
            added = add_adapters(base, weights, part_metadata, {name: params[name]}, part_folder)
            params[name] = added[name]
        sizes = {name: part_metadata.model.generators[name]}
        model = dataclasses.replace(metadata.model, **sizes)
        metadata = metadata.replace(model=model).of_generators(part_metadata)
    return metadata, params


def trained_generators(folder: epath.Path) -> dict[str, tuple[epath.Path, RunMetadata]]:
    """{generator: (folder of its checkpoints, their metadata)} of a workdir.

    Raises:
        UserError: there are two of a name, or they were trained on different classes.
    """
    generators = {}
    for part in GENERATOR_PARTS:
        metadata = read_metadata(folder / part.name)
        for name in metadata.model.generators if metadata else ():
            if name in generators:
                raise UserError(
                    f"{folder} holds two {name} generators, in {generators[name][0].name}/ and in "
                    f"{part.name}/. Move the one you do not want to another folder."
                )
            generators[name] = folder / part.name, metadata
    if len({metadata.class_names for _, metadata in generators.values()}) > 1:
        raise UserError(
            f"The generators in {folder} were trained on data with different classes; train one of "
            "them again."
        )
    return generators


def read_averages(folder: epath.Path, name: str) -> tuple[RunMetadata, Any]:
    """The metadata and the averaged parameters, or adapters, of a generator in a part's folder."""
    stored = read(folder, lambda metadata: {"ema_params": {name: metadata.trained(name)}})
    assert stored is not None  # its metadata was read before
    return stored[0], stored[1]["ema_params"][name]


# Adapters.


def read_adapters(folder: epath.Path) -> tuple[RunMetadata, dict[str, Any]]:
    """(metadata, {generator: adapters}) of an export, or of a training run's latest checkpoints.

    Raises:
        UserError: the folder holds no adapters, or they are damaged.
    """
    stored = export.read_config(folder)
    if stored and stored[0].get("base"):
        content, checksums = stored
        return RunMetadata.from_json(content), export.read(folder, checksums, content["base"])
    metadata, adapters, base = None, {}, {}
    for name, (part_folder, part_metadata) in trained_generators(folder).items():
        if part_metadata.base:
            metadata, adapters[name] = read_averages(part_folder, name)
            base[name] = part_metadata.base[name]
    if metadata is None:
        raise UserError(
            f"There are no adapters in {folder}. Train some with --config.lora.rank=16, or open "
            "the model with Pipeline.from_pretrained."
        )
    return metadata.replace(base=base), adapters


def add_adapters(
    model: RunMetadata,
    params: dict[str, Any],
    adapters: RunMetadata,
    trees: dict[str, Any],
    folder: str | os.PathLike,
    scale: float = 1.0,
) -> dict[str, Any]:
    """The generators of a model, for the classes of adapters in `folder` and with these added.

    Args:
        params: {network: its weights}, NumPy. trees: {generator: adapters}.

    Raises:
        UserError: the adapters were trained on other weights or with another tokenizer.
    """
    check_tokenizer(adapters, model, folder)
    assert adapters.base is not None
    for name in trees:
        if name not in params or storage.fingerprint(params[name]) != adapters.base[name]:
            trained_on = adapters.base_workdir or (adapters.config or {}).get("init_from")
            raise UserError(
                f"The adapters in {folder} are for another {name} generator than this model's "
                f"(weights {adapters.base[name]}). Open the model that they were trained on"
                f"{f', {trained_on}' if trained_on else ''}, as it was then."
            )
    names = model.class_names, adapters.class_names
    return {
        name: lora.merge(lora.with_classes(params[name], *names), trees.get(name, {}), scale)
        for name in GENERATORS
        if name in params
    }


def read_tokenizer(folder: str | os.PathLike) -> tuple[RunMetadata, Any] | None:
    """The tokenizer of a workdir, of an exported or converted folder, or of a bundled model.

    Returns:
        (metadata, raw parameters), or None if the folder holds no tokenizer.

    Raises:
        UserError: all its checkpoints are damaged.
    """
    folder = bundled.find(folder)
    stored, key = read_export(folder, "tokenizer"), "tokenizer"
    if stored is None:
        abstract = lambda metadata: {"params": metadata.model.abstract_params("tokenizer")}
        stored, key = read(folder / TOKENIZER.name, abstract), "params"
    if stored is None:
        return None
    metadata, params = stored
    return metadata.replace(model=metadata.model.only(), teacher=None), params[key]


def write_export(
    folder: str | os.PathLike,
    metadata: RunMetadata,
    params: dict[str, Any],
    dtype: str = "float32",
):
    """Writes a model to a folder for `read_model`; an earlier export stays until it is complete.

    Args:
        params: the weights, on this host or replicated on its devices.
        dtype: of the weights in the files, see `export.DTYPES`.

    Raises:
        UserError: the folder is a training run's, whose checkpoints the export would hide; an
            unknown dtype, or weights that do not fit it; or no space or no permission.
    """
    folder = storage.storage_path(folder)
    check_export(folder)
    if is_main():
        params = export.rounded(params, dtype)
        if dtype != "float32" and not metadata.base:  # the tokenizer that will be read
            tokenizer = jax.tree.map(lambda x: x.astype(np.float32), params["tokenizer"])
            metadata = metadata.replace(fingerprint=storage.fingerprint(tokenizer))
        export.write(folder, metadata.to_json(), params)
    barrier(f"{folder} is written")


def holds_model(folder: epath.Path) -> bool:
    """Whether this is the folder of an export or of a training run."""
    return (folder / export.CONFIG).is_file() or any((folder / part).is_dir() for part in PARTS)


def check_export(folder: epath.Path):
    """Raises UserError for a training run's folder, whose checkpoints an export would hide."""
    if any((folder / part).is_dir() for part in PARTS if part != DISTILLATION.name):
        raise UserError(f"{folder} holds a training run; export to another folder.")


# Runs to resume or to build on.


def check_tokenizer(generator: RunMetadata, tokenizer: RunMetadata, folder: str | os.PathLike):
    """Raises UserError if the generator in `folder` was trained with another tokenizer."""
    if generator.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"The generator in {folder} was trained with another tokenizer (weights "
            f"{generator.fingerprint}) than this model's ({tokenizer.fingerprint}). Train it "
            "again with this tokenizer, or restore its own tokenizer."
        )


class Resume(NamedTuple):
    """How to go on with a run.

    Attributes:
        allow_changes: names of settings that may differ from those of the checkpoint: a setting
            ("learning_rate"), a section ("data"), or a dotted path of both.
        step: go back to the checkpoint of this step; None: the newest one.
    """

    allow_changes: tuple[str, ...] = ()
    step: int | None = None


NEWEST = Resume()  # go on from the newest checkpoint with the same settings


def covers(name: str, setting: str) -> bool:
    """Whether a name, such as "learning_rate" or "data", means a setting given by its path."""
    return f".{name}." in f".{setting}."


def changed_settings(
    stored: RunMetadata, new: RunMetadata, section: str
) -> dict[str, tuple[Any, Any]]:
    """{dotted path: (stored value, new value)} of the settings that differ.

    Settings in `MAY_CHANGE` are left out.

    Args:
        section: the section of the config with the recipe.
    """

    def settings(metadata: RunMetadata) -> dict[str, Any]:
        content = metadata.to_json()
        config = content["config"]
        values = {name: content[name] for name in FIXED}
        values |= {name: config[name] for name in ("seed", "dtype", "class_dropout", "lora")}
        values |= {f"data.{name}": content[name] for name in ("num_images", "resize_filter")}
        for name in ("data", section):
            values[name] = {k: v for k, v in config[name].items() if k not in MAY_CHANGE}
        return dict(leaves(values))

    old = settings(stored)
    return {
        name: (old.get(name), value)
        for name, value in settings(new).items()
        if old.get(name) != value
    }


def leaves(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every entry of nested dictionaries."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def check_resume(
    stored: RunMetadata,
    new: RunMetadata,
    section: str,
    folder: epath.Path,
    allow_changes: Sequence[str] = (),
):
    """Raises UserError if settings differ from those of the run in `folder` and are not allowed to.

    Args:
        section: the section of the config with the recipe.
        allow_changes: see `Resume`.
    """
    if new.model.generators:
        check_tokenizer(stored, new, folder)
    changes = changed_settings(stored, new, section)
    follow = FOLLOW if any(covers(n, name) for n in LENGTH for name in changes) else ()
    never = {name for name in changes if any(covers(n, name) for n in NEVER_CHANGE)}
    refused = [
        name
        for name in changes
        if name in never or not any(covers(n, name) for n in (*allow_changes, *follow))
    ]
    if not refused:
        return
    shown = "; ".join(
        f"{name} = {reprlib.repr(changes[name][0])}, now {reprlib.repr(changes[name][1])}"
        for name in refused
    )
    if never:
        advice = (
            "Its checkpoints only fit the old values. Use the settings it was started with, or "
            "another workdir (--config.init_from=... starts from the weights of a model)."
        )
    else:
        names = dict.fromkeys("data" if covers("data", n) else n.split(".")[-1] for n in refused)
        advice = (
            "Use the settings it was started with, or another workdir. To change this run on "
            f"purpose, add --allow_changes={','.join([*allow_changes, *names])}."
        )
    raise UserError(f"{folder} holds a run with {shown}. {advice}")
