"""Metrics and pictures of a training at Weights & Biases, beside TensorBoard's."""

import logging
import secrets
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath, epy

from nvg_jax.errors import UserError, comes_with
from nvg_jax.runtime.storage import in_bucket, write_file

with epy.lazy_imports(error_callback=comes_with("wandb")):
    import wandb  # pyright: ignore[reportMissingImports]
    from wandb import errors  # pyright: ignore[reportMissingImports]


logger = logging.getLogger("nvg_jax")


def version() -> str:
    """Of wandb; raises UserError if it is not installed."""
    return wandb.__version__


class WandbWriter:
    """Writes what process 0 writes to TensorBoard; every part is a run, which a resume continues.

    Its id stays in the part's folder: a training that starts over in a new folder of the same name
    is another run. Steps that are done again keep their first values. `WANDB_MODE=offline` needs
    no account.

    Raises:
        UserError: wandb is not installed, or refuses the account or a name.
    """

    def __init__(self, project: str, folder: epath.Path, config: dict[str, Any]):
        name, file = f"{folder.parent.name}/{folder.name}", folder / "wandb_id.txt"
        if not file.exists():
            write_file(file, secrets.token_hex(8))
        self._local = tempfile.TemporaryDirectory() if in_bucket(folder) else None
        try:
            self._run = wandb.init(
                project=project,
                name=name,
                group=folder.parent.name,
                id=file.read_text(),
                resume="allow",
                config=config,
                dir=self._local.name if self._local else str(folder),
            )
        except (errors.UsageError, errors.AuthenticationError) as error:
            raise UserError(f"config.wandb_project: {error}") from error
        except errors.CommError as error:
            logger.warning("nothing goes to Weights & Biases until the next start: %s", error)
            self._run = None

    def write_scalars(self, step: int, scalars: Mapping[str, float]):
        if self._run:
            self._run.log(dict(scalars), step=step)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]):
        if self._run:
            self._run.log({tag: wandb.Image(image) for tag, image in images.items()}, step=step)

    def flush(self):
        if self._run:
            self._run.finish()
        if self._local:
            self._local.cleanup()
