"""The published names: our full-size models accept exactly the published tensors."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers import published_tokenizer
from safetensors.numpy import load_file, save_file

from nvg_jax import models
from nvg_jax.layers import TransformerConfig
from nvg_jax.tokenizer import TokenizerConfig
from nvg_jax.torch_interop import weight_names


def shapes(init, model) -> dict[str, tuple[int, ...]]:
    """Path -> shape of a model's parameters, without allocating them."""
    tree = nn.unbox(jax.eval_shape(lambda key: init(model, key), jax.random.key(0)))
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}


def tokenizer_shapes(config: TokenizerConfig) -> dict[str, tuple[int, ...]]:
    return shapes(models.init_tokenizer, models.ModelConfig(config).make_tokenizer())


def generator_shapes(sizes: dict, config: TokenizerConfig) -> dict[str, tuple[int, ...]]:
    found = {"canvas_scale": (config.num_stages + 1,)}
    for name in models.GENERATORS:
        transformer = {name: TransformerConfig(**sizes[name])}
        model = models.ModelConfig(config, sizes["num_classes"], **transformer).make_generator(name)
        found |= {f"{name}/{k}": v for k, v in shapes(models.init_generator, model).items()}
    return found


def stand_ins(shapes_by_name) -> dict[str, np.ndarray]:
    """Arrays of the given shapes that take no memory."""
    return {name: np.broadcast_to(np.float32(0), tuple(s)) for name, s in shapes_by_name.items()}


def published_shapes(ours) -> dict[str, tuple[int, ...]]:
    views = weight_names.published_views(stand_ins(ours))
    return {name: view.shape for name, view in views.items()}


@pytest.fixture(scope="module")
def keys(parity_dir):
    return json.loads((parity_dir / "keys.json").read_text())


@pytest.mark.slow
def test_autoencoder(keys):
    names = {name: tuple(shape) for name, shape in keys["ae"]["keys"].items()}
    config = TokenizerConfig(**weight_names.tokenizer_sizes(stand_ins(names)))
    assert config == published_tokenizer()
    ours = tokenizer_shapes(config)
    assert published_shapes(ours) == names
    total = sum(int(np.prod(shape)) for shape in ours.values())
    assert total == keys["ae"]["params"]["total"]


@pytest.mark.slow
@pytest.mark.parametrize("name, depth", [("d16", 16), ("d20", 20), ("d24", 24)])
def test_generators(keys, name, depth):
    names = {name: tuple(shape) for name, shape in keys[name]["keys"].items()}
    tensors = stand_ins(names) | {"rope_ids": weight_names.rope_ids((16, 16))}
    sizes = weight_names.generator_sizes(tensors)
    assert sizes == {
        "content": {"width": 64 * depth, "depth": depth, "head_dim": 64, "mlp_ratio": 4},
        "structure": {"width": 32 * depth, "depth": depth, "head_dim": 64, "mlp_ratio": 4},
        "num_classes": 1000,
        "latent_size": (16, 16),
        "latent_dim": 32,
        "codebook_size": 4096,
    }
    ours = generator_shapes(sizes, published_tokenizer())
    assert published_shapes(ours) | {"rope_ids": (1, 257, 11)} == names
    for part in models.GENERATORS:
        total = sum(int(np.prod(s)) for path, s in ours.items() if path.startswith(part))
        assert total == keys[name]["params"][part]


def test_layouts():
    """A convolution (out, in, kh, kw), a linear (out, in) and the blocks apart, by their values."""
    ours = {
        "encoder/conv_in/kernel": np.arange(24.0).reshape(1, 2, 3, 4),  # (kh, kw, in, out)
        "content/blocks/blocks/linear1/kernel": np.arange(12.0).reshape(2, 2, 3),
        "content/blocks/blocks/query_norm/scale": np.arange(4.0).reshape(2, 2),
        "quantizer/smooth_kernel": np.arange(8.0).reshape(2, 1, 1, 2, 2),
    }
    views = weight_names.published_views(ours)
    conv = views["encoder.conv_in.conv.weight"]
    assert conv.shape == (4, 3, 1, 2)
    assert conv[3, 1, 0, 1] == ours["encoder/conv_in/kernel"][0, 1, 1, 3]
    assert views["content_blocks.1.linear1.weight"].tolist() == [[6, 9], [7, 10], [8, 11]]
    assert views["content_blocks.1.norm.query_norm.scale"].tolist() == [2, 3]
    assert views["quantize.quant_resi.1.weight"][:, :, 0, 0].tolist() == [[4, 6], [5, 7]]


def test_rope_ids_of_a_wide_grid():
    ids = weight_names.rope_ids((2, 4))
    assert ids.shape == (1, 9, 6)
    assert ids[0, 0].tolist() == [1] * 6
    assert ids[0, 6].tolist() == [0, 0, 0, 0, 1, 1]  # row 1, column 1


OURS = {"content/canvas_embed/kernel": (3, 2), "content/canvas_embed/bias": (2,)}
WEIGHT, BIAS = np.float32([[1, 2, 3], [4, 5, 6]]), np.float32([7, 8])


def test_from_published():
    params = weight_names.from_published(
        {"content_embed.bias": BIAS, "content_embed.weight": WEIGHT.astype(np.float16)}, OURS
    )
    assert params["content/canvas_embed/kernel"].tolist() == [[1, 4], [2, 5], [3, 6]]
    assert params["content/canvas_embed/kernel"].dtype == np.float32


