"""Compares our numbers with the published model's, for every row of the parity pack.

tests/parity holds inputs and outputs of the published model at a small size with random weights.
All sizes are read from it. Everything is computed in float32 on the CPU with the highest matmul
precision.
"""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers import optimizer_config

from nvg_jax import clustering, granularity, layers, models
from nvg_jax.content.losses import content_losses
from nvg_jax.jobs import conversion
from nvg_jax.pipeline import Pipeline
from nvg_jax.sampling.guidance import filter_logits
from nvg_jax.sampling.settings import top_p_range
from nvg_jax.structure import flow
from nvg_jax.structure.losses import structure_losses
from nvg_jax.tokenizer import GranularitySequence
from nvg_jax.torch_interop import weight_names
from nvg_jax.training.optimizers import learning_rate_schedule

NETWORK = 1e-4  # relative error of one network: largest difference / largest value
IMAGE = 1e-3  # relative error of an image after all stages
FLOW_STEPS = 4  # of the pack's rows gentf_* and gen4*


@pytest.fixture(scope="module", autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def expected(parity_dir):
    with np.load(parity_dir / "expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def meta(parity_dir):
    return json.loads((parity_dir / "meta.json").read_text())


@pytest.fixture(scope="module")
def load(parity_dir):
    """(weights of the autoencoder, of the generators), "raw" or "ema" -> Pipeline of the pack."""

    @functools.cache
    def load(autoencoder: str, generators: str) -> Pipeline:
        files = parity_dir / "ae.ckpt", parity_dir / "generator.ckpt"
        return Pipeline(*conversion.read_published(*files, autoencoder, generators))

    return load


@pytest.fixture
def raw(load):
    return load("raw", "raw")


SLOW = pytest.mark.slow
COPIES = pytest.mark.parametrize("copy", ["raw", pytest.param("ema", marks=SLOW)])


def prefix(copy: str) -> str:
    return "" if copy == "raw" else "ema_"


def close(ours, theirs, tolerance: float):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    error = np.abs(ours - theirs).max() / max(np.abs(theirs).max(), np.finfo(np.float32).tiny)
    assert error <= tolerance


def same(ours, theirs, message=""):
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs), message)


def channels_last(x):
    """(B, C, h, w) -> (B, h, w, C)."""
    return np.moveaxis(x, 1, -1)


def positions(x):
    """(B, D, h, w) -> (B, L, D)."""
    return channels_last(x).reshape(x.shape[0], -1, x.shape[1])


@functools.partial(jax.jit, static_argnames=("model", "method"))
def apply(model, params, *args, method):
    """Compiled once for the raw and the averaged weights."""
    return model.apply({"params": params}, *args, method=method)


def tokenize(pipe, *args, method):
    return apply(pipe.tokenizer, pipe.params["tokenizer"], *args, method=method)


def generator(pipe, name):
    """(module, its parameters) of the "content" or "structure" generator."""
    return pipe.metadata.model.make_generator(name), pipe.params[name]


# The tokenizer.


@pytest.mark.slow
@COPIES
def test_latent(load, expected, copy):
    latent = tokenize(load(copy, "raw"), expected["images_nhwc"], method="latents")
    close(latent, positions(expected[prefix(copy) + "latent"]), NETWORK)


@pytest.mark.slow
@COPIES
def test_maps_tokens_and_canvases(load, expected, copy):
    name = prefix(copy)
    got = tokenize(load(copy, "raw"), expected["images_nhwc"], method="encode")
    same(got.sequence.structure, expected[name + "labels"])
    same(got.sequence.tokens, expected[name + "tokens"])
    before = jnp.concatenate([jnp.zeros_like(got.canvases[:, :1]), got.canvases[:, :-1]], axis=1)
    close(before, expected[name + "canvas"], NETWORK)
    close(got.canvases[:, -1], expected[name + "fhat"], NETWORK)


@COPIES
def test_canvases_of_a_sequence(load, expected, copy):
    """From the pack's maps and tokens, through the function that sampling uses."""
    name = prefix(copy)
    sequence = GranularitySequence(expected[name + "labels"], expected[name + "tokens"])
    canvases = tokenize(load(copy, "raw"), sequence, method="canvases")
    close(canvases[:, -1], expected[name + "fhat"], NETWORK)
    close(canvases[:, :-1], expected[name + "canvas"][:, 1:], NETWORK)


