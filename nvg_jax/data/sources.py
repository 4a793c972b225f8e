"""Data sets as random-access sources of encoded images with labels.

Scikit-learn's digits, IDX files, folders of images, and data sets prepared by TensorFlow Datasets
(TFDS) all become a `Source`, the only interface that the loader uses. `SequenceSource` is the only
source without images: it holds the granularity sequences that a tokenizer made from them.
"""

import abc
import collections
import contextlib
import errno
import functools
import gzip
import hashlib
import logging
import os
import pathlib
import re
import unicodedata
import zlib
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from etils import epy
from PIL import Image

from nvg_jax.errors import UserError, comes_with, is_failure, is_mistake, listed, reported
from nvg_jax.runtime.storage import digest, fingerprint, local_path

with epy.lazy_imports(error_callback=comes_with("train")):  # slow
    import tensorflow_datasets as tfds
    from sklearn import datasets, model_selection

    from nvg_jax.data import sequences

logger = logging.getLogger("nvg_jax")

NAMES = ("digits", "fashion_mnist", "image_folder", "sequences")  # and tfds:NAME
FASHION_MNIST_DIR = "/usr/share/datasets/fashion-mnist"  # Debian's package dataset-fashion-mnist
FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
TFDS_DIR = "~/tensorflow_datasets"  # TFDS's own default
DIGITS_TEST_SIZE = 300
FOLDER_TEST_FRACTION = 0.1
SPLITS = ("train", "test")


class Source(abc.ABC):
    """Labeled images by index: a random-access data source for Grain.

    An item is a dictionary with "image", an encoded image file (bytes) or uint8 (H, W) or
    (H, W, 3) in 0..255; "label", an int in 0..num_classes-1; and "name", the file or record to name
    in messages.

    Attributes:
        class_names: the name of every class, in the order of the labels.
        unreadable: {name: reason} of every record that a loader with on_bad="skip" has skipped so
            far in this process.
    """

    def __init__(self, class_names: Sequence[str]):
        self.class_names = tuple(map(composed, class_names))
        self.unreadable: dict[str, str] = {}

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def images_per_class(self) -> tuple[int, ...] | None:
        """The number of images of every class; None if only reading all of them would tell."""
        return None

    def listing(self) -> Any:
        """What tells its records from those of another data set, JSON-serializable."""

        def name(index: int) -> str:
            try:
                return self[index]["name"]
            except UserError as error:  # unreadable, which may be allowed
                return str(error)

        return [len(self), name(0), name(len(self) - 1)]

    def describe(self) -> Any:
        """What tells its records from those of another version, JSON-serializable."""
        return self.listing()

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> dict[str, Any]: ...


class ArraySource(Source):
    """Images in memory: uint8 (N, H, W) or (N, H, W, 3), with integer labels (N,)."""

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, class_names: Sequence[str], name: str
    ):
        super().__init__(class_names)
        self._images, self._labels, self._name = images, labels, name

    @functools.cached_property
    def _digest(self) -> str:
        return fingerprint([self._images, self._labels])

    def describe(self) -> str:
        """A hash of all images and labels."""
        return self._digest

    @property
    def images_per_class(self) -> tuple[int, ...]:
        return tuple(np.bincount(self._labels, minlength=self.num_classes).tolist())

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "image": self._images[index],
            "label": int(self._labels[index]),
            "name": f"{self._name} image {index}",
        }


class FolderSource(Source):
    """Image files below `root`; each of `files` is "class/file name".

    File systems store a letter with an accent in one of two forms: class names have the composed
    one, which their users type.
    """

    def __init__(self, root: pathlib.Path, files: Sequence[str], class_names: Sequence[str]):
        super().__init__(class_names)
        self._root, self._files = root, files
        self._labels = {name: label for label, name in enumerate(self.class_names)}

    def _class(self, file: str) -> str:
        return composed(file.split("/")[0])

    @property
    def images_per_class(self) -> tuple[int, ...]:
        counts = collections.Counter(map(self._class, self._files))
        return tuple(counts[name] for name in self.class_names)

    @functools.cached_property
    def _digest(self) -> str:
        return digest({file: self._size(file) for file in self._files})

    def _size(self, file: str) -> int:
        try:
            return os.stat(self._root / file).st_size
        except OSError as error:  # a link to nowhere; who reads it says so
            if not is_mistake(error):
                raise
            return -1

    def listing(self) -> str:
        """A hash of the names of all files."""
        return digest(self._files)

    def describe(self) -> str:
        """A hash of the names and sizes of all files, -1 of those that cannot be read."""
        return self._digest

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file = self._files[index]
        path = self._root / file
        with reported(f"{path} cannot be read"):
            image = path.read_bytes()
        return {"image": image, "label": self._labels[self._class(file)], "name": str(path)}


