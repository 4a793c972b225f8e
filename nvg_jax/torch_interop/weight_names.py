"""The published checkpoints' names and layouts, and ours: one table for both directions.

Our parameters are a flat dictionary {path: array}: a tokenizer's "encoder/...", "decoder/..." and
"quantizer/...", or a pair of generators' "content/..." and "structure/..." with their
"canvas_scale". Published tensors have PyTorch's layouts: convolutions (out, in, kh, kw), linears
(out, in), and separate tensors for each block, where ours are (kh, kw, in, out), (in, out) and
stacked along the first axis.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from nvg_jax.errors import UserError, listed
from nvg_jax.torch_interop.checkpoint_files import (
    check_tensors,
    read_state_dict,
    safetensors_names,
)

# Our path of a module (a pattern) -> the published one; {} is the index of a stacked block.
_BLOCK = r"/(norm|conv)(\d)"
_MODULES = {
    r"(encoder|decoder)/conv_(in|out)": r"\1.conv_\2.conv",
    r"(encoder|decoder)/norm_out": r"\1.norm_out.norm",
    r"(encoder|decoder)/middle_block0" + _BLOCK: r"\1.mid.block_1.\2\3.\2",
    r"(encoder|decoder)/middle_block0/shortcut": r"\1.mid.block_1.nin_shortcut.conv",  # only ours
    r"(encoder|decoder)/middle_block1" + _BLOCK: r"\1.mid.block_2.\2\3.\2",
    r"encoder/level(\d+)_block(\d+)" + _BLOCK: r"encoder.down.\1.block.\2.\3\4.\3",
    r"decoder/level(\d+)_block(\d+)" + _BLOCK: r"decoder.up.\1.block.\2.\3\4.\3",
    r"encoder/level(\d+)_block(\d+)/shortcut": r"encoder.down.\1.block.\2.nin_shortcut.conv",
    r"decoder/level(\d+)_block(\d+)/shortcut": r"decoder.up.\1.block.\2.nin_shortcut.conv",
    r"encoder/level(\d+)_downsample": r"encoder.down.\1.downsample.conv.conv",
    r"decoder/level(\d+)_upsample": r"decoder.up.\1.upsample.conv.conv",
    r"(content|structure)/blocks/blocks/(linear1|linear2)": r"\1_blocks.{}.\2",
    r"(content|structure)/blocks/blocks/modulation": r"\1_blocks.{}.modulation.lin",
    r"(content|structure)/(class_embed|stage_embed)": r"\1_\2",
    r"content/canvas_embed": r"content_embed",
    r"content/canvas_head/linear": r"x0_head.linear",
    r"content/canvas_head/modulation": r"x0_head.adaLN_modulation.1",
    r"content/token_head": r"cls_head.linear",
    r"structure/structure_embed": r"structure_embed",
    r"structure/canvas_embed": r"structure_content_cond_embed",
    r"structure/time_(in|out)": r"structure_time_embed.\1_layer",
    r"structure/head/linear": r"structure_head.linear",
    r"structure/head/modulation": r"structure_head.adaLN_modulation.1",
}
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
# Parameters whose published name does not consist of a module and a leaf.
_PARAMETERS = {
    r"quantizer/codebook": r"quantize.embedding.weight",
    r"quantizer/smooth_kernel": r"quantize.quant_resi.{}.weight",
    r"quantizer/smooth_bias": r"quantize.quant_resi.{}.bias",
    r"(content|structure)/blocks/blocks/(query|key)_norm/scale": r"\1_blocks.{}.norm.\2_norm.scale",
    r"content/start_canvas": r"content_start_embed",
    r"canvas_scale": r"scale_factors",
}
# Published tensors that are not needed: a statistic, the frozen tokenizer that a generator's file
# repeats, and the feature network of REPA with the projection onto its features.
_UNNEEDED = (
    r"total_visited_codes|first_stage_model\..*|repa_encoder\..*|(nvgformer\.)?projector\..*"
)
# Prefix of the moving average's tensors, and of the generators'.
_EMA = "ema_model."
_GENERATOR = "nvgformer."

_WRAPPERS = ("module", "_orig_mod")  # DistributedDataParallel and torch.compile

WEIGHTS = ("raw", "ema")
# The published generators were trained with the raw autoencoder, and sample with their average.
DEFAULTS = {"autoencoder": "raw", "generator": "ema"}

logger = logging.getLogger("nvg_jax")


def read(path: str | Path, weights: str) -> dict[str, np.ndarray]:
    """One copy of the weights of a published file, by published name without its prefix.

    Names lose what PyTorch's wrappers (data parallelism, compilation) put in front of them.

    Args:
        path: an autoencoder's or a pair of generators' checkpoint. A safetensors file without
            averaged tensors has one copy, whichever it is.
        weights: "raw", or "ema" for the moving average.

    Raises:
        UserError: the file cannot be read, or has no such copy.
    """
    names = safetensors_names(path)
    single = names is not None and not any(map(is_averaged, names))
    wrapped = set()

    def name_in_copy(name: str) -> str | None:
        wrapped.update(part for part in name.split(".") if part in _WRAPPERS)
        if not single and is_averaged(name) != (weights == "ema"):
            return None
        name = without_wrappers(name).removeprefix(_EMA)
        return None if re.fullmatch(_UNNEEDED, name) else name.removeprefix(_GENERATOR)

    tensors = read_state_dict(path, keep=lambda name: name_in_copy(name) is not None)
    if wrapped:
        taken = ", ".join(f"{part}." for part in sorted(wrapped))
        logger.warning("%s: took %s off the names of its tensors", path, taken)
    if not tensors:
        other = WEIGHTS[weights == "raw"]
        raise UserError(
            f"{path} holds no {weights} weights. Take the {other} ones, if it is a checkpoint of "
            "the published autoencoder or generators."
        )
    return {
        ours: tensor for name, tensor in tensors.items() if (ours := name_in_copy(name)) is not None
    }


def without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def is_averaged(name: str) -> bool:
    return without_wrappers(name).startswith(_EMA)


def published_views(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Published name -> view, in the published layout, of our parameters {path: array}."""
    views = {}
    for path, array in params.items():
        name = _published_name(path)
        indices = range(array.shape[0]) if "{}" in name else [...]
        for index in indices:
            view = array[index]
            if path.endswith("kernel"):
                view = view.transpose((3, 2, 0, 1) if view.ndim == 4 else (1, 0))
            views[name.format(index)] = view
    return views


