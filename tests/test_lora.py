"""Low-rank adapters: training them, adding them to a model, their files."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers import random_like, random_pipeline, read_meta, tiny_config
from test_end_to_end import weights

from nvg_jax import Adapters, Pipeline, lora, models
from nvg_jax.errors import UserError
from nvg_jax.metadata import read_metadata
from nvg_jax.parts import BOTH_GENERATORS
from nvg_jax.runtime import sharding
from nvg_jax.runtime.checkpoint import Checkpoints
from nvg_jax.runtime.storage import fingerprint
from nvg_jax.sampling.settings import Settings
from nvg_jax.train import train
from nvg_jax.training.registry import make_trainer

pytestmark = pytest.mark.slow

RANK = 2
KERNELS = [f"blocks/blocks/{layer}/kernel" for layer in ("linear1", "linear2", "modulation")]
TABLE = "class_embed/embedding"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """An exported model of the digits with random weights, zeros of both signs among them."""
    folder = tmp_path_factory.mktemp("base")
    pipe = random_pipeline()
    params = jax.device_get(pipe.params)
    kernel = params["content"]["blocks"]["blocks"]["linear1"]["kernel"].copy()
    kernel[:, :4, :4] = -0.0
    params["content"]["blocks"]["blocks"]["linear1"]["kernel"] = kernel
    pipe = Pipeline(pipe.metadata.replace(fingerprint=fingerprint(params["tokenizer"])), params)
    pipe.save_pretrained(folder)
    return folder, pipe


def config_for(folder):
    config = tiny_config(part="generators", init_from=str(folder), tokenizer_workdir=str(folder))
    config.lora.rank = RANK
    config.generator_training.update(length="4 steps", save_every=2, eval_every=4)
    config.generator_training.optimizer.learning_rate = 0.02
    return config


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "lora"
    train(config_for(base[0]), folder)
    return folder


def leaves(params):
    return flatten_dict(jax.device_get(params), sep="/")


def same_bits(a, b):
    a, b = jax.device_get(a), jax.device_get(b)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(x.tobytes() == y.tobytes() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def test_only_adapters_and_the_class_table_are_trained_and_stored(base, run):
    state = weights(run / "generators")
    for name in ("content", "structure"):
        width, layers = 32, 2
        sizes = {"linear1": (32, 224), "linear2": (160, 32), "modulation": (32, 96)}
        expected = {"class_embed/embedding_delta": (11, width)}
        for layer, (inputs, outputs) in sizes.items():
            expected[f"blocks/blocks/{layer}/kernel_a"] = (layers, inputs, RANK)
            expected[f"blocks/blocks/{layer}/kernel_b"] = (layers, RANK, outputs)
        found = leaves(state["params"][name])
        assert {path: x.shape for path, x in found.items()} == expected
        assert all(np.any(x) for x in found.values())  # all have learned
        old, new = (leaves(x.params[name]) for x in (base[1], Pipeline.from_pretrained(run)))
        changed = {path for path in old if not np.array_equal(old[path], new[path])}
        assert changed == {TABLE, *KERNELS}


def test_a_kernel_gets_the_product_of_its_adapter_times_the_scale(base, run):
    pipe, adapters = base[1], Adapters.from_pretrained(run).params
    for scale in (1.0, -0.5):
        tuned = pipe.load_lora(run, scale)
        for name, tree in adapters.items():
            old, new, added = leaves(pipe.params[name]), leaves(tuned.params[name]), leaves(tree)
            for path in KERNELS:
                for layer in range(2):
                    delta = scale * np.dot(added[f"{path}_a"][layer], added[f"{path}_b"][layer])
                    expected = old[path][layer] + delta
                    np.testing.assert_allclose(new[path][layer], expected, atol=1e-6)
            delta = scale * added[f"{TABLE}_delta"]
            np.testing.assert_allclose(new[TABLE], old[TABLE] + delta, atol=1e-6)


def test_scale_zero_is_the_base_model_bit_for_bit(base, run):
    pipe = base[1]
    tuned = pipe.load_lora(run, 0.0)
    assert same_bits(tuned.params, pipe.params)
    assert not same_bits(pipe.load_lora(run, 1e-3).params, pipe.params)
    settings = dict(seed=1, flow_steps=2)
    before, after = (x.sample(["3", "4"], **settings).images for x in (pipe, tuned))
    assert np.array_equal(before, after)


@pytest.mark.parametrize("name", models.GENERATORS)
def test_a_generator_with_adapters_computes_as_with_the_merged_weights(base, name):
    """In training, where the modules add the adapters themselves, and with every weight in use."""
    model = base[1].metadata.model.make_generator(name)
    params = jax.device_get(base[1].params[name])
    shapes = jax.eval_shape(lambda key: lora.init(params, RANK, key), jax.random.key(0))
    adapters = random_like(shapes, 0.3)
    length, bits = 16, 4
    canvas = jax.random.normal(jax.random.key(0), (2, length, 4))
    maps, ids = jnp.ones((2, length, bits), jnp.int32), jnp.array([1, 2])
    if name == "content":
        args = canvas, maps, ids, ids, jnp.ones(6)
    else:
        args = jnp.zeros((2, length, bits)), jnp.ones(2), maps, canvas, ids, ids
    apply = jax.jit(lambda params: model.apply({"params": params}, *args))
    whole, merged = lora.combine(params, adapters), lora.merge(params, adapters)
    np.testing.assert_allclose(apply(whole), apply(merged), rtol=1e-4, atol=1e-4)
    assert np.abs(apply(merged) - apply(params)).max() > 0.1


def one_step(rank, change=lambda params: params, mesh=None, seed=0):
    """(parameters before, after) one step of Adam from random weights; of adapters with a rank."""
    config = tiny_config()
    config.lora.rank = rank
    # Without decay and clipping, a step changes every matrix as if it were trained alone.
    config.generator_training.optimizer.update(
        weight_decay=0.0, clip=1e9, warmup_steps=0, learning_rate=0.1
    )
    mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    model = models.ModelConfig.from_config(config, num_classes=10)
    with sharding.in_mesh(mesh):
        trainer = make_trainer(BOTH_GENERATORS, config, model, mesh, 100)
        names = BOTH_GENERATORS.networks
        params = random_like({name: model.abstract_params(name) for name in names}, 0.2)
        inputs = {"tokenizer": random_like(model.abstract_params("tokenizer"), 0.3, seed=1)}
        inputs |= {"canvas_scale": np.ones(6, np.float32)} | ({"base": params} if rank else {})
        inputs = jax.tree.map(
            lambda x, like: jax.device_put(x, like.sharding), inputs, trainer.abstract_inputs
        )
        state = trainer.jit_init_state(jax.random.key(seed), inputs)
        first = change(jax.device_get(state.params)) if rank else params
        placed = jax.tree.map(lambda x: x.sharding, trainer.abstract_state.params)
        state = state.replace(params=jax.device_put(first, placed))
        rng = np.random.default_rng(0)
        batch = {
            "image": rng.uniform(-1, 1, (16, 8, 8, 3)).astype(np.float32),
            "label": np.arange(16, dtype=np.int32) % 10,
        }
        batch = sharding.global_batch(batch, mesh)
        state, metrics = trainer.jit_train_step(state, inputs, batch, jax.random.key(1))
        specs = {
            path: [*x.sharding.spec]
            for path, x in flatten_dict(inputs.get("base", {}), sep="/").items()
        }
        return params, jax.device_get(state.params), jax.device_get(metrics), specs


def identities(params):
    """The same adapters with A = [1 0]: a step of B is then a step of the kernel."""
    return unflatten_dict(
        {
            path: np.broadcast_to(np.eye(*x.shape[1:], dtype=x.dtype), x.shape)
            if path[-1] == "kernel_a"
            else x
            for path, x in flatten_dict(params).items()
        }
    )


def test_a_step_at_full_rank_is_a_step_of_those_matrices():
    """Compared with ordinary training, from the same weights with the same noise."""
    params, whole, _, _ = one_step(0)
    _, adapters, _, _ = one_step(160, identities)  # the largest width
    for name in models.GENERATORS:
        before, expected = leaves(params[name]), leaves(whole[name])
        found = leaves(lora.merge(params[name], adapters[name]))
        for path in before:
            if path in (TABLE, *KERNELS):
                step, wanted = found[path] - before[path], expected[path] - before[path]
                assert np.abs(wanted).max() > 1e-3
                np.testing.assert_allclose(step, wanted, rtol=1e-3, atol=1e-6, err_msg=path)
            else:
                np.testing.assert_array_equal(found[path], before[path])


def test_a_resumed_run_ends_with_the_same_bits(base, run, tmp_path):
    config, folder = config_for(base[0]), tmp_path / "run"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "generators" / "4")
    assert read_meta(folder / "generators")["step"] == 2
    train(config, folder)
    assert read_meta(folder / "generators")["step"] == 4
    assert same_bits(weights(folder / "generators"), weights(run / "generators"))
    config.lora.rank = RANK + 1
    with pytest.raises(UserError, match="lora.rank = 2, now 3. Its checkpoints only fit the old"):
        train(config, folder, allow_changes=["rank"])


def test_adapters_are_saved_merged_and_refused_where_they_do_not_belong(base, run, tmp_path):
    folder, pipe = base
    tuned = pipe.load_lora(run)
    Adapters.from_pretrained(run).save_pretrained(tmp_path / "adapters")
    files = {file.name for file in (tmp_path / "adapters").iterdir()}
    assert files == {"config.json", "model.safetensors"}
    assert same_bits(pipe.load_lora(tmp_path / "adapters").params, tuned.params)
    assert same_bits(Pipeline.from_pretrained(run).params, tuned.params)
    tuned.save_pretrained(tmp_path / "merged")
    assert same_bits(Pipeline.from_pretrained(tmp_path / "merged").params, tuned.params)
    with pytest.raises(UserError, match="holds adapters. Open the model .* Pipeline.load_lora"):
        Pipeline.from_pretrained(tmp_path / "adapters")
    with pytest.raises(UserError, match="are for another content generator .*, .*base.*, as it"):
        tuned.load_lora(run)
    for place in (folder, tmp_path / "merged"):
        with pytest.raises(UserError, match="There are no adapters in .* Train some with"):
            pipe.load_lora(place)
    with pytest.raises(UserError, match="There is no folder .*nowhere. Give the workdir"):
        pipe.load_lora(tmp_path / "nowhere")
    with pytest.raises(UserError, match="must be a finite number, got inf"):
        pipe.load_lora(run, float("inf"))
    shutil.copytree(run, tmp_path / "two")
    shutil.copytree(run / "generators", tmp_path / "two" / "content")
    with pytest.raises(UserError, match="holds two content generators"):
        pipe.load_lora(tmp_path / "two")


def test_a_distilled_model_keeps_its_steps(base, run):
    pipe = base[1]
    distilled = pipe.metadata.replace(
        teacher="a fingerprint",
        sampling=Settings(flow_steps=2),
        config={"distillation": {"reflow": True, "flow_steps": 2}},
    )
    tuned = Pipeline(distilled, pipe.params).load_lora(run)
    assert (
        tuned.settings == Settings(flow_steps=2) != Adapters.from_pretrained(run).metadata.sampling
    )
    tuned.metadata.expand_settings(tuned.settings)


@pytest.mark.parametrize("teacher", [None, "a fingerprint"])
def test_a_workdir_of_content_adapters_opens_with_the_bases_structure(base, run, tmp_path, teacher):
    """As `load_lora` does; of a distilled base, its steps too."""
    distilled = dict(
        teacher=teacher,
        sampling=Settings(flow_steps=2),
        config={"distillation": {"reflow": True, "flow_steps": 2}},
    )
    pipe = Pipeline(base[1].metadata.replace(**(distilled if teacher else {})), base[1].params)
    pipe.save_pretrained(tmp_path / "base")
    adapters = Adapters.from_pretrained(run)
    trained = read_metadata(run / "generators")
    metadata = trained.replace(
        model=dataclasses.replace(trained.model, structure=None),
        base={"content": trained.base["content"]},
        base_workdir=str(tmp_path / "base"),
        tokenizer_workdir=str(tmp_path / "base"),
    )
    with Checkpoints(tmp_path / "run" / "content") as checkpoints:
        content = {"content": adapters.params["content"]}
        checkpoints.save(1, {"params": content, "ema_params": content}, metadata.to_json())
    opened = Pipeline.from_pretrained(tmp_path / "run")
    added = pipe.load_lora(tmp_path / "run")
    assert same_bits(opened.params, added.params)
    assert same_bits(opened.params["structure"], base[1].params["structure"])
    assert opened.settings == added.settings and opened.metadata.teacher == teacher
    assert opened.settings == (Settings(flow_steps=2) if teacher else trained.sampling)


def test_a_distilled_structure_generator_gets_no_adapters(base, tmp_path):
    pipe = base[1]
    student = Pipeline(pipe.metadata.replace(teacher="a fingerprint"), pipe.params)
    student.save_pretrained(tmp_path / "student")
    with pytest.raises(UserError, match="was distilled, .*--config.part=content"):
        train(config_for(tmp_path / "student"), tmp_path / "run")


def test_other_classes_start_from_the_mean_of_the_base_models(base):
    pipe = base[1]
    params = jax.device_get({name: pipe.params[name] for name in models.GENERATORS})
    for tree in params.values():
        table = tree["class_embed"]["embedding"]
        new = lora.with_classes(tree, pipe.class_names, ("7", "cat"))["class_embed"]["embedding"]
        np.testing.assert_array_equal(new, [table[7], table[:10].mean(0), table[10]])


def test_what_adapters_need_is_said_before_anything_is_read(tmp_path):
    for changes in (dict(part="generators"), dict(part="all", init_from="fashion_mnist")):
        config = tiny_config(**changes)
        config.lora.rank = 4
        with pytest.raises(UserError, match="give that model as --config.init_from, its tokeni"):
            train(config, tmp_path)
