"""Data: every source, the transform, and the loader's order, resumption and coverage."""

import collections
import errno
import gzip
import io
import json
import multiprocessing
import os
import pathlib
import pickle
import shutil
import signal
import struct
import sys
import tracemalloc
import types

import grain
import numpy as np
import pytest
from absl import flags
from helpers import Process, raising, wait_for
from PIL import ExifTags, Image, ImageOps
from reference import resizing

from nvg_jax.data import (
    LoaderOptions,
    Transform,
    eval_batches,
    lanczos4,
    loader,
    open_source,
    train_batches,
)
from nvg_jax.data.sources import ArraySource, FolderSource, TfdsSource, reading_tfds
from nvg_jax.data.transforms import decode
from nvg_jax.errors import UserError


def numbered(count, size=4):
    """`count` gray images; image i has the value and the label i."""
    values = np.arange(count)
    images = np.broadcast_to(values[:, None, None], (count, size, size)).astype(np.uint8)
    return ArraySource(images, values, [str(v) for v in values], "numbered")


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path, **options)


def items(source):
    return [source[i] for i in range(len(source))]


# Sources.


def test_digits_split_is_fixed_and_stratified():
    train, test = open_source("digits", "train"), open_source("digits", "test")
    assert (len(train), len(test)) == (1497, 300)
    assert train.class_names == tuple("0123456789") and train.num_classes == 10
    counts = collections.Counter(item["label"] for item in items(test))
    assert set(counts.values()) <= {29, 30, 31}  # a sixth of the 174 to 183 of every digit
    again = open_source("digits", "test")
    assert all(
        (a["image"] == b["image"]).all() for a, b in zip(items(test), items(again), strict=True)
    )
    # The parts are those of scikit-learn's own data: together all images, in 0..255.
    from sklearn import datasets

    whole = collections.Counter(image.tobytes() for image in datasets.load_digits().images)
    parts = collections.Counter()
    for item in items(train) + items(test):
        assert item["image"].dtype == np.uint8 and item["image"].shape == (8, 8)
        parts[np.round(item["image"] * (16 / 255)).tobytes()] += 1
    assert parts == whole
    assert max(item["image"].max() for item in items(train)) == 255


def write_idx(path, values):
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    content = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def test_fashion_mnist_idx_files(tmp_path, monkeypatch):
    images = np.arange(3 * 2 * 2).reshape(3, 2, 2)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.array([9, 0, 3]))
    source = open_source("fashion_mnist", "train", data_dir=str(tmp_path))
    assert [item["label"] for item in items(source)] == [9, 0, 3]
    assert (np.stack([item["image"] for item in items(source)]) == images).all()
    assert source.class_names[9] == "Ankle boot"

    described = source.describe()
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", 255 - images)
    other = open_source("fashion_mnist", "train", data_dir=str(tmp_path))
    assert other.listing() == source.listing() and other.describe() != described
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", images)
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte.*apt-get install"):
        open_source("fashion_mnist", "test", data_dir=str(tmp_path))
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.array([9, 0]))
    with pytest.raises(UserError, match="3 train images but 2 labels"):
        open_source("fashion_mnist", "train", data_dir=str(tmp_path))
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.array([9, 0, 10]))
    with pytest.raises(UserError, match="go up to 10"):
        open_source("fashion_mnist", "train", data_dir=str(tmp_path))
    for content in ([0, 0, 8, 1, 0, 0, 0, 3, 1], [0, 0, 8, 1, 0, 0], []):
        (tmp_path / "train-labels-idx1-ubyte").write_bytes(bytes(content))
        with pytest.raises(UserError, match="train-labels-idx1-ubyte' is not a complete IDX file"):
            open_source("fashion_mnist", "train", data_dir=str(tmp_path))
    packed = tmp_path / "train-images-idx3-ubyte.gz"
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"ubyte.gz' cannot be unpacked"):
        open_source("fashion_mnist", "train", data_dir=str(tmp_path))
    monkeypatch.setattr(pathlib.Path, "read_bytes", raising(OSError(errno.EIO, "Input/output")))
    with pytest.raises(OSError, match="Input/output"):
        open_source("fashion_mnist", "train", data_dir=str(tmp_path))


def make_folder(root, per_class=1):
    for i in range(per_class):
        save(root / "zebra" / f"{i}.png", [[i, i], [i, i]])
        save(root / "ant" / f"{i}.png", [[[i, 0, 0], [i, 0, 0]]])


