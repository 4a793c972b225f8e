"""Held-out loss over training FLOPs: `python -m benchmarks.scaling --workdir=RUN --workdir=RUN`.

For generators of several sizes, each trained alone (part=separate): prints the parameters, the
FLOPs of the matrix products, and the last held-out loss of the averaged weights, and draws the
losses of all evaluations. The FLOPs are those of training on cached sequences, without the encoder.
Evaluations before half of the shortest run are left out: averages still hold the first weights.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from absl import app, flags, logging
from matplotlib import figure, ticker

from nvg_jax.metadata import read_metadata
from nvg_jax.models import parameter_counts
from nvg_jax.parts import CONTENT, STRUCTURE, Part
from nvg_jax.runtime import sharding
from nvg_jax.runtime.storage import storage_path
from nvg_jax.training import curves, forecast, registry

FLAGS = flags.FLAGS


class Curve(NamedTuple):
    """The training of a generator: its parameters, FLOPs of a step, and {step: held-out loss}."""

    parameters: int
    step_flops: float
    losses: dict[int, float]


def read_curve(workdir: str, part: Part) -> Curve | None:
    """The curve of a generator that was trained alone; None if there is none with an evaluation."""
    folder = storage_path(workdir) / part.name
    metadata, (name,) = read_metadata(folder), part.networks
    losses = curves.read_part(folder).get(f"test_{name}/loss") if metadata else None
    if metadata is None or metadata.num_images is None or not losses:
        return None
    config = ml_collections.ConfigDict(metadata.config)
    trainer = registry.make_trainer(
        part, config, metadata.model, sharding.make_mesh(), metadata.num_images
    )
    length = metadata.model.tokenizer.num_positions
    batch = {"label": trainer.abstract_batch["label"]}
    for key, columns in (("structure", length), ("tokens", 2 * length - 1)):
        batch[key] = jax.ShapeDtypeStruct((trainer.recipe.batch_size, columns), jnp.int32)
    program = trainer.trace(batch=batch)
    parameters = parameter_counts(trainer.trained(trainer.abstract_state.params))[name]
    return Curve(parameters, forecast.flops(program.jaxpr.jaxpr), losses)


def main(_):
    generators = {}  # name -> workdir -> curve
    for part in (CONTENT, STRUCTURE):
        read = {workdir: read_curve(workdir, part) for workdir in FLAGS.workdir}
        if runs := {workdir: curve for workdir, curve in read.items() if curve}:
            generators[part.name] = runs
    if not generators:
        raise app.UsageError(
            "No generator was trained alone and evaluated in these folders (part=separate)."
        )
    canvas = figure.Figure(figsize=(4.5 * len(generators), 3.4), layout="constrained")
    axes = canvas.subplots(1, len(generators), squeeze=False)[0]
    print("| generator | run | parameters | FLOPs of a step | steps | FLOPs | held-out loss |")
    print("|---|---|---|---|---|---|---|")
    for axis, (name, runs) in zip(axes, generators.items()):
        first = min(max(curve.losses) for curve in runs.values()) / 2
        for workdir, curve in runs.items():
            steps = [step for step in sorted(curve.losses) if step >= first]
            total = steps[-1] * curve.step_flops
            print(
                f"| {name} | {workdir} | {curve.parameters:,} | {curve.step_flops:.3g} "
                f"| {steps[-1]:,} | {total:.3g} | {curve.losses[steps[-1]]:.3f} |"
            )
            flops = [step * curve.step_flops for step in steps]
            label = f"{curve.parameters / 1e6:.2f} million parameters"
            axis.plot(flops, [curve.losses[step] for step in steps], "o-", label=label)
        axis.set(title=name, xlabel="training FLOPs", ylabel="held-out loss", xscale="log")
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize="small")
    canvas.savefig(FLAGS.out, dpi=120)


if __name__ == "__main__":
    flags.DEFINE_multi_string("workdir", None, "A run's workdir; give the flag once for each.")
    flags.DEFINE_string("out", "scaling.png", "The picture to write.")
    flags.mark_flags_as_required(["workdir"])
    jax.config.update("jax_platforms", "cpu")
    logging.set_verbosity(logging.WARNING)
    app.run(main)
