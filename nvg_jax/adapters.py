"""Low-rank adapters in a folder or on a hub; `lora` says what they are."""

import dataclasses
import os
from typing import Any

from nvg_jax import bundled, hub, workdir
from nvg_jax.workdir import RunMetadata


@dataclasses.dataclass(frozen=True)
class Adapters:
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
        return cls(*workdir.read_adapters(bundled.find(folder, revision)))

    def save_pretrained(self, folder: str | os.PathLike, dtype: str = "float32"):
        """Writes the adapters to a folder, like `Pipeline.save_pretrained`."""
        workdir.write_export(folder, self.metadata.without_paths(), self.params, dtype)

    def push_to_hub(
        self,
        name: str,
        dtype: str = "float32",
        *,
        license: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
    ) -> str:
        """Uploads the adapters and a card, like `Pipeline.push_to_hub`."""
        return hub.push(name, self.metadata, self.params, dtype, license, private, revision)
