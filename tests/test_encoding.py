"""Cached sequences: what is in them, damage, kills, several processes, training from them."""

import shutil
import signal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, forked, tiny_config
from PIL import Image

from nvg_jax import Pipeline
from nvg_jax.data import (
    LoaderOptions,
    Transform,
    eval_batches,
    open_source,
    sequences,
    train_batches,
)
from nvg_jax.errors import UserError
from nvg_jax.jobs.encoding import encode_data_set, plan_encoding, write_shards
from nvg_jax.metadata import RunMetadata
from nvg_jax.models import ModelConfig
from nvg_jax.parts import CONTENT
from nvg_jax.runtime import sharding, storage
from nvg_jax.tokenizer import Tokenizer, TokenizerConfig
from nvg_jax.training import generators as steps
from nvg_jax.training.registry import make_trainer

SIZES = TokenizerConfig(**tiny_config().tokenizer)  # L = 16 of 8 x 8 pixels
TRAIN, TEST = 10, 5  # images
BATCH = 16  # the same everywhere, as every other one would be compiled anew
UNUSED = Transform((1, 1))  # sequences are not transformed


def random_params(sizes: TokenizerConfig):
    leaves, tree = jax.tree.flatten(ModelConfig(sizes).abstract_params("tokenizer"))
    rng = np.random.default_rng(0)
    leaves = [rng.normal(scale=0.3, size=leaf.shape).astype(np.float32) for leaf in leaves]
    return jax.tree.unflatten(tree, leaves)


@pytest.fixture(scope="module")
def pipeline():
    """A tokenizer with random weights."""
    metadata = RunMetadata(model=ModelConfig(SIZES, 2), class_names=("ant", "bee"))
    params = {"tokenizer": random_params(SIZES)}
    fingerprint = storage.fingerprint(params["tokenizer"])
    return Pipeline(metadata.replace(fingerprint=fingerprint), params)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Noise of 9 x 9 pixels, of which 2 x 2 crops of 8 x 8 can be taken; its config section."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(1)
    for split, count in (("train", TRAIN), ("test", TEST)):
        for i in range(count):
            path = root / split / ("ant" if i < 3 else "bee") / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).save(path)
    return {"name": "image_folder", "data_dir": str(root), "resize": 9, "pad": 0}


@pytest.fixture(scope="module", autouse=True)
def small_files():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequences, "SHARD_SIZE", 4)
        yield


@pytest.fixture(scope="module")
def whole(pipeline, data, tmp_path_factory):
    """A cache with eight crops of every training image, made in one go."""
    folder = tmp_path_factory.mktemp("caches") / "whole"
    encode_data_set(pipeline, folder, data, crops=8, batch_size=BATCH)
    return folder


@pytest.mark.slow
def test_a_tokenizer_encodes_data_of_other_classes(pipeline, data, tmp_path):
    names = ("x", "y", "z")
    trained = pipeline.metadata.replace(model=ModelConfig(SIZES, 3), class_names=names)
    encode_data_set(
        Pipeline(trained.replace(config={"data": data}), pipeline.params), tmp_path, data
    )
    assert open_source("sequences", "train", data_dir=str(tmp_path)).class_names == ("ant", "bee")


def test_crops_that_are_all_the_same_are_named(pipeline, data, tmp_path, caplog):
    warned = lambda: [r for r in caplog.records if "crops of an image" in r.message]
    encode_data_set(pipeline, tmp_path / "larger", data, crops=2)  # 9 pixels for 8
    encode_data_set(pipeline, tmp_path / "shifted", data | {"resize": 8, "pad": 1}, crops=2)
    assert not warned()
    encode_data_set(pipeline, tmp_path / "same", data | {"resize": 8}, crops=2)
    assert len(warned()) == 1