@COPIES
def test_decoded_image(load, expected, copy):
    name = prefix(copy)
    image = tokenize(load(copy, "raw"), expected[name + "fhat"], method="decode")
    close(image, channels_last(expected[name + "decoded"]), NETWORK)


@pytest.mark.slow
@pytest.mark.parametrize("name, index_backprop", [("vq", False), ("vqsmooth", True)])
def test_quantizer_in_training(raw, expected, name, index_backprop):
    """Losses, tokens and gradients; vqsmooth is the warm-up with index backpropagation."""

    def loss(latents, params):
        quantized = raw.tokenizer.apply(
            {"params": params}, latents, index_backprop, method="quantize"
        )
        return quantized.losses.mean(), quantized

    grad = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (total, quantized), (latent_grad, grads) = grad(
        jnp.asarray(positions(expected["latent"])), raw.params["tokenizer"]
    )
    row = {key[len(name) + 1 :]: x for key, x in expected.items() if key.startswith(name + "_")}
    close(total, row["loss"], NETWORK)
    close(quantized.losses, row["loss_per_stage"], NETWORK)
    for stage, ids in enumerate(quantized.stage_tokens):
        same(ids, row[f"indices_{stage}"])
    close(quantized.canvases[:, -1], positions(row["fhat"]), NETWORK)
    grads = weight_names.published_views(
        {f"quantizer/{k}": np.asarray(v) for k, v in grads["quantizer"].items()}
    )
    close(grads["quantize.embedding.weight"], row["grad_embedding"], NETWORK)
    for leaf in ("weight", "bias"):
        stages = [grads[f"quantize.quant_resi.{i}.{leaf}"] for i in range(len(quantized.losses))]
        close(np.stack(stages), row[f"grad_phi_{leaf}"], NETWORK)
    close(latent_grad, positions(row["grad_z"]), NETWORK)


@pytest.mark.slow
def test_hierarchies_of_points(expected):
    """Random, clumped and exactly tied points."""
    names = [key.removesuffix("_points") for key in expected if re.match("clust_.*_points", key)]
    assert names
    for size in {expected[name + "_points"].shape[1] for name in names}:  # one compilation each
        rows = [name for name in names if expected[name + "_points"].shape[1] == size]
        points = np.concatenate([expected[name + "_points"] for name in rows])
        labels = np.concatenate([expected[name + "_labels"] for name in rows])
        same(clustering.greedy_hierarchy(points), labels, f"{rows}")


# The functions without parameters.


def test_structure_embedding(expected):
    feature = expected["structure_feat"]
    stages = feature.shape[1]
    labels = jnp.asarray(expected["labels"])
    same(granularity.structure_embedding(labels, jnp.arange(stages), stages - 1), feature)


@pytest.mark.parametrize("name, kinds", [("content", (0,)), ("structure", (2, 0))])
def test_rotary_embedding(raw, expected, name, kinds):
    """The rotation matrices, which the pack stores for its first image and some stages."""
    feature = expected["structure_feat"]
    head_dim = raw.metadata.model.generators[name].head_dim
    split = layers.rope_split(head_dim, feature.shape[-1])
    rows = {int(m[1]): key for key in expected if (m := re.fullmatch(rf"rope_s(\d+)_{name}", key))}
    assert rows
    for stage, key in rows.items():
        at = layers.rope_positions(
            jnp.asarray(feature[:1, stage]), kinds, raw.tokenizer.config.latent_size
        )
        cos, sin = layers.rope_angles(at, split)
        matrices = jnp.stack([jnp.stack([cos, -sin], -1), jnp.stack([sin, cos], -1)], axis=-2)
        close(matrices[:, None], expected[key], NETWORK)


def test_time_embedding(expected):
    temb = expected["temb"]
    got = layers.timestep_embedding(jnp.asarray(expected["temb_t"]), temb.shape[-1])
    close(got, temb, NETWORK)


def test_flow_schedule(expected):
    rows = {m: key for key in expected if (m := re.fullmatch(r"schedule_(\d+)_(\d+)", key))}
    assert rows
    for match, key in rows.items():
        close(flow.shifted_times(int(match[1]), int(match[2])), expected[key], 1e-6)