def test_image_folder_with_split_folders(tmp_path):
    make_folder(tmp_path / "train", 3)
    make_folder(tmp_path / "val", 2)
    train = open_source("image_folder", "train", data_dir=str(tmp_path))
    test = open_source("image_folder", "test", data_dir=str(tmp_path), class_names=["ant", "zebra"])
    assert train.class_names == ("ant", "zebra")
    assert [item["label"] for item in items(train)] == [0, 0, 0, 1, 1, 1]
    assert [item["name"] for item in items(test)][1] == str(tmp_path / "val" / "ant" / "1.png")
    shutil.rmtree(tmp_path / "val" / "ant")
    (item, *_) = items(open_source("image_folder", "test", data_dir=str(tmp_path)))
    assert item["label"] == 1  # of two classes, though no ant is held out
    save(tmp_path / "val" / "bee" / "0.png", [[0]])
    with pytest.raises(UserError, match="val' has the class folders bee, which .*train' does not"):
        open_source("image_folder", "test", data_dir=str(tmp_path))


def test_other_pictures_of_the_same_names_are_another_data_set(tmp_path):
    make_folder(tmp_path, 40)
    describe = lambda: open_source("image_folder", "train", data_dir=str(tmp_path)).describe()
    before = describe()
    assert describe() == before
    save(tmp_path / "ant" / "20.png", np.arange(64).reshape(8, 8))
    assert describe() != before
    (tmp_path / "ant" / "20.png").unlink()
    (tmp_path / "ant" / "20.png").symlink_to(tmp_path / "nowhere")  # readers name it, or skip it
    assert describe() != before


def test_a_folder_that_may_not_be_listed_is_named(tmp_path, monkeypatch):
    make_folder(tmp_path)
    denied = PermissionError(errno.EACCES, "Permission denied")  # root may list every folder
    monkeypatch.setattr(os, "scandir", raising(denied))
    with pytest.raises(UserError, match=f"{tmp_path} cannot be read: Permission denied"):
        open_source("image_folder", "train", data_dir=str(tmp_path))


def test_image_folder_classes_are_sorted(tmp_path):
    for name in "hgdcabfe":
        save(tmp_path / name / "0.png", [[0]])
    source = open_source("image_folder", "train", data_dir=str(tmp_path))
    assert source.class_names == tuple("abcdefgh")


def test_image_folder_without_split_folders(tmp_path):
    make_folder(tmp_path, 200)
    names = {
        split: {
            i["name"] for i in items(open_source("image_folder", split, data_dir=str(tmp_path)))
        }
        for split in ("train", "test")
    }
    assert len(names["train"] | names["test"]) == 400 and not names["train"] & names["test"]
    assert 20 <= len(names["test"]) <= 60  # a tenth
    # Taking a file away moves no other file.
    gone = sorted(names["train"])[0]
    (tmp_path / gone).unlink()
    test = open_source("image_folder", "test", data_dir=str(tmp_path))
    assert {item["name"] for item in items(test)} == names["test"]


def test_image_folder_errors(tmp_path):
    def open_(split="train", **options):
        return open_source("image_folder", split, data_dir=str(tmp_path), **options)

    with pytest.raises(UserError, match="needs data_dir"):
        open_source("image_folder", "train")
    with pytest.raises(UserError, match="is not a folder"):
        open_source("image_folder", "train", data_dir=str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="has no subfolders"):
        open_()
    (tmp_path / "ant").mkdir()
    (tmp_path / "ant" / ".hidden").touch()
    with pytest.raises(UserError, match="ant' has no images"):
        open_()
    make_folder(tmp_path)
    with pytest.raises(UserError, match="falls into the test split"):
        open_("test")
    with pytest.raises(UserError, match=r"1 classes .ant., but .* has 2 classes .ant, zebra."):
        open_(class_names=["ant"])
    (tmp_path / "ant" / "deeper").mkdir()
    with pytest.raises(UserError, match="has a folder 'deeper' inside"):
        open_()


def test_names_that_are_not_utf_8_and_links_to_themselves(tmp_path):
    make_folder(tmp_path)
    name = os.fsdecode(b"caf\xe9")  # Latin-1
    (tmp_path / "ant" / "0.png").rename(tmp_path / "ant" / name)
    (tmp_path / "ant").rename(tmp_path / f"ant {name}")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "zebra" / "loop.png").symlink_to("loop.png")
    source = open_source("image_folder", "train", data_dir=str(tmp_path))
    assert source.class_names == (f"ant {name}", "zebra")
    assert len(source) == 3  # by the hashes of their names
    with pytest.raises(UserError, match="loop.png cannot be read"):
        FolderSource(tmp_path, ["zebra/loop.png"], ["zebra"])[0]


