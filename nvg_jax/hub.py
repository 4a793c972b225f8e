"""Models on the Hugging Face hub: exports to open and to upload, and published checkpoints."""

import contextlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath, epy

from nvg_jax.errors import UserError, comes_with, listed
from nvg_jax.metadata import RunMetadata, write_export
from nvg_jax.models import parameter_counts
from nvg_jax.runtime import export
from nvg_jax.runtime.processes import is_restarted
from nvg_jax.runtime.storage import storage_path

with epy.lazy_imports(error_callback=comes_with("hub")):
    import huggingface_hub
    from huggingface_hub import errors

logger = logging.getLogger("nvg_jax")

PREFIX = "hf://"
NAME = re.compile(rf"({PREFIX})?(\w[\w.-]*/\w[\w.-]*)")
TOKEN = "a token (the variable HF_TOKEN, or `hf auth login`)"
CHECKPOINTS = (".ckpt", ".pt", ".pth", ".bin")
AUTOENCODER = re.compile(r"(?<![a-z])(ae|vae|vq\w*|autoencoder|tokenizer)(?![a-z])")


def model_name(folder: str | os.PathLike) -> str | None:
    """ "org/name" of hf://org/name or org/name, None if it cannot be a model of the hub."""
    match = NAME.fullmatch(os.fspath(folder))
    return match and match[2]


def repository(name: str | os.PathLike) -> str:
    """As `model_name`, of what must be a model of the hub.

    Raises:
        UserError: it cannot be.
    """
    found = model_name(name)
    if found is None:
        raise UserError(f"{name} is not a model of the hub; expected {PREFIX}ORG/NAME.")
    return found


def is_remote(folder: str | os.PathLike) -> bool:
    """Whether this is hf://..., and not a folder."""
    return os.fspath(folder).startswith(PREFIX)


def download(folder: str, revision: str | None = None) -> Path:
    """The folder in the hub's cache with the files of an export, which are downloaded if needed.

    Args:
        folder: hf://org/name or org/name.
        revision: a branch, a tag or a commit; by default the newest.

    Raises:
        UserError: there is no such model or revision, no permission or no network.
    """
    name = repository(folder)
    with _reported(folder, name, revision):
        files = [export.CONFIG, "model*.safetensors"]
        place = _api().snapshot_download(name, revision=revision, allow_patterns=files)
    if export.read_config(epath.Path(place)) is None:
        raise UserError(f"{name} is no model of nvg_jax: it has no {export.CONFIG} of ours.")
    return Path(place)


class Storable:
    """A model or adapters: what can be written to a folder and uploaded."""

    metadata: RunMetadata
    params: dict[str, Any]

    def save_pretrained(self, folder: str | os.PathLike, dtype: str = "float32"):
        """Writes this to a folder for `from_pretrained`; replaces an earlier export.

        The folder holds the metadata in config.json and the weights in model.safetensors or, above
        5 GB, in several files with an index. Absolute paths of this machine are left out.

        Args:
            dtype: of the weights in the files: "float32", "bfloat16" or "float16".

        Raises:
            UserError: the folder is a training run's, or the weights do not fit the dtype.
        """
        write_export(folder, self.metadata.without_paths(), self.params, dtype)

    def push_to_hub(
        self,
        name: str,
        dtype: str = "float32",
        *,
        license: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
    ) -> str:
        """Uploads this and a card made from its metadata; replaces an earlier upload.

        Absolute paths of this machine are left out.

        Args:
            name: "org/name" on the Hugging Face hub; it is made if it does not exist.
            dtype: of the weights in the files: "float32", "bfloat16" or "float16".
            license: its identifier on the hub, such as "mit".
            private: whether others cannot see it, if it is made now.
            revision: a branch.

        Returns:
            The address of the commit.

        Raises:
            UserError: no such name, no permission or no network, or the weights do not fit the
                dtype.
        """
        name = repository(name)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, dtype)
            text = card(name, self.metadata.without_paths(), parameter_counts(self.params), license)
            (Path(folder) / "README.md").write_text(text, encoding="utf-8")
            with _reported(PREFIX + name, name, revision):
                _api().create_repo(name, private=private, exist_ok=True)
                try:
                    commit = _api().upload_folder(
                        repo_id=name,
                        folder_path=folder,
                        revision=revision,
                        commit_message="Upload a model of nvg_jax",
                        delete_patterns="model*.safetensors*",  # of an earlier export in more files
                    )
                except ValueError as error:  # of the card: an unknown license, say
                    if isinstance(error, json.JSONDecodeError):  # a proxy's answer
                        raise
                    raise UserError(
                        f"The hub refuses it: {' '.join(str(error).split())}"
                    ) from error
        return str(commit.commit_url)


