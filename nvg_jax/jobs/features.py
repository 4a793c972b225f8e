"""Features of many images (an archive, a split, samples), computed by all processes together.

The unit of work is a batch. Its features are stored in a folder of parts, so that a run that was
killed resumes where it stopped.
"""

import concurrent.futures
import logging
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from nvg_jax import pretrained
from nvg_jax.data import Source, Transform
from nvg_jax.data.transforms import decode
from nvg_jax.errors import UserError
from nvg_jax.evaluation.generation import FeatureSet
from nvg_jax.evaluation.metrics import Moments
from nvg_jax.jobs.sampling import open_folder, own_missing
from nvg_jax.pretrained import ImageFeatures
from nvg_jax.runtime.files import atomic_write, digest, fingerprint
from nvg_jax.runtime.processes import barrier, gather, is_main, own_share
from nvg_jax.runtime.progress import Progress
from nvg_jax.runtime.sharding import fill_batch, local_batch, make_mesh

logger = logging.getLogger("nvg_jax")
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")  # arrays of a reference file
REFERENCE_IMAGES = 10_000  # images of a data set used for precision and recall
SHUFFLE_SEED = 0
DECODING_THREADS = 16


class ImageSet(Protocol):
    """A fixed sequence of images, in batches: an `Archive`, a `Split` or a `SamplingJob`.

    Attributes:
        batch_size: the size of all batches but the last, which may be smaller.
        num_batches: number of batches.
        image_size: height and width.
    """

    batch_size: int
    num_batches: int
    image_size: tuple[int, int]

    def __len__(self) -> int: ...

    def batches(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        """Yields the batches with the given increasing numbers as uint8 (B, H, W, 3)."""

    def describe(self) -> dict[str, Any]:
        """Everything the images depend on, JSON-serializable."""


class Archive:
    """The images in an .npz file, "arr_0", uint8 (N, H, W, 3), read one batch at a time.

    Raises:
        UserError: the file does not exist, is damaged or has other contents.
    """

    def __init__(self, path: str | os.PathLike, batch_size: int):
        self.path, self.batch_size = Path(path), batch_size
        if not self.path.is_file():
            raise UserError(f"There is no file {path}.")
        try:
            with zipfile.ZipFile(self.path) as archive:
                names = [name.removesuffix(".npy") for name in archive.namelist()]
                if "arr_0" not in names:
                    raise UserError(
                        f"{path} has the arrays {', '.join(names) or '(none)'}; expected "
                        'the images as "arr_0", which is what np.savez and `nvg_jax.sample` write.'
                    )
                self._checksum = archive.getinfo("arr_0.npy").CRC
                with archive.open("arr_0.npy") as member:
                    self.shape, fortran, dtype = read_header(member)
        except (zipfile.BadZipFile, EOFError, zlib.error) as error:
            raise self._damaged(error) from error
        if len(self.shape) != 4 or self.shape[-1] != 3 or dtype != np.uint8 or fortran:
            raise UserError(
                f"The images in {path} must be uint8 of shape (N, H, W, 3), got {dtype} "
                f"{self.shape}{' in Fortran order' if fortran else ''}."
            )

        self.image_size = self.shape[1:3]
        self.num_batches = -(-len(self) // batch_size)

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        wanted, image_size = set(numbers), int(np.prod(self.shape[1:]))
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as member:
                read_header(member)
                for number in range(max(wanted, default=-1) + 1):
                    count = min(self.batch_size, len(self) - number * self.batch_size)
                    content = member.read(count * image_size)
                    if number in wanted:
                        yield np.frombuffer(content, np.uint8).reshape(count, *self.shape[1:])
        except (zipfile.BadZipFile, EOFError, zlib.error, ValueError) as error:
            raise self._damaged(error) from error

    def statistics(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The statistics that a reference file holds besides its images, for `FeatureSet`."""
        try:
            with np.load(self.path) as archive:
                stored = {n: archive[n].astype(np.float64) for n in STATISTICS if n in archive}
        except (zipfile.BadZipFile, EOFError, zlib.error, ValueError) as error:
            raise self._damaged(error) from error
        pairs = {"pool_statistics": ("mu", "sigma"), "spatial_statistics": ("mu_s", "sigma_s")}
        return {
            name: tuple(stored[key] for key in keys)
            for name, keys in pairs.items()
            if all(key in stored for key in keys)
        }

    def describe(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "crc32": self._checksum}

    def _damaged(self, error: Exception) -> UserError:
        return UserError(
            f"{self.path} is damaged, incomplete or not an .npz file ({error}). Copy or make it "
            "again."
        )


def read_header(member) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, Fortran order, dtype) of an .npy file opened at its start."""
    if np.lib.format.read_magic(member) == (1, 0):
        return np.lib.format.read_array_header_1_0(member)
    return np.lib.format.read_array_header_2_0(member)


class Split:
    """The images of a split of a data set, cropped to one size, in a fixed random order."""

    def __init__(self, source: Source, transform: Transform, data: dict[str, Any], batch_size: int):
        self._source, self._transform, self._data = source, transform, data
        self.batch_size, self.num_batches = batch_size, -(-len(source) // batch_size)
        self.image_size = transform.image_size
        self._order = np.random.default_rng(SHUFFLE_SEED).permutation(len(source))

    def __len__(self) -> int:
        return len(self._source)

    def batches(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        with concurrent.futures.ThreadPoolExecutor(DECODING_THREADS) as threads:
            for number in numbers:
                start = number * self.batch_size
                chosen = self._order[start : start + self.batch_size]
                yield np.stack(list(threads.map(self._image, chosen)))

    def _image(self, index: int) -> np.ndarray:
        return image_to_uint8(read_image(self._source, index, self._transform)[0])

    def describe(self) -> dict[str, Any]:
        name = self._data.get("data_dir") and os.path.abspath(self._data["data_dir"])
        first, last = (self._source[index]["name"] for index in (0, -1 + len(self)))
        return {
            "data": [self._data["name"], name, self._data.get("split")],
            "images": [len(self), first, last],
            "size": [*self._transform.image_size, *self._transform.cover],
        }


def read_image(source: Source, index: int, transform: Transform) -> tuple[np.ndarray, int]:
    """(image float32 (H, W, 3) in [-1, 1], label) of a record.

    Raises:
        UserError: the image is unreadable; the message names it.
    """
    name = f"record {index}"
    try:
        item = source[int(index)]
        name = item["name"]
        return transform(decode(item["image"])), item["label"]
    except UserError as error:
        raise UserError(
            f"{name}: {error}. Repair it or remove it from the data set to evaluate."
        ) from error


def image_to_uint8(image: np.ndarray) -> np.ndarray:
    """The pixel values v of float values v / 127.5 - 1."""
    return np.round((image + 1) * 127.5).astype(np.uint8)


class Inception:
    """The network behind the published metrics, on all local devices.

    Args:
        prepare: `tf1_inception_input` for generation, `antialiased_inception_input` for
            reconstruction.

    Raises:
        UserError: the network's weights are missing; the message says how to import them.
    """

    name = "inception"

    def __init__(self, prepare=pretrained.tf1_inception_input):
        params = pretrained.load("inception")
        self.fingerprint = fingerprint(params)
        self._mesh = make_mesh(devices=jax.local_devices())
        self._params = jax.device_put(params, NamedSharding(self._mesh, PartitionSpec()))
        self._features = jax.jit(lambda params, x: pretrained.inception(params, prepare(x)))

    def image_features(self, images) -> ImageFeatures:
        """Float32 features of images (B, H, W, 3), in the form that `prepare` accepts."""
        with jax.set_mesh(self._mesh):
            found = self._features(self._params, local_batch(images, self._mesh))
            found = jax.device_get(found)
        return jax.tree.map(lambda x: x[: len(images)], found)


def extract(
    images: ImageSet, judge: Inception, folder: Path, keep: int | None = None
) -> FeatureSet:
    """The features of all images, on every process.

    Args:
        folder: holds the parts; it is kept, so that repeating the call takes no time.
        keep: the number of images, from the first on, whose features are kept; None keeps all.

    Raises:
        UserError: an image cannot be read, or `folder` holds features of other images.
    """
    size, count = images.batch_size, len(images)
    description = {"network": judge.fingerprint, "batch_size": size, **images.describe()}
    pool_moments, spatial_moments, kept = Moments(), Moments(), []
    keep = count if keep is None else min(keep, count)
    keep_batches = -(-keep // size)
    compute = lambda numbers: map(judge.image_features, filled(images, numbers))
    parts = in_parts(images, folder, description, compute, "features")
    for number, part in zip(own_share(images.num_batches), parts):
        real = min(size, count - number * size)
        features = ImageFeatures(**part)
        pool_moments += Moments.of(features.pool[:real])
        spatial_moments += Moments.of(features.spatial[:real])
        if number < keep_batches:
            kept.append(np.concatenate([features.pool, features.logits], axis=1))
    kept = gather_rows(kept, keep_batches)[:keep]
    statistics = [gather_moments(x).statistics for x in (pool_moments, spatial_moments)]
    width = len(statistics[0][0])
    return FeatureSet(count, kept[:, :width], kept[:, width:], *statistics)


def filled(images: ImageSet, numbers: Sequence[int]) -> Iterator[np.ndarray]:
    """The batches, all filled to the same size, so that one compiled program serves them."""
    for batch in images.batches(numbers):
        yield fill_batch(batch, min(images.batch_size, len(images)))


def in_parts(
    images: ImageSet, folder: Path, description: dict[str, Any], compute, name: str
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the arrays of each of this process's batches, read from a file or computed and stored.

    Args:
        folder: the folder of the files.
        description: everything the arrays depend on.
        compute: batch numbers -> an iterator over their arrays, NamedTuples.
        name: the name in the progress lines.
    """
    open_folder(folder, "*.npz", description)
    path = lambda number: folder / f"{number:06d}.npz"
    missing = own_missing(images.num_batches, lambda number: [path(number)])
    size = min(images.batch_size, len(images))
    computed, progress = compute(missing), Progress(name, len(missing) * size, "images")
    done, missing = 0, set(missing)
    for number in own_share(images.num_batches):
        arrays = None if number in missing else read_arrays(path(number))
        if arrays is None:
            source = computed if number in missing else compute([number])
            arrays = {k: np.asarray(v) for k, v in next(iter(source))._asdict().items()}
            with atomic_write(path(number)) as file:
                np.savez(file, **arrays)
            done += size
            progress.update(done)
        yield arrays


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a part, or None if it is damaged."""
    try:
        with np.load(path) as archive:
            return dict(archive)
    except Exception as error:  # damage raises errors of many kinds
        logger.warning("%s is damaged (%s); computing it again", path, error)
        return None


def gather_rows(own: list[np.ndarray], count: int) -> np.ndarray:
    """All processes' batches (B, D), concatenated in order; `own` are those of `own_share`."""
    if jax.process_count() == 1:
        return np.concatenate(own)
    shape = np.array(own[0].shape if own else (0, 0))
    shape = gather(shape[None], jax.process_count()).max(0)
    stacked = np.stack(own) if own else np.empty((0, *shape), np.float32)
    return gather(stacked, count).reshape(-1, shape[-1])


def gather_moments(own: Moments) -> Moments:
    """The moments of all processes' features."""
    if jax.process_count() == 1:
        return own
    width = gather(np.array([np.size(own.mean) if own.count else 0]), jax.process_count()).max()
    own_row = np.zeros((1, 1 + width + width * width))
    if own.count:
        own_row[0] = np.concatenate([[own.count], own.mean, own.scatter.ravel()])
    total = Moments()
    for row in gather(own_row, jax.process_count()):
        if row[0]:
            mean, scatter = row[1 : 1 + width], row[1 + width :].reshape(width, width)
            total += Moments(int(row[0]), mean, scatter)
    return total


def reference_features(images: ImageSet, judge: Inception) -> FeatureSet:
    """The features to compare with, cached for the next call with the same images.

    Statistics stored in a reference file take precedence over those of its images. For a data set,
    statistics are computed from all images, and precision and recall from 10,000.
    """
    description = {"network": judge.fingerprint, **images.describe()}
    folder = pretrained.cache_folder() / "references" / digest(description)[:16]
    keep = None if isinstance(images, Archive) else REFERENCE_IMAGES
    file = folder.with_suffix(".npz")
    stored = read_arrays(file) if file.exists() else None
    # Each machine may have its own cache, but all processes must take the same branch.
    if gather(np.array([stored is not None]), jax.process_count()).all():
        logger.info("features of the reference: %s", file)
        pairs = [
            (stored[f"{name}_mean"], stored[f"{name}_covariance"]) for name in ("pool", "spatial")
        ]
        found = FeatureSet(int(stored["count"]), stored["pool"], stored["logits"], *pairs)
    else:
        found = extract(images, judge, folder, keep)
        if is_main():
            with atomic_write(file) as out:
                np.savez(
                    out, count=found.count, pool=found.pool, logits=found.logits,
                    pool_mean=found.pool_statistics[0], pool_covariance=found.pool_statistics[1],
                    spatial_mean=found.spatial_statistics[0],
                    spatial_covariance=found.spatial_statistics[1],
                )  # fmt: skip
            shutil.rmtree(folder, ignore_errors=True)
    barrier("the features of the reference are there")
    if isinstance(images, Archive):
        found = found._replace(**images.statistics())
    return found