def test_a_test_folder_without_classes_leaves_val(tmp_path):
    make_folder(tmp_path / "train")
    make_folder(tmp_path / "val")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "unlabeled.png").touch()
    source = open_source("image_folder", "test", data_dir=str(tmp_path))
    assert source[0]["name"].startswith(str(tmp_path / "val"))


def test_unknown_names():
    with pytest.raises(UserError, match="no data set 'mnist'"):
        open_source("mnist", "train")
    with pytest.raises(UserError, match="no split 'val'"):
        open_source("digits", "val")
    with pytest.raises(UserError, match="leave data_dir empty"):
        open_source("digits", "train", data_dir="/data")


def prepare_tfds(folder, name="imagenet2012", splits=("train", "validation", "test")):
    """What TFDS prepares, made without TensorFlow: two records a split, labels 0 and 1."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="png"),
            "label": tfds.features.ClassLabel(names=["red", "blue"]),
            "file_name": tfds.features.Text(),
        }
    )
    serializer = ExampleSerializer(features.get_serialized_info())
    folder.mkdir(parents=True)
    features.save_config(folder)
    for split in splits:
        file = folder / f"{name}-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(file), "group_size:1")
        for label, color in enumerate([[255, 0, 0], [0, 0, 255]]):
            example = {
                "image": io.BytesIO(encoded(np.full((3, 4, 3), color, np.uint8))),
                "label": -1 if split == "test" else label,  # ImageNet's test split has no labels
                "file_name": f"{split}_{label}.png",
            }
            writer.write(serializer.serialize_example(features.encode_example(example)))
        writer.close()
    info = {
        "name": name,
        "version": "1.10.0",
        "fileFormat": "array_record",
        "splits": [
            {
                "name": split,
                "shardLengths": ["2"],
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
            for split in splits
        ],
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))


def test_tfds_array_record(tmp_path):
    prepare_tfds(tmp_path / "imagenet2012" / "1.10.0")
    train = open_source("tfds:imagenet2012", "train", data_dir=str(tmp_path))
    test = open_source("tfds:imagenet2012", "test", data_dir=str(tmp_path))
    assert train.class_names == ("red", "blue") and len(train) == len(test) == 2
    train = pickle.loads(pickle.dumps(train))  # as worker processes get it
    for source, split in ((train, "train"), (test, "validation")):
        for item in items(source):
            assert isinstance(item["image"], bytes)
            assert f"{split}_{item['label']}.png" in item["name"]
            color = np.asarray(decode(item["image"]))[0, 0]
            assert color.tolist() == ([0, 0, 255] if item["label"] else [255, 0, 0])
    with pytest.raises(UserError, match="no folder of a version with a data set prepared"):
        open_source("tfds:mnist", "train", data_dir=str(tmp_path))

    version = tmp_path / "imagenet2012" / "1.10.0"
    content = (version / "dataset_info.json").read_text()
    next(version.glob("imagenet2012-test*")).unlink()  # ImageNet's are of no use
    assert len(open_source("tfds:imagenet2012", "test", data_dir=str(tmp_path))) == 2
    (version / "dataset_info.json").write_text(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"1.10.0' is damaged .* Prepare the data set again"):
        open_source("tfds:imagenet2012", "train", data_dir=str(tmp_path))
    (version / "dataset_info.json").write_text(content)
    shutil.copytree(version, tmp_path / "imagenet2012" / "1.11.0")
    newer = tmp_path / "imagenet2012" / "1.11.0" / "dataset_info.json"
    newer.write_text(content.replace('"1.10.0"', '"1.11.0"'))
    for name, chosen in (("imagenet2012:1.10.0", "1.10.0"), ("imagenet2012", "1.11.0")):
        source = open_source(f"tfds:{name}", "train", data_dir=str(tmp_path))
        assert source[0]["name"].startswith(f"imagenet2012/{chosen} train")
    with pytest.raises(UserError, match="no folder 2.0.0 with a data set"):
        open_source("tfds:imagenet2012:2.0.0", "train", data_dir=str(tmp_path))
    shutil.rmtree(tmp_path / "imagenet2012" / "1.11.0")

    class Cut:  # what the reader gives of a file that was cut in half
        __len__ = lambda self: 1
        __getitem__ = lambda self, index: {"image": None, "label": None, "file_name": None}

    with pytest.raises(UserError, match="a record 0 is damaged"):
        TfdsSource(Cut(), ("red",), "a")[0]
    with pytest.raises(ImportError), reading_tfds("not damaged"):  # a package is not installed
        raise ModuleNotFoundError
    (tmp_path / "imagenet2012" / "1.9.0").mkdir()  # an older one: not taken, though "9" > "1"
    (tmp_path / "imagenet2012" / "1.9.0" / "dataset_info.json").touch()
    assert len(open_source("tfds:imagenet2012", "train", data_dir=str(tmp_path))) == 2
    info = json.loads((version / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (version / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="not in ArrayRecord"):
        open_source("tfds:imagenet2012", "train", data_dir=str(tmp_path))


def test_tfds_splits_without_labels(tmp_path):
    prepare_tfds(tmp_path / "other" / "1.10.0", "other")
    test = open_source("tfds:other", "test", data_dir=str(tmp_path))
    assert "validation_1.png" in test[1]["name"] and test[1]["label"] == 1
    prepare_tfds(tmp_path / "hidden" / "1.10.0", "hidden", ("train", "test"))
    with pytest.raises(UserError, match="test record 1 .test_1.png. has no label"):
        open_source("tfds:hidden", "test", data_dir=str(tmp_path))[1]


# Transform.


def encoded(pixels, mode=None, format="PNG", **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels, mode)
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    "content, expected",
    [
        (np.array([[7]], np.uint8), [7, 7, 7]),
        (np.array([[[1, 2, 3]]], np.uint8), [1, 2, 3]),
        (encoded(np.array([[7]], np.uint8)), [7, 7, 7]),
        (encoded(np.array([[32896]], np.uint16)), [128, 128, 128]),  # 128 * 257
        (encoded(np.array([[65535]], np.uint16)), [255, 255, 255]),
        (encoded(np.array([[[9, 8, 7, 255]]], np.uint8)), [9, 8, 7]),
        (encoded(np.array([[[9, 8, 7, 0]]], np.uint8)), [255, 255, 255]),
        (encoded(Image.new("1", (1, 1), 1)), [255, 255, 255]),
        (encoded(Image.new("LA", (1, 1), (5, 255))), [5, 5, 5]),
        (encoded(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), format="TIFF"), [255, 0, 0]),
        (encoded(np.array([[7]], np.uint16), transparency=7), [255, 255, 255]),
        (encoded(np.array([[32896]], np.uint16), transparency=7), [128, 128, 128]),
        (encoded(Image.new("RGB", (1, 1), (250, 3, 9)).quantize(2)), [250, 3, 9]),
        (encoded(Image.new("RGB", (1, 1), (250, 3, 9)).quantize(2), transparency=0), [255] * 3),
    ],
)
def test_decode_gives_rgb(content, expected):
    image = decode(content)
    assert image.mode == "RGB" and image.getpixel((0, 0)) == tuple(expected)


def test_photos_are_read_as_the_camera_was_held():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # turned to the right
    photo = Image.new("RGB", (40, 30), "blue")
    photo.paste("red", (0, 0, 10, 30))
    turned = encoded(photo, format="JPEG", exif=exif)
    for image in (turned, Image.open(io.BytesIO(turned))):
        upright = decode(image)
        assert upright.size == (30, 40)
        assert [upright.getpixel((15, y))[0] > 200 for y in (3, 36)] == [True, False]
    damaged = encoded(photo, format="JPEG", exif=b"Exif\0\0damaged")
    assert decode(damaged).size == (40, 30)


def test_decode_refuses_what_it_cannot_show(monkeypatch):
    whole = encoded(np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8))
    for broken in (b"", b"text", whole[: len(whole) // 2]):
        with pytest.raises(UserError, match=r"not an? (readable )?image"):
            decode(broken)
    with pytest.raises(UserError, match="no fixed range"):
        decode(encoded(np.ones((2, 2), np.float32), format="TIFF"))
    with pytest.raises(UserError, match="do not fit in 16 bits"):
        decode(encoded(np.array([[70000]], np.int32), format="TIFF"))
    monkeypatch.setattr(Image, "open", raising(MemoryError()))  # no fault of the image
    with pytest.raises(MemoryError):
        decode(whole)


def coordinates(height, width):
    """An image whose red is the row and whose green is the column."""
    rows, columns = np.indices((height, width))
    return Image.fromarray(np.stack([rows, columns, 0 * rows], -1).astype(np.uint8))


def corner(crop):
    """Row and column of the image that the crop's first pixel shows."""
    return tuple(np.round((crop[0, 0, :2] + 1) * 127.5).astype(int).tolist())