@pytest.mark.parametrize(
    "tensors, sentences",
    [
        (
            {"content_embed.weight": WEIGHT, "content_embed.biases": BIAS},
            ["missing (1): content_embed.bias (2,)\n", "unexpected (1): content_embed.biases"],
        ),
        (
            {"content_embed.weight": WEIGHT.T, "content_embed.bias": BIAS},
            ["of another shape (1): content_embed.weight (3, 2), expected (2, 3)"],
        ),
        (
            {"content_embed.weight": WEIGHT, "content_embed.bias": BIAS.astype(np.float64)},
            ["of another type (1): content_embed.bias float64"],
        ),
    ],
)
def test_other_tensors_are_listed(tensors, sentences):
    with pytest.raises(ValueError) as error:
        weight_names.from_published(tensors, OURS)
    for sentence in sentences:
        assert sentence in str(error.value)


def test_sizes_that_cannot_be_told():
    with pytest.raises(ValueError, match="no tensor 'encoder.conv_in.conv.weight'"):
        weight_names.tokenizer_sizes({"rope_ids": BIAS})
    with pytest.raises(ValueError, match="no tensor 'rope_ids'"):
        weight_names.generator_sizes({"x": BIAS})
    with pytest.raises(ValueError, match="row-major"):
        weight_names.generator_sizes({"rope_ids": weight_names.rope_ids((2, 4))[:, ::-1]})
    with pytest.raises(
        ValueError, match=r"rope_ids has the shape \(0,\), not 3 sizes above 0: the"
    ):
        weight_names.generator_sizes({"rope_ids": np.zeros(0)})
    with pytest.raises(ValueError, match="row-major"):
        weight_names.generator_sizes({"rope_ids": np.full((1, 9, 6), np.nan)})


def test_latent_size_of_an_autoencoder(keys):
    names = {name: tuple(shape) for name, shape in keys["ae"]["keys"].items()}
    sizes = weight_names.tokenizer_sizes(stand_ins(names), (8, 32))
    assert TokenizerConfig(**sizes).image_size == (128, 512)
    with pytest.raises(ValueError, match="256 latent positions, which cannot be 8 x 8"):
        weight_names.tokenizer_sizes(stand_ins(names), (8, 8))
    del names["quantize.quant_resi.8.weight"], names["quantize.quant_resi.8.bias"]
    with pytest.raises(ValueError, match="128 latent positions.*Give its latent size"):
        weight_names.tokenizer_sizes(stand_ins(names))
    others = {name: shape for name, shape in names.items() if "quant_resi" not in name}
    with pytest.raises(ValueError, match="has no quantize.quant_resi; it is not one of NVG"):
        weight_names.tokenizer_sizes(stand_ins(others))


@pytest.mark.slow
@pytest.mark.parametrize("copy", weight_names.WEIGHTS)
def test_there_and_back_gives_the_same_bytes(parity_dir, tmp_path, copy):
    """Published -> ours -> published -> a safetensors file, both files of the pack."""
    autoencoder = weight_names.read(parity_dir / "ae.ckpt", copy)
    generator = weight_names.read(parity_dir / "generator.ckpt", copy)
    sizes = weight_names.generator_sizes(generator)
    grid = sizes["latent_size"]
    config = TokenizerConfig(**weight_names.tokenizer_sizes(autoencoder, grid))
    for tensors, shapes_, back_to, prefix in (
        (autoencoder, tokenizer_shapes(config), None, ""),
        (generator, generator_shapes(sizes, config), grid, "nvgformer."),
    ):
        params = weight_names.from_published(tensors, shapes_)
        save_file(weight_names.to_published(params, back_to), tmp_path / "back.safetensors")
        back = load_file(tmp_path / "back.safetensors")
        assert set(back) == {prefix + name for name in tensors}
        for name, tensor in tensors.items():
            other = back[prefix + name]
            assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape), name
            assert other.tobytes() == tensor.tobytes(), name


def test_copies_of_the_weights(parity_dir):
    raw = weight_names.read(parity_dir / "ae.ckpt", "raw")
    averaged = weight_names.read(parity_dir / "ae.ckpt", "ema")
    assert set(raw) == set(averaged)
    name = "encoder.conv_in.conv.bias"
    assert not np.array_equal(raw[name], averaged[name])
    with pytest.raises(ValueError, match="holds no ema weights. Take the raw ones"):
        weight_names.read(parity_dir / "ae.legacy.ckpt", "ema")


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, depths, heads",
    [
        (dict(image_size=(128, 128), channel_multipliers=(1, 2, 2, 4)), (6, 6), 64),
        (dict(image_size=(16, 32), latent_size=(8, 16), channel_multipliers=(2, 1)), (2, 3), 32),
        (dict(image_size=(8, 8), latent_size=(8, 8), channel_multipliers=(3,)), (1, 1), 64),
    ],
)
def test_other_sizes_are_read_from_the_tensors(config, depths, heads):
    config = published_tokenizer(codebook_size=1024, latent_dim=12, blocks_per_level=3, **config)
    sizes = {
        name: dict(width=2 * heads, depth=depth, head_dim=heads, mlp_ratio=2)
        for name, depth in zip(models.GENERATORS, depths, strict=True)
    } | {"num_classes": 10}
    views = weight_names.published_views(stand_ins(tokenizer_shapes(config)))
    assert TokenizerConfig(**weight_names.tokenizer_sizes(views, config.latent_size)) == config
    views = weight_names.published_views(stand_ins(generator_shapes(sizes, config)))
    views["rope_ids"] = weight_names.rope_ids(config.latent_size)
    assert weight_names.generator_sizes(views) == sizes | {
        "latent_size": config.latent_size,
        "latent_dim": 12,
        "codebook_size": 1024,
    }
