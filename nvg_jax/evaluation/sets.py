"""Sets of images to measure: a file, a split of a data set, or images in memory.

`jobs` adds the images that a model makes: samples and reconstructions.
"""

import abc
import concurrent.futures
import dataclasses
import functools
import logging
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from nvg_jax.data import SequenceSource, Transform, open_source
from nvg_jax.data.sources import SPLITS
from nvg_jax.data.transforms import DEFAULT_FILTER
from nvg_jax.errors import UserError, reported
from nvg_jax.runtime import watchdog
from nvg_jax.runtime.processes import from_all, gather, own_share
from nvg_jax.runtime.progress import Progress
from nvg_jax.runtime.sharding import fill_batch
from nvg_jax.runtime.storage import local_path, storage_path
from nvg_jax.visualize import to_uint8

logger = logging.getLogger("nvg_jax")
# Arrays of a reference file, in pairs: what `FeatureSet` calls them.
STATISTICS = (
    {"mu": "pool_mean", "sigma": "pool_covariance"},
    {"mu_s": "spatial_mean", "sigma_s": "spatial_covariance"},
)
DAMAGE = (zipfile.BadZipFile, EOFError, zlib.error, ValueError)  # what a damaged file raises
SHUFFLE_SEED = 0
DECODING_THREADS = 16
# A split in memory has at most these images, and takes at most these bytes as float32.
MAX_IMAGES = {"train": 60_000, "test": 10_000}
MAX_BYTES = 4 << 30


