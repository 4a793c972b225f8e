"""Models that come with the package, so that sampling works right after installation.

Each is an export of float16 weights in a folder of its name. The samples with which the page of a
model opens were made by `python -m nvg_jax.app --workdir=NAME --write_opening`.
"""

import os
from pathlib import Path

from etils import epath

from nvg_jax import hub
from nvg_jax.errors import UserError
from nvg_jax.metadata import holds_model
from nvg_jax.runtime.storage import storage_path

FOLDER = Path(__file__).parent
MODELS = {
    "fashion_mnist": "32 x 32 pixels, ten classes of clothing; configs/fashion_mnist.py",
    "emoji": "32 x 32 pixels, emoji of 292 classes; configs/emoji.py:small",
    "emoji_tokenizer": (
        "64 x 64 pixels, the tokenizer alone: encodes and reconstructs emoji; configs/emoji.py"
    ),
}


def find(folder: str | os.PathLike, revision: str | None = None) -> epath.Path:
    """The folder of a model: this one, that of a bundled model, or one downloaded from the hub.

    A folder that holds a model takes precedence over a bundled model of its name, and any folder
    over a model of the hub.

    Args:
        revision: of a model of the hub.

    Raises:
        UserError: the installation lacks the bundled model, the hub does not give the model, or
            there is a revision of another model than the hub's.
    """
    name = os.fspath(folder)
    if hub.is_remote(name) or (hub.model_name(name) and not storage_path(name).exists()):
        return epath.Path(hub.download(name, revision))
    if revision is not None:
        raise UserError(
            f"revision={revision!r} is for models of the hub, and {name} is not read from there; "
            "write hf://ORG/NAME."
        )
    name, place = name.rstrip("/"), storage_path(folder)
    if name not in MODELS or holds_model(place):
        return place
    place = epath.Path(FOLDER / name)
    if not holds_model(place):
        raise UserError(f"The installation lacks {place}; install nvg_jax again.")
    return place
