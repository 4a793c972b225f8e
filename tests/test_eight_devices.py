"""Everything that needs several devices, in one process with eight of them.

Run as a script, this file is that process: it prints what the tests below check, as JSON.
"""

import json
import math
import re
import sys
import tempfile
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import flags
from etils import epath
from helpers import (
    on_eight_devices,
    published_tokenizer,
    random_like,
    random_pipeline,
    tiny_config,
    tiny_discriminator,
)
from test_attention import arguments as attention_arguments
from test_lora import RANK, leaves, one_step

from nvg_jax import layers, models
from nvg_jax.errors import UserError
from nvg_jax.kernels.rotary import Rotary
from nvg_jax.kernels.tpu_attention import fused_attention
from nvg_jax.parts import BOTH_GENERATORS, DISTILLATION, TOKENIZER
from nvg_jax.runtime import checkpoint, sharding
from nvg_jax.runtime.checkpoint import Checkpoints
from nvg_jax.tokenizer.losses import discriminator_loss
from nvg_jax.training.registry import make_trainer
from nvg_jax.training.run import open_run
from nvg_jax.training.state import TrainState

pytestmark = pytest.mark.slow
STEPS = 12  # those of the other tests, whose compiled programs are shared
BAD = 5  # the tokenizer's step whose first images, those of one device, are not numbers
MESHES = {
    "one device": (1, 1, 1),
    "data 8": (8, 1, 1),
    "fsdp 8": (1, 8, 1),
    "data 2 fsdp 2 tensor 2": (2, 2, 2),
}
# What is trained on them: an axis by itself with one part, all axes with every part.
TRAINED = {
    "one device": ("tokenizer", "generators", "distillation"),
    "data 8": ("tokenizer",),
    "fsdp 8": ("generators",),
    "data 2 fsdp 2 tensor 2": ("tokenizer", "generators", "distillation"),
}
SHARDED = [(part, mesh) for mesh in MESHES if mesh != "one device" for part in TRAINED[mesh]]


def run_config():
    config = tiny_config()
    for training in (config.tokenizer_training, config.generator_training):
        training.update(length=f"{STEPS} steps", log_every=1, save_every=10, eval_every=STEPS)
    config.tokenizer_training.max_skipped_steps = 2
    return config


def observe() -> dict:
    curves, starts = {}, {}
    for name, sizes in MESHES.items():
        devices = jax.devices()[: math.prod(sizes)]
        mesh = sharding.make_mesh(*sizes, devices=devices)
        curves[name] = train_on(mesh, TRAINED[name], starts)
    return {
        "training": curves,
        "adapters": [step_of_adapters(1, 1, 1), step_of_adapters(2, 2, 2)],
        "placement": placement(),
        "attention": split_attention(),
        "discriminator": split_discriminator(),
        "sampling": sampling(),
    }


@pytest.fixture(scope="module")
def seen():
    return on_eight_devices(__file__)


# Training.


def train_on(mesh, parts, starts: dict[str, TrainState]) -> dict[str, dict]:
    """Twelve steps of the training of `parts`, from the seed and the data of `run_config`.

    Args:
        starts: {part: its first state}; filled by the first mesh, placed on the others.

    Returns:
        {part: {"curves", "collectives" and "sizes" of its compiled step}}.
    """
    config = run_config()
    config.sampling.update(structure_guidance=(1.0, 2.0), flow_steps=2)  # of the teacher
    run = open_run(config, epath.Path("unused"), mesh)
    key = jax.device_put(jax.random.fold_in(run.key, 2), run.replicated)
    scale = jax.device_put(np.ones(6, np.float32), run.replicated)
    batches = run.train_batches(16, config.seed)
    taken = [sharding.global_batch(next(batches), mesh) for _ in range(STEPS)]
    found = {}

    def start(part, inputs):
        trainer = make_trainer(part, config, run.model, mesh, len(run.train_source))
        if part.name not in starts:
            first = trainer.jit_init_state(jax.random.fold_in(run.key, trainer.INIT_KEY), inputs)
            starts[part.name] = jax.device_get(first)
        placed = jax.tree.map(lambda x: x.sharding, trainer.abstract_state)
        return trainer, jax.device_put(starts[part.name], placed)

    def steps(trainer, state, inputs):
        placed = jax.tree.map(
            lambda x, like: x.sharding.is_equivalent_to(like.sharding, x.ndim),
            inputs, trainer.abstract_inputs,
        )  # fmt: skip
        assert all(jax.tree.leaves(placed))  # what `compile` compiles is what runs
        step = trainer.jit_train_step.lower(
            state, inputs, taken[0], key, index_backprop=False
        ).compile()
        metrics = []
        for number, batch in enumerate(taken):
            if trainer.part is TOKENIZER and number == BAD:
                batch = batch | {"image": batch["image"].at[:2].set(jnp.nan)}
            state, values = step(state, inputs, batch, key)
            metrics.append(values)
        curves = {
            tag: [float(m[tag]) for m in jax.device_get(metrics)]
            for tag in metrics[0]
            if re.search("loss$|^skipped$", tag) and metrics[0][tag].ndim == 0
        }
        found[trainer.part.name] = {
            "curves": curves, "collectives": collectives(step), "sizes": leaf_sizes(trainer)
        }  # fmt: skip
        return state

    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        if "tokenizer" in parts:
            steps(*start(TOKENIZER, {}), {})
        params = jax.device_put(starts["tokenizer"].params, run.replicated)
        if "generators" in parts:
            inputs = {"tokenizer": params, "canvas_scale": scale}
            state = steps(*start(BOTH_GENERATORS, inputs), inputs)
            if "distillation" in parts:  # of a student that knows nothing yet
                inputs = {"teacher": state.params["structure"], "tokenizer": params}
                steps(*start(DISTILLATION, inputs), inputs)
    return found


