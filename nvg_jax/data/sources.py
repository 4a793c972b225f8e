"""Data sets as random-access sources of still encoded images with their labels.

Digits of scikit-learn, IDX files, folders of images, and data sets prepared by TensorFlow
Datasets (TFDS) all become a `Source`, which is all that the loader knows of them. The one source
without images holds what a tokenizer has made of them.
"""

import abc
import gzip
import hashlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from nvg_jax.data import sequences

FASHION_MNIST_DIR = "/usr/share/datasets/fashion-mnist"  # of Debian's dataset-fashion-mnist
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
TFDS_DIR = "~/tensorflow_datasets"  # where TFDS itself prepares data sets
DIGITS_TEST_SIZE = 300
FOLDER_TEST_FRACTION = 0.1
SPLITS = ("train", "test")


class Source(abc.ABC):
    """Labeled images by index; what Grain calls a random-access data source.

    An item is {"image": an encoded image file (bytes), or uint8 (H, W) or (H, W, 3) in 0..255;
    "label": int in 0..num_classes-1; "name": the file or record, for messages}.

    Attributes:
        class_names: the name of every class; its place is the class's label.
        unreadable: the name of every record that a loader with on_bad="skip" has left out so far
            in this process, and what was wrong with it.
    """

    def __init__(self, class_names: Sequence[str]):
        self.class_names = tuple(class_names)
        self.unreadable: dict[str, str] = {}

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

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

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "image": self._images[index],
            "label": int(self._labels[index]),
            "name": f"{self._name} image {index}",
        }


class FolderSource(Source):
    """Image files below `root`; each of `files` is "class/file name"."""

    def __init__(self, root: pathlib.Path, files: Sequence[str], class_names: Sequence[str]):
        super().__init__(class_names)
        self._root, self._files = root, files
        self._labels = {name: label for label, name in enumerate(class_names)}

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file = self._files[index]
        path = self._root / file
        return {
            "image": path.read_bytes(),
            "label": self._labels[file.split("/")[0]],
            "name": str(path),
        }


class TfdsSource(Source):
    """A split of a data set that TFDS has prepared in ArrayRecord; the images stay encoded."""

    def __init__(self, records: Sequence[dict[str, Any]], class_names: Sequence[str], name: str):
        super().__init__(class_names)
        self._records, self._name = records, name

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._records[index]
        name = f"{self._name} record {index}"
        if "file_name" in record:
            name += f" ({record['file_name'].decode()})"
        return {"image": record["image"], "label": int(record["label"]), "name": name}