class TfdsSource(Source):
    """A split of a data set that TFDS has prepared as ArrayRecord; the images stay encoded.

    Args:
        sizes: of its files, which tell it from another of this name.
    """

    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        class_names: Sequence[str],
        name: str,
        sizes: Sequence[int] = (),
    ):
        super().__init__(class_names)
        self._records, self._name, self._sizes = records, name, sizes

    def describe(self) -> Any:
        return [*self.listing(), self._name, *self._sizes]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._read(index)
        if record["label"] < 0:
            raise UserError(f"{record['name']} has no label.")
        return record

    @property
    def has_labels(self) -> bool:
        """False if it is empty, or its labels are not public, so that TFDS gives -1."""
        return len(self) > 0 and self._read(0)["label"] >= 0

    def _read(self, index: int) -> dict[str, Any]:
        name = f"{self._name} record {index}"
        with reading_tfds(name):
            record = self._records[index]
            image, label = record["image"], int(record["label"])
            if "file_name" in record:
                name += f" ({record['file_name'].decode()})"
        return {"image": image, "label": label, "name": name}


@contextlib.contextmanager
def reading_tfds(name: str):
    """Turns what libraries raise for damaged files of TFDS into a UserError."""
    try:
        yield
    except Exception as error:  # damage comes as errors of many kinds
        if isinstance(error, UserError | ImportError) or is_failure(error):
            raise
        raise UserError(f"{name} is damaged ({error}). Prepare the data set again.") from error


class SequenceSource(Source):
    """A split of a cache of granularity sequences, indexed by image.

    Instead of "image", an item has "crops": the image's sequences, an array of `crop_dtype`.

    Attributes:
        tokenizer: the sizes of the tokenizer that made the sequences, a dictionary.
        fingerprint: of its weights.
        crop_dtype: the structured dtype of one crop, see `sequences.crop_dtype`.
        resize, resize_filter: how the images were resized, as in a config's `data`.
    """

    def __init__(self, folder: pathlib.Path, split: str):
        meta = sequences.read_meta(folder)
        super().__init__(meta["class_names"])
        self.tokenizer, self.fingerprint = meta["tokenizer"], meta["fingerprint"]
        self.crop_dtype = sequences.crop_dtype(self.tokenizer)
        self.resize = meta["data"]["resize"]
        self.resize_filter = meta["data"]["resize_filter"]
        self._folder, self._records = folder, sequences.Records(folder, split, meta)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        label, crops = self._records[index]
        return {"crops": crops, "label": label, "name": self._records.name(index)}

    def check_tokenizer(self, fingerprint: str):
        """Raises UserError if another tokenizer made the sequences."""
        if self.fingerprint != fingerprint:
            raise UserError(
                f"The sequences in {self._folder} were made by another tokenizer (weights "
                f"{self.fingerprint}) than the one of this run ({fingerprint}). Make them "
                "again with nvg_jax.encode, or train with the tokenizer that made them."
            )


