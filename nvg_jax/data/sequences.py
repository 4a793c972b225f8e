"""The files of a cache of granularity sequences, which `nvg_jax.encode` writes.

A folder holds, for each split, files train-00000-of-00157.array_record, each of a range of the
data set's images, and meta.json, written when all of them are there; until then unfinished.json
holds the settings. A record is an image with all its crops (see `pack`); the last record of a file
is JSON, {name: reason} of the images of its range that could not be read and have no record.
"""

import dataclasses
import json
import math
import zlib
from pathlib import Path
from typing import Any

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from nvg_jax.runtime.files import atomic_path, read_json, write_json

FORMAT = 1
SHARD_SIZE = 4096  # images of a file
META, UNFINISHED = "meta.json", "unfinished.json"


# Records.


def crop_dtype(tokenizer: dict[str, Any]) -> np.dtype:
    """What is stored of one crop: "structure" (L,), "tokens" (2L - 1,), in the smallest integers.

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
    """Whole sequences, int (N, S, L) each, as N crops of `crop_dtype`.

    Stored are the labels of the finest stage, of which those of the others are the leading bits,
    and the tokens of stage 0, 1, ... K after each other, one for each cluster.
    """
    stages, length = structure.shape[1:]
    finest = structure[:, -1]
    # Where the label 0, 1, ... L-1 of the finest stage is; every 2**(K-i)-th opens a cluster of
    # stage i.
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
    """The record of an image: crc32 of the rest, label (little-endian uint32 both), its crops."""
    content = label.to_bytes(4, "little") + crops.tobytes()
    return zlib.crc32(content).to_bytes(4, "little") + content


def unpack(record: bytes, dtype: np.dtype) -> tuple[int, np.ndarray]:
    """(label, crops) of a record.

    Raises:
        ValueError: the record is damaged.
    """
    checksum, content = record[:4], record[4:]
    if zlib.crc32(content) != int.from_bytes(checksum, "little"):
        raise ValueError("its checksum differs")
    return int.from_bytes(content[:4], "little"), np.frombuffer(content, dtype, offset=4)


# Writing.


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of a cache and the images of the split that it takes, start .. stop - 1."""

    split: str
    file: str
    start: int
    stop: int


def plan(settings: dict[str, Any]) -> list[Shard]:
    """All files of a cache, from "images" (their number in each split) and "shard_size"."""
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


def begin(folder: Path, settings: dict[str, Any]):
    """Begins a cache in a new folder, or sees that one is to go on with the same settings.

    Raises:
        ValueError: other settings, or a folder with something else in it.
    """
    settings = json.loads(json.dumps(settings))  # as they come back
    stored = read_json(folder / META) or read_json(folder / UNFINISHED)
    if stored is None:
        # A kill in this very function may have left the settings' temporary file.
        names = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
        if folder.is_file() or names - {f"{UNFINISHED}.tmp"}:
            raise ValueError(f"{folder} exists and is no cache of sequences; give a new folder.")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / UNFINISHED, settings)
        return
    for key, value in settings.items():
        if stored.get(key) != value:
            raise ValueError(
                f"{folder} holds a cache with {key} = {stored.get(key)}, and it cannot go on with "
                f"{value}. Use the settings it was begun with, or another folder."
            )


def write_shard(path: Path, records: list[bytes], unreadable: dict[str, str]):
    """Writes one file of cached sequences, atomically.

    Raises:
        OSError: it cannot be written.
    """
    with atomic_path(path) as temporary:
        try:
            writer = ArrayRecordWriter(str(temporary), "group_size:1")
            try:
                for record in (*records, json.dumps(unreadable).encode()):
                    writer.write(record)
            finally:
                writer.close()
        except RuntimeError as error:  # the writer raises it for any failure
            raise OSError(
                f"{temporary} could not be written ({error}). Make room or grant write permission, "
                "and run the same command again to resume."
            ) from error


def finish(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Writes and returns the metadata of a cache of which all files are there.

    They are the settings and, for each split, "shards": {file: {"records", "bytes"}} and
    "unreadable": {name: reason}.

    Raises:
        ValueError: a file is damaged, or no image of a split could be read.
    """
    shards = {split: {} for split in settings["images"]}
    unreadable = {split: {} for split in settings["images"]}
    for shard in plan(settings):
        path = folder / shard.file
        try:
            content = grain.sources.ArrayRecordDataSource([str(path)])
            records = len(content) - 1
            names = json.loads(content[records])
        except Exception as error:  # damage comes as errors of many kinds
            raise ValueError(f"{_damaged(path)} ({error})") from error
        unreadable[shard.split] |= names
        shards[shard.split][shard.file] = {"records": records, "bytes": path.stat().st_size}
    for split, files in shards.items():
        if not any(file["records"] for file in files.values()):
            raise ValueError(f"No image of the {split} split could be read.")
    meta = {**settings, "shards": shards, "unreadable": unreadable}
    write_json(folder / META, meta)
    (folder / UNFINISHED).unlink(missing_ok=True)
    return meta


# Reading.


class Records:
    """The records of one split of a cache by image, each checked against its checksum."""

    def __init__(self, folder: Path, split: str, meta: dict[str, Any]):
        """
        Args:
            meta: of `read_meta`.

        Raises:
            ValueError: a file is missing or has another length than when it was written.
        """
        self._dtype = crop_dtype(meta["tokenizer"])
        self._paths = [folder / file for file in meta["shards"][split]]
        shards = meta["shards"][split].values()
        for path, shard in zip(self._paths, shards):
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                raise ValueError(_damaged(path))
        self._ends = np.cumsum([shard["records"] for shard in shards])
        self._files = grain.sources.ArrayRecordDataSource([str(path) for path in self._paths])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def name(self, index: int) -> str:
        shard = self._shard(index)
        first = self._ends[shard - 1] if shard else 0
        return f"{self._paths[shard]} record {index - first}"

    def __getitem__(self, index: int) -> tuple[int, np.ndarray]:
        """(label, crops of `crop_dtype`) of an image.

        Raises:
            ValueError: the record is damaged.
        """
        shard = self._shard(index)
        try:  # every file before this one has one record more, of JSON
            return unpack(self._files[index + shard], self._dtype)
        except Exception as error:  # damage comes as errors of many kinds
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{self.name(index)} is damaged ({reason}). Remove the file, and run "
                "nvg_jax.encode again with the same settings to write it anew."
            ) from error

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self._ends, index, side="right"))


def read_meta(folder: Path) -> dict[str, Any]:
    """The metadata of a finished cache.

    Raises:
        ValueError: there is none in the folder, it is not finished, or of another format.
    """
    meta = read_json(folder / META)
    if meta is None:
        if (folder / UNFINISHED).exists():
            raise ValueError(
                f"The cache in {folder} is not finished; run nvg_jax.encode again with the same "
                "settings to go on."
            )
        raise ValueError(
            f"{folder} has no cached sequences (no {META}); make them with `python -m "
            "nvg_jax.encode`."
        )
    if meta["format"] != FORMAT:
        raise ValueError(
            f"The cache in {folder} has the format {meta['format']}, and this version reads "
            f"{FORMAT}. Make it again with nvg_jax.encode."
        )
    return meta


def _damaged(path: Path) -> str:
    return (
        f"{path} is missing or damaged. Remove what is left of it, and run nvg_jax.encode again "
        "with the same settings to write it anew."
    )