def test_center_and_random_crop():
    transform = Transform((2, 2), resize=4)  # of 4x6 pixels, which resizing leaves alone
    image = coordinates(4, 6)
    center = transform(image)
    assert center.shape == (2, 2, 3) and center.dtype == np.float32
    np.testing.assert_allclose(
        center[..., :2], np.array([[[1, 2], [1, 3]], [[2, 2], [2, 3]]]) / 127.5 - 1, atol=1e-6
    )
    rng = np.random.default_rng(0)
    corners = {corner(transform(image, rng)) for _ in range(500)}
    assert corners == {(row, column) for row in range(3) for column in range(5)}


def test_pad_shifts_with_copies_of_the_edge():
    image = coordinates(3, 3)
    transform = Transform((3, 3), resize=3, pad=1)
    assert (transform(image) == Transform((3, 3), resize=3)(image)).all()
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        crop = np.round((transform(image, rng) + 1) * 127.5).astype(int)
        seen.add((tuple(crop[:, 0, 0].tolist()), tuple(crop[0, :, 1].tolist())))
    shifts = [(0, 0, 1), (0, 1, 2), (1, 2, 2)]
    assert seen == {(rows, columns) for rows in shifts for columns in shifts}


def test_resize_covers_and_range():
    assert Transform((256, 256)).cover == (288, 288)
    assert Transform((16, 32)).cover == (18, 36)
    # 100x50 (height x width) must cover 8x16: resized to 32x16, of which the middle shows.
    image = Image.fromarray(
        np.repeat(np.repeat([[255], [0], [0], [255]], 25, 0), 50, 1).astype(np.uint8)
    ).convert("RGB")
    crop = Transform((8, 16), resize=8)(image)
    assert crop.shape == (8, 16, 3) and crop.max() < -0.9
    assert Transform((32, 16), resize=16)(image).max() == 1
    with pytest.raises(UserError, match=r"resized to 8 pixels .* at least 16"):
        Transform((16, 16), resize=8)
    with pytest.raises(UserError, match="resize_filter must be one of lanczos, published, got 'x'"):
        Transform((16, 16), resize_filter="x")