def test_top_p_range(expected):
    rows = {m: key for key in expected if (m := re.fullmatch(r"neglog_(\w+)_(\w+)_(\d+)", key))}
    assert rows
    for match, key in rows.items():
        start, end = (float(number.replace("p", ".")) for number in match.groups()[:2])
        close(top_p_range(start, end, int(match[3])), expected[key], 1e-12)


def test_token_filters(expected):
    keys = [key for key in expected if re.match("filter_top", key)]
    assert keys
    for key in keys:
        top_k, top_p = re.search(r"topk(\d+)", key), re.search(r"topp([\d.]+)", key)
        got = filter_logits(
            jnp.asarray(expected["filter_in"]),
            int(top_k[1]) if top_k else None,
            float(top_p[1]) if top_p else None,
        )
        same(got, expected[key], key)


@pytest.mark.parametrize(
    "name, decay_from, final", [("lr_short", 1000 + 8000, 0.1), ("lr_long", 10_000, 0.01)]
)
def test_learning_rate(expected, name, decay_from, final):
    """Warm-up of 1000 steps, constant, linear decay; the key names the total number of steps."""
    (key,) = [key for key in expected if key.startswith(name + "_total")]
    steps = int(key.removeprefix(name + "_total"))
    config = optimizer_config(decay_start=decay_from / steps, final=final)
    schedule = learning_rate_schedule(config, 256, steps)
    close([float(schedule(int(step))) for step in expected["lr_steps"]], expected[key], 1e-6)


def no_tie(scores):
    """Whether clipping leaves the halves of each cluster (clusters, n) distinct: (clusters,)."""
    ordered = np.sort(np.clip(scores, -1, 1), axis=-1)
    half = scores.shape[-1] // 2
    return ordered[:, half - 1] != ordered[:, half]


def by_cluster(values, labels):
    """(B, L) -> (B * clusters, n), the positions of each cluster in ascending order."""
    order = np.argsort(labels, axis=-1, kind="stable")
    count = labels.max() + 1
    return np.take_along_axis(values, order, axis=-1).reshape(len(values) * count, -1)


def same_splits(ours, theirs, scores, labels):
    """Asserts equal splits of the clusters without a tie after clipping; returns their number."""
    settled = no_tie(by_cluster(np.asarray(scores), labels))
    same(by_cluster(np.asarray(ours), labels)[settled], by_cluster(theirs, labels)[settled])
    return settled.sum()


@pytest.mark.slow
def test_splits_of_scores(expected):
    rows = [key.removesuffix("_in") for key in expected if re.fullmatch(r"gtk\d+_in", key)]
    assert rows
    for row in rows:
        scores = expected[row + "_in"]  # (B, clusters, positions of a cluster)
        batch, clusters, size = scores.shape
        labels = np.broadcast_to(np.repeat(np.arange(clusters), size), (batch, clusters * size))
        flat = scores.reshape(batch, -1)
        got = granularity.split(jnp.asarray(labels), jnp.asarray(flat), clusters.bit_length() - 1)
        chosen = expected[row + "_out"].reshape(batch, -1)
        assert same_splits(got, 2 * labels + chosen, flat, labels)


def test_split_of_a_map(expected):
    labels, scores = expected["cluster_cur"], expected["cluster_logits"]
    stage = int(expected["cluster_stage"])
    got = granularity.split(jnp.asarray(labels), jnp.asarray(scores), stage)
    assert same_splits(got, expected["cluster_out"], scores, labels)


# The generators in training.