def open_source(
    name: str,
    split: str,
    *,
    data_dir: str | None = None,
    class_names: Sequence[str] | None = None,
) -> Source:
    """Opens one split of a data set.

    Args:
        name: "digits", "fashion_mnist", "image_folder", "tfds:NAME" or "sequences".
        split: "train" or "test".
        data_dir: the folder of the data set. "image_folder" and "sequences" need it;
            "fashion_mnist" and "tfds:NAME" have a default; "digits" takes none.
        class_names: the classes that a model was trained with; the data set must have the same
            classes in the same order. None accepts any.

    Raises:
        UserError: an unknown name or split, a missing or malformed folder or file, or other
            classes than `class_names`.
    """
    check_name(name)
    if split not in SPLITS:
        raise UserError(f"There is no split '{split}'; choose one of {', '.join(SPLITS)}.")
    folder = local_path(data_dir, "data_dir") if data_dir else None
    with reported(f"{folder or name} cannot be read"):
        source = _open(name, split, folder)
    if class_names is not None and tuple(map(composed, class_names)) != source.class_names:
        raise UserError(
            f"The model was trained with {_count_classes(class_names)}, but the data set "
            f"'{name}' has {_count_classes(source.class_names)}; give the data set that the model "
            "was trained with."
        )
    return source


def _open(name: str, split: str, folder: pathlib.Path | None) -> Source:
    if name == "digits":
        if folder:
            raise UserError(
                f"The digits come with scikit-learn, not from '{folder}'; leave data_dir empty, "
                "or choose another data set."
            )
        return _digits(split)
    if name == "fashion_mnist":
        return _fashion_mnist(split, folder or pathlib.Path(FASHION_MNIST_DIR))
    if name == "image_folder":
        return _image_folder(split, folder)
    if name.startswith("tfds:"):
        name, folder = name.removeprefix("tfds:"), folder or local_path(TFDS_DIR, "data_dir")
        return _tfds(name, split, folder)
    if not folder:
        raise UserError(
            "The data set sequences needs data_dir, the folder that nvg_jax.encode wrote."
        )
    return SequenceSource(folder, split)


def check_name(name: str):
    """Raises UserError for the name of a data set that `open_source` does not know."""
    if name not in NAMES and not name.startswith("tfds:"):
        raise UserError(
            f"There is no data set '{name}'; choose digits, fashion_mnist, image_folder, "
            "tfds:NAME or sequences."
        )


def _count_classes(class_names: Sequence[str]) -> str:
    return f"{len(class_names)} classes ({listed(class_names)})"


def _digits(split: str) -> Source:
    """The 1,797 8x8 digits that come with scikit-learn: 1,497 to train and 300 to test.

    The split is random but fixed, and stratified by class.
    """
    digits = cast(Any, datasets.load_digits())
    indices = model_selection.train_test_split(
        np.arange(len(digits.target)),
        test_size=DIGITS_TEST_SIZE,
        stratify=digits.target,
        random_state=0,
    )[SPLITS.index(split)]
    # Pixel values are 0..16.
    images = np.round(digits.images[indices] * (255 / 16)).astype(np.uint8)
    class_names = [str(digit) for digit in digits.target_names]
    return ArraySource(images, digits.target[indices], class_names, f"digits {split}")


def _fashion_mnist(split: str, folder: pathlib.Path) -> Source:
    """60,000 training and 10,000 test images of clothes, 28x28, from IDX files or TFDS."""
    if (folder / "fashion_mnist").is_dir():
        return _tfds("fashion_mnist", split, folder)
    prefix = {"train": "train", "test": "t10k"}[split]
    images = _read_idx(folder, f"{prefix}-images-idx3-ubyte", dimensions=3)
    labels = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", dimensions=1)
    if len(images) != len(labels):
        raise UserError(
            f"'{folder}' has {len(images)} {split} images but {len(labels)} labels: these IDX "
            "files do not belong together. Download them again."
        )
    if labels.max() >= len(FASHION_MNIST_CLASSES):
        raise UserError(
            f"The {split} labels in '{folder}' go up to {labels.max()}, but Fashion-MNIST has "
            f"classes 0 to {len(FASHION_MNIST_CLASSES) - 1}. Download the files again."
        )
    return ArraySource(images, labels, FASHION_MNIST_CLASSES, f"fashion_mnist {split}")