class SequenceSource(Source):
    """A split of a cache of granularity sequences; the index is that of an image.

    An item has, in place of "image", "crops": its sequences, an array of `sequences.crop_dtype`.

    Attributes:
        tokenizer: the sizes of the tokenizer that made them, a dictionary.
        tokenizer_hash: a hash of its weights.
    """

    def __init__(self, folder: pathlib.Path, split: str):
        meta = sequences.read_meta(folder)
        super().__init__(meta["class_names"])
        self.tokenizer, self.tokenizer_hash = meta["tokenizer"], meta["tokenizer_hash"]
        self._folder, self._records = folder, sequences.Records(folder, split, meta)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        label, crops = self._records[index]
        return {"crops": crops, "label": label, "name": self._records.name(index)}

    def check_tokenizer(self, tokenizer_hash: str):
        """Raises ValueError if the sequences were made by another tokenizer."""
        if self.tokenizer_hash != tokenizer_hash:
            raise ValueError(
                f"The sequences in {self._folder} were made with another tokenizer (weights "
                f"{self.tokenizer_hash}) than the one to train with ({tokenizer_hash}). Make them "
                "again with nvg_jax.encode, or use their own tokenizer."
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
        data_dir: the folder the data set lies in. "image_folder" and "sequences" need it;
            "fashion_mnist" and "tfds:NAME" have a default; "digits" takes none.
        class_names: the classes a model was trained with; the data set must have the same, in
            the same order.

    Raises:
        ValueError: a name, split, folder, file or list of classes that does not fit.
    """
    if split not in SPLITS:
        raise ValueError(f"There is no split '{split}'; choose one of {', '.join(SPLITS)}.")
    if data_dir and "://" in data_dir:
        raise ValueError(
            f"Data are read from folders, and '{data_dir}' is none; mount the bucket on every "
            "machine (gcsfuse; docs/launch.md) and give the folder it is mounted on."
        )
    if name == "digits":
        if data_dir:
            raise ValueError(
                f"The digits come with scikit-learn and are not read from '{data_dir}'; leave "
                "data_dir empty, or choose another data set."
            )
        source = _digits(split)
    elif name == "fashion_mnist":
        source = _fashion_mnist(split, data_dir)
    elif name == "image_folder":
        source = _image_folder(split, data_dir)
    elif name.startswith("tfds:"):
        source = _tfds(name.removeprefix("tfds:"), split, data_dir or TFDS_DIR)
    elif name == "sequences":
        if not data_dir:
            raise ValueError(
                "The data set granularity needs data_dir, the folder that nvg_jax.encode wrote."
            )
        source = SequenceSource(pathlib.Path(data_dir), split)
    else:
        raise ValueError(
            f"There is no data set '{name}'; choose digits, fashion_mnist, image_folder, "
            "tfds:NAME or granularity."
        )
    if class_names is not None and tuple(class_names) != source.class_names:
        raise ValueError(
            f"The model was trained with {_count_classes(class_names)}, but the data set "
            f"'{name}' has {_count_classes(source.class_names)}; give the data set the model was "
            "trained with."
        )
    return source


def _count_classes(class_names: Sequence[str]) -> str:
    shown = ", ".join(class_names[:10]) + (", ..." if len(class_names) > 10 else "")
    return f"{len(class_names)} classes ({shown})"


def _digits(split: str) -> Source:
    """The 1,797 8x8 digits inside scikit-learn, 1,497 to train and 300 to test.

    The split is random but fixed, with the classes in equal parts on both sides.
    """
    from sklearn import datasets, model_selection  # takes seconds to import

    digits = datasets.load_digits()
    indices = model_selection.train_test_split(
        np.arange(len(digits.target)),
        test_size=DIGITS_TEST_SIZE,
        stratify=digits.target,
        random_state=0,
    )[SPLITS.index(split)]
    images = np.round(digits.images[indices] * (255 / 16)).astype(np.uint8)  # 0..16 before
    class_names = [str(digit) for digit in digits.target_names]
    return ArraySource(images, digits.target[indices], class_names, f"digits {split}")


def _fashion_mnist(split: str, data_dir: str | None) -> Source:
    """60,000 training and 10,000 test pictures of clothes, 28x28, from IDX files or TFDS."""
    folder = pathlib.Path(data_dir or FASHION_MNIST_DIR)
    if (folder / "fashion_mnist").is_dir():
        return _tfds("fashion_mnist", split, str(folder))
    prefix = {"train": "train", "test": "t10k"}[split]
    images = _read_idx(folder, f"{prefix}-images-idx3-ubyte", dimensions=3)
    labels = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", dimensions=1)
    if len(images) != len(labels):
        raise ValueError(
            f"'{folder}' has {len(images)} {split} images but {len(labels)} labels; these IDX "
            "files do not belong together. Get them again."
        )
    if labels.max() >= len(FASHION_MNIST_CLASSES):
        raise ValueError(
            f"The {split} labels in '{folder}' go up to {labels.max()}, but Fashion-MNIST has "
            f"classes 0 to {len(FASHION_MNIST_CLASSES) - 1}. Get the files again."
        )
    return ArraySource(images, labels, FASHION_MNIST_CLASSES, f"fashion_mnist {split}")


def _read_idx(folder: pathlib.Path, file: str, dimensions: int) -> np.ndarray:
    """Reads an IDX file of bytes (yann.lecun.com's format), compressed with gzip or not.

    It holds 0, 0, 8 (the type: unsigned byte), the number of dimensions, every dimension as a
    big-endian 32-bit number, and the values.
    """
    path, packed = folder / file, folder / f"{file}.gz"
    if path.is_file():
        content = path.read_bytes()
    elif packed.is_file():
        path = packed
        try:
            content = gzip.decompress(packed.read_bytes())
        except (OSError, EOFError) as error:
            raise ValueError(f"'{packed}' cannot be unpacked ({error}). Get it again.") from error
    else:
        raise ValueError(
            f"'{folder}' has no file '{file}' or '{file}.gz'. On Debian and Ubuntu `apt-get "
            f"install dataset-fashion-mnist` puts the files into {FASHION_MNIST_DIR}; elsewhere, "
            "get the four .gz files from https://github.com/zalandoresearch/fashion-mnist and "
            "give their folder as data_dir."
        )
    header = 4 + 4 * dimensions
    shape = np.frombuffer(content[4:header], ">u4").astype(int)
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != header + np.prod(shape):
        raise ValueError(
            f"'{path}' is not a whole IDX file of bytes with {dimensions} dimensions. Get it again."
        )
    if not np.prod(shape):
        raise ValueError(f"'{path}' holds nothing. Get it again.")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _image_folder(split: str, data_dir: str | None) -> Source:
    """A folder with a sub-folder of images for every class.

    With the sub-folders train and test (or val), each with the classes' folders inside, these
    are the splits. Else a hash of its name puts a tenth of the files into the test split: a file
    stays on its side when others come or go.
    """
    if not data_dir:
        raise ValueError("The data set image_folder needs data_dir, a folder of class folders.")
    root = pathlib.Path(data_dir)
    if not root.is_dir():
        raise ValueError(f"The data_dir '{root}' is not a folder.")
    held_out = [root / name for name in ("test", "val") if (root / name).is_dir()]
    if (root / "train").is_dir() and held_out:
        folder = {"train": root / "train", "test": held_out[0]}[split]
        files = _list_images(folder)
        class_names = _sub_folders(root / "train")
        if _sub_folders(folder) != class_names:
            raise ValueError(
                f"'{folder}' has other class folders than '{root / 'train'}': "
                f"{sorted(set(class_names) ^ set(_sub_folders(folder)))} are in one of them alone."
            )
        return FolderSource(folder, files, class_names)
    files = [file for file in _list_images(root) if _in_test(file) == (split == "test")]
    if not files:
        raise ValueError(
            f"No image of '{root}' falls into the {split} split, which takes files by a hash of "
            "their names; add images, or make the folders train and test with the class folders "
            "inside."
        )
    return FolderSource(root, files, _sub_folders(root))


def _in_test(file: str) -> bool:
    digest = hashlib.sha256(file.encode()).digest()
    return int.from_bytes(digest[:8], "big") < FOLDER_TEST_FRACTION * 2**64


def _sub_folders(folder: pathlib.Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _list_images(root: pathlib.Path) -> list[str]:
    """All files in the class folders of `root` as "class/file name", without hidden ones."""
    classes = _sub_folders(root)
    if not classes:
        raise ValueError(
            f"'{root}' has no sub-folders; image_folder expects one sub-folder of images for "
            "every class."
        )
    files = []
    for name in classes:
        with os.scandir(root / name) as entries:
            found = sorted((e.name, e.is_dir()) for e in entries if not e.name.startswith("."))
        for file, is_folder in found:
            if is_folder:
                raise ValueError(
                    f"The class folder '{root / name}' has a folder '{file}' inside; images must "
                    "lie directly in their class folder. (For own splits, name the folders train "
                    "and test, or train and val.)"
                )
            files.append(f"{name}/{file}")
        if not found:
            raise ValueError(
                f"The class folder '{root / name}' has no images; fill it or take it away."
            )
    return files


def _tfds(name: str, split: str, data_dir: str) -> Source:
    """A data set that TFDS has prepared in data_dir/NAME/VERSION, the newest version of it."""
    import tensorflow_datasets as tfds  # takes seconds to import

    root = pathlib.Path(data_dir).expanduser() / name
    versions = [path.parent for path in root.glob("*.*.*/dataset_info.json")]
    if not versions:
        raise ValueError(
            f"'{root}' has no version folder with a data set prepared by TFDS; docs/data.md says "
            "how to prepare one. (The data set's name is NAME, or NAME/CONFIG where it has any.)"
        )
    newest = max(versions, key=lambda folder: [int(n) for n in folder.name.split(".")])
    builder = tfds.builder_from_directory(str(newest))
    features = dict(builder.info.features)
    if "image" not in features or not isinstance(features.get("label"), tfds.features.ClassLabel):
        raise ValueError(f"The data set in '{newest}' has no image with one class label each.")
    wanted = [split]
    if split == "test":  # ImageNet's own test split has no labels
        wanted = ["validation"] if builder.name == "imagenet2012" else ["test", "validation"]
    available = [s for s in wanted if s in builder.info.splits]
    if not available:
        raise ValueError(
            f"The data set in '{newest}' has no split {' or '.join(wanted)}, only "
            f"{', '.join(builder.info.splits)}."
        )
    try:
        records = builder.as_data_source(
            available[0], decoders={"image": tfds.decode.SkipDecoding()}
        )
    except NotImplementedError as error:
        raise ValueError(
            f"The data set in '{newest}' is not in ArrayRecord; prepare it with "
            "file_format='array_record', as docs/data.md says."
        ) from error
    return TfdsSource(records, features["label"].names, f"{name} {available[0]}")
