"""Converts between the published checkpoints and folders for `Pipeline.from_pretrained`."""

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from nvg_jax import hub
from nvg_jax.data.sources import default_class_names
from nvg_jax.errors import UserError
from nvg_jax.metadata import RunMetadata
from nvg_jax.models import ModelConfig
from nvg_jax.parts import GENERATORS
from nvg_jax.pipeline import Pipeline
from nvg_jax.runtime import export
from nvg_jax.runtime.storage import atomic_path, fingerprint, local_path, make_folder, storage_path
from nvg_jax.sampling.settings import PUBLISHED
from nvg_jax.torch_interop import checkpoint_files, weight_names

HEADER = "nvg_jax"  # the key of the metadata in a safetensors header


def read_published(
    autoencoder: str | os.PathLike,
    generator: str | os.PathLike | None = None,
    autoencoder_weights: str = weight_names.DEFAULTS["autoencoder"],
    generator_weights: str = weight_names.DEFAULTS["generator"],
) -> tuple[RunMetadata, dict[str, Any]]:
    """(metadata, params) of checkpoints in the published layout, the arguments of `Pipeline`.

    What `to_safetensors` wrote keeps its own metadata; other files get that of the published model.
    Sizes are read from the tensors, every one of which is used or known to be unneeded. The files
    are memory-mapped, so memory holds only the float32 parameters and the pages being read.

    Args:
        autoencoder: file of an autoencoder.
        generator: file of its content and structure generators; None for the autoencoder alone.
        autoencoder_weights, generator_weights: "raw", or "ema" for the moving average. The
            published generators were trained with, and sample with, the defaults.

    Raises:
        UserError: a file is missing, is not a checkpoint, lacks these weights or has other tensors
            than the published model; or the generator belongs to another autoencoder.
    """
    autoencoder = local_path(autoencoder, "autoencoder")
    files = {"autoencoder": (autoencoder, autoencoder_weights)}
    if generator is not None:
        generator = local_path(generator, "generator")
        files["generator"] = generator, generator_weights
    for part, (file, weights) in files.items():
        if not file.is_file():
            raise UserError(f"There is no file {file}. Give a checkpoint that the authors publish.")
        if weights != weight_names.DEFAULTS[part] and _own_metadata(file):
            raise UserError(
                f"{file} was written by --to-safetensors and holds one copy of the weights; leave "
                f"--{part}_weights out."
            )
    sizes, own_metadata = {}, _own_metadata(generator or autoencoder)
    if generator is not None:
        generator_tensors = weight_names.read(generator, generator_weights)
        with _naming(generator):
            sizes = weight_names.generator_sizes(generator_tensors)
    tensors = weight_names.read(autoencoder, autoencoder_weights)
    with _naming(autoencoder):
        if own_metadata:
            own = dataclasses.asdict(own_metadata.model.tokenizer)
        else:
            own = weight_names.tokenizer_sizes(tensors, sizes.get("latent_size"))
        classes = default_class_names(sizes.get("num_classes", 0))
        if own_metadata:
            classes = own_metadata.class_names
        model = ModelConfig.from_sizes({"tokenizer": own}, len(classes))
        published = RunMetadata(model, classes, resize_filter="published")
        metadata = (own_metadata or published).replace(
            model=model,
            sources={
                part: {"file": file.name, "weights": weights, "sha256": export.sha256(file)}
                for part, (file, weights) in files.items()
            },
        )
        shapes = _shapes(model.abstract_params("tokenizer"))
        flat = weight_names.from_published(tensors, shapes)
    params = {"tokenizer": unflatten_dict(flat, sep="/")}
    trained_with = own_metadata and own_metadata.fingerprint
    metadata = metadata.replace(fingerprint=fingerprint(params["tokenizer"]))
    if generator is None:
        return metadata, params
    if trained_with and trained_with != metadata.fingerprint:
        raise UserError(
            f"{generator} was made for another autoencoder (weights {trained_with}) than "
            f"{autoencoder} ({metadata.fingerprint}). Give the two that belong together."
        )
    for size in ("latent_dim", "codebook_size"):
        if sizes[size] != own[size]:
            raise UserError(
                f"{generator} was made for another autoencoder than {autoencoder}: its {size} is "
                f"{sizes[size]}, the autoencoder's {own[size]}. Give the two that belong together."
            )
    with _naming(generator):
        model = ModelConfig.from_sizes({**sizes, "tokenizer": own}, len(classes))
        shapes = _shapes({name: model.abstract_params(name) for name in model.generators})
        shapes["canvas_scale"] = (model.tokenizer.num_stages + 1,)
        flat = weight_names.from_published(generator_tensors, shapes)
    metadata = metadata.replace(
        model=model,
        canvas_scale=tuple(flat.pop("canvas_scale").tolist()),
        sampling=own_metadata.sampling if own_metadata else PUBLISHED,
    )
    return metadata, params | unflatten_dict(flat, sep="/")