def _read_idx(folder: pathlib.Path, file: str, dimensions: int) -> np.ndarray:
    """Reads an IDX file of bytes (the format of yann.lecun.com), gzipped or not.

    The file holds 0, 0, 8 (the type: unsigned byte), the number of dimensions, the size of each
    dimension as a big-endian 32-bit number, and the values.
    """
    path, packed = folder / file, folder / f"{file}.gz"
    if path.is_file():
        content = path.read_bytes()
    elif packed.is_file():
        path, content = packed, packed.read_bytes()
        try:
            content = gzip.decompress(content)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(
                f"'{packed}' cannot be unpacked ({error}). Download it again."
            ) from error
    else:
        raise UserError(
            f"'{folder}' has no file '{file}' or '{file}.gz'. On Debian and Ubuntu `apt-get "
            f"install dataset-fashion-mnist` puts the files into {FASHION_MNIST_DIR}; elsewhere, "
            "download the four .gz files from https://github.com/zalandoresearch/fashion-mnist "
            "and give their folder as data_dir."
        )
    header = 4 + 4 * dimensions
    shape = np.frombuffer(content[4:header].ljust(header - 4, b"\0"), ">u4").astype(int)
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != header + np.prod(shape):
        raise UserError(
            f"'{path}' is not a complete IDX file of bytes with {dimensions} dimensions. Download "
            "it again."
        )
    if not np.prod(shape):
        raise UserError(f"'{path}' has no values. Download it again.")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _image_folder(split: str, root: pathlib.Path | None) -> Source:
    """A folder with one subfolder of images per class.

    If there are subfolders train and test (or val), each with class folders inside, they are the
    splits; test may lack classes. Otherwise, a hash of "class/file name" puts a tenth of the files
    into the test split, so that a file stays in its split when others are added or removed.
    """
    if not root:
        raise UserError(
            "The data set image_folder needs data_dir, a folder of class folders: give --data_dir "
            "(in training --config.data.data_dir)."
        )
    if not root.is_dir():
        raise UserError(f"The data_dir '{root}' is not a folder.")
    held_out = [root / name for name in ("test", "val") if (root / name).is_dir()]
    if (root / "train").is_dir() and held_out:
        class_names = _class_names(root / "train")
        untrained = lambda held: sorted(set(_class_names(held)) - set(class_names))
        fitting = [held for held in held_out if _subfolders(held) and not untrained(held)]
        folder = {"train": root / "train", "test": (fitting or held_out)[0]}[split]
        _name_others(root, ["train", "test", "val"])
        files = _list_images(folder)
        if unknown := untrained(folder):
            raise UserError(
                f"'{folder}' has the class folders {listed(unknown)}, which '{root / 'train'}' "
                "does not have. Rename or remove them, or add images of these classes to train."
            )
        return FolderSource(folder, files, class_names)
    class_names = _class_names(root)
    files = [file for file in _list_images(root) if _in_test(file) == (split == "test")]
    if not files:
        raise UserError(
            f"No image of '{root}' falls into the {split} split, which is chosen by a hash of the "
            "file names; add images, or make folders train and test with the class folders inside."
        )
    return FolderSource(root, files, class_names)


def _in_test(file: str) -> bool:
    sha = hashlib.sha256(os.fsencode(composed(file))).digest()  # names need not be UTF-8
    return int.from_bytes(sha[:8], "big") < FOLDER_TEST_FRACTION * 2**64


def composed(name: str) -> str:
    """A name in Unicode's composed form (NFC)."""
    return unicodedata.normalize("NFC", name)


def _class_names(folder: pathlib.Path) -> list[str]:
    names = sorted(map(composed, _subfolders(folder)))
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise UserError(
            f"'{folder}' has two folders that are both named {twice[0]}, in different Unicode "
            "forms. Move the images of one into the other."
        )
    return names


def _subfolders(folder: pathlib.Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if _is_folder(e) and not e.name.startswith("."))


def _name_others(folder: pathlib.Path, read: Sequence[str]):
    """Says which pictures, folders and links lie beside the folders that are read."""

    def counts(entry: os.DirEntry) -> bool:
        suffix = os.path.splitext(entry.name)[1].lower()
        return suffix in Image.registered_extensions() or entry.is_symlink() or _is_folder(entry)

    with os.scandir(folder) as entries:
        visible = [e for e in entries if e.name[0] != "." and e.name not in read]
        others = sorted(e.name for e in visible if counts(e))
    if others:
        _say_once(f"'{folder}': not read: {listed(others)}")


