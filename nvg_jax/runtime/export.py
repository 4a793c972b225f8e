"""A model as the files that hubs understand: JSON and safetensors, readable by other tools too.

`config.json` holds the metadata, the SHA-256 of every file of weights, and a checksum of itself.
The weights are in `model.safetensors` or, above `MAX_FILE` bytes, in
`model-00001-of-00003.safetensors` and so on, with `model.safetensors.index.json`, which says where
each tensor is. Where a folder already holds a model, the names of the new files also have a
fingerprint of the weights, `model-1a2b3c4d.safetensors`. The metadata is any JSON; its keys are
defined in `metadata.RunMetadata`.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nvg_jax.errors import UserError, reported
from nvg_jax.runtime.storage import (
    atomic_path,
    digest,
    fingerprint,
    local_file,
    make_folder,
    sealed,
)

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = re.compile(r"model(-[0-9a-f]{8})?(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?(\.tmp)?")
MAX_FILE = 5 * 10**9  # bytes of tensors in a file, as on the Hugging Face hub
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def rounded(params: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The arrays of a tree in another dtype, as NumPy arrays.

    Raises:
        UserError: an unknown dtype, or values that are too large for it.
    """
    if dtype not in DTYPES:
        raise UserError(f"Weights can be {', '.join(DTYPES)}, got {dtype!r}.")
    with np.errstate(over="ignore"):
        tree = jax.tree.map(lambda x: x.astype(DTYPES[dtype]), jax.device_get(params))
    leaves: dict[str, Any] = flatten_dict(tree, sep=".")
    for name, leaf in leaves.items():
        if not np.isfinite(leaf).all():
            raise UserError(
                f"{name} has values that are not finite or too large for {dtype}; export it as "
                "bfloat16 or float32."
            )
    return tree


def write(folder: epath.Path, meta: dict[str, Any], params: dict[str, Any]):
    """Writes a model; an earlier one in this folder stays until the new one is complete.

    So that it does, new files have other names than those of the earlier one.

    Raises:
        UserError: no space or no permission.
    """
    make_folder(folder)
    leaves: dict[str, Any] = flatten_dict(params, sep=".")
    files = split(leaves, fingerprint(params)[:8] if (folder / CONFIG).exists() else "")
    content = {**meta, "model_type": "nvg", "files": {}}
    with contextlib.ExitStack() as stack:
        place = lambda name: stack.enter_context(atomic_path(folder / name))
        config = place(CONFIG)  # entered first, so that it is replaced last
        for name, tensors in files.items():
            path = place(name)
            save(tensors, path)
            content["files"][name] = sha256(path)
        if len(files) > 1:
            size = sum(x.nbytes for tensors in files.values() for x in tensors.values())
            index = {name: file for file, tensors in files.items() for name in tensors}
            text = json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=1)
            place(INDEX).write_text(text)
        config.write_text(sealed(content))
    kept = {*files, INDEX} if len(files) > 1 else {*files}
    for path in folder.iterdir():  # an earlier model may have had more or fewer files
        if WEIGHTS.fullmatch(path.name) and path.name not in kept:
            path.unlink()


def save(tensors: dict[str, np.ndarray], path: Path, header: dict[str, str] | None = None):
    """safetensors' `save_file`, in a file that others may read as far as any new file.

    Raises:
        OSError: as any other write; safetensors has an error of its own.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, {"format": "flax", **(header or {})})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    path.chmod(mode)


def split(tensors: dict[str, np.ndarray], mark: str = "") -> dict[str, dict[str, np.ndarray]]:
    """{file: its tensors}, in order, with at most `MAX_FILE` bytes in each.

    Args:
        mark: a part of the names of the files.
    """
    files, size = [{}], 0
    for name, tensor in tensors.items():
        if files[-1] and size + tensor.nbytes > MAX_FILE:
            files.append({})
            size = 0
        files[-1][name] = np.ascontiguousarray(tensor)
        size += tensor.nbytes
    stem = f"model-{mark}" if mark else "model"
    if len(files) == 1:
        return {f"{stem}.safetensors": files[0]}
    return {
        f"{stem}-{number:05}-of-{len(files):05}.safetensors": part
        for number, part in enumerate(files, 1)
    }


def read_config(folder: epath.Path) -> tuple[dict[str, Any], dict[str, str]] | None:
    """(metadata, {file of weights: its SHA-256}) of a folder's model; None if it holds none.

    Raises:
        UserError: config.json is damaged or was edited, or names other files than an export's.
    """
    path = folder / CONFIG
    if not path.is_file():
        return None
    with reported(f"{path} cannot be read"):
        text = path.read_bytes()
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(
            f"{path} is not JSON ({error}). Restore a copy of it or export the model again; if it "
            "is of another program, move it away."
        ) from error
    if not isinstance(content, dict) or content.get("model_type") != "nvg":
        return None
    if content.pop("digest", None) == digest(content):
        del content["model_type"]
        files = content.pop("files", None)
        if isinstance(files, dict) and files and all(map(WEIGHTS.fullmatch, files)):
            return content, files
        raise UserError(f"{path} does not name the files of a model; it is not of our export.")
    raise UserError(
        f"{path} is damaged or was edited: its checksum does not match. Restore a copy of it, or "
        "export the model again."
    )


def read(folder: epath.Path, checksums: dict[str, str], networks: Iterable[str]) -> dict[str, Any]:
    """The weights of some of a model's networks, as float32.

    Args:
        checksums: {file: its SHA-256}.

    Raises:
        UserError: a file is missing or damaged.
    """
    tensors = {}
    for name, checksum in checksums.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder} lacks {name}. Copy the folder again, whole.")
        with reported(f"{folder / name} cannot be read"), local_file(folder / name) as path:
            if sha256(path) != checksum:
                raise UserError(
                    f"{path.resolve()} is damaged (its SHA-256 differs from {CONFIG}'s). Delete "
                    "it, and restore a copy, or export or download the model again."
                )
            with safe_open(path, "numpy") as file:
                for key in file.keys():
                    if key.split(".")[0] in networks:
                        tensors[key] = file.get_tensor(key).astype(np.float32, copy=False)
    return unflatten_dict(tensors, sep=".")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
