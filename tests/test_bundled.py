"""The models that come with the package."""

import types
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import ROOT, forked, random_pipeline, tiny_config
from PIL import Image

from benchmarks import structure_control
from nvg_jax import Pipeline, bundled, evaluate, workdir
from nvg_jax.errors import UserError
from nvg_jax.jobs import editing
from nvg_jax.runtime.storage import fingerprint
from nvg_jax.sampling import control
from nvg_jax.training.run import Run
from nvg_jax.visualize import to_uint8


@pytest.mark.slow
def test_the_bundled_model_draws_the_class_that_is_asked_for():
    """Samples of a class are more like others of their class than like those of another one."""
    pipe = Pipeline.from_pretrained("fashion_mnist")
    names = ("T-shirt/top", "Trouser", "Bag", "Ankle boot")
    draw = lambda seed: pipe.sample([n for n in names for _ in range(4)], seed=seed).images
    samples = [draw(seed) for seed in range(3)]
    first, second = (
        images.reshape(len(names), 4, -1).mean(1) - samples[2].mean(0).ravel()
        for images in samples[:2]
    )
    likeness = np.corrcoef(first, second)[: len(names), len(names) :]
    assert (likeness.argmax(1) == np.arange(len(names))).all() and likeness.diagonal().min() > 0.7
    # The page opens with the first of them: four rows that end with the finished image.
    with Image.open(bundled.FOLDER / "fashion_mnist" / "opening.png") as picture:
        opening = np.asarray(picture)
    finished = opening[: 4 * 32, -32:].reshape(4, 32, 32, 3)
    assert np.abs(finished.astype(int) - to_uint8(samples[0][:4])).mean() < 2


@pytest.mark.slow
def test_emoji_follow_the_outline_of_a_picture_in_another_class():
    pipe = Pipeline.from_pretrained("emoji")
    files = [ROOT / "docs/control/emoji" / f"{name}.png" for name in ("flamingo", "house")]
    given = pipe.encode(np.stack([pipe.prepare(editing.read_picture(file)) for file in files]))
    prefix = jax.tree.map(lambda x: x.repeat(4, axis=0), given)
    stages = pipe.tokenizer.config.num_stages
    images = pipe.sample(["fluent heart"] * 8, prefix=prefix, structure_stages=stages).images
    drawn = structure_control.colored(images).reshape(2, 4, 32, 32)
    opaque = np.stack(
        [np.asarray(Image.open(file).resize((32, 32)))[..., 3] > 127 for file in files]
    )
    own, other = (structure_control.overlap(drawn, x[:, None]) for x in (opaque, opaque[::-1]))
    assert own > other + 0.1
    red, green, blue = images[structure_control.colored(images)].mean(0)
    assert red > blue > green  # a heart's


@pytest.mark.slow
def test_a_local_change_reaches_far_pixels_and_pasting_restores_them():
    pipe = Pipeline.from_pretrained("fashion_mnist")
    boot = pipe.prepare(editing.read_picture(ROOT / "docs" / "control" / "boot.png"))
    canvas = pipe.canvases(pipe.encode(boot[None]))[0, -1]
    changed = canvas.copy()
    changed[15] = canvas[0]  # the lower right corner becomes background
    before, after = pipe.decode_canvas([canvas, changed])
    rows, columns = np.mgrid[:32, :32]
    away = np.maximum(24 - rows, 0) + np.maximum(24 - columns, 0)
    change = np.abs(after - before).max(-1)
    assert change[away == 0].mean() > 2 * change[away > 8].mean()
    assert (change[away > 16] > 0.01).any()
    pasted = control.paste(boot, after, away == 0, feather=2)
    np.testing.assert_array_equal(pasted[away > 2], boot[away > 2])
    np.testing.assert_array_equal(pasted[away == 0], after[away == 0])


def test_what_is_bundled_is_listed_with_its_license_and_is_small():
    listed = Pipeline.bundled()
    assert set(listed) == {path.parent.name for path in bundled.FOLDER.glob("*/config.json")}
    assert "MIT license" in listed["fashion_mnist"] and "CC-BY 4.0" in listed["emoji"]
    assert sum(path.stat().st_size for path in bundled.FOLDER.rglob("*")) < 10e6


def test_an_installation_without_its_models_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(bundled, "FOLDER", tmp_path)
    with pytest.raises(UserError, match="install nvg_jax again"):
        Pipeline.from_pretrained("fashion_mnist")


def test_a_folder_of_the_same_name_comes_first_if_it_holds_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fashion_mnist" / "evaluation").mkdir(parents=True)
    for name in ("fashion_mnist", Path("fashion_mnist"), "fashion_mnist/"):
        assert "Bag" in Pipeline.from_pretrained(name).class_names
    random_pipeline().save_pretrained("fashion_mnist")
    assert Pipeline.from_pretrained("fashion_mnist").class_names == tuple("0123456789")