@pytest.mark.parametrize("shape", [(8000, 1), (1, 8000)])
@pytest.mark.parametrize("resize_filter", ["lanczos", "published"])
def test_a_very_long_image_costs_no_more_than_its_crop(shape, resize_filter):
    """Resized whole, it would have 288 x 2,304,000 pixels."""
    image = Image.fromarray(np.full(shape, 51, np.uint8)).convert("RGB")
    tracemalloc.start()
    crop = Transform((256, 256), resize_filter=resize_filter)(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
    np.testing.assert_array_equal(crop, np.full((256, 256, 3), np.float32(51 / 127.5 - 1)))


def test_the_crop_of_a_long_image_is_that_of_the_whole(monkeypatch):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 131, 3), np.uint8))
    transform = Transform((12, 10), pad=2)
    parts = [transform(image), *(transform(image, np.random.default_rng(n)) for n in range(9))]
    monkeypatch.setattr("nvg_jax.data.transforms.LONG", 1e9)
    whole = [transform(image), *(transform(image, np.random.default_rng(n)) for n in range(9))]
    np.testing.assert_array_equal(parts, whole)


PUBLISHED = Transform((256, 256), resize_filter="published")


def pixels_of(crop):
    return np.round((crop + 1) * 127.5).astype(np.uint8)


@pytest.mark.parametrize("number", range(len(resizing.SIZES)))
def test_published_images_are_those_of_albumentations_and_opencv(number):
    expected = json.loads(resizing.FILE.read_text())[number]
    photograph = resizing.photograph(*resizing.SIZES[number])
    found = resizing.summary(pixels_of(PUBLISHED(Image.fromarray(photograph))))
    assert found["pixels"] == expected["pixels"]
    assert found["sha256"] == expected["sha256"]


def test_published_sizes_and_places():
    """The long side is rounded, to even between two integers; odd room is one more at the end."""
    for size, expected in (
        ((64, 67), (288, 302)),
        ((65, 64), (292, 288)),
        ((640, 427), (432, 288)),
    ):
        assert PUBLISHED.resized(*size) == expected
    assert Transform((256, 256)).resized(640, 427) == (431, 288)  # ours rounds down
    odd = coordinates(5, 7)
    assert corner(Transform((4, 4), 5, resize_filter="published")(odd)) == (0, 1)
    assert corner(Transform((4, 4), 5)(odd)) == (0, 2)