def collectives(compiled) -> list[tuple[str, int, str]]:
    """(kind, elements of the largest result, operation) of every collective of a program."""
    found = []
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    for line in compiled.as_text().splitlines():
        match = re.search(rf"= (.*?) ({kinds})(-start)?\(", line)
        if match:
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            sizes = [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]
            operation = re.search(r'op_name="([^"]*)"', line)
            found.append((match[2], max(sizes), operation[1] if operation else ""))
    return found


def leaf_sizes(trainer) -> list[int]:
    """Numbers of elements of all parameters, and of one layer of stacked ones.

    Of the linear layers of a block also of the parts that have a product of their own: one for
    attention, or four for the MLP, of width x width.
    """
    sizes = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(trainer.abstract_state):
        sizes.add(leaf.size)
        name = jax.tree_util.keystr(path)
        if "blocks" in name:
            sizes.add(leaf.size // leaf.shape[0])
        if "linear1" in name or "linear2" in name:
            part = min(leaf.shape[1:]) ** 2
            sizes.update((part, 4 * part))
    return sorted(sizes)


@pytest.mark.parametrize("part, name", SHARDED)
def test_every_mesh_gives_the_losses_of_one_device(seen, part, name):
    """Also after a step that is left out for the gradient of one device's images."""
    alone, found = (seen["training"][mesh][part]["curves"] for mesh in ("one device", name))
    assert alone.keys() == found.keys() and alone
    if part == "tokenizer":
        skipped = [step == BAD for step in range(STEPS)]
        assert alone["skipped"] == found["skipped"] == skipped
        assert [np.isnan(loss) for loss in found["loss"]] == skipped
    for tag in alone.keys() - {"skipped"}:
        assert len(set(alone[tag])) == STEPS
        np.testing.assert_allclose(found[tag], alone[tag], rtol=1e-5, err_msg=tag)


@pytest.mark.parametrize("part, name", [case for case in SHARDED if case[0] != "distillation"])
def test_only_parameters_and_gradients_travel(seen, part, name):
    """No gather of activations, nothing moved about; sums of gradients, metrics and no more.

    Over "tensor" one sum of the residual for each half of a block, as planned.
    """
    data, fsdp, tensor = MESHES[name]
    step = seen["training"][name][part]
    sizes, found = set(step["sizes"]), step["collectives"]
    assert found
    for kind, size, operation in found:
        # A parameter may be collected, a gradient summed, in two goes: over one axis of the mesh,
        # then over the other.
        parameter = any(size * cut in sizes for cut in {1, fsdp, tensor, fsdp * tensor})
        if kind == "all-gather":
            assert fsdp * tensor > 1 and parameter, (size, operation)
            place = "(sharding_constraint|squeeze|reshape|^)$"
            if not jax.__version__.startswith("0.10."):
                # Also a parameter by its name, or a layer's part of the scanned parameters.
                place += r"|^state\.params(\['\w+'\])+$|/jit\(dynamic_index_in_dim\)/dynamic_slice$"
            assert re.search(place, operation.replace("\\", "")), operation
        elif kind == "all-reduce":
            residual = tensor > 1 and re.search("bnpd,pdc->bnc|bnc,cpd->bnpd", operation)
            metric = size <= 16  # one number, one a stage, or one a code
            assert residual or parameter or metric, (size, operation)
        else:
            raise AssertionError(f"{kind} of {size} elements: {operation}")
    if fsdp > 1:
        assert any(kind == "all-gather" for kind, _, _ in found)


def step_of_adapters(*sizes) -> dict[str, Any]:
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
    _, params, metrics, specs = one_step(RANK, mesh=mesh)
    return {
        "losses": [float(metrics[f"{name}/loss"]) for name in models.GENERATORS],
        "params": {path: x.ravel()[:50].tolist() for path, x in leaves(params).items()},
        "specs": specs,
    }


def test_a_step_of_adapters_on_eight_devices_is_that_of_one(seen):
    one, eight = seen["adapters"]
    np.testing.assert_allclose(eight["losses"], one["losses"], rtol=1e-5)
    for path, values in one["params"].items():
        np.testing.assert_allclose(eight["params"][path], values, atol=1e-3, err_msg=path)
    spec = eight["specs"]["content/blocks/blocks/linear1/kernel"]
    assert spec == [None, "fsdp", "tensor"]


def test_heads_that_do_not_split_are_refused():
    config = run_config()
    model = models.ModelConfig.from_config(config, num_classes=10)
    mesh = jax.sharding.AbstractMesh((1, 1, 3), sharding.MESH_AXES)
    with pytest.raises(UserError, match="2 attention heads .* do not split over mesh.tensor=3"):
        make_trainer(BOTH_GENERATORS, config, model, mesh, 100)
    with pytest.raises(UserError, match="2 attention heads of the structure generator"):
        make_trainer(DISTILLATION, config, model, mesh, 100)


# The TPU's attention kernel, interpreted.


def split_attention() -> dict[str, float]:
    """Result and gradients on a mesh of eight, as largest differences from one device's."""
    *inputs, rotary = attention_arguments(9, 8, 64, batch=4)
    inputs += rotary[:2]

    @jax.jit
    def run(*args):
        def loss(q, k, v, *scales):
            how = Rotary(*scales, *rotary[2:])
            return jnp.square(fused_attention(q, k, v, how, interpret=True)).mean()

        value, grads = jax.value_and_grad(loss, argnums=range(5))(*args)
        return value, *grads

    expected = run(*inputs)
    with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
        found = run(*inputs)
    names = ("value", "q", "k", "v", "q_scale", "k_scale")
    return {
        name: float(np.abs(a - b).max() / np.abs(b).max())
        for name, a, b in zip(names, jax.device_get(found), jax.device_get(expected))
    }


def test_the_attention_kernel_splits_images_and_heads(seen):
    assert max(seen["attention"].values()) < 1e-5, seen["attention"]


# The discriminator's batch statistics.


def split_discriminator() -> dict[str, Any]:
    """Largest differences between eight devices and one, after a discriminator's pass."""
    model = tiny_discriminator()
    key = jax.random.key(0)

    def value(params, spectral, images):
        logits, updated = model.apply(
            {"params": params, "spectral": spectral}, images, mutable=["spectral"]
        )
        return discriminator_loss(logits[:8], logits[8:]), (logits, updated)

    step = jax.value_and_grad(value, argnums=(0, 2), has_aux=True)
    # Every device's images differ in brightness, so statistics of one device alone are others.
    images = np.random.default_rng(11).normal(size=(16, 8, 8, 3)).astype(np.float32)
    images += np.arange(16, dtype=np.float32)[:, None, None, None]
    abstract = jax.eval_shape(model.init, key, images)
    variables = random_like(sharding.unbox(abstract), 1.0)
    alone = jax.jit(step)(variables["params"], variables["spectral"], images)

    mesh = sharding.make_mesh(2, 2, 2)
    placed = jax.device_put(variables, sharding.shardings(abstract, mesh))
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        together = jax.jit(step)(
            placed["params"], placed["spectral"], sharding.global_batch(images, mesh)
        )
    kernel = placed["params"]["layers_0"]["block1"]["conv"]["kernel"]

    def paths(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(p, simple=True, separator="/"): float(x) for p, x in leaves}

    biggest = lambda tree: paths(jax.tree.map(lambda x: abs(x).max(), tree))
    host = lambda tree: jax.tree.map(sharding.to_host, tree)
    return {
        "difference": biggest(jax.tree.map(np.subtract, host(alone), host(together))),
        "size": biggest(host(alone)),
        "share": kernel.addressable_shards[0].data.shape,
    }


def test_a_discriminator_has_the_statistics_of_the_whole_batch(seen):
    found = seen["discriminator"]
    assert found["share"] == [3, 3, 8, 8]  # of 3, 3, 16, 16
    assert found["size"]["1/1"] > 1e-3
    for path, size in found["size"].items():
        assert found["difference"][path] < 1e-4 * size + 1e-6, path


# Sampling.


def sample(pipe):
    guidance = dict(content_guidance=2.0, structure_guidance=2.0)
    return pipe.sample(range(8), seed=4, flow_steps=2, **guidance)


def sampling() -> dict[str, list]:
    """Samples of all devices, and the collectives of the program that drew them."""
    pipe, found = random_pipeline(), []
    program = pipe.program

    def look(*args, **static):
        compiled = program.sample.lower(*args, **static).compile()
        found.append(collectives(compiled))
        return compiled(*args)

    pipe.program = program._replace(sample=look)
    out = sample(pipe)
    assert out.images.shape == (8, 8, 8, 3)
    return {
        "collectives": found[0],
        "images": out.images.tolist(),
        "tokens": out.sequence.tokens.tolist(),
    }


def test_sampling_on_many_devices_needs_no_communication(seen):
    assert seen["sampling"]["collectives"] == []


def test_eight_devices_give_the_same_samples(seen):
    here = sample(random_pipeline())
    np.testing.assert_array_equal(seen["sampling"]["tokens"], here.sequence.tokens)
    np.testing.assert_allclose(seen["sampling"]["images"], here.images, atol=1e-5)


# Placement.


def params(key):
    """Every way in which a parameter may name its axes."""
    draw = lambda names, *shape: nn.LogicallyPartitioned(jax.random.normal(key, shape), names)
    return {
        "wide": draw(("embed", "mlp"), 4, 6),
        "narrow": draw(("mlp", "embed"), 6, 4),
        "stacked": draw(("layers", "embed", "mlp"), 3, 4, 6),
        "odd": draw(("embed", "mlp"), 3, 6),
        "bias": draw(("mlp",), 6),
        "table": draw((None, "embed"), 5, 4),
        "codes": draw(("vocab", None), 8, 3),
        "conv": draw((None, None, "conv_in", "conv_out"), 3, 3, 4, 6),
        "free": draw((None,), 6),
        "scalar": jnp.float32(3),
    }


def init(key):
    return TrainState.create(params(key), optax.adam(0.1))


def shard_shapes(tree) -> dict[str, list[int]]:
    """Path -> the shape of one device's share, of arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p): x.addressable_shards[0].data.shape for p, x in leaves}


def share_of_a_device(init, model, mesh) -> float:
    """Largest share of all parameters that a device holds; nothing is computed."""
    abstract = jax.eval_shape(lambda key: init(model, key), jax.random.key(0))
    leaves = jax.tree.leaves(sharding.unbox(abstract))
    placed = jax.tree.leaves(sharding.shardings(abstract, mesh))
    held = sum(math.prod(s.shard_shape(x.shape)) for x, s in zip(leaves, placed))
    return held / sum(math.prod(x.shape) for x in leaves)


def placement() -> dict:
    """Where parameters, state and batches lie, and what a checkpoint restores to."""
    seen = {"meshes": {}, "shares": {}, "restored": {}}
    for sizes in ((-1, 1, 1), (2, -1, 2), (1, 8, 1), (4, 1, -1)):
        seen["meshes"][str(sizes)] = list(sharding.make_mesh(*sizes).shape.values())
    try:
        sharding.make_mesh(-1, 3, 1)
    except UserError as error:
        seen["sentence"] = str(error)

    mesh = sharding.make_mesh(2, 2, 2)
    key = jax.random.key(0)
    make, said = sharding.sharded_init(init, mesh, key)
    state = make(key)
    seen["state"] = shard_shapes(state)
    place = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)
    seen["as_said"] = place(state) == place(said)
    alone = sharding.unbox(jax.jit(params)(jax.random.key(0)))
    same = [np.array_equal(sharding.to_host(state.params[k]), alone[k]) for k in alone]
    seen["values"] = all(same)

    batch = {"image": np.arange(8 * 3).reshape(8, 3), "mask": np.arange(8) < 5}
    placed = sharding.global_batch(batch, mesh)
    seen["batch"] = shard_shapes(placed)
    back = {name: sharding.to_host(x) for name, x in placed.items()}
    seen["batch_back"] = all(np.array_equal(batch[name], back[name]) for name in batch)
    first = [np.asarray(shard.data)[0, 0] for shard in placed["image"].addressable_shards]
    seen["batch_starts"] = sorted(map(int, first))

    rng = np.random.default_rng(0)
    many = {str(n): rng.normal(size=(64, 64)).astype(np.float32) for n in range(200)}
    split = jax.NamedSharding(mesh, jax.P("fsdp", "tensor"))
    sums = checkpoint.describe(jax.device_put(many, split))  # ends, though each is a sum of its own
    seen["checksums"] = sums == checkpoint.describe(many)

    for sizes in ((1, 8, 1), (1, 4, 2), (8, 1, 1)):
        mesh, config = sharding.make_mesh(*sizes), published_tokenizer()
        for name, width in (("content", 1024), ("structure", 512)):
            transformer = {name: layers.TransformerConfig(width, 16)}
            model = models.ModelConfig(config, 1000, **transformer).make_generator(name)
            share = share_of_a_device(models.init_generator, model, mesh)
            seen["shares"][f"{name} {sizes}"] = share
        share = share_of_a_device(
            models.init_tokenizer, models.ModelConfig(config).make_tokenizer(), mesh
        )
        seen["shares"][f"tokenizer {sizes}"] = share

    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(folder)
        checkpoints.save(1, state, {})
        checkpoints.wait()
        for sizes in ((1, 8, 1), (2, 2, 1), (1, 2, 2), (1, 1, 1)):
            devices = jax.devices()[: math.prod(sizes)]
            _, wanted = sharding.sharded_init(
                init, sharding.make_mesh(*sizes, devices=devices), key
            )
            found, _, _ = checkpoints.restore(lambda meta: wanted)
            same = jax.tree.map(lambda a, b: np.array_equal(a, b), found, state)
            seen["restored"][str(sizes)] = all(jax.tree.leaves(same)) and place(found) == place(
                wanted
            )
        checkpoints.close()
    return seen


def test_one_size_of_a_mesh_may_be_the_rest(seen):
    assert seen["placement"]["meshes"] == {
        "(-1, 1, 1)": [8, 1, 1],
        "(2, -1, 2)": [2, 2, 2],
        "(1, 8, 1)": [1, 8, 1],
        "(4, 1, -1)": [4, 1, 2],
    }
    assert "data=-1, fsdp=3, tensor=1 does not fit 8 devices" in seen["placement"]["sentence"]


def test_names_become_shares(seen):
    """fsdp and tensor have two devices each; the average and Adam's moments lie alike."""
    expected = {
        "wide": [2, 3],
        "narrow": [3, 2],
        "stacked": [3, 2, 3],
        "odd": [3, 3],  # three rows do not split in two
        "bias": [3],
        "table": [5, 2],
        "codes": [4, 3],
        "conv": [3, 3, 2, 3],
        "free": [6],
        "scalar": [],
    }
    for part in (".params", ".ema_params", ".opt_state[0].mu", ".opt_state[0].nu"):
        found = {name: seen["placement"]["state"][f"{part}['{name}']"] for name in expected}
        assert found == expected, part
    assert seen["placement"]["state"][".step"] == []
    assert seen["placement"]["as_said"]


def test_a_sharded_start_has_the_values_of_one_device(seen):
    assert seen["placement"]["values"]


@pytest.mark.parametrize("sizes", ["(1, 8, 1)", "(2, 2, 1)", "(1, 2, 2)", "(1, 1, 1)"])
def test_a_checkpoint_of_eight_devices_goes_to_any_mesh(seen, sizes):
    assert seen["placement"]["restored"][sizes]


def test_a_batch_is_split_over_data_and_fsdp(seen):
    assert seen["placement"]["batch"] == {"['image']": [2, 3], "['mask']": [2]}
    # Rows 0, 2, 4 and 6 begin a share; both devices of "tensor" hold the same.
    assert seen["placement"]["batch_starts"] == [0, 0, 6, 6, 12, 12, 18, 18]
    assert seen["placement"]["checksums"]
    assert seen["placement"]["batch_back"]


@pytest.mark.parametrize("name", ["content", "structure", "tokenizer"])
def test_the_published_models_spread_over_the_devices(seen, name):
    assert seen["placement"]["shares"][f"{name} (8, 1, 1)"] == 1
    for sizes in ("(1, 8, 1)", "(1, 4, 2)"):
        assert 1 / 8 <= seen["placement"]["shares"][f"{name} {sizes}"] < 1 / 8 + 0.01


if __name__ == "__main__":
    flags.FLAGS(sys.argv[:1])
    print(json.dumps(observe()))