@pytest.fixture(scope="module")
def training(load, expected):
    """Function: parameters of the generators -> (loss, terms, gradients by published name).

    It uses the pack's noise, times and classes and the raw autoencoder's sequences, without REPA.
    """
    pipe = load("raw", "raw")
    (content, _), (structure, _) = (generator(pipe, name) for name in ("content", "structure"))
    class_ids = jnp.asarray(expected["train_txt"][:, 0])
    noise = jnp.asarray(expected["train_eps"][:, 0])
    times = jax.nn.sigmoid(jnp.asarray(expected["train_u"][..., 0, 0]))
    quantized = tokenize(pipe, expected["images_nhwc"], method="encode")
    canvas_scale = jnp.asarray(pipe.metadata.canvas_scale)
    stages, learned = pipe.tokenizer.config.num_stages, times.shape[1]

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        terms = {"times": times.reshape(-1, 1, 1)}

        def predict_canvas(canvas, embedding, stage):
            terms["canvas"], hidden = content.apply(
                {"params": params["content"]}, canvas, embedding, stage,
                jnp.repeat(class_ids, stages), canvas_scale, method="predict_canvas",
            )  # fmt: skip
            return terms["canvas"], hidden

        def token_logits(missing):
            own = {"params": params["content"]}
            terms["logits"] = content.apply(own, missing, method="token_logits")
            return terms["logits"]

        def velocity(noisy, *args):
            own = {"params": params["structure"]}
            terms["noisy"] = noisy
            terms["velocity"] = structure.apply(own, noisy, *args, jnp.repeat(class_ids, learned))
            return terms["velocity"]

        terms |= content_losses(predict_canvas, token_logits, quantized)[0]
        terms["flow_loss"] = structure_losses(
            velocity, quantized.sequence.structure, quantized.canvases, noise, times
        )
        total = (terms["canvas_loss"] + terms["token_loss"]).mean() + terms["flow_loss"].mean()
        return total, terms

    def run(params):
        (total, terms), grads = loss({name: params[name] for name in models.GENERATORS})
        grads = {path: np.asarray(x) for path, x in flatten_dict(grads, sep="/").items()}
        return total, terms, weight_names.published_views(grads)

    return run


@pytest.mark.slow
@COPIES
def test_training_outputs_and_losses(load, training, expected, meta, copy):
    """With the generators' raw and averaged weights."""
    total, terms, grads = training(load("raw", copy).params)
    row = {
        key.removeprefix(prefix(copy) + "train_"): x
        for key, x in expected.items()
        if key.startswith(prefix(copy) + "train_")
    }
    close(terms["canvas"], row["x0_hat"], NETWORK)
    close(terms["canvas_loss"], row["final_loss"], NETWORK)
    close(terms["token_loss"], row["ce_loss"], NETWORK)
    close(terms["token_accuracy"], row["acc"], 0)
    close(terms["flow_loss"], row["structure_loss"], NETWORK)
    close(total, row["loss_uniform"], NETWORK)
    for key, theirs in row.items():
        if match := re.fullmatch(r"logits_(\d+)(?:\D+(\d+))?", key):
            clusters, stride = 2 ** int(match[1]), int(match[2] or 1)
            logits = terms["logits"][:, clusters - 1 : 2 * clusters - 1]
            close(logits[:, ::stride], theirs, NETWORK)
        elif key.startswith("grad/"):
            close(grads[key.removeprefix("grad/")], theirs, NETWORK)
    if copy == "raw":
        target = row["structure_target"].reshape(terms["noisy"].shape)
        # z = t * noise + (1 - t) * target, and the target is predicted as noise - velocity.
        noise = (terms["noisy"] - (1 - terms["times"]) * target) / terms["times"]
        close(noise - terms["velocity"], row["structure_logits"], NETWORK)
        norms = {name: np.linalg.norm(grads[name]) for name in meta["train_grad_norms"]}
        assert norms == pytest.approx(meta["train_grad_norms"], rel=NETWORK)
        total_norm = np.linalg.norm(list(norms.values()))
        assert total_norm == pytest.approx(float(row["grad_total_norm"]), rel=NETWORK)


@SLOW
def test_training_with_averaged_content_alone(load, training, expected):
    content = load("raw", "ema").params["content"]
    total, _, _ = training(load("raw", "raw").params | {"content": content})
    close(total, expected["contentema_train_loss_uniform"], NETWORK)


# The generators in sampling.


def test_velocity_of_one_flow_step(raw, expected):
    model, params = generator(raw, "structure")

    @jax.jit
    def run(params, *args):
        options = {"capture_intermediates": True, "mutable": ["intermediates"]}
        return model.apply({"params": params}, *args, **options)

    stages = [int(m[1]) for key in expected if (m := re.fullmatch(r"vel_s(\d+)_v", key))]
    assert stages
    for stage in stages:
        row = {k[len(f"vel_s{stage}_") :]: expected[k] for k in expected if f"vel_s{stage}_" in k}
        batch, _, num_bits = row["z"].shape
        velocity, state = run(
            params,
            jnp.asarray(row["z"]),
            jnp.full(batch, row["t"]),
            granularity.structure_embedding(jnp.asarray(row["structure"]), stage, num_bits),
            jnp.asarray(row["canvas"]),
            jnp.full(batch, stage),
            jnp.asarray(expected["vel_txt"][:, 0]),
        )
        close(velocity, row["v"], NETWORK)
        inside = {k[0]: v[0] for k, v in flatten_dict(state["intermediates"]).items()}
        vec = inside["class_embed"] + inside["time_out"] + inside["stage_embed"]
        close(vec, row["vec"], NETWORK)
        if "tokens_out" in row:
            close(inside["blocks"][0], row["tokens_out"], NETWORK)


