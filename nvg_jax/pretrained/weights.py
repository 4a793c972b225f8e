"""From the files that people publish to a checked file of ours in a cache folder, and back.

What a network does not need is worked in once, here: DINOv2's layer scales are multiplied into the
linears before them, position embeddings are resampled to 224 x 224 pixels, and the key biases are
zero (a key's bias adds the same to all scores of a query, which the softmax does not see).
"""

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from nvg_jax.pretrained.networks import (
    DEPTH,
    SIZES,
    VGG_CHANNELS,
    VIT_IMAGE,
    Lpips,
    VisionTransformer,
)
from nvg_jax.runtime.files import fingerprint
from nvg_jax.torch_interop.checkpoint_files import read_state_dict


@dataclasses.dataclass(frozen=True)
class Source:
    """Published files (name -> address), pattern of their tensors that are of no use here, and the
    setting of a run that does without the network."""

    files: dict[str, str]
    unneeded: str
    without: str


SOURCES = {
    "lpips": Source(
        {
            "vgg16-397923af.pth": "https://download.pytorch.org/models/vgg16-397923af.pth",
            "vgg.pth": "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/"
            "weights/v0.1/vgg.pth",
        },
        r"(classifier|pre_logits|head|lins|scaling_layer)\..*",
        "tokenizer_training.perceptual_weight=0",
    ),
    "dino": Source(
        {
            "dino_deitsmall16_pretrain.pth": "https://dl.fbaipublicfiles.com/dino/"
            "dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"
        },
        "",
        "tokenizer_training.adversarial_weight=0",
    ),
    "dinov2": Source(
        {
            "dinov2_vitb14_pretrain.pth": "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/"
            "dinov2_vitb14_pretrain.pth"
        },
        "mask_token",
        "generator_training.repa_weight=0",
    ),
}
NAMES = tuple(SOURCES)
DINOV2_GRID = 37  # rows of its published position embedding, for 518 x 518 pixels


def abstract(name: str) -> dict[str, Any]:
    """The tree of `jax.ShapeDtypeStruct` that `load` gives values to, all float32."""
    if _known(name) == "lpips":
        model, images = Lpips(), ((1, 16, 16, 3),) * 2
    else:
        model, images = VisionTransformer(**SIZES[name]), ((1, VIT_IMAGE, VIT_IMAGE, 3),)
    init = lambda: model.init(jax.random.key(0), *map(jnp.zeros, images))
    return jax.eval_shape(init)["params"]


def convert(name: str, files: Sequence[str | Path], cache: str | Path | None = None) -> Path:
    """Stores the parameters of a network from its published files, for `load`.

    Args:
        name: one of NAMES.
        files: the published ones, or timm's, from `torch.save` or as .safetensors. "lpips" needs
            two, torchvision's (or timm's) VGG16 and the heads of the package lpips, or one, the
            state dict of its `LPIPS(net="vgg")`.
        cache: folder, by default that of $NVG_CACHE, else ~/.cache/nvg_jax.

    Returns:
        The written file. It appears complete or not at all.

    Raises:
        ValueError: an unknown name, files that are missing or cannot be read, tensors that are
            missing, unexpected, of another shape or type; it lists them.
    """
    source = SOURCES[_known(name)]
    tensors = {}
    for file in map(Path, files):
        found = _read(file, source.unneeded)
        # lpips numbers VGG16's layers as torchvision does, within five slices.
        found = {re.sub(r"^net\.slice\d\.", "features.", key): x for key, x in found.items()}
        if twice := [key for key in found if key in tensors]:
            raise ValueError(f"{file} repeats tensors of another file: {_listed(twice)}.")
        tensors |= found
    _check(name, files, tensors)
    tensors = {key: tensor.astype(np.float32) for key, tensor in tensors.items()}
    params = _lpips_params(tensors) if name == "lpips" else _vit_params(tensors, **SIZES[name])
    path = _path(name, cache)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    flat = {key: np.ascontiguousarray(x) for key, x in flatten_dict(params, sep="/").items()}
    checksum = fingerprint(unflatten_dict(flat, sep="/"))
    try:
        unfinished.write_bytes(save(flat, {"checksum": checksum}))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def load(name: str, cache: str | Path | None = None) -> dict[str, Any]:
    """The parameters of a network, NumPy float32, whose checksum is verified.

    Args:
        name: one of NAMES.
        cache: the folder given to `convert`.

    Raises:
        ValueError: an unknown name; nothing was converted, with what to do; a damaged file.
    """
    source, path = SOURCES[_known(name)], _path(name, cache)
    own = "" if path == _path(name, None) else f"NVG_CACHE={path.parent} "
    command = f"{own}python -m nvg_jax.convert --pretrained={name} --from={','.join(source.files)}"
    if not path.is_file():
        raise ValueError(
            f"The weights of {name} are not there ({path}). Download {_files(source)}, and run "
            f"`{command}`. Or go without: --config.{source.without}."
        )
    try:
        with safe_open(path, "numpy") as file:
            checksum = (file.metadata() or {}).get("checksum")
            flat = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}). Write it anew: `{command}`.") from error
    params = unflatten_dict(flat, sep="/")
    expected = {key: leaf.shape for key, leaf in flatten_dict(abstract(name), sep="/").items()}
    shapes = {key: x.shape for key, x in flat.items()}
    if shapes != expected or fingerprint(params) != checksum:
        raise ValueError(
            f"{path} is damaged (its contents and its checksum differ). Write it anew: `{command}`."
        )
    return params


