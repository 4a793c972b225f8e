"""Reads the model in a folder: of a training run, an export, a bundled model or one of the hub."""

import contextlib
import dataclasses
import functools
import os
import shlex
from typing import Any

from etils import epath

from nvg_jax import bundled, hub, lora
from nvg_jax.errors import UserError, reported
from nvg_jax.metadata import RunMetadata, read_checkpoint, read_metadata
from nvg_jax.parts import DISTILLATION, GENERATOR_PARTS, GENERATORS, TOKENIZER
from nvg_jax.runtime import export, storage


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
    try:
        return metadata, export.read(folder, checksums, networks or metadata.model.networks)
    except (UserError, FileNotFoundError):
        if export.read_config(folder) == stored:
            raise
        return read_export(folder, *networks)  # a training has replaced it


def read_model(
    folder: str | os.PathLike, revision: str | None = None
) -> tuple[RunMetadata, dict[str, Any]]:
    """(metadata, parameters) of a workdir, an export, or a model that `bundled.find` finds.

    Args:
        revision: of a model of the hub.

    Raises:
        UserError: there is no such model, or its parts do not belong together.
    """
    place = bundled.find(folder, revision)
    return read_export(place) or read_workdir(place)


def check_folder(folder: epath.Path, remedy: str):
    """Raises UserError if there is no such folder, or it cannot be looked at."""
    if not folder.is_dir():
        with reported(f"{folder} cannot be read"), contextlib.suppress(*storage.MISSING):
            os.stat(folder)
        raise UserError(f"There is no folder {folder}. {remedy}")


def read_workdir(folder: epath.Path) -> tuple[RunMetadata, dict[str, Any]]:
    """(metadata, parameters) of a workdir's latest checkpoints: raw tokenizer, averaged generators.

    The tokenizer is the workdir's own, or the one that its generators name.

    Raises:
        UserError: there is no such folder, no tokenizer, or a generator that was trained with
            another tokenizer.
    """
    check_folder(
        folder,
        "Give the --workdir of a training run, a folder that was exported or converted, or a "
        f"bundled model: {', '.join(bundled.MODELS)}.",
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
                "no longer there. Move it back. (If it was a training's, a copy of its folder "
                f"tokenizer/ in {folder} will do.)"
            )
        if not os.access(folder, os.R_OK | os.X_OK) and not storage.in_bucket(folder):
            raise UserError(f"{folder} cannot be read: Permission denied.")
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
    read_base = functools.cache(read_model)  # once for both generators
    for name, (part_folder, part_metadata) in generators.items():
        check_tokenizer(part_metadata, metadata, part_folder)
        part_metadata, params[name] = read_averages(part_folder, name)
        sizes = {name: part_metadata.model.generators[name]}
        if part_metadata.base:
            place = part_metadata.base_workdir
            assert place is not None  # only an export has no paths
            if not bundled.find(place).is_dir():
                raise UserError(
                    f"The adapters in {part_folder} are for the model in {place}, which is no "
                    "longer there. Move it back, or open it where it is and add them with "
                    "Pipeline.load_lora."
                )
            base, weights = read_base(place)
            added = add_adapters(base, weights, part_metadata, {name: params[name]}, part_folder)
            params[name] = added.pop(name)
            for other in added.keys() - generators.keys():  # without adapters: the base's own
                params[other], sizes[other] = added[other], base.model.generators[other]
                own = {key: getattr(base, key) for key in ("teacher", "sampling", "config")}
                metadata = metadata.replace(**own)
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
    abstract = lambda metadata: {"ema_params": {name: metadata.trained(name)}}
    stored = read_checkpoint(folder, abstract)
    assert stored is not None  # its metadata was read before
    return stored[0], stored[1]["ema_params"][name]


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
        stored, key = read_checkpoint(folder / TOKENIZER.name, abstract), "params"
    if stored is None:
        return None
    metadata, params = stored
    return metadata.replace(model=metadata.model.only(), teacher=None), params[key]


def check_tokenizer(generator: RunMetadata, tokenizer: RunMetadata, folder: str | os.PathLike):
    """Raises UserError if the generator in `folder` was trained with another tokenizer."""
    if generator.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"The generator in {folder} was trained with another tokenizer (weights "
            f"{generator.fingerprint}) than this model's ({tokenizer.fingerprint}). Train it "
            "again with this tokenizer, or restore its own tokenizer."
        )


# Adapters.


@dataclasses.dataclass(frozen=True)
class Adapters(hub.Storable):
    """Low-rank adapters of one or both generators, {generator: tree}; `lora` says what they are."""

    metadata: RunMetadata
    params: dict[str, Any]

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, *, revision: str | None = None
    ) -> "Adapters":
        """Opens the workdir of a training with `lora.rank`, saved adapters, or those of a hub.

        Args:
            revision: on the hub, a branch, a tag or a commit.

        Raises:
            UserError: there are no adapters, they are damaged, or the hub does not give them.
        """
        folder = bundled.find(folder, revision)
        stored = export.read_config(folder)
        if stored and stored[0].get("base"):
            content, checksums = stored
            params = export.read(folder, checksums, content["base"])
            return cls(RunMetadata.from_json(content), params)
        check_folder(folder, "Give the workdir of a training with lora.rank, or saved adapters.")
        metadata, adapters, base = None, {}, {}
        for name, (part_folder, part_metadata) in trained_generators(folder).items():
            if part_metadata.base:
                metadata, adapters[name] = read_averages(part_folder, name)
                base[name] = part_metadata.base[name]
        if metadata is None:
            raise UserError(
                f"There are no adapters in {folder}. Train some with --config.lora.rank=16, or "
                "open the model with Pipeline.from_pretrained."
            )
        return cls(metadata.replace(base=base), adapters)


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
