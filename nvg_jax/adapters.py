"""Low-rank adapters in a folder or on a hub; `lora` says what they are."""

import dataclasses
import os
from typing import Any

from nvg_jax import hub, workdir
from nvg_jax.metadata import RunMetadata


@dataclasses.dataclass(frozen=True)
class Adapters(hub.Storable):
    """Adapters of one or both generators of a model, {generator: tree}, with their metadata."""

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
            UserError: there are no adapters, or the hub does not give them.
        """
        return cls(*workdir.read_adapters(folder, revision))