def test_a_cache_of_other_pictures_is_not_continued(pipeline, data, tmp_path):
    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(data["data_dir"], images)
    encode_data_set(pipeline, out, data | {"data_dir": str(images)})
    first = next((images / "train/bee").iterdir())
    first.rename(first.with_name("new.png"))  # as many as before
    with pytest.raises(UserError, match="of other pictures: the data set has changed since"):
        encode_data_set(pipeline, out, data | {"data_dir": str(images)})


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def hand_made(folder, images=6, crops=3):
    """A cache without a tokenizer: L = 2, the tokens of crop c of image i are 10 i + c."""
    tokenizer = {"latent_size": [1, 2], "codebook_size": 100}
    settings = {
        "format": 1, "tokenizer": tokenizer, "fingerprint": "abc", "class_names": ["a"] * images,
        "images": {"train": images, "test": images}, "shard_size": 4,
        "data": {"resize": 9, "resize_filter": "lanczos"},
    }  # fmt: skip
    sequences.begin(folder, settings)
    for shard in sequences.plan(settings):
        records = []
        for image in range(shard.start, shard.stop):
            array = np.zeros(crops, sequences.crop_dtype(tokenizer))
            array["structure"] = [1, 0]
            array["tokens"] = 10 * image + np.arange(crops)[:, None]
            records.append(sequences.pack(image, array))
        sequences.write_shard(folder / shard.file, records, {})
    sequences.finish(folder, settings)
    return folder