@functools.cache
def _say_once(text: str):  # a data set is opened several times
    logger.info(text)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False  # a link to itself: reading it will say so


def _list_images(root: pathlib.Path) -> list[str]:
    """All files in the class folders of `root`, as "class/file name", except hidden ones."""
    classes = _subfolders(root)
    if not classes:
        raise UserError(
            f"'{root}' has no subfolders; image_folder expects one subfolder of images per class."
        )
    _name_others(root, classes)
    files = []
    for name in classes:
        with os.scandir(root / name) as entries:
            found = sorted((e.name, _is_folder(e)) for e in entries if e.name[0] != ".")
        for file, is_folder in found:
            if is_folder:
                raise UserError(
                    f"The class folder '{root / name}' has a folder '{file}' inside; images must "
                    "lie directly in their class folder. (For your own splits, name the folders "
                    "train and test, or train and val.)"
                )
            files.append(f"{name}/{file}")
        if not found:
            raise UserError(
                f"The class folder '{root / name}' has no images; fill it or remove it."
            )
    return files


def _tfds(name: str, split: str, data_dir: pathlib.Path) -> Source:
    """A data set that TFDS has prepared in data_dir/NAME/VERSION: NAME:VERSION, or the newest."""
    name, _, version = name.partition(":")
    root, wanted = data_dir / name, re.escape(version) or r"\d+\.\d+\.\d+"
    folders = [path.parent for path in root.glob("*/dataset_info.json")]
    versions = [folder for folder in folders if re.fullmatch(wanted, folder.name)]
    if not versions:
        raise UserError(
            f"'{root}' has no folder {version or 'of a version'} with a data set prepared by TFDS; "
            "docs/data.md shows how to prepare one. (The name is tfds:NAME, or tfds:NAME/CONFIG "
            "for a data set with configurations; :VERSION may follow.)"
        )
    newest = max(versions, key=lambda folder: [int(n) for n in folder.name.split(".")])
    with reading_tfds(f"The data set in '{newest}'"):
        builder = cast(Any, tfds.builder_from_directory(str(newest)))
        features = dict(builder.info.features)
    if "image" not in features or not isinstance(features.get("label"), tfds.features.ClassLabel):
        raise UserError(
            f"The data set in '{newest}' lacks the features image and label (a class label)."
        )
    candidates = [split]
    if split == "test":  # ImageNet's own test split has no labels, and need not be there
        candidates = ["validation"] if builder.name == "imagenet2012" else ["test", "validation"]
    available = [s for s in candidates if s in builder.info.splits]
    if not available:
        raise UserError(
            f"The data set in '{newest}' has no split {' or '.join(candidates)}, only "
            f"{', '.join(builder.info.splits)}."
        )
    names = features["label"].names
    if builder.name == "imagenet2012" and len(names) == 1000:
        # TFDS names these classes by WordNet ID.
        names = default_class_names(len(names))

    def opened(split: str) -> TfdsSource:
        try:
            records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        except NotImplementedError as error:
            raise UserError(
                f"The data set in '{newest}' is not in ArrayRecord format; prepare it with "
                "file_format='array_record', as docs/data.md shows."
            ) from error
        info = builder.info.splits[split]
        sizes = [*info.shard_lengths, info.num_bytes]
        return TfdsSource(records, names, f"{builder.info.full_name} {split}", sizes)

    first, *others = available
    source = opened(first)
    return opened(others[0]) if others and not source.has_labels else source


def default_class_names(count: int) -> tuple[str, ...]:
    """The class names of a model that knows only the number of its classes.

    1,000 classes are assumed to be ImageNet's, in the usual order of its labels, with torchvision's
    names; otherwise the names are "0", "1", and so on.
    """
    if count == 1000:
        path = pathlib.Path(__file__).with_name("imagenet_classes.txt")
        return tuple(path.read_text().splitlines())
    return tuple(str(index) for index in range(count))