def _known(name: str) -> str:
    if name not in SOURCES:
        raise ValueError(f"There is no pretrained network {name!r}; choose {', '.join(NAMES)}.")
    return name


def _path(name: str, cache: str | Path | None) -> Path:
    folder = cache or os.environ.get("NVG_CACHE") or "~/.cache/nvg_jax"
    if "://" in str(folder):
        raise ValueError(
            f"Pretrained networks are kept in folders, and {folder} is none; mount the bucket on "
            "every machine (gcsfuse; docs/launch.md) and give the folder it is mounted on."
        )
    return Path(folder).expanduser().absolute() / f"{name}.safetensors"


def _files(source: Source) -> str:
    return " and ".join(f"{file} from {address}" for file, address in source.files.items())


def _listed(items: Sequence[str]) -> str:
    """The first ten, so that a wholly wrong file gives a readable message."""
    more = f" and {len(items) - 10} more" if len(items) > 10 else ""
    return ", ".join(items[:10]) + more


def _read(file: Path, unneeded: str) -> dict[str, np.ndarray]:
    if not file.is_file():
        raise ValueError(f"There is no file {file}.")
    keep = lambda key: not re.fullmatch(unneeded, key)
    if file.suffix != ".safetensors":
        return read_state_dict(file, keep)
    try:
        return {key: tensor for key, tensor in load_file(file).items() if keep(key)}
    except SafetensorError as error:
        raise ValueError(f"Cannot read {file}, it is no safetensors file: {error}.") from error


def _check(name: str, files: Sequence[str | Path], tensors: dict[str, np.ndarray]):
    """Raises ValueError unless the tensors are those of the published files."""
    if name == "lpips":
        shapes = _lpips_shapes()
    else:
        shapes = _vit_shapes(name)
        # timm's networks for 224 x 224 pixels have the positions that we need.
        needed = (1, 1 + (VIT_IMAGE // SIZES[name]["patch"]) ** 2, SIZES[name]["width"])
        if "pos_embed" in tensors and tensors["pos_embed"].shape == needed:
            shapes["pos_embed"] = needed
    problems = {
        "missing": [f"{key} {shape}" for key, shape in shapes.items() if key not in tensors],
        "unexpected": [key for key in tensors if key not in shapes],
        "of another shape": [
            f"{key} {tensors[key].shape}, expected {shape}"
            for key, shape in shapes.items()
            if key in tensors and tensors[key].shape != shape
        ],
        "of another type": [
            f"{key} {tensor.dtype}"
            for key, tensor in tensors.items()
            if tensor.dtype not in (np.float32, np.float16, ml_dtypes.bfloat16)
        ],
    }
    if any(problems.values()):
        lists = [
            f"{problem} ({len(keys)}): {_listed(keys)}"
            for problem, keys in problems.items()
            if keys
        ]
        raise ValueError(
            f"The tensors of {', '.join(map(str, files))} are not those of {name}.\n"
            + "\n".join(lists)
            + f"\nGive {_files(SOURCES[name])}."
        )


def _vgg_modules() -> list[str]:
    """Published name of each convolution: features.N, where ReLU and pooling have numbers too."""
    names, number = [], 0
    for channels in VGG_CHANNELS:
        for _ in channels:
            names.append(f"features.{number}")
            number += 2
        number += 1
    return names


def _lpips_shapes() -> dict[str, tuple[int, ...]]:
    shapes, before = {}, 3
    for name, after in zip(_vgg_modules(), sum(VGG_CHANNELS, ())):
        shapes |= {f"{name}.weight": (after, before, 3, 3), f"{name}.bias": (after,)}
        before = after
    heads = {
        f"lin{i}.model.1.weight": (1, channels[-1], 1, 1) for i, channels in enumerate(VGG_CHANNELS)
    }
    return shapes | heads


def _lpips_params(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    heads = range(len(VGG_CHANNELS))
    return {
        "vgg": {f"conv{i}": _conv(tensors, name) for i, name in enumerate(_vgg_modules())},
        **{f"head{i}": tensors[f"lin{i}.model.1.weight"].ravel() for i in heads},
    }


def _conv(tensors: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    kernel = tensors[f"{name}.weight"].transpose(2, 3, 1, 0)
    return {"kernel": kernel, "bias": tensors[f"{name}.bias"]}


def _vit_shapes(name: str) -> dict[str, tuple[int, ...]]:
    width, patch = SIZES[name]["width"], SIZES[name]["patch"]
    grid = DINOV2_GRID if name == "dinov2" else VIT_IMAGE // patch
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


def _vit_params(tensors: dict[str, np.ndarray], width: int, patch: int) -> dict[str, Any]:
    def stacked(key: str) -> np.ndarray:
        return np.stack([tensors[f"blocks.{i}.{key}"] for i in range(DEPTH)])

    def linear(key: str, layer_scale: str | None = None) -> dict[str, np.ndarray]:
        kernel, bias = stacked(f"{key}.weight").swapaxes(1, 2), stacked(f"{key}.bias")
        if f"blocks.0.{layer_scale}" in tensors:
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
    """(1, 1 + n * n, C) -> (1, 1 + grid * grid, C), bicubic with antialiasing (a = -0.5)."""
    first, rest = position[:, :1], position[:, 1:]
    n, width = round(rest.shape[1] ** 0.5), rest.shape[2]
    rest = jax.image.resize(rest.reshape(n, n, width), (grid, grid, width), "cubic", antialias=True)
    return np.concatenate([first, np.asarray(rest).reshape(1, -1, width)], axis=1)