def flip(path, find=None):
    """Turns one bit of a file, at the bytes `find` or in the middle."""
    content = bytearray(path.read_bytes())
    content[content.index(find) if find else len(content) // 2] ^= 1
    path.write_bytes(content)


# What is stored.

# The positions 2, 0, 1, 3 have the labels 0, 1, 2, 3 of stage 2.
STRUCTURE = [[0, 0, 0, 0], [0, 1, 0, 1], [1, 2, 0, 3]]
TOKENS = [[7, 7, 7, 7], [1, 2, 1, 2], [3, 4, 5, 6]]
STORED = [7, 1, 2, 5, 3, 4, 6]


def test_one_token_is_stored_for_each_cluster():
    dtype = sequences.crop_dtype({"latent_size": (2, 2), "codebook_size": 4096})
    crops = sequences.compact(np.array([STRUCTURE]), np.array([TOKENS]), dtype)
    assert crops["structure"].tolist() == STRUCTURE[2:] and crops["tokens"].tolist() == [STORED]
    assert len(sequences.pack(3, crops)) == 4 + 4 + 4 * 1 + 7 * 2


def test_the_steps_rebuild_maps_and_tokens_of_all_stages():
    sizes = TokenizerConfig((4, 4), (2, 2), 3, 8, 32, (1, 1), blocks_per_level=1)
    tokenizer, params = Tokenizer(sizes), random_params(sizes)
    batch = {
        "structure": jnp.array(STRUCTURE[2:], jnp.uint8),
        "tokens": jnp.array([STORED], jnp.uint16),
    }
    quantized = jax.jit(steps.encode, static_argnums=0)(tokenizer, params, batch)
    assert quantized.sequence.structure.tolist() == [STRUCTURE]
    assert quantized.sequence.tokens.tolist() == [TOKENS]
    assert [ids.tolist() for ids in quantized.stage_tokens] == [[[7]], [[1, 2]], [[5, 3, 4, 6]]]


@pytest.mark.parametrize(
    "latent_size, codebook_size, expected",
    [((2, 2), 256, "u1 u1"), ((16, 16), 257, "u1 u2"), ((16, 32), 65536, "u2 u2"),
     ((2, 2), 65537, "u1 u4")],
)  # fmt: skip
def test_the_smallest_integers_that_hold_every_value(latent_size, codebook_size, expected):
    dtype = sequences.crop_dtype({"latent_size": latent_size, "codebook_size": codebook_size})
    assert " ".join(dtype[name].base.str[1:] for name in ("structure", "tokens")) == expected


@pytest.mark.slow
def test_every_crop_is_encoded_as_the_pipeline_encodes_it(pipeline, data, whole):
    rebuild = jax.jit(lambda params, batch: steps.encode(pipeline.tokenizer, params, batch))
    for split, crops, rows in (("train", 8, (0, 1)), ("test", 1, (0,))):
        images = open_source("image_folder", split, data_dir=data["data_dir"])
        cached = open_source("sequences", split, data_dir=str(whole))
        assert len(cached) == len(images) == {"train": TRAIN, "test": TEST}[split]
        assert cached.class_names == ("ant", "bee")
        kinds = 0
        for index in range(len(images)):
            assert cached[index]["label"] == images[index]["label"] == int(index >= 3)
            pixels = np.asarray(Image.open(images[index]["name"]))
            possible = [pixels[y : y + 8, x : x + 8] for y in rows for x in rows]
            expected = pipeline.encode(np.resize(possible, (BATCH, 8, 8, 3)))
            expected = set(zip(*(map(str, part.tolist()) for part in expected)))
            assert len(expected) == len(possible)
            stored = cached[index]["crops"]
            assert len(stored) == crops
            batch = {name: np.resize(stored[name], (8, stored[name].shape[1]))
                     for name in stored.dtype.names}  # fmt: skip
            found = rebuild(pipeline.params["tokenizer"], batch).sequence
            found = set(zip(*(map(str, part.tolist()) for part in found)))
            assert found <= expected
            kinds += len(found)
        # Eight draws leave out one of the four crops about every third time.
        assert kinds == TEST if split == "test" else kinds > 3 * TRAIN


# The loader.


def test_an_epoch_shows_one_crop_of_every_image_and_in_time_all_are_drawn(tmp_path):
    source = open_source("sequences", "train", data_dir=str(hand_made(tmp_path / "cache")))
    assert len(source) == 6
    loader = train_batches(source, LoaderOptions(UNUSED, 3), seed=0)
    drawn = set()
    for _ in range(20):
        epoch = [next(loader), next(loader)]
        assert epoch[0]["structure"].dtype == epoch[0]["tokens"].dtype == np.uint8
        assert epoch[0]["structure"].shape == (3, 2) and epoch[0]["tokens"].shape == (3, 3)
        labels, tokens = (np.concatenate([b[k] for b in epoch]) for k in ("label", "tokens"))
        assert sorted(labels) == list(range(6)) and (tokens[:, 0] // 10 == labels).all()
        drawn |= set(tokens[:, 0].tolist())
    assert drawn == {10 * image + crop for image in range(6) for crop in range(3)}


@pytest.mark.parametrize("process_count", [1, 4])
def test_evaluation_sees_the_first_crop_of_every_image_once(tmp_path, process_count):
    source = open_source("sequences", "test", data_dir=str(hand_made(tmp_path / "cache")))
    seen = []
    for process in range(process_count):
        options = LoaderOptions(UNUSED, 2, process_index=process, process_count=process_count)
        for batch in eval_batches(source, options):
            assert batch["tokens"].dtype == np.uint8 and not batch["tokens"][~batch["mask"]].any()
            seen += batch["tokens"][batch["mask"], 0].tolist()
    assert sorted(seen) == [0, 10, 20, 30, 40, 50]


# Damage and other tokenizers.


def test_a_flipped_bit_is_named_and_the_rest_can_be_read(tmp_path):
    folder = hand_made(tmp_path / "cache")
    record = np.array([[51]] * 3, np.uint8).tobytes()  # the tokens of image 5, crop 1
    flip(folder / "train-00001-of-00002.array_record", record)
    source = open_source("sequences", "train", data_dir=str(folder))
    with pytest.raises(UserError, match=r"train-00001-of-00002.array_record record 1 is damaged"):
        source[5]
    assert [source[i]["label"] for i in range(5)] == list(range(5))
    with pytest.raises(UserError, match=r"train-00001-of-00002.array_record record 1 is damaged"):
        list(eval_batches(source, LoaderOptions(UNUSED, 6)))
    (batch,) = eval_batches(source, LoaderOptions(UNUSED, 6, on_bad="skip"))
    assert batch["mask"].tolist() == [True] * 5 + [False] and len(source.unreadable) == 1


def test_a_record_has_a_checksum_of_its_own():
    dtype = sequences.crop_dtype({"latent_size": (1, 2), "codebook_size": 9})
    record = sequences.pack(1, np.zeros(2, dtype))
    assert sequences.unpack(record, dtype)[0] == 1
    for at in range(len(record)):
        wrong = bytearray(record)
        wrong[at] ^= 1
        with pytest.raises(UserError, match="checksum"):
            sequences.unpack(bytes(wrong), dtype)


def test_a_damaged_folder_is_refused_with_what_to_do(tmp_path):
    folder = hand_made(tmp_path / "cache")
    file = folder / "train-00001-of-00002.array_record"
    content = file.read_bytes()

    def open_(**options):
        return open_source("sequences", "train", **{"data_dir": str(folder), **options})

    for damage in (lambda: file.write_bytes(content[:-1]), file.unlink):
        damage()
        with pytest.raises(UserError, match="00001-of-00002.array_record is missing or damaged"):
            open_()
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"1 classes .* has 6 classes"):
        open_(class_names=["b"])
    flip(folder / "meta.json", b"abc")
    with pytest.raises(UserError, match="meta.json is damaged"):
        open_()
    (folder / "meta.json").write_text("{")
    with pytest.raises(UserError, match="meta.json is damaged"):
        open_()
    (folder / "meta.json").unlink()
    with pytest.raises(UserError, match="no cached sequences"):
        open_()
    storage.write_json(folder / "meta.json", {"format": 2})
    with pytest.raises(UserError, match="are in format 2"):
        open_()
    with pytest.raises(UserError, match="needs data_dir"):
        open_(data_dir=None)


def test_another_tokenizer_is_refused(pipeline, whole):
    source = open_source("sequences", "train", data_dir=str(whole))
    source.check_tokenizer(pipeline.metadata.fingerprint)
    assert TokenizerConfig(**source.tokenizer) == SIZES
    with pytest.raises(UserError, match=r"another tokenizer \(weights .*than the one of this run"):
        source.check_tokenizer("0123456789abcdef")


# Kills, several processes, mistakes.


def test_an_interrupted_run_goes_on_with_the_missing_files(
    pipeline, data, whole, tmp_path, monkeypatch
):
    folder, write, written = tmp_path / "cache", sequences.write_shard, []
    folder.mkdir()
    (folder / "unfinished.json.tmp").write_text("{")  # of a kill at the very beginning

    def interrupt(path, *args):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(path, *args)

    monkeypatch.setattr(sequences, "write_shard", interrupt)
    with pytest.raises(KeyboardInterrupt):
        encode_data_set(pipeline, folder, data, crops=8, batch_size=BATCH)
    monkeypatch.undo()
    monkeypatch.setattr(sequences, "SHARD_SIZE", 4)  # undone as well
    with pytest.raises(UserError, match="is not finished"):
        open_source("sequences", "train", data_dir=str(folder))
    for other, message in (
        (dict(crops=7), "crops = 8, and cannot be resumed with 7"),
        (dict(crops=8, seed=1), "seed = 0, and cannot be resumed with 1"),
    ):
        with pytest.raises(UserError, match=message):
            encode_data_set(pipeline, folder, data, **other)
    before = [path.stat().st_mtime_ns for path in written]
    encode_data_set(pipeline, folder, data, crops=8, batch_size=BATCH)
    assert [path.stat().st_mtime_ns for path in written] == before
    assert contents(folder) == contents(whole)
    # A file that is gone is made anew, and only it.
    written[0].unlink()
    encode_data_set(pipeline, folder, data, crops=8, batch_size=BATCH)
    assert contents(folder) == contents(whole) and written[1].stat().st_mtime_ns == before[1]


@pytest.mark.slow
def test_a_killed_process_leaves_no_half_file(pipeline, data, whole, tmp_path):
    pipeline.save_pretrained(tmp_path / "export")
    # The third file to be flushed is the second shard: only its temporary file is there.
    code = f"""
import os, signal, itertools
from nvg_jax import Pipeline
from nvg_jax.data import sequences
from nvg_jax.jobs.encoding import encode_data_set
count = itertools.count(1)
sequences.SHARD_SIZE = 4
os.fsync = lambda fd: next(count) == 3 and os.kill(os.getpid(), signal.SIGKILL)
pipeline = Pipeline.from_pretrained({str(tmp_path / "export")!r})
encode_data_set(pipeline, {str(tmp_path / "cache")!r}, {data!r}, crops=8, batch_size={BATCH})
"""
    done = forked("-c", code)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [
        "train-00000-of-00003.array_record", "train-00001-of-00003.array_record.tmp",
        "unfinished.json",
    ]  # fmt: skip
    encode_data_set(pipeline, tmp_path / "cache", data, crops=8, batch_size=BATCH)
    assert contents(tmp_path / "cache") == contents(whole)


def test_two_processes_write_each_file_once(pipeline, data, whole, tmp_path):
    sources, settings = plan_encoding(pipeline, data, 8, 0)
    written = []
    for process in range(2):
        folder = tmp_path / str(process)
        sequences.begin(folder, settings)
        transform = Transform((8, 8), resize=9)
        options = LoaderOptions(transform, BATCH, process_index=process, process_count=2)
        write_shards(pipeline, folder, sources, settings, options)
        (folder / sequences.UNFINISHED).unlink()
        written.append(contents(folder))
    assert len(written[0]) == 3 and len(written[1]) == 2
    expected = contents(whole)
    del expected[sequences.META]
    assert written[0] | written[1] == expected and not written[0].keys() & written[1].keys()


def test_unreadable_images_stop_or_are_named_and_left_out(pipeline, data, tmp_path):
    root = tmp_path / "images"
    for split in ("train", "test"):
        for path in sorted((ROOT / data["data_dir"] / split).glob("*/*.png")):
            copy = root / split / path.parent.name / path.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    broken = root / "train" / "ant" / "1.png"
    broken.write_bytes(b"no image")
    data = {**data, "data_dir": str(root)}
    with pytest.raises(UserError, match=r"ant/1.png: not an image"):
        encode_data_set(pipeline, tmp_path / "cache", data, batch_size=BATCH)
    meta = encode_data_set(pipeline, tmp_path / "cache", data, on_bad="skip", batch_size=BATCH)
    assert list(meta["unreadable"]["train"]) == [str(broken)] and not meta["unreadable"]["test"]
    source = open_source("sequences", "train", data_dir=str(tmp_path / "cache"))
    assert [source[i]["label"] for i in range(len(source))] == [0] * 2 + [1] * 7


def test_the_same_data_may_lie_elsewhere(pipeline, data, tmp_path):
    shutil.copytree(ROOT / data["data_dir"], tmp_path / "elsewhere")
    plan = lambda place: plan_encoding(pipeline, data | {"data_dir": str(place)}, 2, 0)[1]
    sequences.begin(tmp_path / "cache", plan(ROOT / data["data_dir"]))
    sequences.begin(tmp_path / "cache", plan(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match="made with data = .*cannot be resumed with"):
        settings = plan(tmp_path / "elsewhere")
        settings["data"]["pad"] = 7
        sequences.begin(tmp_path / "cache", settings)


def test_wrong_use_gets_a_sentence(pipeline, data, whole, tmp_path, monkeypatch):
    cached = {"name": "sequences", "data_dir": str(whole), "resize": 0, "pad": 0}
    (tmp_path / "something").touch()
    for arguments, message in (
        ((tmp_path / "new", cached), "holds cached sequences already"),
        ((tmp_path, data), "exists and holds no cached sequences"),
        ((tmp_path / "something", data), "exists and holds no cached sequences"),
    ):
        with pytest.raises(UserError, match=message):
            encode_data_set(pipeline, *arguments)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "everywhere", lambda seen: False)  # another process's answer
        with pytest.raises(UserError, match="Not every process sees .*unshared"):
            encode_data_set(pipeline, tmp_path / "unshared", data)
    with (
        storage.locked(tmp_path / "unshared"),
        pytest.raises(UserError, match="Another command is writi"),
    ):
        encode_data_set(pipeline, tmp_path / "unshared", data)
    with pytest.raises(UserError, match="crops must be at least 1"):
        encode_data_set(pipeline, tmp_path / "new", data, crops=0)
    (tmp_path / "new.array_record.tmp").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        sequences.write_shard(tmp_path / "new.array_record", [], {})


# Training.


@pytest.mark.slow
def test_a_training_step_has_the_losses_that_it_has_from_the_images(pipeline, data, tmp_path):
    data = {**data, "resize": 8}  # no random crop
    encode_data_set(pipeline, tmp_path / "cache", data, batch_size=BATCH)
    config = tiny_config()
    mesh = sharding.make_mesh()
    tokenizer = pipeline.params["tokenizer"]
    options = LoaderOptions(Transform((8, 8), resize=8), 4)
    logged = []
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        model = ModelConfig.from_config(config, num_classes=2)
        trainer = make_trainer(CONTENT, config, model, mesh, num_images=TRAIN)
        inputs = {"tokenizer": tokenizer, "canvas_scale": np.ones(6, np.float32)}
        for name, folder in (
            ("image_folder", data["data_dir"]),
            ("sequences", tmp_path / "cache"),
        ):
            source = open_source(name, "train", data_dir=str(folder))
            batches = train_batches(source, options, seed=3)
            state = trainer.jit_init_state(jax.random.key(0), inputs)
            for _ in range(3):
                batch = sharding.global_batch(next(batches), mesh)
                state, metrics = trainer.jit_train_step(state, inputs, batch, jax.random.key(1))
                logged.append(jax.device_get(metrics))
    assert "content/loss" in logged[0] and logged[0]["content/loss"] != logged[1]["content/loss"]
    for from_images, from_cache in zip(logged[:3], logged[3:]):
        jax.tree.map(
            lambda *pair: np.testing.assert_allclose(*pair, rtol=1e-5, atol=1e-6),
            from_images,
            from_cache,
        )