@pytest.mark.parametrize("name", ["fashion_mnist", "fashion_mnist/"])
def test_results_of_a_bundled_model_are_kept_apart(tmp_path, monkeypatch, name):
    """In a folder of its name, they would look as if the folder held the model."""
    monkeypatch.chdir(tmp_path)
    uses = {"reconstruction": False, "sweep": None, "reference": None}

    def folder(**given):
        flags = {"out": None, "samples": None, "workdir": name} | uses | given
        monkeypatch.setattr(evaluate, "FLAGS", types.SimpleNamespace(**flags))
        return str(evaluate.out_folder().relative_to(tmp_path))

    assert folder() == "runs/evaluation/fashion_mnist/classifier"
    random_pipeline().save_pretrained("fashion_mnist")
    assert folder() == "fashion_mnist/evaluation/classifier"
    assert folder(reconstruction=True) == "fashion_mnist/evaluation/reconstruction"
    assert folder(sweep="top_p=1", reference="train") == "fashion_mnist/evaluation/sweep"
    assert folder(reference="train") == "fashion_mnist/evaluation/reference"


@pytest.mark.slow
def test_nothing_is_made_before_the_input_is_checked(tmp_path):
    command = ["-m", "nvg_jax.evaluate", "--workdir=fashion_mnist", "--reconstruction"]
    done = forked(*command, "--data_name=sequences", cwd=tmp_path)
    assert done.returncode == 2 and "needs data_dir" in done.stderr
    done = forked(*command, "--num_samples=500", "--top_p=0.9", cwd=tmp_path)
    assert done.returncode == 2
    assert "--num_samples, --top_p: no effect with --reconstruction; leave out" in done.stderr
    assert not list(tmp_path.iterdir())


def test_generators_can_use_a_bundled_tokenizer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = types.SimpleNamespace(workdir=tmp_path, config=tiny_config())
    choose = lambda folder: run.config.update(tokenizer_workdir=folder) or named(run)
    named = Run.tokenizer_workdir.fget
    assert choose("") == str(tmp_path) and choose("there") == str(tmp_path / "there")
    assert choose("emoji_tokenizer") == "emoji_tokenizer"  # as the metadata keeps it
    metadata, params = workdir.read_tokenizer("emoji_tokenizer")
    assert metadata.fingerprint == fingerprint(params)


# Classes.


@pytest.fixture(scope="module")
def numbered():
    """A model of folders that are called 1, 2, ... 10: as ids, these names mean other classes."""
    pipe = random_pipeline()
    names = tuple(str(number) for number in range(1, 11))
    return Pipeline(pipe.metadata.replace(class_names=names), pipe.params)


@pytest.mark.parametrize(
    "classes, expected",
    [
        (["0", "1", "2"], [0, 1, 2]),  # "0" is no name
        (["1", "2", "10"], [0, 1, 9]),  # 10 is no id
        (["id:1", "id:2"], [1, 2]),
        ([1, "10"], [1, 9]),
        ([np.array(3), jax.numpy.array(4), np.int64(5)], [3, 4, 5]),
        (range(2), [0, 1]),
    ],
)
def test_a_list_of_classes_has_one_meaning(numbered, classes, expected):
    assert numbered.class_ids(classes) == expected


@pytest.mark.parametrize(
    "classes, said", [(["1", "2"], "can be read as names and as"), (["0", "10"], "are names and")]
)
def test_classes_that_may_be_names_or_ids_are_refused(numbered, classes, said):
    with pytest.raises(UserError, match=f"classes {', '.join(classes)} {said}"):
        numbered.class_ids(classes)


@pytest.mark.parametrize("wrong, right", [("Dres", "Dress"), ("boot", "Ankle boot"), ("cat", "")])
def test_an_unknown_class_is_answered_by_a_name_like_it(wrong, right):
    with pytest.raises(UserError, match=f"Unknown class '{wrong}'") as error:
        Pipeline.from_pretrained("fashion_mnist").class_id(wrong)
    assert (f"Did you mean '{right}'?" in str(error.value)) == bool(right)


def test_names_and_ids_that_agree_may_be_mixed():
    assert random_pipeline().class_ids(["3", "7", 5]) == [3, 7, 5]  # digits are called 0 .. 9
    pipe = Pipeline.from_pretrained("fashion_mnist")
    assert pipe.class_ids(["Bag", "Dress", 0]) == [8, 3, 0]
    assert pipe.class_ids(["8", "3"]) == [8, 3]


def test_the_model_of_the_documentation_has_the_bundled_tokenizer():
    pipe = Pipeline.from_pretrained(ROOT / "docs" / "models" / "emoji_16")
    assert pipe.can_sample and pipe.tokenizer.config.latent_size == (16, 16)
    tokenizer = Pipeline.from_pretrained("emoji_tokenizer").params["tokenizer"]
    jax.tree.map(np.testing.assert_array_equal, pipe.params["tokenizer"], tokenizer)