def _published_name(path: str) -> str:
    for pattern, name in _PARAMETERS.items():
        if match := re.fullmatch(pattern, path):
            return match.expand(name)
    module, _, leaf = path.rpartition("/")
    for pattern, name in _MODULES.items():
        if match := re.fullmatch(pattern, module):
            return f"{match.expand(name)}.{_LEAVES[leaf]}"
    raise KeyError(f"The parameter {path!r} has no published name.")


def from_published(
    tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Our parameters, float32, from published tensors.

    Args:
        tensors: published name -> array of a floating type of at most 32 bits. `rope_ids`, which
            `generator_sizes` checks, is not one of our parameters.
        shapes: path -> shape of each of our parameters.

    Raises:
        UserError: tensors are missing, unexpected, or of another shape or type; the message lists
            them.
    """
    params = {path: np.empty(shape, np.float32) for path, shape in shapes.items()}
    views = published_views(params)
    expected = {name: view.shape for name, view in views.items()}
    if problems := check_tensors({k: x for k, x in tensors.items() if k != "rope_ids"}, expected):
        raise UserError(
            "The checkpoint's tensors are not those of the published model at the sizes it "
            f"tells.\n{problems}"
        )
    for name, view in views.items():
        view[...] = tensors[name]
    return params


def to_published(
    params: Mapping[str, np.ndarray], grid: tuple[int, int] | None = None
) -> dict[str, np.ndarray]:
    """Published name -> contiguous array of our parameters, for safetensors' `save_file`.

    Args:
        params: {path: array}.
        grid: (h, w) for a pair of generators, which adds their prefix to the names and the constant
            `rope_ids` to the tensors; None for a tokenizer.
    """
    tensors = {name: np.ascontiguousarray(view) for name, view in published_views(params).items()}
    if grid is None:
        return tensors
    tensors["rope_ids"] = rope_ids(grid)
    return {_GENERATOR + name: tensor for name, tensor in tensors.items()}


def rope_ids(grid: tuple[int, int]) -> np.ndarray:
    """The constant rotary positions of the generators, float32 (1, 1 + L, 3 + K).

    Ones for the class token, then kind, K structure channels, row and column of each position;
    kind and structure are zero.
    """
    height, width = grid
    bits = (height * width).bit_length() - 1
    ids = np.zeros((1, 1 + height * width, 3 + bits), np.float32)
    ids[:, 0] = 1
    ids[0, 1:, -2:] = np.indices(grid).reshape(2, -1).T
    return ids


def tokenizer_sizes(
    tensors: Mapping[str, np.ndarray], latent_size: tuple[int, int] | None = None
) -> dict:
    """The fields of `TokenizerConfig` that a published autoencoder has.

    Args:
        tensors: the tensors returned by `read`.
        latent_size: (h, w), which the tensors do not determine; None for a square latent.

    Raises:
        UserError: a tensor that determines a size is missing, or no tokenizer has these sizes.
    """
    base = _shape(tensors, "encoder.conv_in.conv.weight", 4)[0]
    widths = [
        _shape(tensors, f"encoder.down.{level}.block.0.conv2.conv.weight", 4)[0]
        for level in range(_count(tensors, r"encoder\.down\.(\d+)\..*"))
    ]
    if any(width % base for width in widths):
        raise UserError(
            f"The autoencoder's levels have {widths} channels, which should be whole multiples of "
            f"its first convolution's {base}."
        )
    splits = _count(tensors, r"quantize\.quant_resi\.(\d+)\..*")
    if not splits:
        raise UserError("The autoencoder has no quantize.quant_resi; it is not one of NVG.")
    positions = 2 ** (splits - 1)
    if latent_size is None:
        side = int(positions**0.5)
        latent_size = (side, side)
    if latent_size[0] * latent_size[1] != positions:
        raise UserError(
            f"The autoencoder has {positions} latent positions, which cannot be "
            f"{latent_size[0]} x {latent_size[1]}. Give its latent size (h, w), or a generator "
            "that was made for it."
        )
    downsamples = _count(tensors, r"encoder\.down\.(\d+)\.downsample\..*")
    codebook_size, latent_dim = _shape(tensors, "quantize.embedding.weight", 2)
    return {
        "image_size": tuple(n * 2**downsamples for n in latent_size),
        "latent_size": tuple(latent_size),
        "latent_dim": latent_dim,
        "codebook_size": codebook_size,
        "base_channels": base,
        "channel_multipliers": tuple(width // base for width in widths),
        "blocks_per_level": _count(tensors, r"encoder\.down\.\d+\.block\.(\d+)\..*"),
    }


def generator_sizes(tensors: Mapping[str, np.ndarray]) -> dict:
    """The sizes that the tensors of a published pair of generators determine.

    Returns:
        "content" and "structure" (fields of `TransformerConfig`), "num_classes", "latent_size",
        "latent_dim" and "codebook_size".

    Raises:
        UserError: a tensor that determines a size is missing, or `rope_ids` is not the expected
            constant.
    """
    positions = _shape(tensors, "rope_ids", 3)[1] - 1
    grids = [(h, positions // h) for h in range(1, positions + 1) if positions % h == 0]
    same = lambda grid: np.array_equal(tensors["rope_ids"], rope_ids(grid))
    grid = next(filter(same, grids), None)
    if grid is None:
        raise UserError(
            "The checkpoint's rope_ids are not the positions of a grid in row-major order, which "
            "is all that the published model has."
        )

    def transformer(name: str, embedding: str) -> dict:
        width = _shape(tensors, embedding, 2)[0]
        hidden = _shape(tensors, f"{name}_blocks.0.linear1.weight", 2)[0]
        return {
            "width": width,
            "depth": _count(tensors, rf"{name}_blocks\.(\d+)\..*"),
            "head_dim": _shape(tensors, f"{name}_blocks.0.norm.query_norm.scale", 1)[0],
            "mlp_ratio": hidden // width - 3,
        }

    codebook_size, latent_dim = _shape(tensors, "cls_head.linear.weight", 2)
    return {
        "content": transformer("content", "content_embed.weight"),
        "structure": transformer("structure", "structure_embed.weight"),
        "num_classes": _shape(tensors, "content_class_embed.weight", 2)[0] - 1,
        "latent_size": grid,
        "latent_dim": latent_dim,
        "codebook_size": codebook_size,
    }


def _shape(tensors: Mapping[str, np.ndarray], name: str, axes: int) -> tuple[int, ...]:
    if name not in tensors:
        raise UserError(
            f"The checkpoint has no tensor {name!r}, so its sizes cannot be told; it has "
            f"{listed(list(tensors))}. Is it the other file, the autoencoder's or the generator's?"
        )
    shape = tensors[name].shape
    if len(shape) != axes or 0 in shape:
        raise UserError(
            f"The checkpoint's {name} has the shape {shape}, not {axes} sizes above 0: the file is "
            "damaged, or of another model."
        )
    return shape


def _count(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number that the pattern finds in a name; 0 if there is none."""
    numbers = [int(match[1]) for name in names if (match := re.fullmatch(pattern, name))]
    return max(numbers, default=-1) + 1
