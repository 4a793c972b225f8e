"""Starting a training from another model's weights."""

import jax
import numpy as np
import pytest
from helpers import random_pipeline, read_meta, tiny_config
from PIL import Image

from nvg_jax import Pipeline, models
from nvg_jax.errors import UserError
from nvg_jax.metadata import RunMetadata
from nvg_jax.models import ModelConfig
from nvg_jax.parts import TOKENIZER
from nvg_jax.runtime import sharding
from nvg_jax.runtime.storage import fingerprint, storage_path
from nvg_jax.train import train
from nvg_jax.training import initial
from nvg_jax.training.registry import open_trainer
from nvg_jax.training.resume import check_start
from nvg_jax.training.run import open_run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An exported model of the classes "0" to "9" with random weights."""
    folder = tmp_path_factory.mktemp("model")
    pipe = random_pipeline()
    finished = fingerprint(jax.device_get(pipe.params["tokenizer"]))
    pipe = Pipeline(pipe.metadata.replace(fingerprint=finished), pipe.params)
    pipe.save_pretrained(folder)
    return folder, pipe


def fresh(num_classes=3, width=32):
    """A content generator's initial parameters for other classes."""
    config = tiny_config()
    config.content.width = width
    generator = models.ModelConfig.from_config(config, num_classes).make_generator("content")
    init, _ = sharding.sharded_init(
        lambda key: models.init_generator(generator, key), sharding.make_mesh(), jax.random.key(0)
    )
    return {"content": init(jax.random.key(0))}


def test_classes_are_found_by_name_and_new_ones_start_from_the_mean(model):
    folder, pipe = model
    found = initial.start_from(str(folder), fresh(), ("7", "cat", "2"))["content"]
    old = jax.device_get(pipe.params["content"])
    table = old["class_embed"]["embedding"]
    expected = np.stack([table[7], table[:10].mean(0), table[2], table[10]])  # the null class last
    np.testing.assert_allclose(found["class_embed"]["embedding"], expected, rtol=1e-6)
    rest = lambda tree: {k: v for k, v in tree.items() if k != "class_embed"}
    jax.tree.map(np.testing.assert_array_equal, rest(jax.device_get(found)), rest(old))


@pytest.mark.slow
def test_a_tokenizer_starts_from_the_weights_of_the_model(model, tmp_path):
    folder, pipe = model
    config, mesh = tiny_config(part="tokenizer", init_from=str(folder)), sharding.make_mesh()
    with sharding.in_mesh(mesh):
        run = open_run(config, storage_path(tmp_path / "run"), mesh)
        state = jax.device_get(open_trainer(run, TOKENIZER).first_state(run, inputs={}))
    old = jax.device_get(pipe.params["tokenizer"])
    for found in (state.params, state.ema_params):
        jax.tree.map(np.testing.assert_array_equal, found, old)
    assert not any(np.any(x) for x in jax.tree.leaves(state.opt_state))  # nothing was learned yet


def test_what_does_not_fit_is_named(model):
    folder, _ = model
    wrong = r"init_from=.*: content/\S+ is \(.*\), and the config needs \(2, 448\)"
    with pytest.raises(UserError, match=wrong):
        initial.start_from(str(folder), fresh(width=64), ("7", "8", "9"))
    with pytest.raises(UserError, match="has no judge; it has content, structure, tokenizer"):
        initial.start_from(str(folder), {"judge": {}}, ())
    with pytest.raises(UserError, match="There is no folder .*nowhere"):
        initial.start_from(str(folder / "nowhere"), fresh(), ())


@pytest.mark.slow
def test_a_part_that_is_trained_later_is_checked_first(model, tmp_path):
    config = tiny_config(part="all", init_from=str(model[0]))
    config.structure.width = 64
    with pytest.raises(UserError, match=r"structure/\S+ is \(.*, and the config needs \("):
        train(config, tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_whose_later_parts_would_start_from_scratch_is_refused(tmp_path, finished):
    (tmp_path / "tokenizer").mkdir()
    sizes = ModelConfig.from_config(tiny_config(), 1)
    metadata = lambda **config: RunMetadata(sizes, ("a",), config=tiny_config(**config).to_dict())
    stored = metadata(part="all", init_from="a/model")
    with pytest.raises(UserError, match="init_from=a/model, and so would generators: give it aga"):
        check_start(stored, metadata(part="all"), tmp_path / "tokenizer", finished)
    check_start(stored, metadata(part="tokenizer"), tmp_path / "tokenizer", finished)


@pytest.mark.slow
def test_fine_tuning_on_other_classes_with_the_tokenizer_of_an_export(model, tmp_path):
    """Generators on a folder with ten classes, nine of which the model knows, at rate zero."""
    folder, pipe = model
    rng, names = np.random.default_rng(0), (*"012345678", "dog")
    for split in ("train", "val"):
        for name in names:
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for number in range(8):
                pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{number}.png")
    config = tiny_config(part="generators", init_from=str(folder), tokenizer_workdir=str(folder))
    config.data.update(name="image_folder", data_dir=str(tmp_path / "data"), resize=8)
    config.generator_training.optimizer.update(learning_rate=0.0, weight_decay=0.0)
    config.generator_training.optimizer.schedule = "constant"  # one program for both lengths
    config.generator_training.length = "2 steps"
    train(config, tmp_path / "run")
    tuned = Pipeline.from_pretrained(tmp_path / "run")
    assert tuned.class_names == names
    for name in ("content", "structure"):
        old, new = (
            jax.device_get(x.params[name]["class_embed"]["embedding"]) for x in (pipe, tuned)
        )
        expected = np.stack([*old[:9], old[:10].mean(0), old[10]])
        np.testing.assert_allclose(new, expected, rtol=1e-5)
    # The known class draws what it drew before.
    plain = dict(seed=1, content_guidance=1.0, structure_guidance=1.0)
    before, after = (x.sample(["3"], **plain).sequence for x in (pipe, tuned))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    # Resuming does not read the folder again, and nothing starts from another one.
    config.init_from = str(tmp_path / "gone")
    train(config, tmp_path / "run")
    config.generator_training.length = "3 steps"
    longer = dict(allow_changes=["length"])
    with pytest.raises(UserError, match="init_from=.*gone has no effect: the run in .*generators"):
        train(config, tmp_path / "run", **longer)
    config.init_from = ""
    train(config, tmp_path / "run", **longer)
    assert read_meta(tmp_path / "run" / "generators")["step"] == 3
