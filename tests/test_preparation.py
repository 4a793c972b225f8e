"""How images are resized: kept with the model, inherited by what builds on it, and `prepare`."""

import json
import types

import numpy as np
import pytest
from absl import flags
from etils import epath
from helpers import raising, random_pipeline, tiny_config
from PIL import Image

from nvg_jax import cli
from nvg_jax.data import SequenceSource, Transform, open_source
from nvg_jax.data.transforms import decode
from nvg_jax.errors import UserError
from nvg_jax.evaluation.sets import Split
from nvg_jax.jobs import editing, scoring
from nvg_jax.jobs.encoding import encode_data_set
from nvg_jax.metadata import RunMetadata, read_model_metadata
from nvg_jax.parts import TOKENIZER
from nvg_jax.pipeline import Pipeline
from nvg_jax.runtime import sharding
from nvg_jax.runtime.storage import storage_path
from nvg_jax.sampling.settings import Settings
from nvg_jax.training import changes
from nvg_jax.training.run import choose_resize_filter, open_run
from nvg_jax.visualize import to_uint8

DIGITS = {"name": "digits", "data_dir": "", "resize": 9, "pad": 0}
PHOTO = np.random.default_rng(0).integers(0, 256, (31, 22, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def published():
    pipeline = random_pipeline()
    metadata = pipeline.metadata.replace(resize_filter="published", fingerprint="f")
    return Pipeline(metadata, pipeline.params, "float32")


@pytest.fixture(scope="module")
def folder(published, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    published.save_pretrained(folder)
    return folder


def test_checkpoints_that_do_not_say_it(published):
    """Ours were made with "lanczos"; what was converted was published."""
    content = published.metadata.to_json()
    assert content["resize_filter"] == "published"
    assert RunMetadata.from_json(json.loads(json.dumps(content))) == published.metadata
    del content["resize_filter"]
    assert RunMetadata.from_json(content).resize_filter == "lanczos"
    converted = content | {"sources": {"autoencoder": {"file": "ae.ckpt"}}}
    assert RunMetadata.from_json(converted).resize_filter == "published"
    trained_on = converted | {"config": tiny_config().to_dict()}  # generators, by us
    assert RunMetadata.from_json(trained_on).resize_filter == "lanczos"


def test_metadata_of_another_version_is_named_and_other_errors_pass(published, monkeypatch):
    content = published.metadata.to_json()
    with pytest.raises(UserError, match="RunMetadata: missing or unknown age, class_names"):
        RunMetadata.from_json({k: v for k, v in content.items() if k != "class_names"} | {"age": 1})
    with pytest.raises(UserError, match="TransformerConfig: missing or unknown depth, heads"):
        RunMetadata.from_json(content | {"content": {"width": 32, "heads": 2}})
    with pytest.raises(UserError, match=r"are damaged: \['top_k'\] is no Settings"):
        RunMetadata.from_json(content | {"sampling": ["top_k"]})
    monkeypatch.setattr(Settings, "from_dict", raising(TypeError("a mistake in the code")))
    with pytest.raises(TypeError, match="a mistake in the code"):
        RunMetadata.from_json(content)


def test_prepare_is_the_evaluation_crop_of_the_training(published):
    expected = Transform((8, 8), 9, resize_filter="published")(Image.fromarray(PHOTO))
    prepared = published.prepare(PHOTO)
    assert prepared.dtype == np.float32 and prepared.shape == (8, 8, 3)
    np.testing.assert_array_equal(prepared, expected)
    np.testing.assert_array_equal(published.prepare(Image.fromarray(PHOTO)), expected)
    ours = Pipeline(
        published.metadata.replace(
            resize_filter="lanczos", config={"data": {"resize": 12}, "distillation": {}}
        ),
        published.params,
        "float32",
    )
    np.testing.assert_array_equal(
        ours.prepare(PHOTO), Transform((8, 8), 12)(Image.fromarray(PHOTO))
    )


def test_prepare_keeps_the_pixels_of_an_image_that_fits(published):
    own = PHOTO[:8, :8]
    np.testing.assert_array_equal(published.prepare(own), own.astype(np.float32) / 127.5 - 1)
    clear = Image.fromarray(np.zeros((8, 8, 4), np.uint8))  # transparent: white
    assert (published.prepare(clear) == 1).all()
    assert published.encode(published.prepare(PHOTO)[None]).tokens.shape[0] == 1


@pytest.mark.parametrize(
    "image", [PHOTO.astype(np.float32), PHOTO[None], PHOTO[..., :2], PHOTO[:0], [[1, 2]], "a.png"]
)
def test_prepare_refuses_what_is_no_image(published, image):
    with pytest.raises(UserError, match="must be a PIL image, or uint8 of shape"):
        published.prepare(image)


def test_a_run_resizes_as_configured_or_as_what_it_builds_on(folder, tmp_path):
    source = open_source("digits", "train")
    choose = lambda **settings: choose_resize_filter(
        tiny_config(**settings), storage_path(tmp_path), source
    )
    assert choose() == "lanczos"
    assert choose(tokenizer_workdir=str(folder)) == "published"
    assert choose(init_from=str(folder)) == "published"
    assert choose(init_from="fashion_mnist") == "lanczos"
    assert choose(init_from=str(folder), data=dict(resize_filter="lanczos")) == "lanczos"
    assert read_model_metadata(tmp_path) is None
    config = tiny_config(tokenizer_workdir=str(folder))
    run = open_run(config, storage_path(tmp_path), sharding.make_mesh())
    assert run.loader_options(16).transform.resize_filter == "published"


def test_commands_prepare_images_as_the_model_was_trained(monkeypatch):
    values = flags.FlagValues()
    monkeypatch.setattr(cli.flags, "FLAGS", values)
    for name in ("data_name", "data_dir"):
        flags.DEFINE_string(name, None, "", flag_values=values)
    values(["command", "--data_dir=/images"])
    config = {"data": {"name": "digits", "resize": 9, "resize_filter": "", "on_bad": "skip"}}
    of_the_model = {"resize": 9, "name": "digits", "on_bad": "skip"}
    own = {"data_dir": "/images", "resize_filter": "published"}
    metadata = types.SimpleNamespace(config=config, resize_filter="published")
    assert cli.data_section(metadata) == of_the_model | own
    values(["command", "--data_dir=/images", "--data_name=image_folder"])
    other = {"resize": 9, "pad": 0, "name": "image_folder", "on_bad": "skip"}
    assert cli.data_section(metadata) == other | own
    metadata = types.SimpleNamespace(config=None, resize_filter="published")  # converted
    unknown = {"resize": 0, "pad": 0, "name": "image_folder", "on_bad": "error"}
    assert cli.data_section(metadata) == unknown | own


def test_fid_during_training_prepares_images_as_the_run_does(published, monkeypatch):
    config, prepared = tiny_config(part="tokenizer"), []
    config.tokenizer_training.fid_every = 1
    monkeypatch.setattr(scoring, "make_judge", lambda *_: None)
    monkeypatch.setattr(scoring, "features_of", lambda *_, **__: None)
    monkeypatch.setattr(scoring, "Split", lambda data, *_: prepared.append(data["resize_filter"]))
    run = types.SimpleNamespace(
        config=config, model=published.metadata.model, resize_filter="published"
    )
    scoring.fid_measurements(run, [TOKENIZER])
    assert prepared == ["published"]


@pytest.mark.slow
def test_sequences_are_encoded_as_the_model_was_trained(published, tmp_path, caplog):
    meta = encode_data_set(published, tmp_path / "cache", DIGITS)
    assert meta["data"]["resize_filter"] == "published"
    source = SequenceSource(tmp_path / "cache", "test")
    assert source.resize_filter == "published"
    config = tiny_config(data=dict(resize_filter="lanczos"))
    assert choose_resize_filter(config, tmp_path, source) == "published"
    assert "data.resize_filter=lanczos has no effect" in caplog.text
    config.data.update(name="sequences", data_dir=str(tmp_path / "cache"))
    assert open_run(config, epath.Path(tmp_path), sharding.make_mesh()).config.data.resize == 9
    digits = open_source("digits", "test")
    images = [Transform((8, 8), 9, resize_filter="published")] * 3
    images = [t(Image.fromarray(digits[i]["image"]).convert("RGB")) for i, t in enumerate(images)]
    sequence = published.encode(np.stack(images))
    for i in range(3):
        np.testing.assert_array_equal(source[i]["crops"]["structure"][0], sequence.structure[i, -1])


def test_a_run_resumes_with_its_own_filter_only(published, tmp_path):
    old = published.metadata.replace(config=tiny_config().to_dict(), resize_filter="lanczos")
    old = old.replace(model=old.model.only())
    new = old.replace(resize_filter="published")
    with pytest.raises(UserError, match="data.resize_filter = 'lanczos', now 'published'"):
        changes.check_changes(old, new, "tokenizer_training", tmp_path)


def test_evaluation_and_editing_prepare_as_the_model_was_trained(published, tmp_path):
    digits = open_source("digits", "test")
    split = Split(DIGITS | {"resize_filter": "published"}, "test", (8, 8), count=5)
    expected = [
        Transform((8, 8), 9, resize_filter="published")(decode(digits[i]["image"]))
        for i in split._order
    ]
    np.testing.assert_array_equal(next(split.batches([0]))[0], to_uint8(expected[0]))
    assert split.describe()["size"] == [8, 8, 9, 9, "published"]
    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    kept = editing.keep_stages(published, tmp_path / "photo.png", 5, 5)
    sequence = published.encode(published.prepare(PHOTO)[None])
    np.testing.assert_array_equal(kept.sequence.structure, sequence.structure[0])
    np.testing.assert_array_equal(kept.sequence.tokens, sequence.tokens[0])
