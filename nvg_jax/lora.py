"""Low-rank adapters of generators (LoRA; Hu et al., arXiv 2106.09685).

A linear layer of a transformer's blocks gets two small matrices beside its kernel, "kernel_a" and
"kernel_b", and computes with kernel + kernel_a @ kernel_b. New classes need rows of their own, so
the class table gets an "embedding_delta" of its full size. Where a module's parameters have such
leaves, it adds them itself (`layers`); `merge` adds them to the weights for good.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PRNGKeyArray

CLASS_TABLE = ("class_embed", "embedding")  # (classes + 1, width); the last row is the null class


def init(params: Mapping[str, Any], rank: int, key: PRNGKeyArray) -> dict[str, Any]:
    """Adapters that change nothing yet, for a generator's parameters, of which only shapes count.

    A is normal with deviation 1 / sqrt(rank), and B zero. A step of Adam then changes a kernel
    about as much as without adapters, whatever the rank.
    """
    leaves: dict[tuple, Any] = flatten_dict(params)
    adapters = {}
    for number, (path, weight) in enumerate(sorted(leaves.items())):
        if path == CLASS_TABLE:
            adapters[*path[:-1], "embedding_delta"] = jnp.zeros(weight.shape)
        elif path[-1] == "kernel" and "blocks" in path:
            *layers, width, features = weight.shape
            a = jax.random.normal(jax.random.fold_in(key, number), (*layers, width, rank))
            adapters[*path[:-1], "kernel_a"] = a * rank**-0.5
            adapters[*path[:-1], "kernel_b"] = jnp.zeros((*layers, rank, features))
    return unflatten_dict(adapters)


def add(weight: Any, name: str, module: Mapping[str, Any], scale: float = 1.0) -> Any:
    """A weight plus `scale` times the adapter for it among its module's parameters, if any."""
    if f"{name}_delta" in module:
        return weight + scale * module[f"{name}_delta"]
    if f"{name}_a" in module:
        with jax.default_matmul_precision("highest"):
            return weight + scale * (module[f"{name}_a"] @ module[f"{name}_b"])
    return weight


def combine(params: Mapping[str, Any], adapters: Mapping[str, Any]) -> dict[str, Any]:
    """One tree of weights and adapters, to apply a generator with."""
    return unflatten_dict(flatten_dict(params) | flatten_dict(adapters))


def merge(
    params: Mapping[str, Any], adapters: Mapping[str, Any], scale: float = 1.0
) -> dict[str, Any]:
    """Weights with `scale` times their adapters added; 0 leaves every bit as it is."""
    return {
        name: merge(weight, adapters.get(name, {}), scale)
        if isinstance(weight, Mapping)
        else add(weight, name, adapters if scale else {}, scale)
        for name, weight in params.items()
    }


def with_classes(
    params: Mapping[str, Any], old_names: Sequence[str], new_names: Sequence[str]
) -> dict[str, Any]:
    """A generator's parameters for other classes, see `class_table`."""
    leaves: dict[tuple, Any] = flatten_dict(params)
    leaves[CLASS_TABLE] = class_table(leaves[CLASS_TABLE], old_names, new_names)
    return unflatten_dict(leaves)


def class_table(
    table: np.ndarray, old_names: Sequence[str], new_names: Sequence[str]
) -> np.ndarray:
    """The rows of a class table (classes + 1, width) for other classes; the last row stays."""
    rows = dict(zip(old_names, table))
    mean = table[:-1].mean(0)
    return np.stack([rows.get(name, mean) for name in new_names] + [table[-1]])