def guidance(meta, kind: str) -> tuple[float, float]:
    """(first, last) of the pack's "linspace(1,3.5,9)"."""
    start, end, _ = re.fullmatch(r"linspace\((.*),(.*),(.*)\)", meta["cfg"][kind]).groups()
    return float(start), float(end)


@pytest.fixture(scope="module")
def one_stage(load, meta):
    """Functions of one stage with guidance and the raw weights, compiled once.

    predict: (canvas before the stage, map, stage, class ids, scale) -> (predicted final canvases
        (2B, L, D), conditional ones first; guided logits (B, L, V)).
    scores: (canvas after the stage, map, stage, class ids, scale, noise, flow steps) -> (B, L).
    """
    pipe = load("raw", "raw")
    (content, content_params), (structure, structure_params) = (
        generator(pipe, name) for name in ("content", "structure")
    )
    canvas_scale = jnp.asarray(pipe.metadata.canvas_scale)
    num_bits = pipe.tokenizer.config.num_stages - 1

    def both(class_ids):
        return jnp.concatenate([class_ids, jnp.full_like(class_ids, content.num_classes)])

    def guided(x, scale):
        cond, null = jnp.split(x, 2)
        return null + scale * (cond - null)

    @jax.jit
    def predict(canvas, labels, stage, class_ids, scale):
        canvas, labels = jnp.tile(canvas, (2, 1, 1)), jnp.tile(labels, (2, 1))
        embedding = granularity.structure_embedding(labels, stage, num_bits)
        apply = functools.partial(content.apply, {"params": content_params})
        final = apply(
            canvas, embedding, jnp.full(len(canvas), stage), both(class_ids), canvas_scale,
            method="predict_canvas",
        )[0]  # fmt: skip
        missing = granularity.cluster_means(final - canvas, labels, labels.shape[1])
        logits = apply(missing, method="token_logits")
        return final, guided(logits, scale)

    @functools.partial(jax.jit, static_argnames="steps")
    def scores(canvas, labels, stage, class_ids, scale, noise, steps):
        embedding = granularity.structure_embedding(labels, stage, num_bits)
        twice = lambda x: jnp.concatenate([x, x])

        def velocity(z, time):
            time = jnp.full(2 * len(z), time)
            args = twice(z), time, twice(embedding), twice(canvas), jnp.full(2 * len(z), stage)
            out = structure.apply({"params": structure_params}, *args, both(class_ids))
            return guided(out, scale)

        times = jnp.asarray(flow.shifted_times(steps, labels.shape[1]), jnp.float32)
        z = flow.solve(velocity, noise, embedding - 1.0, stage, times)
        return jnp.take(z, stage, axis=2)

    return predict, scores


