"""Cached granularity sequences: the files that `nvg_jax.encode` writes.

For each split, a folder holds files such as train-00000-of-00157.array_record, each with a range of
the data set's images. meta.json is written once all files exist; until then, unfinished.json holds
the settings. A record is an image with all its crops (see `pack`). The last record of a file is
JSON, {name: reason} for the images in its range that are unreadable and have no record.
"""

import dataclasses
import json
import math
import zlib
from pathlib import Path
from typing import Any, cast

import numpy as np
from etils import epy

from nvg_jax.errors import UserError, comes_with, is_failure, is_mistake
from nvg_jax.runtime.storage import as_json, atomic_path, make_folder, read_json, write_json

with epy.lazy_imports(error_callback=comes_with("train")):  # slow
    import grain
    from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

FORMAT = 1
SHARD_SIZE = 4096  # images per file
META, UNFINISHED = "meta.json", "unfinished.json"


# Records.


def crop_dtype(tokenizer: dict[str, Any]) -> np.dtype:
    """The stored form of a crop: "structure" (L,) and "tokens" (2L - 1,).

    Both use the smallest integer type that holds all values.

    Args:
        tokenizer: the sizes "latent_size" and "codebook_size".
    """
    length = math.prod(tokenizer["latent_size"])
    smallest = lambda count: np.min_scalar_type(count - 1).newbyteorder("<")
    return np.dtype(
        [
            ("structure", smallest(length), (length,)),
            ("tokens", smallest(tokenizer["codebook_size"]), (2 * length - 1,)),
        ]
    )


