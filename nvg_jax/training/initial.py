"""Starts a training from another model's weights, on other data and classes."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import ml_collections
from flax.traverse_util import flatten_dict, unflatten_dict

from nvg_jax import workdir
from nvg_jax.errors import UserError
from nvg_jax.lora import CLASS_TABLE, class_table
from nvg_jax.metadata import RunMetadata
from nvg_jax.models import ModelConfig, check_networks
from nvg_jax.parts import Part
from nvg_jax.runtime.sharding import to_host
from nvg_jax.training.state import Params, TrainState

State = TypeVar("State", bound=TrainState)

REMEDY = "Give a model that has what is trained, or train less with --config.part."


def start_from(folder: str, initial: dict[str, Any], class_names: Sequence[str]) -> dict[str, Any]:
    """The weights of another model for a new training.

    The rows of the class table are matched by class name. A class that the model does not have
    starts from the mean of all its classes; the null class keeps its row.

    Args:
        folder: a workdir, an exported or converted folder, or the name of a bundled model.
        initial: {"tokenizer" or a generator: its initial parameters}, placed on devices.
        class_names: the classes of the new data.

    Returns:
        The same tree with the model's weights.

    Raises:
        UserError: the model lacks a network, or an array has another size; the message names it.
    """
    return fit_model(folder, workdir.read_model(folder), initial, class_names)


def fit_model(
    folder: str,
    model: tuple[RunMetadata, dict[str, Any]],
    initial: dict[str, Any],
    class_names: Sequence[str],
) -> dict[str, Any]:
    """`start_from` with what `workdir.read_model` read; shapes with shardings are enough to fit."""
    metadata, params = model
    check_networks(f"init_from={folder}", params, initial, REMEDY)
    weights = {
        name: fit_params(tree, params[name], f"{folder}: {name}", metadata, class_names)
        for name, tree in initial.items()
    }
    return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), weights, initial)


def with_params(state: State, params: Params) -> State:
    """An initial state whose parameters, and their moving average, start from `params`."""
    return state.replace(params=params, ema_params=jax.tree.map(jnp.copy, params))


def check_init(config: ml_collections.ConfigDict, parts: Iterable[Part]):
    """Raises UserError like `start_from` if config.init_from lacks what one of the parts needs."""
    folder = config.init_from
    model = ModelConfig.from_config(config, num_classes=0)
    sizes = {name: model.abstract_params(name) for part in parts for name in part.networks}
    try:
        _, params = workdir.read_model(folder)
    except UserError as error:
        raise UserError(f"init_from={folder}: {error}") from error
    check_networks(f"init_from={folder}", params, sizes, REMEDY)
    for name, abstract in sizes.items():
        needed, stored = flatten_dict(abstract), flatten_dict(params[name])
        for tree in (needed, stored):
            tree.pop(CLASS_TABLE, None)
        check_sizes(needed, stored, f"{folder}: {name}")


def check_sizes(needed: dict[tuple, Any], stored: dict[tuple, Any], where: str):
    """Raises UserError for an array of {path: array} that is missing or has another size."""
    for path in sorted(needed.keys() | stored.keys()):
        sizes = [tree[path].shape if path in tree else "missing" for tree in (needed, stored)]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"init_from={where}/{'/'.join(path)} is {sizes[1]}, and the config needs "
                f"{sizes[0]}. Use the sizes of that model."
            )


def fit_params(
    initial: Params, weights: Params, where: str, metadata: RunMetadata, class_names: Sequence[str]
) -> Params:
    """`weights`, with a class table for `class_names`, as a tree like `initial`.

    The REPA projector, which no model keeps, is taken from `initial`.
    """
    needed: dict[tuple, Any] = flatten_dict(initial)
    stored: dict[tuple, Any] = flatten_dict(weights)
    if CLASS_TABLE in needed and CLASS_TABLE in stored:
        stored[CLASS_TABLE] = class_table(stored[CLASS_TABLE], metadata.class_names, class_names)
    stored |= {path: to_host(x) for path, x in needed.items() if path[0] == "repa"}
    check_sizes(needed, stored, where)
    return unflatten_dict(stored)
