"""Which settings of a run may change when it goes on."""

import reprlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath
from flax.traverse_util import flatten_dict

from nvg_jax.errors import UserError
from nvg_jax.metadata import SIZES, RunMetadata
from nvg_jax.workdir import check_tokenizer

# Settings that may differ on resume: logging, saving, and how and where the same data is read.
MAY_CHANGE = frozenset(
    ("log_every", "eval_every", "eval_images", "save_every", "keep", "fid_every", "fid_samples")
    + ("data_dir", "credits", "num_threads", "prefetch", "on_bad")
    + ("resize_filter",)  # what it comes to, `RunMetadata.resize_filter`, may not
)
LENGTH = ("length", "batch_size", "num_images")
FOLLOW = ("warmup_steps", "ema_decay")  # may change with these, which they follow from if -1
# Metadata that never change, and a section of the config: what the weights fit.
FIXED = (*SIZES, "teacher", "base", "class_names")
NEVER_CHANGE = (*FIXED, "lora", "optimizer.name")


class Resume(NamedTuple):
    """How to go on with a run.

    Attributes:
        allow_changes: names of settings that may differ from those of the checkpoint: a setting
            ("learning_rate"), a section ("data"), or a dotted path of both.
        step: go back to the checkpoint of this step; None: the newest one.
    """

    allow_changes: tuple[str, ...] = ()
    step: int | None = None


NEWEST = Resume()  # go on from the newest checkpoint with the same settings


def covers(name: str, setting: str) -> bool:
    """Whether a name, such as "learning_rate" or "data", means a setting given by its path."""
    return f".{name}." in f".{setting}."


def changed_settings(
    stored: RunMetadata, new: RunMetadata, section: str
) -> dict[str, tuple[Any, Any]]:
    """{dotted path: (stored value, new value)} of the settings that differ.

    Settings in `MAY_CHANGE` are left out, and `remat`.

    Args:
        section: the section of the config with the recipe.
    """

    def settings(metadata: RunMetadata) -> dict[str, Any]:
        content = metadata.to_json()
        config = content["config"]
        values = {name: content[name] for name in FIXED}
        values |= {name: config[name] for name in ("seed", "dtype", "class_dropout", "lora")}
        if metadata.teacher:  # what a student learns depends on how its teacher samples
            values["sampling"] = config["sampling"]
        values |= {f"data.{name}": content[name] for name in ("num_images", "resize_filter")}
        for name in ("data", section):
            values[name] = {k: v for k, v in config[name].items() if k not in MAY_CHANGE}
        return {k: v for k, v in flatten_dict(values, sep=".").items() if not covers("remat", k)}

    old = settings(stored)
    return {
        name: (old.get(name), value)
        for name, value in settings(new).items()
        if old.get(name) != value
    }


def check_changes(
    stored: RunMetadata,
    new: RunMetadata,
    section: str,
    folder: epath.Path,
    allow_changes: Sequence[str] = (),
):
    """Raises UserError if settings differ from those of the run in `folder` and are not allowed to.

    Args:
        section: the section of the config with the recipe.
        allow_changes: see `Resume`.
    """
    if new.model.generators:
        check_tokenizer(stored, new, folder)
    changes = changed_settings(stored, new, section)
    follow = FOLLOW if any(covers(n, name) for n in LENGTH for name in changes) else ()
    never = {name for name in changes if any(covers(n, name) for n in NEVER_CHANGE)}
    never -= {name for name in never if covers("drop_path", name)}  # any weights fit it
    refused = [
        name
        for name in changes
        if name in never or not any(covers(n, name) for n in (*allow_changes, *follow))
    ]
    if not refused:
        return
    shown = "; ".join(
        f"{name} = {reprlib.repr(changes[name][0])}, now {reprlib.repr(changes[name][1])}"
        for name in refused
    )
    if never:
        advice = (
            "Its checkpoints only fit the old values. Use the settings it was started with, or "
            "another workdir (--config.init_from=... starts from the weights of a model)."
        )
    else:
        names = dict.fromkeys("data" if covers("data", n) else n.split(".")[-1] for n in refused)
        advice = (
            "Use the settings it was started with, or another workdir. To change this run on "
            f"purpose, add --allow_changes={','.join([*allow_changes, *names])}."
        )
    raise UserError(f"{folder} holds a run with {shown}. {advice}")