class ImageSet(abc.ABC):
    """A fixed sequence of images, in batches.

    Attributes:
        batch_size: the size of all batches but the last, which may be smaller.
        image_size: height and width.
    """

    batch_size: int
    image_size: tuple[int, int]

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def batches(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        """Yields the batches with these increasing numbers as uint8 (B, H, W, 3)."""

    def describe(self) -> dict[str, Any]:
        """Everything the images depend on, JSON-serializable; of sets whose features are stored."""
        raise NotImplementedError

    @property
    def num_batches(self) -> int:
        return -(-len(self) // self.batch_size)

    def filled(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        """`batches`, all filled to the same size, so that one compiled program serves them."""
        for batch in self.batches(numbers):
            yield fill_batch(batch, min(self.batch_size, len(self)))

    def collect(self, work: str) -> np.ndarray:
        """All images, uint8 (N, H, W, 3), on every process; all processes share the work.

        Args:
            work: what the progress lines call it.
        """
        own, size = own_share(self.num_batches), min(self.batch_size, len(self))
        images = np.zeros((len(own), size, *self.image_size, 3), np.uint8)
        progress = Progress(work, images.shape[0] * size, "images")
        for row, batch in enumerate(self.filled(own)):
            images[row] = batch
            progress.update((row + 1) * size)
        return gather(images, self.num_batches).reshape(-1, *images.shape[2:])[: len(self)]


class Archive(ImageSet):
    """The images in an .npz file, "arr_0", uint8 (N, H, W, 3), read one batch at a time.

    Raises:
        UserError: the file does not exist, is damaged or has other contents.
    """

    def __init__(self, path: str | os.PathLike, batch_size: int):
        self.path, self.batch_size = storage_path(path), batch_size
        if not self.path.is_file():
            raise UserError(f"There is no file {path}.")
        try:
            with (
                reported(f"{path} cannot be read"),
                self.path.open("rb") as file,
                zipfile.ZipFile(file) as archive,
            ):
                names = [name.removesuffix(".npy") for name in archive.namelist()]
                if "arr_0" in names:
                    self._checksum = archive.getinfo("arr_0.npy").CRC
                    with archive.open("arr_0.npy") as member:
                        self.shape, fortran, dtype = read_header(member)
        except DAMAGE as error:
            raise self._damaged(error) from error
        if "arr_0" not in names:
            raise UserError(
                f"{path} has the arrays {', '.join(names) or '(none)'}; expected the images as "
                '"arr_0", which is what np.savez and `nvg_jax.sample` write.'
            )
        if len(self.shape) != 4 or self.shape[-1] != 3 or dtype != np.uint8 or fortran:
            raise UserError(
                f"The images in {path} must be uint8 of shape (N, H, W, 3), got {dtype} "
                f"{self.shape}{' in Fortran order' if fortran else ''}."
            )
        self.image_size = self.shape[1:3]

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        chosen, bytes_per_image = set(numbers), int(np.prod(self.shape[1:]))
        try:
            with (
                self.path.open("rb") as file,
                zipfile.ZipFile(file) as archive,
                archive.open("arr_0.npy") as member,
            ):
                read_header(member)
                for number in range(max(chosen, default=-1) + 1):
                    count = min(self.batch_size, len(self) - number * self.batch_size)
                    content = member.read(count * bytes_per_image)
                    if number in chosen:
                        yield np.frombuffer(content, np.uint8).reshape(count, *self.shape[1:])
        except DAMAGE as error:
            raise self._damaged(error) from error

    def statistics(self) -> dict[str, np.ndarray]:
        """The statistics that a reference file holds besides its images, for `FeatureSet`."""
        try:
            with self.path.open("rb") as file, np.load(file) as archive:
                pairs = [pair for pair in STATISTICS if all(name in archive for name in pair)]
                return {pair[n]: archive[n].astype(np.float64) for pair in pairs for n in pair}
        except DAMAGE as error:
            raise self._damaged(error) from error

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


@dataclasses.dataclass(frozen=True)
class LabeledImages(ImageSet):
    """Images in memory, uint8 (N, H, W, 3), with their classes, int (N,)."""

    images: np.ndarray
    labels: np.ndarray
    batch_size: int = 100

    @property
    def image_size(self) -> tuple[int, int]:
        return self.images.shape[1:3]

    def __len__(self) -> int:
        return len(self.images)

    def select(self, indices) -> "LabeledImages":
        """The images with these indices, in this order."""
        return LabeledImages(self.images[indices], self.labels[indices], self.batch_size)

    def batches(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        for number in numbers:
            yield self.images[number * self.batch_size : (number + 1) * self.batch_size]


class Split(ImageSet):
    """The images of a split of a data set, cropped to one size, in a fixed random order.

    Unreadable images are left out, with a warning, if data["on_bad"] is "skip".

    Args:
        data: "name", "data_dir", "resize" and perhaps "resize_filter" and "on_bad", as in a
            config's `data`.
        split: "train" or "test".
        count: only the first images of that order; None is all.

    Raises:
        UserError: there is no such data set, or it has no images.
    """

    def __init__(
        self,
        data: dict[str, Any],
        split: str,
        image_size: tuple[int, int],
        batch_size: int = 1,
        count: int | None = None,
    ):
        self.source = open_source(data["name"], split, data_dir=data["data_dir"] or None)
        if isinstance(self.source, SequenceSource):
            raise UserError(
                "Cached sequences have no images to evaluate with; give the data set they were "
                "made from with --data_name (and --data_dir)."
            )
        self._data, self._split = data, split
        self._transform = Transform(
            image_size,
            data["resize"],
            resize_filter=data.get("resize_filter") or DEFAULT_FILTER,
        )
        self.image_size, self.batch_size = image_size, batch_size
        order = np.random.default_rng(SHUFFLE_SEED).permutation(len(self.source))
        self._order = order[:count]

    @functools.cached_property
    def _indices(self) -> np.ndarray:
        """The records of the images, without those to leave out; all processes share the work.

        Collective: the first time, every process must read it.
        """
        if self._data.get("on_bad") != "skip":
            return self._order
        count = len(self._order)
        readable = np.zeros(-(-count // jax.process_count()), bool)
        with concurrent.futures.ThreadPoolExecutor(DECODING_THREADS) as threads:
            own = self._order[own_share(count)]
            readable[: len(own)] = list(threads.map(self._is_readable, own))
        indices = self._order[from_all(readable).T.reshape(-1)[:count]]
        if not len(indices):
            raise UserError(f"None of the {len(self._order)} images to evaluate with can be read.")
        return indices

    def __len__(self) -> int:
        return len(self._indices)

    def batches(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        with concurrent.futures.ThreadPoolExecutor(DECODING_THREADS) as threads:
            for number in numbers:
                start = number * self.batch_size
                chosen = self._indices[start : start + self.batch_size]
                yield np.stack([image for image, _ in threads.map(self._read, chosen)])

    def load(self) -> LabeledImages:
        """All images of the set in memory, in the order of the data set.

        Raises:
            UserError: an image is unreadable and not to be left out, or all are.
        """
        with concurrent.futures.ThreadPoolExecutor(DECODING_THREADS) as threads:
            images, labels = zip(*threads.map(self._read, np.sort(self._indices)))
        return LabeledImages(np.stack(images), np.array(labels))

    def _is_readable(self, index: int) -> bool:
        watchdog.reset(slow=True)  # there may be a million
        try:
            self._decode(index)
        except UserError as error:
            logger.warning("left out %s", error)
            return False
        return True

    def _read(self, index: int) -> tuple[np.ndarray, int]:
        """(image uint8 (H, W, 3), label) of a record; raises like `_decode`."""
        image, label = self._decode(index)
        return to_uint8(self._transform(image)), label

    def _decode(self, index: int) -> tuple[Image.Image, int]:
        """(image, label) of a record.

        Raises:
            UserError: the image is unreadable; the message names it.
        """
        name = f"record {index}"
        try:
            item = self.source[int(index)]
            name = item["name"]
            return self._transform.decode(item["image"]), item["label"]
        except UserError as error:
            raise UserError(
                f"{name}: {error}. Repair it or remove it from the data set to evaluate."
            ) from error

    def describe(self) -> dict[str, Any]:
        folder = self._data["data_dir"] and str(local_path(self._data["data_dir"], "data_dir"))
        return {
            "data": [self._data["name"], folder, self._split],
            "images": [len(self._order), self.source.describe()],
            "size": [*self.image_size, *self._transform.cover, self._transform.resize_filter],
        }


def load_split(data: dict[str, Any], split: str, image_size: tuple[int, int]) -> LabeledImages:
    """A split in memory, or a fixed random choice of it; the arguments are those of `Split`."""
    bytes_per_image = 4 * 3 * image_size[0] * image_size[1]
    count = min(MAX_IMAGES[split], MAX_BYTES // bytes_per_image)
    return Split(data, split, image_size, count=count).load()


def open_reference(
    text: str,
    batch_size: int,
    image_size: tuple[int, int] | None = None,
    data: dict[str, Any] | None = None,
) -> ImageSet:
    """The reference images that --reference names: an .npz file, or a split of the data set.

    Args:
        image_size, data: the model's image size, and `data` as in a config; only for a split.

    Raises:
        UserError: `text` is neither, or `data` is missing.
    """
    if text in SPLITS:
        if data is None or image_size is None:
            raise UserError(
                f"--reference={text} is a split of a data set, cropped to a model's image size; "
                "give --workdir, or a reference file."
            )
        return Split(data, text, image_size, batch_size)
    if not text.endswith(".npz"):
        raise UserError(f"--reference must be train, test or an .npz file, got {text!r}.")
    return Archive(text, batch_size)