def download_published(
    name: str, autoencoder: str | None = None, generator: str | None = None
) -> tuple[Path, Path | None]:
    """The files of a published autoencoder and generator, downloaded if needed.

    Args:
        name: hf://org/name or org/name.
        autoencoder, generator: their names in the repository. By default the one checkpoint that is
            named like an autoencoder, and the only other one, if there is one; of several, none for
            an autoencoder that is named.

    Raises:
        UserError: there is no such model, no permission or no network; or several files may be
            meant, which the message lists.
    """
    name = repository(name)
    with _reported(PREFIX + name, name, None):
        info = _api().model_info(name)
        files = [s.rfilename for s in info.siblings or () if s.rfilename.endswith(CHECKPOINTS)]
        alone = autoencoder is not None
        if autoencoder is None:
            named = [file for file in files if AUTOENCODER.search(Path(file).stem.lower())]
            autoencoder = _only(name, "autoencoder", named, files)
        others = [file for file in files if file != autoencoder]
        if generator is None and (len(others) == 1 or (others and not alone)):
            generator = _only(name, "generator", others, files)
        license = _license(info) or "not stated"
        logger.info("The license of %s: %s. Converting does not change it.", name, license)
        paths = [
            Path(_api().hf_hub_download(name, file))
            for file in (autoencoder, generator)
            if file is not None
        ]
    return paths[0], paths[1] if len(paths) > 1 else None


def stated_license(name: str) -> str | None:
    """The license on the card of hf://org/name or org/name, None if it states none.

    Raises:
        UserError: there is no such model, no permission or no network.
    """
    name = repository(name)
    with _reported(PREFIX + name, name, None):
        return _license(_api().model_info(name))


def _license(info: "huggingface_hub.ModelInfo") -> str | None:
    return (info.card_data or {}).get("license")


def _only(name: str, what: str, found: list[str], files: list[str]) -> str:
    if len(found) == 1:
        return found[0]
    raise UserError(
        f"Which file of {name} is the {what}? Give --{what}=FILE, one of: "
        f"{', '.join(files) or 'none (it has no checkpoint)'}."
    )


def _api() -> "huggingface_hub.HfApi":
    return huggingface_hub.HfApi(library_name="nvg_jax")