def test_published_random_crops_are_parts_of_the_whole():
    image = Image.fromarray(resizing.photograph("chelsea", 80, 97))
    whole = Transform((72, 87), resize=72, resize_filter="published")(image)
    transform = Transform((64, 64), resize=72, pad=2, resize_filter="published")
    padded = np.pad(whole, ((2, 2), (2, 2), (0, 0)), "edge")
    for seed in range(20):
        draws = np.random.default_rng(seed)  # the same draws as without the filter
        top, left = (draws.integers(-2, room + 3) for room in (72 - 64, 87 - 64))
        crop = transform(image, np.random.default_rng(seed))
        np.testing.assert_array_equal(crop, padded[top + 2 : top + 66, left + 2 : left + 66])


def test_lanczos4_by_hand():
    """On a tap only that one counts; halfway the weights are symmetric; edges are repeated."""
    on_tap = lanczos4.kernel(np.zeros(1, np.float32))
    np.testing.assert_allclose(on_tap, [[0, 0, 0, 1, 0, 0, 0, 0]], atol=1e-9)
    half = lanczos4.kernel(np.array([0.5], np.float32))[0]
    lanczos = np.sinc(x := np.arange(-3.5, 4)) * np.sinc(x / 4)
    np.testing.assert_allclose(half, lanczos / lanczos.sum(), atol=1e-6)
    places, weights = lanczos4.taps(6, 3, np.arange(3))  # each pixel is between two: 0.5, 2.5, 4.5
    assert places.tolist()[0] == [0, 0, 0, 0, 1, 2, 3, 4]
    assert places.tolist()[2] == [1, 2, 3, 4, 5, 5, 5, 5]
    np.testing.assert_array_equal(weights, np.rint([half * 2048] * 3))


# Loader.


def options(process_batch_size, pad=0, **settings):
    """Of images of 4x4 pixels, which are neither resized nor cropped."""
    return LoaderOptions(Transform((4, 4), resize=4, pad=pad), process_batch_size, **settings)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_equal_batches(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert set(a) == set(b)
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_train_epochs_hold_all_in_new_orders():
    loader = train_batches(numbered(12), options(4), seed=0)
    batches = take(loader, 9)
    assert batches[0]["image"].shape == (4, 4, 4, 3) and batches[0]["image"].dtype == np.float32
    assert batches[0]["label"].dtype == np.int32 and set(batches[0]) == {"image", "label"}
    for batch in batches:  # the image belongs to the label
        np.testing.assert_allclose(
            batch["image"][:, 0, 0, 0], batch["label"] / 127.5 - 1, atol=1e-6
        )
    epochs = np.concatenate([batch["label"] for batch in batches]).reshape(3, 12)
    assert (np.sort(epochs) == np.arange(12)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = train_batches(numbered(12), options(4), seed=1)
    assert (next(other)["label"] != epochs[0, :4]).any()


def test_resume_gives_the_same_batches(tmp_path):
    import orbax.checkpoint as ocp

    def loader():  # crops are random: part of what must be the same
        options = LoaderOptions(Transform((6, 6)), 5)
        return train_batches(open_source("digits", "train"), options, seed=3)

    first = loader()
    take(first, 7)
    state = json.loads(json.dumps(first.get_state()))
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(7, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(first)))
        expected = take(first, 5)
        second = loader()
        second.set_state(state)
        assert_equal_batches(take(second, 5), expected)
        third = loader()
        args = ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(third))
        manager.restore(7, args=args)
        assert_equal_batches(take(third, 5), expected)
    assert (expected[0]["image"] != expected[1]["image"]).any()


def test_processes_share_the_batches_of_one():
    def loader(**settings):
        options = LoaderOptions(Transform((6, 6)), **settings)
        return train_batches(open_source("digits", "train"), options, seed=3)

    whole = take(loader(process_batch_size=6), 4)
    parts = [
        take(loader(process_batch_size=2, process_index=i, process_count=3), 4) for i in range(3)
    ]
    for step, batch in enumerate(whole):
        for key in batch:
            joined = np.concatenate([part[step][key] for part in parts])
            np.testing.assert_array_equal(joined, batch[key])


def test_processes_cover_an_epoch_without_overlap():
    labels = []
    for i in range(2):  # 10 = 5 global batches of 2 x 1
        loader = train_batches(numbered(10), options(1, process_index=i, process_count=2), seed=0)
        labels.append({int(batch["label"][0]) for batch in take(loader, 5)})
    assert not labels[0] & labels[1] and labels[0] | labels[1] == set(range(10))


