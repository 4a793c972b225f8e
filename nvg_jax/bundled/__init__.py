"""Models that come with the package, so that sampling works right after installation.

Each is one file of float16 weights, `NAME.safetensors`, with the model's metadata in its header.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from nvg_jax import workdir
from nvg_jax.errors import UserError
from nvg_jax.parts import PARTS
from nvg_jax.runtime.files import atomic_write, fingerprint
from nvg_jax.workdir import RunMetadata

FOLDER = Path(__file__).parent


class BundledModel(NamedTuple):
    """A model that comes with the package.

    description: what it generates. data: its training data, with the license. sha256: of its file.
    """

    description: str
    data: str
    sha256: str


MODELS = {
    "fashion_mnist": BundledModel(
        "32 x 32 pixels, ten classes of clothing; configs/fashion_mnist.py",
        "Fashion-MNIST, Copyright (c) 2017 Zalando SE, MIT license",
        "1eff48023a70d6816a42a0a11fc95db360c323837826eeb21115cde0a002f893",
    ),
    "emoji_tokenizer": BundledModel(
        "64 x 64 pixels, the tokenizer alone: encodes and reconstructs emoji; configs/emoji.py",
        "Noto Emoji by Google, Apache 2.0; Twemoji, CC-BY 4.0; Fluent Emoji by Microsoft, MIT",
        "09e4ec039c8e29856090f13e9ef50a8956a0e559ea60dcf5e086051d983067cd",
    ),
}


def read(name: str) -> tuple[RunMetadata, dict[str, Any]]:
    """(metadata, float32 parameters) of a bundled model.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = FOLDER / f"{name}.safetensors"
    if not path.is_file():
        raise UserError(f"The installation lacks {path}; install nvg_jax again.")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != MODELS[name].sha256:
        raise UserError(f"{path} is damaged (its SHA-256 differs); install nvg_jax again.")
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = RunMetadata.from_json(json.loads(header["__metadata__"]["nvg_jax"]))
    leaves = safetensors.numpy.load(content)
    params = unflatten_dict({k: v.astype(np.float32) for k, v in leaves.items()}, sep="/")
    return metadata, params


def read_model(folder: str | os.PathLike) -> tuple[RunMetadata, dict[str, Any]]:
    """(metadata, parameters) of a workdir, an exported or converted folder, or a bundled model.

    A folder that holds a model takes precedence over a bundled model of the same name.

    Raises:
        UserError: there is no such folder, no model in it, or its parts do not belong together.
    """
    return read(os.fspath(folder)) if is_bundled(folder) else workdir.read_model(folder)


def is_bundled(folder: str | os.PathLike) -> bool:
    """Whether this is the name of a bundled model, and no folder of that name holds a model."""
    parts = (workdir.EXPORT_FOLDER, *PARTS)
    return os.fspath(folder) in MODELS and not any((Path(folder) / p).is_dir() for p in parts)


def read_resize_filter(folder: str | os.PathLike) -> str | None:
    """How the images of such a model were resized, None if the folder holds no model."""
    if is_bundled(folder):
        return read(os.fspath(folder))[0].resize_filter
    return workdir.read_resize_filter(folder)


def write(path: str | Path, metadata: RunMetadata, params: dict[str, Any]) -> str:
    """Writes the file of a model to bundle and returns its SHA-256, for `MODELS`."""
    small = jax.tree.map(lambda x: np.asarray(x).astype(np.float16), params)
    rounded = jax.tree.map(lambda x: x.astype(np.float32), small["tokenizer"])
    metadata = metadata.replace(fingerprint=fingerprint(rounded))
    text = json.dumps(metadata.to_json())
    leaves: dict[str, Any] = flatten_dict(small, sep="/")
    content = safetensors.numpy.save(leaves, {"nvg_jax": text})
    with atomic_write(Path(path)) as file:
        file.write(content)
    return hashlib.sha256(content).hexdigest()