@contextlib.contextmanager
def _reported(folder: str, name: str, revision: str | None) -> Iterator[None]:
    """Says in a sentence what the hub refuses; raises a failure of the hub itself unchanged.

    For a launcher, which may repeat the command, a hub that cannot be reached is a failure.
    """
    unreachable = ConnectionError if is_restarted() else UserError
    try:
        try:
            yield
        except errors.OfflineModeIsEnabled as error:
            raise UserError("HF_HUB_OFFLINE is set, and this needs the hub; unset it.") from error
        except errors.HFValidationError as error:
            raise UserError(f"{name} is not a name of the hub: {error}") from error
        except errors.GatedRepoError as error:
            raise UserError(
                f"{name} is gated: accept its license on its page of the hub, and give {TOKEN}."
            ) from error
        except errors.RevisionNotFoundError as error:
            raise UserError(f"{name} has no revision {revision!r}.") from error
        except errors.RepositoryNotFoundError as error:
            raise UserError(
                f"The hub has no model {name}, or it is private. Check the name, or give {TOKEN}."
            ) from error
        except errors.LocalEntryNotFoundError as error:
            raise unreachable(
                f"{name} lacks a file, or the hub cannot be reached and the cache has no complete "
                f"copy ({str(error).splitlines()[0]}). Check the name, the network and HF_ENDPOINT."
            ) from error
        except errors.EntryNotFoundError as error:
            raise UserError(f"{name} lacks a file ({str(error).splitlines()[0]}).") from error
        except errors.HfHubHTTPError as error:
            status = error.response.status_code
            if status not in (401, 403):
                raise
            raise UserError(
                f"The hub does not permit this for {name} ({status}). Give {TOKEN} that may do it."
            ) from error
        except errors.HTTPError as error:  # pyright: ignore[reportPrivateImportUsage]
            raise unreachable(
                f"The hub cannot be reached ({error}). Check the network and HF_ENDPOINT."
            ) from error
    except (UserError, ConnectionError) as error:
        if is_remote(folder) or type(error) not in (UserError, ConnectionError):
            raise
        raise type(error)(
            f"There is no folder {folder}, so it must be a model of the Hugging Face hub. {error}"
        ) from error


def card(name: str, metadata: RunMetadata, counts: dict[str, int], license: str | None) -> str:
    """The README.md of a model: what it is, its numbers and how to sample from it.

    Args:
        counts: {network: number of parameters}.
        license: its identifier on the hub, such as "mit".
    """
    sizes, settings, config = metadata.model.tokenizer, metadata.sampling, metadata.config or {}
    base = config.get("init_from") or ""
    if not is_remote(base) and (not base or "/" in base or storage_path(base).exists()):
        base = "THE MODEL THAT THEY WERE TRAINED ON"
    pixels = " x ".join(map(str, sizes.image_size))
    classes = metadata.class_names
    latent = " x ".join(map(str, sizes.latent_size))
    rows: dict[str, Any] = {
        "images": f"{pixels} pixels",
        "classes": f"{len(classes)}: {listed(classes)}" if classes else None,
        "parameters": ", ".join(f"{network} {n / 1e6:.3g}M" for network, n in counts.items()),
        "latent": f"{latent} positions, {sizes.latent_dim} channels, {sizes.codebook_size} codes",
        "data": config.get("data", {}).get("name"),
        "credits": metadata.credits,
        "training": metadata.step and f"{metadata.step} steps",
        "FID": metadata.fid and f"{metadata.fid:.4g} (the best of its training)",
        "sampling": ", ".join(f"{key}={value}" for key, value in vars(settings).items()),
        "converted from": ", ".join(
            f"{source['file']} (SHA-256 {source['sha256'][:16]}...)"
            for source in (metadata.sources or {}).values()
        ),
        "adapters": metadata.base and f"of rank {config['lora']['rank']}, for {base}",
        "license": license or "not stated; that of the data and of its sources applies",
    }
    lines = ["---", "library_name: nvg_jax", "pipeline_tag: unconditional-image-generation"]
    lines += [f"license: {license}"] if license else []
    lines += ["---", "", f"# {name}", ""]
    lines += ["A [Next Visual Granularity](https://arxiv.org/abs/2508.12811) model.", ""]
    first = classes[0] if classes else 0
    use = (
        f"pipe.sample([{json.dumps(first)}]).images"
        if metadata.model.generators
        else "pipe.encode(images)"
    )
    opened = base if metadata.base else name
    lines += ["    import nvg_jax", f'    pipe = nvg_jax.Pipeline.from_pretrained("{opened}")']
    lines += [f'    pipe = pipe.load_lora("{name}")'] if metadata.base else []
    lines += [f"    {use}", "", "| | |", "|---|---|"]
    cell = lambda value: str(value).replace("|", "\\|")
    lines += [f"| {key} | {cell(value)} |" for key, value in rows.items() if value]
    return "\n".join(lines) + "\n"
