"""The curves of finished and running trainings: read, compared as tables, drawn."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath, epy
from flax.traverse_util import flatten_dict
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto import event_pb2
from tensorboard.util import tensor_util

from nvg_jax.errors import UserError, comes_with
from nvg_jax.parts import PARTS
from nvg_jax.runtime.storage import local_file, make_folder, storage_path, write_file
from nvg_jax.training.plan import FILE

with epy.lazy_imports(error_callback=comes_with("report")):
    from matplotlib import figure  # pyright: ignore[reportMissingImports]

Curves = dict[str, dict[int, float]]  # tag -> step -> value
# What ranks runs: the first of these that all of them have, and whether less is better.
RANKING = {"fid": True, "test_content/loss": True, "test_structure/loss": True}
RANKING |= {"test_psnr": False, "loss": True}
START: int = event_pb2.SessionLog.START  # pyright: ignore[reportAttributeAccessIssue]


def read_curves(workdir: epath.Path) -> dict[str, Curves]:
    """{part: its scalars} of a workdir, each step once, as TensorBoard shows them.

    Raises:
        UserError: there is no training in the folder.
    """
    curves = {part: read_part(workdir / part) for part in PARTS if (workdir / part).is_dir()}
    curves = {part: tags for part, tags in curves.items() if tags}
    if not curves:
        raise UserError(f"{workdir} holds no training with curves; give its --workdir.")
    return curves


def read(folders: Mapping[str, str]) -> tuple[dict[str, dict[str, Curves]], list[dict[str, Any]]]:
    """({name: curves of its workdir}, the config of each), the best run first.

    Raises:
        UserError: there is no training in one of the folders.
    """
    paths = {name: storage_path(folder) for name, folder in folders.items()}
    runs = {name: read_curves(path) for name, path in paths.items()}
    runs = {name: runs[name] for name in rank(runs)}
    return runs, [read_config(paths[name]) for name in runs]


def read_part(folder: epath.Path) -> Curves:
    curves, begun = {}, False
    for path in sorted(folder.glob("events.out.tfevents.*")):
        with local_file(path) as local:
            for event in EventFileLoader(str(local)).Load():
                if event.session_log.status == START:
                    if begun:  # earlier processes went further than the checkpoint
                        for values in curves.values():
                            for step in [step for step in values if step >= event.step]:
                                del values[step]
                    begun = True
                for value in event.summary.value:
                    array = tensor_util.make_ndarray(value.tensor)
                    if array.dtype == np.float32 and array.ndim == 0:
                        curves.setdefault(value.tag, {})[event.step] = float(array)
    return {tag: values for tag, values in curves.items() if values}


def read_config(workdir: epath.Path) -> dict[str, Any]:
    """{dotted path: value} of the settings of a run; {} if it does not say them."""
    path = workdir / FILE
    if not path.exists():
        return {}
    try:
        return flatten_dict(json.loads(path.read_text())["config"], sep=".")
    except (ValueError, LookupError, TypeError, AssertionError) as error:
        raise UserError(
            f"{path} is damaged ({error}). Remove it: training writes it again."
        ) from error


def differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """{setting: its value in every run} of the settings that differ."""
    names = sorted(set().union(*configs))
    values = {name: [config.get(name) for config in configs] for name in names}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row)}


def shown_tags(curves: Curves) -> list[str]:
    """What a table and a picture show: FID, held-out metrics and losses, without single stages."""
    tags = [tag for tag in sorted(curves) if not tag.split("/")[-1].isdigit()]
    tested = [tag for tag in tags if tag == "fid" or tag.startswith("test_")]
    return tested + [tag for tag in tags if tag.split("/")[-1] == "loss" and tag not in tested]


def rank(runs: Mapping[str, dict[str, Curves]]) -> list[str]:
    """The names of the runs, the best one first.

    Compared are the last values of the last part that all have trained (the lowest ones of FID).
    """
    parts = [part for part in PARTS if all(part in curves for curves in runs.values())]
    for tag, less in RANKING.items() if parts else ():
        curves = {name: run[parts[-1]].get(tag, {}) for name, run in runs.items()}
        if all(curves.values()):
            value = lambda name: min(curves[name].values()) if tag == "fid" else last(curves[name])
            worse = lambda x: (math.isnan(x), x if less else -x)
            return sorted(runs, key=lambda name: worse(value(name)))
    return list(runs)


def last(values: dict[int, float]) -> float:
    return values[max(values)]


def tables(runs: Mapping[str, dict[str, Curves]], configs: Sequence[Mapping[str, Any]]) -> str:
    """The settings that differ, and the last numbers of every part, a line for each run."""
    lines, names = [], list(runs)
    differing = differences(configs)
    if differing:
        lines += [
            "settings that differ",
            *table(["", *names], [[n, *v] for n, v in differing.items()]),
        ]
    for part in PARTS:
        trained = {name: run[part] for name, run in runs.items() if part in run}
        tags = list(dict.fromkeys(t for curves in trained.values() for t in shown_tags(curves)))
        if trained:
            rows = [
                [name, max(max(values) for values in curves.values())]
                + [f"{last(curves[tag]):.4g}" if tag in curves else "" for tag in tags]
                for name, curves in trained.items()
            ]
            lines += ["", part, *table(["", "step", *tags], rows)]
    return "\n".join(lines).strip()


def table(head: list[Any], rows: list[list[Any]]) -> list[str]:
    cells = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in cells]


def draw(runs: Mapping[str, dict[str, Curves]], path: epath.Path):
    """Draws the curves of all runs into one PNG.

    Raises:
        UserError: Matplotlib is not installed.
    """
    panels = {
        (part, tag): None
        for part in PARTS
        for run in runs.values()
        for tag in shown_tags(run.get(part, {}))
    }
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    canvas = figure.Figure(figsize=(5 * columns, 3.2 * rows), layout="constrained")
    axes = list(canvas.subplots(rows, columns, squeeze=False).flat)
    for axis, (part, tag) in zip(axes, panels):
        for number, (name, run) in enumerate(runs.items()):
            values = run.get(part, {}).get(tag, {})
            steps = sorted(values)
            marker = "o" if len(steps) == 1 else None
            style = dict(marker=marker, color=f"C{number % 10}", label=name)
            axis.plot(steps, [values[step] for step in steps], **style)
        axis.set(title=f"{part}: {tag}", xlabel="step")
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.axis("off")
    canvas.axes[0].legend(fontsize="small")
    content = io.BytesIO()
    canvas.savefig(content, format="png", dpi=120)
    make_folder(path.parent)
    write_file(path, content.getvalue())