def convert(
    out: str | os.PathLike,
    autoencoder: str | os.PathLike,
    generator: str | os.PathLike | None = None,
    autoencoder_weights: str = weight_names.DEFAULTS["autoencoder"],
    generator_weights: str = weight_names.DEFAULTS["generator"],
    dtype: str = "float32",
    **upload: Any,
):
    """Writes a folder for `Pipeline.from_pretrained`; see `read_published` for the arguments.

    Args:
        out: a new folder, or hf://org/name on the Hugging Face hub.
        dtype: of the weights in the files.
        upload: on the hub, "license" and "private" of `Pipeline.push_to_hub`.

    Raises:
        UserError: as for `read_published`, or `out` exists and is not empty.
    """
    _check_new(out)
    # Not bound to a name, so the arrays are freed once the pipeline holds copies.
    pipeline = Pipeline(
        *read_published(autoencoder, generator, autoencoder_weights, generator_weights)
    )
    _write(pipeline, out, dtype, upload)


def export_model(
    workdir: str | os.PathLike, out: str | os.PathLike, dtype: str = "float32", **upload: Any
):
    """Writes a folder's model as an export; see `convert` for the arguments.

    Raises:
        UserError: the folder holds no model, or `out` exists and is not empty.
    """
    _check_new(out)
    _write(Pipeline.from_pretrained(workdir), out, dtype, upload)


def _check_new(out: str | os.PathLike):
    if hub.is_remote(out):
        hub.repository(out)
    else:
        _new_folder(out)


def _write(pipeline: Pipeline, out: str | os.PathLike, dtype: str, upload: dict[str, Any]):
    if hub.is_remote(out):
        pipeline.push_to_hub(os.fspath(out), dtype, **upload)
    else:
        pipeline.save_pretrained(out, dtype)


def to_safetensors(workdir: str | os.PathLike, out: str | os.PathLike):
    """Writes a folder's weights under the published names, float32, in the published layout.

    The files are `out`/autoencoder.safetensors and, for a folder that can sample,
    `out`/generator.safetensors. Their headers keep the metadata, for the way back.

    Args:
        workdir: the folder of a training run (raw tokenizer, averaged generators), or an exported
            or converted one.

    Raises:
        UserError: the folder holds no model or only one of the generators, or `out` exists and is
            not empty.
    """
    out = _new_folder(out)
    pipeline = Pipeline.from_pretrained(workdir)
    params: dict[str, dict[str, Any]] = {
        name: flatten_dict(jax.device_get(tree), sep="/") for name, tree in pipeline.params.items()
    }
    generators = [name for name in GENERATORS if name in params]
    if pipeline.tokenizer.config.fixed_structure is not None:
        raise UserError(
            f"{workdir} has tokenizer.structure=grid, which the published layout does not know. "
            "Export it without --to_safetensors."
        )
    if len(generators) == 1:
        raise UserError(
            f"{workdir} has only the {generators[0]} generator, and the published layout holds "
            "both in one file. Train the other one first."
        )
    make_folder(out)
    header = {HEADER: json.dumps(pipeline.metadata.without_paths().to_json())}
    files = {"autoencoder": weight_names.to_published(params["tokenizer"])}
    if generators:
        both = {f"{name}/{k}": x for name in generators for k, x in params[name].items()}
        both["canvas_scale"] = np.asarray(pipeline.metadata.canvas_scale, np.float32)
        latent_size = pipeline.tokenizer.config.latent_size
        files["generator"] = weight_names.to_published(both, latent_size)
    with contextlib.ExitStack() as stack:  # all files or none
        for name, tensors in files.items():
            path = stack.enter_context(atomic_path(out / f"{name}.safetensors"))
            export.save(tensors, path, header)


def _own_metadata(file: Path) -> RunMetadata | None:
    """The metadata in a file of `to_safetensors`, None in others."""
    text = checkpoint_files.read_header(file).get(HEADER)
    if not text:
        return None
    try:
        return RunMetadata.from_json(json.loads(text))
    except UserError as error:
        raise UserError(f"Cannot convert {file}. {error}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is damaged: {HEADER} in its header cannot be read ({error!r})."
        ) from error


@contextlib.contextmanager
def _naming(file: Path):
    """Adds the name of the file to a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"Cannot convert {file}. {error}") from error


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    leaves: dict[str, Any] = flatten_dict(tree, sep="/")
    return {path: leaf.shape for path, leaf in leaves.items()}


def _new_folder(out: str | os.PathLike) -> epath.Path:
    folder = storage_path(out)
    # A conversion that was killed leaves *.tmp, which the next one overwrites.
    if folder.exists() and not (
        folder.is_dir() and all(path.suffix == ".tmp" for path in folder.iterdir())
    ):
        raise UserError(f"{folder} exists and is not empty. Give --out a new folder.")
    return folder