def compact(structure: np.ndarray, tokens: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Packs full structure maps and tokens, int (N, S, L) each, into N crops of `crop_dtype`.

    This stores the finest map, whose leading bits are the labels of all others,
    and one token for each cluster of stages 0, 1, ... K in that order.
    """
    stages, length = structure.shape[1:]
    finest = structure[:, -1]
    # Positions in the order of their finest labels 0, 1, ... L-1. A cluster of stage i starts at
    # every 2**(K-i)-th.
    positions = np.argsort(finest, axis=1)
    unique = [
        np.take_along_axis(tokens[:, stage], positions[:, :: length >> stage], axis=1)
        for stage in range(stages)
    ]
    crops = np.empty(len(structure), dtype)
    crops["structure"] = finest
    crops["tokens"] = np.concatenate(unique, axis=1)
    return crops


def pack(label: int, crops: np.ndarray) -> bytes:
    """The record of an image: the CRC-32 of the rest, the label, the crops.

    The CRC-32 and the label are little-endian uint32.
    """
    content = label.to_bytes(4, "little") + crops.tobytes()
    return zlib.crc32(content).to_bytes(4, "little") + content


def unpack(record: bytes, dtype: np.dtype) -> tuple[int, np.ndarray]:
    """The label and the crops of a record.

    Raises:
        UserError: the record is damaged.
    """
    checksum, content = record[:4], record[4:]
    if zlib.crc32(content) != int.from_bytes(checksum, "little"):
        raise UserError("its checksum does not match")
    return int.from_bytes(content[:4], "little"), np.frombuffer(content, dtype, offset=4)


# Writing.


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file, with the images start .. stop - 1 of a split."""

    split: str
    file: str
    start: int
    stop: int


def plan(settings: dict[str, Any]) -> list[Shard]:
    """All files to write, from the settings "images" (their number per split) and "shard_size"."""
    shards, size = [], settings["shard_size"]
    for split, images in settings["images"].items():
        count = math.ceil(images / size)
        shards += [
            Shard(
                split,
                f"{split}-{i:05d}-of-{count:05d}.array_record",
                i * size,
                min((i + 1) * size, images),
            )
            for i in range(count)
        ]
    return shards


def has_begun(folder: Path) -> bool:
    return (folder / META).exists() or (folder / UNFINISHED).exists()


def begin(folder: Path, settings: dict[str, Any]):
    """Creates a folder for sequences, or checks that it was created with the same settings.

    Raises:
        UserError: other settings, or the folder holds something else.
    """
    settings = as_json(settings)
    stored = read_json(folder / META) or read_json(folder / UNFINISHED)
    if stored is None:
        # If this function was killed earlier, the temporary file of the settings remains.
        names = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
        if folder.is_file() or names - {f"{UNFINISHED}.tmp"}:
            raise UserError(f"{folder} exists and holds no cached sequences. Give a new folder.")
        make_folder(folder)
        write_json(folder / UNFINISHED, settings)
        return
    for key, value in settings.items():
        if _comparable(key, stored.get(key)) != _comparable(key, value):
            if key == "records":  # digests
                raise UserError(
                    f"{folder} holds sequences of other pictures: the data set has changed since. "
                    "Encode it to another folder."
                )
            raise UserError(
                f"{folder} holds sequences made with {key} = {stored.get(key)}, and cannot be "
                f"resumed with {value}. Use the same settings, or another folder."
            )


def _comparable(key: str, value: Any) -> Any:
    """A setting without the place of the data: its records tell whether they are the same."""
    if key == "data" and isinstance(value, dict):
        return {name: each for name, each in value.items() if name != "data_dir"}
    return value


def write_shard(path: Path, records: list[bytes], unreadable: dict[str, str]):
    """Writes a file of records, atomically.

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_path(path) as temporary:
        try:
            writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
            try:
                for record in (*records, json.dumps(unreadable).encode()):
                    writer.write(record)
            finally:
                writer.close()
        except RuntimeError as error:  # what the writer raises for any failure
            if not is_mistake(error):
                raise
            raise UserError(
                f"{path} cannot be written: {error}. Fix the cause and run the same command again."
            ) from error


def finish(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Writes and returns the metadata, once all files exist.

    The metadata holds the settings and, for each split, "shards": {file: {"records", "bytes"}} and
    "unreadable": {name: reason}.

    Raises:
        UserError: a file is damaged, or all images of a split are unreadable.
    """
    shards = {split: {} for split in settings["images"]}
    unreadable = {split: {} for split in settings["images"]}
    for shard in plan(settings):
        path = folder / shard.file
        try:
            content = cast(Any, grain.sources.ArrayRecordDataSource([str(path)]))
            records = len(content) - 1
            names = json.loads(content[records])
        except Exception as error:  # damage comes as errors of many kinds
            if is_failure(error):
                raise
            raise UserError(f"{_damaged(path)} ({error})") from error
        unreadable[shard.split] |= names
        shards[shard.split][shard.file] = {"records": records, "bytes": path.stat().st_size}
    for split, files in shards.items():
        if not any(file["records"] for file in files.values()):
            raise UserError(f"All images of the {split} split are unreadable.")
    meta = {**settings, "shards": shards, "unreadable": unreadable}
    write_json(folder / META, meta)
    (folder / UNFINISHED).unlink(missing_ok=True)
    return meta


# Reading.


class Records:
    """The records of one split, indexed by image; reading verifies the checksum."""

    def __init__(self, folder: Path, split: str, meta: dict[str, Any]):
        """
        Args:
            meta: the result of `read_meta`.

        Raises:
            UserError: a file is missing, or its size is not the one recorded in `meta`.
        """
        self._dtype = crop_dtype(meta["tokenizer"])
        self._paths = [folder / file for file in meta["shards"][split]]
        shards = meta["shards"][split].values()
        for path, shard in zip(self._paths, shards):
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                raise UserError(_damaged(path))
        self._ends = np.cumsum([shard["records"] for shard in shards])
        self._files = grain.sources.ArrayRecordDataSource([str(path) for path in self._paths])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def name(self, index: int) -> str:
        shard = self._shard(index)
        first = self._ends[shard - 1] if shard else 0
        return f"{self._paths[shard]} record {index - first}"

    def __getitem__(self, index: int) -> tuple[int, np.ndarray]:
        """The label and the crops (of `crop_dtype`) of an image.

        Raises:
            UserError: the record is damaged.
        """
        shard = self._shard(index)
        try:  # each file before this one has one more record, the JSON
            return unpack(self._files[index + shard], self._dtype)
        except Exception as error:  # damage comes as errors of many kinds
            if is_failure(error):
                raise
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{self.name(index)} is damaged ({reason}). Delete the file and run "
                "nvg_jax.encode again with the same settings to rewrite it."
            ) from error

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self._ends, index, side="right"))


def read_meta(folder: Path) -> dict[str, Any]:
    """The metadata of a folder of sequences.

    Raises:
        UserError: the folder has none, is unfinished, or has another format.
    """
    meta = read_json(folder / META)
    if meta is None:
        if (folder / UNFINISHED).exists():
            raise UserError(
                f"The encoding into {folder} is not finished. Run nvg_jax.encode again with the "
                "same settings to resume it."
            )
        raise UserError(
            f"{folder} has no cached sequences (no {META}). Make them with `python -m "
            "nvg_jax.encode`."
        )
    if meta["format"] != FORMAT:
        raise UserError(
            f"The sequences in {folder} are in format {meta['format']}, but this version reads "
            f"format {FORMAT}. Make them again with nvg_jax.encode."
        )
    return meta


def _damaged(path: Path) -> str:
    return (
        f"{path} is missing or damaged. Delete what is left of it and run nvg_jax.encode again "
        "with the same settings to rewrite it."
    )