@pytest.mark.slow
def test_worker_processes_give_the_same_batches():
    flags.FLAGS.unparse_flags()  # as in a notebook; Grain reads flags
    source = numbered(12)
    expected = take(train_batches(source, options(4, pad=1), seed=0), 6)
    workers = train_batches(source, options(4, pad=1, num_workers=2), seed=0)
    found = take(workers, 3)
    assert_equal_batches(found, expected[:3])
    assert found[0]["image"].flags.c_contiguous
    state = workers.get_state()
    workers.close()
    workers = train_batches(source, options(4, pad=1, num_workers=2), seed=0)
    workers.set_state(state)
    assert_equal_batches(take(workers, 1), expected[3:4])
    for worker in multiprocessing.active_children():  # as SLURM signals all processes of a job
        os.kill(worker.pid, signal.SIGTERM)
    assert_equal_batches(take(workers, 20)[:2], expected[4:])  # 20: more than are made ahead
    workers.close()


@pytest.mark.parametrize("free, contiguous", [(1e9, True), (64e6, False)])  # a container's
def test_images_go_through_shared_memory_where_there_is_room(monkeypatch, free, contiguous):
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=free))
    sizes = LoaderOptions(Transform((256, 256)), 16, num_workers=2, prefetch=4)
    image = np.zeros((3, 256, 256), np.float32).transpose(2, 1, 0)  # as crops are
    batch = loader._stacking(sizes)([{"image": image, "unreadable": []} for _ in range(16)])
    assert batch["image"].shape == (16, 256, 256, 3)
    assert batch["image"].flags.c_contiguous == contiguous


WITH_A_WORKER = """
import multiprocessing
import sys
import time

from nvg_jax.data import LoaderOptions, Transform, open_source, train_batches

if __name__ == "__main__":
    options = LoaderOptions(Transform((8, 8)), 4, num_workers=1)
    batches = train_batches(open_source("digits", "train"), options, seed=0)
    next(batches)
    (worker,) = multiprocessing.active_children()
    with open(sys.argv[1], "w") as file:
        print(worker.pid, file=file)
    time.sleep(600)
"""


@pytest.mark.slow
def test_workers_end_with_a_training_that_is_killed(tmp_path):
    file = tmp_path / "pid"
    with Process([sys.executable, "-c", WITH_A_WORKER, str(file)]) as process:
        wait_for(lambda: file.exists() and file.read_text().endswith("\n"))
        process.kill()
        worker = pathlib.Path("/proc", file.read_text().strip(), "cmdline")
        wait_for(lambda: not worker.exists() or not worker.read_bytes())  # empty: a zombie


@pytest.mark.parametrize("count, process_count", [(7, 1), (8, 2), (9, 2), (5, 3), (2, 3)])
def test_eval_sees_every_example_once(count, process_count):
    seen, lengths = [], set()
    for i in range(process_count):
        own = options(2, process_index=i, process_count=process_count)
        batches = list(eval_batches(numbered(count), own))
        lengths.add(len(batches))
        for batch in batches:
            assert batch["image"].shape == (2, 4, 4, 3) and batch["mask"].dtype == bool
            assert not batch["image"][~batch["mask"]].any()
            seen += batch["label"][batch["mask"]].tolist()
    assert len(lengths) == 1 and sorted(seen) == list(range(count))


@pytest.mark.parametrize("process_count", [1, 2])
def test_eval_of_a_part_is_evenly_spaced(process_count):
    seen = []
    for i in range(process_count):
        own = options(2, process_index=i, process_count=process_count)
        for batch in eval_batches(numbered(10), own, count=3):
            seen += batch["label"][batch["mask"]].tolist()
    assert sorted(seen) == [0, 3, 6]


def broken_folder(root):
    make_folder(root / "train", 3)
    make_folder(root / "test", 3)
    for split in ("train", "test"):
        (root / split / "ant" / "1.png").write_bytes(b"no image")
        file = root / split / "zebra" / "2.png"
        file.write_bytes(file.read_bytes()[:40])
    return [str(root / "{}" / "ant" / "1.png"), str(root / "{}" / "zebra" / "2.png")]