@pytest.mark.slow
def test_each_stage_from_the_true_canvas_and_map(raw, expected, meta, one_stage):
    predict, scores = one_stage
    class_ids, noise = (jnp.asarray(expected[f"gentf_{k}"]) for k in ("class_label", "noise"))
    labels = expected["labels"]
    stages = labels.shape[1]
    content_scale, structure_scale = (
        np.linspace(*guidance(meta, kind), stages) for kind in ("content", "structure")
    )
    for stage in range(stages):
        before, map_ = expected["canvas"][:, stage], labels[:, stage]
        final, logits = predict(before, map_, stage, class_ids, content_scale[stage])
        if f"gentf_x0_hat_s{stage}" in expected:
            close(final, expected[f"gentf_x0_hat_s{stage}"], NETWORK)
        tokens = jnp.take_along_axis(logits.argmax(-1), jnp.asarray(map_), axis=1)
        same(tokens, expected["gentf_pred"][stage], f"stage {stage}")
        after = tokenize(raw, before, tokens, stage, method="add_stage")
        if f"gentf_canvas_s{stage}" in expected:
            close(after, expected[f"gentf_canvas_s{stage}"], NETWORK)
        if stage == stages - 1:
            continue
        if stage == stages - 2:
            got = noise[:, :, stage]
        else:
            got = scores(after, map_, stage, class_ids, structure_scale[stage], noise, FLOW_STEPS)
        close(got, expected["gentf_cluster_in"][stage], NETWORK)
        split = granularity.split(jnp.asarray(map_), got, stage)
        same(split, expected["gentf_structure"][stage], f"map of stage {stage + 1}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["gen4", *(pytest.param(n, marks=SLOW) for n in ("gen25", "gen4nocfg", "gen4randn"))]
)
def test_whole_generation(raw, expected, meta, name):
    """Argmax tokens and deterministic splits: equal tokens and maps up to the first tied split."""
    guided = "nocfg" not in name
    out = raw.sample(
        expected[name + "_class_label"].tolist(),
        structure_noise=expected[name + "_noise"],
        temperature=0,
        top_k=0,
        top_p=1,
        flow_steps=int(re.match(r"gen(\d+)", name)[1]),
        content_guidance=guidance(meta, "content") if guided else 1,
        structure_guidance=guidance(meta, "structure") if guided else 1,
        canvases=True,
    )
    ties = np.flatnonzero(expected[name + "_cluster_ties"])
    splits = ties[0] if ties.size else out.sequence.structure.shape[1] - 1
    for stage in range(splits + 1):
        margin = expected[name + "_pred_margin"][stage]
        same(
            out.sequence.tokens[:, stage],
            expected[name + "_pred"][stage],
            f"tokens of stage {stage}; the two best logits differ by {margin} in the pack",
        )
        close(out.canvases[:, stage], expected[name + "_canvas"][stage], NETWORK)
    for stage in range(splits):
        margin = expected[name + "_cluster_margin"][stage]
        same(
            out.sequence.structure[:, stage + 1],
            expected[name + "_structure"][stage],
            f"map of stage {stage + 1}; the scores at the cut differ by {margin} in the pack",
        )
    if not ties.size:
        close(out.images, channels_last(expected[name + "_image"]), IMAGE)
    # Decoding the pack's own final canvas does not depend on ties.
    image = raw.decode_canvas(expected[name + "_canvas"][-1])
    close(image, channels_last(expected[name + "_image"]), NETWORK)


@SLOW
def test_networks_inside_a_generation(expected, meta, one_stage):
    """Every stage by itself from the pack's canvas and map: logits, scores and splits.

    Of gen4randn, whose ties end the comparison of the whole generation early.
    """
    predict, scores = one_stage
    row = {k.removeprefix("gen4randn_"): x for k, x in expected.items() if "gen4randn_" in k}
    class_ids, noise = jnp.asarray(row["class_label"]), jnp.asarray(row["noise"])
    stages = len(row["canvas"])
    maps = np.concatenate([np.zeros_like(row["structure"][:1]), row["structure"]])
    before = np.concatenate([np.zeros_like(row["canvas"][:1]), row["canvas"][:-1]])
    content_scale, structure_scale = (
        np.linspace(*guidance(meta, kind), stages) for kind in ("content", "structure")
    )
    for stage in range(stages):
        _, logits = predict(before[stage], maps[stage], stage, class_ids, content_scale[stage])
        tokens = jnp.take_along_axis(logits.argmax(-1), jnp.asarray(maps[stage]), axis=1)
        same(tokens, row["pred"][stage], f"stage {stage}")
        if f"logits_s{stage}" in row:
            close(logits[:, : 2**stage], row[f"logits_s{stage}"], NETWORK)
        if stage == stages - 1:
            continue
        theirs = row["cluster_in"][stage]
        if stage == stages - 2:
            close(noise[:, :, stage], theirs, 0)
        else:
            canvas, scale = row["canvas"][stage], structure_scale[stage]
            got = scores(canvas, maps[stage], stage, class_ids, scale, noise, FLOW_STEPS)
            close(got, theirs, NETWORK)
        split = granularity.split(jnp.asarray(maps[stage]), jnp.asarray(theirs), stage)
        assert same_splits(split, row["structure"][stage], theirs, maps[stage])
