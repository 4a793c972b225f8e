"""Writes the pack's checkpoints that are not stored as files, in torch.save's formats.

Most of the generators' weights were drawn uniformly (Xavier) by PyTorch after
`torch.manual_seed(1234)`. NumPy's legacy generator is the same Mersenne Twister with a stream that
never changes, so the same bits are drawn here instead of storing 20 MB.
"""

import json
from pathlib import Path

import numpy as np
from torch_files import ordered, storage, tensor, write_legacy, write_zip

from nvg_jax.torch_interop.checkpoint_files import read_state_dict

FOLDER = Path(__file__).resolve().parent
SEED = 1234
# Numbers that PyTorch drew before the weights of a generator's first block.
DRAWN_BEFORE = {"content": 7_039_731, "structure": 11_157_235}
STORAGES = {"float32": "FloatStorage", "int64": "LongStorage"}


def block_weights() -> dict[str, np.ndarray]:
    """Published name -> weight (out, in) of every linear layer in the generators' blocks."""
    sizes = json.loads((FOLDER / "meta.json").read_text())["generator"]
    bits = np.random.RandomState(SEED).randint(0, 2**32, 12_200_000, np.uint32)
    fractions = (bits & 0xFFFFFF) * 2.0**-24
    weights = {}
    for part, width in (("content", sizes["hidden"]), ("structure", sizes["structure_hidden"])):
        start = DRAWN_BEFORE[part]
        for block in range(sizes["depth"]):
            for layer, shape in (
                ("linear1", (7 * width, width)),  # query, key, value and 4 * width of the MLP
                ("linear2", (width, 5 * width)),
                ("modulation.lin", (3 * width, width)),
            ):
                bound = np.float64(np.float32(np.sqrt(6 / sum(shape))))
                drawn = fractions[start : start + shape[0] * shape[1]].reshape(shape)
                start += drawn.size
                name = f"nvgformer.{part}_blocks.{block}.{layer}.weight"
                weights[name] = (drawn * (2 * bound) - bound).astype(np.float32)
    return weights


def generator_tensors() -> dict[str, np.ndarray]:
    """The state_dict of generator.ckpt; an average that equals its raw tensor is that array."""
    with np.load(FOLDER / "generator.npz") as stored:
        tensors = dict(stored) | block_weights()
    for name in [name for name in tensors if name.startswith("nvgformer.")]:
        tensors.setdefault("ema_model." + name, tensors[name])
    return tensors


def write_state_dict(path: Path, tensors: dict[str, np.ndarray], write=write_zip) -> Path:
    """Arrays to a checkpoint; the same array under several names is stored once."""
    items, storages = [], {}
    for name, array in tensors.items():
        key = str(id(array))
        storages[key] = array
        strides = tuple(stride // array.itemsize for stride in array.strides)
        store = storage(key, array.size, STORAGES[array.dtype.name])
        items += [name, tensor(store, 0, array.shape, strides)]
    return write(path, {"state_dict": ordered(*items)}, storages)


def write_checkpoints(folder: Path) -> None:
    """generator.ckpt, and ae.legacy.ckpt: the raw tensors of ae.ckpt in PyTorch's older container.

    Args:
        folder: where they are written.
    """
    write_state_dict(folder / "generator.ckpt", generator_tensors())
    raw = read_state_dict(FOLDER / "ae.ckpt", lambda name: not name.startswith("ema_model."))
    raw = {name: np.ascontiguousarray(array) for name, array in raw.items()}
    write_state_dict(folder / "ae.legacy.ckpt", raw, write_legacy)
