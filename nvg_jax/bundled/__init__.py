"""Models that come with the package, so that sampling works right after installation.

Each is an export of float16 weights in a folder of its name.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from nvg_jax import workdir
from nvg_jax.errors import UserError
from nvg_jax.runtime.storage import storage_path
from nvg_jax.workdir import RunMetadata

FOLDER = Path(__file__).parent


class BundledModel(NamedTuple):
    """A model that comes with the package.

    description: what it generates. data: its training data, with the license.
    """

    description: str
    data: str


MODELS = {
    "fashion_mnist": BundledModel(
        "32 x 32 pixels, ten classes of clothing; configs/fashion_mnist.py",
        "Fashion-MNIST, Copyright (c) 2017 Zalando SE, MIT license",
    ),
    "emoji_tokenizer": BundledModel(
        "64 x 64 pixels, the tokenizer alone: encodes and reconstructs emoji; configs/emoji.py",
        "Noto Emoji by Google, Apache 2.0; Twemoji, CC-BY 4.0; Fluent Emoji by Microsoft, MIT",
    ),
}


def find(folder: str | os.PathLike) -> epath.Path:
    """The folder of a model: this one or, if no model is there, that of the bundled model.

    Raises:
        UserError: the installation lacks the model.
    """
    name, place = os.fspath(folder).rstrip("/"), storage_path(folder)
    if name not in MODELS or workdir.holds_model(place):
        return place
    place = epath.Path(FOLDER / name)
    if not workdir.holds_model(place):
        raise UserError(f"The installation lacks {place}; install nvg_jax again.")
    return place


def read_model(folder: str | os.PathLike) -> tuple[RunMetadata, dict[str, Any]]:
    """(metadata, parameters) of a workdir, an exported or converted folder, or a bundled model.

    A folder that holds a model takes precedence over a bundled model of the same name.

    Raises:
        UserError: there is no such folder, no model in it, or its parts do not belong together.
    """
    return workdir.read_model(find(folder))