def test_unreadable_files_are_named(tmp_path):
    broken_folder(tmp_path)
    source = open_source("image_folder", "train", data_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"train/(ant/1|zebra/2).png: not an? "):
        take(train_batches(source, options(2), seed=0), 4)
    with pytest.raises(UserError, match=r"train/ant/1.png: not an image"):
        list(eval_batches(source, options(2)))
    (tmp_path / "train" / "ant" / "0.png").unlink()
    with pytest.raises(UserError, match=r"ant/0.png"):
        list(eval_batches(source, options(2)))


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_files_are_skipped_and_counted(tmp_path, num_workers, caplog):
    broken = broken_folder(tmp_path)
    skip = options(2, on_bad="skip", num_workers=num_workers)

    source = open_source("image_folder", "train", data_dir=str(tmp_path))
    loader = train_batches(source, skip, seed=0)
    batches = take(loader, 12)  # four epochs
    loader.close()
    # Readable images take the places: the red of ant 0 and 2, zebra 0 and 1.
    shown = {
        (int(label), round(float(image[0, 0, 0] + 1) * 127.5))
        for batch in batches
        for image, label in zip(batch["image"], batch["label"], strict=True)
    }
    assert shown == {(0, 0), (0, 2), (1, 0), (1, 1)}
    assert sorted(source.unreadable) == [name.format("train") for name in broken]
    assert "not an image" in source.unreadable[broken[0].format("train")]
    assert sum("Skipped" in message for message in caplog.messages) == 2
    assert_equal_batches(take(train_batches(source, skip, seed=0), 12), batches)

    source = open_source("image_folder", "test", data_dir=str(tmp_path))
    batches = eval_batches(source, skip)
    masks = np.concatenate([batch["mask"] for batch in batches])
    batches.close()
    assert masks.tolist() == [True, False, True, True, True, False]
    assert len(source.unreadable) == 2


def test_a_broken_data_set_stops(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for i in range(9):
            (tmp_path / name / f"{i}.png").write_bytes(b"")
    source = open_source("image_folder", "train", data_dir=str(tmp_path))
    with pytest.raises(UserError, match="10 records drawn in a row are unreadable"):
        next(train_batches(source, options(2, on_bad="skip"), seed=0))


def test_loader_errors():
    for settings, message in [
        (dict(process_batch_size=4, process_count=2), "A batch of 8 .* larger than the 7 training"),
        (dict(process_batch_size=0), "batch of a process must be at least 1"),
        (dict(process_batch_size=1, process_index=2, process_count=2), "process_index 2"),
        (dict(process_batch_size=1, on_bad="ignore"), "'error' or 'skip'"),
    ]:
        with pytest.raises(UserError, match=message):
            train_batches(numbered(7), options(**settings), seed=0)


def test_class_names_of_other_file_systems(tmp_path, caplog):
    composed, decomposed = "Gr\u00fcn", "Gru\u0308n"
    for form in (composed, decomposed):
        root = tmp_path / str(len(form))
        for split in ("train", "test"):
            make_folder(root / split)
        (root / "train" / "ant").rename(root / "train" / form)
        (root / "test" / "ant").rename(root / "test" / decomposed)
        source = open_source("image_folder", "test", data_dir=str(root))
        assert source.class_names == (composed, "zebra")
        assert {item["label"] for item in source} == {0, 1}
    assert not caplog.records
    flat = [tmp_path / str(len(form)) / "train" for form in (composed, decomposed)]
    for split in ("train", "test"):  # the same files are held out
        a, b = (open_source("image_folder", split, data_dir=str(root)) for root in flat)
        assert a.class_names == b.class_names and a.images_per_class == b.images_per_class
    (flat[0] / decomposed).mkdir()
    with pytest.raises(UserError, match="has two folders that are both named Gr\u00fcn"):
        open_source("image_folder", "train", data_dir=str(flat[0]))


def test_what_lies_beside_the_class_folders_is_named(tmp_path, caplog):
    for split in ("train", "test", "more"):
        make_folder(tmp_path / split)
    for name in ("loose.webp", "LICENSE.md", "index.csv"):
        (tmp_path / "train" / name).touch()
    (tmp_path / "train" / "gone").symlink_to("nowhere")
    caplog.set_level("INFO", "nvg_jax")
    for _ in range(2):
        open_source("image_folder", "train", data_dir=str(tmp_path))
    assert [record.getMessage() for record in caplog.records] == [
        f"'{tmp_path}': not read: more",
        f"'{tmp_path / 'train'}': not read: gone, loose.webp",
    ]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    "size, expected",
    [((960, 640), (240, 160)), ((500, 375), (250, 188)), ((2048, 1365), (256, 171))],
)
def test_a_camera_picture_is_read_at_a_smaller_size(size, expected, orientation):
    coarse = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    whole = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    file, exif = io.BytesIO(), Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    whole.save(file, "JPEG", quality=95, exif=exif)
    content = file.getvalue()
    whole = ImageOps.exif_transpose(Image.open(file))
    transform = Transform((32, 32))
    read = transform.decode(content)
    assert read.size == (
        expected if orientation < 5 else expected[::-1]
    )  # the smallest part that is at least 3 * 36
    np.testing.assert_allclose(transform(read), transform(whole), atol=0.02)  # of 2
    published = Transform((32, 32), resize_filter="published")
    assert published.decode(content).size == whole.size
