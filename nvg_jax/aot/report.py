"""Reports on a compiled program: memory, work, collectives and a roofline estimate of its time."""

import collections
import logging
from typing import Any

import ml_collections

from nvg_jax.aot import hlo
from nvg_jax.aot.chips import GIB, GPU_SHARE, GPUS, Chip, Target
from nvg_jax.aot.lowering import Compiler, DoesNotFitError
from nvg_jax.layers import REMAT
from nvg_jax.models import parameter_counts
from nvg_jax.parts import GENERATORS
from nvg_jax.runtime.hardware import device_memory
from nvg_jax.training.length import training_length

logger = logging.getLogger("nvg_jax")
# Measured training steps over the estimate without overlap, on one H100 and on one H200
# (docs/performance.md).
MEASURED = (1.14, 1.28)
ESTIMATE = "roofline estimate from the compiled program, not a measurement"


def roofline(
    flops: float, hbm_bytes: float, link_bytes: float, model_flops: float, device: Chip
) -> dict[str, Any]:
    """Seconds of a step on one device, and its model FLOPs utilization (MFU).

    Arithmetic, memory traffic and communication each run at their published peak. `seconds` is the
    longest of the three, as if they overlapped completely: the classical roofline, on which `mfu`
    is based. `seconds_no_overlap` is their sum.

    Args:
        flops, hbm_bytes, link_bytes: what one device executes, moves and sends.
        model_flops: one device's share of the forward and backward pass of the model alone.
    """
    parts = {
        "compute": flops / device.flops,
        "hbm": hbm_bytes / device.hbm_bandwidth,
        "links": link_bytes / device.link_bandwidth,
    }
    seconds, no_overlap = max(parts.values()), sum(parts.values())
    return {
        **parts,
        "bound": max(parts, key=lambda part: parts[part]),
        "seconds": seconds,
        "seconds_no_overlap": no_overlap,
        "mfu": model_flops / seconds / device.flops,
        "mfu_no_overlap": model_flops / no_overlap / device.flops,
    }


def collectives_by_kind(collectives: list[hlo.Collective]) -> dict[str, dict[str, float]]:
    """How often each kind of collective runs, and its bytes."""
    kinds = collections.defaultdict(lambda: {"count": 0, "bytes": 0, "bytes_sent": 0.0})
    for item in collectives:
        kind = kinds[item.kind]
        kind["count"] += item.count
        kind["bytes"] += item.count * item.bytes
        kind["bytes_sent"] += item.bytes_sent
    return dict(kinds)


def make_report(
    compiler: Compiler, batch_size: int, model_flops: int | None = None
) -> dict[str, Any]:
    """Compiles the program for a global batch and returns its report, JSON-serializable.

    Args:
        model_flops: those of all devices, if already known; see `Compiler.model_flops`.
    """
    compiled, target = compiler.compile(batch_size), compiler.target
    text = compiled.program.as_text()
    assert text is not None  # XLA's backends print their programs
    devices, cost = target.mesh.size, hlo.cost(hlo.parse(text))
    memory = device_memory(compiled.program.memory_analysis()) | {"hbm": target.device.hbm}
    collectives = sorted(cost.collectives, key=lambda item: -item.bytes_sent)
    if model_flops is None:
        model_flops = compiler.model_flops(batch_size)
    times = roofline(
        cost.flops,
        cost.hbm_bytes,
        sum(item.bytes_sent for item in collectives),
        model_flops / devices,
        compiler.device,
    )
    by_module = {
        name: cost.flops_by_module[name] / compiler.device.flops
        + cost.bytes_by_module[name] / compiler.device.hbm_bandwidth
        for name in cost.flops_by_module | cost.bytes_by_module
    }
    sizes = parameter_counts(compiled.params)
    steps_per_day = 86_400 / times["seconds"]
    whole = {}
    if compiler.part:
        length = compiler.config[compiler.part.section].length
        whole["steps"] = training_length(length, compiler.images, batch_size)
        unit = whole["steps"] * times["seconds_no_overlap"] / 3600
        whole["hours"] = [unit * ratio for ratio in MEASURED]
        whole["chip_hours"] = [hours * target.chips for hours in whole["hours"]]
    return {
        "estimate": ESTIMATE,
        "topology": target.topology,
        "devices": devices,
        "mesh": dict(target.mesh.shape),
        "program": compiler.program,
        "part": compiler.part and compiler.part.name,
        "batch_size": batch_size,
        "compile_seconds": compiled.seconds,
        "parameters": {**sizes, "total": sum(sizes.values())},
        "memory": memory,
        "fits": memory["total"] <= memory["hbm"],
        "model_flops": model_flops,
        "executed_flops": cost.flops * devices,
        "hbm_bytes": cost.hbm_bytes,
        "collectives_by_kind": collectives_by_kind(collectives),
        "collectives": [{**c._asdict(), "bytes_sent": c.bytes_sent} for c in collectives],
        "unknown_loops": len(cost.unknown_loops),
        "kernels": dict(cost.kernels),
        "custom_calls": dict(cost.custom_calls),
        "roofline": times,
        "seconds_by_module": by_module,
        "steps_per_day": steps_per_day,
        "images_per_second": batch_size / times["seconds"],
        "epochs_per_day": steps_per_day * batch_size / compiler.images,
        **whole,
    }


def best_remat(
    config: ml_collections.ConfigDict, target: Target, batch_size: int
) -> dict[str, Any]:
    """The report of the training step with the remat policy that promises the shortest step.

    Compiles all policies and, among those that fit, picks the one with the smallest sum of times
    for arithmetic, memory traffic and communication: saving results costs traffic, recomputing them
    costs arithmetic.

    Raises:
        DoesNotFitError: no policy fits; the error is that of the policy that saves the most memory.
    """
    reports, error = [], None
    # Recomputation does not count, so this is the same for all policies.
    model_flops = Compiler(config, target, "train").model_flops(batch_size)
    for remat in REMAT:
        changed = config.copy_and_resolve_references()
        for name in GENERATORS:
            changed[name].remat = remat
        compiler = Compiler(changed, target, "train")
        try:
            report = make_report(compiler, batch_size, model_flops)
        except DoesNotFitError as found:
            logger.info("remat=%s does not fit", remat)
            error = found
            continue
        logger.info(
            "remat=%s: %.1f of %.1f GiB, %.0f ms without overlap",
            remat, report["memory"]["total"] / GIB, report["memory"]["hbm"] / GIB,
            1e3 * report["roofline"]["seconds_no_overlap"],
        )  # fmt: skip
        if report["fits"]:
            reports.append({**report, "remat": remat})
    if not reports:
        raise error or DoesNotFitError(f"No remat policy fits {target.topology}.")
    return min(reports, key=lambda report: report["roofline"]["seconds_no_overlap"])


def format_report(report: dict[str, Any]) -> str:
    """The report as text."""
    r, memory, times = report, report["memory"], report["roofline"]
    by_module = report["seconds_by_module"]
    total = sum(by_module.values())
    program = f"training step ({r['part']})" if r["program"] == "train" else "sampler"
    gib = lambda size: f"{size / GIB:.2f} GiB"
    millions = lambda count: f"{count / 1e6:,.1f} M"
    milliseconds = lambda value: f"{value * 1e3:,.1f} ms"
    on_gpu = r["topology"].partition(":")[0] in GPUS
    short = on_gpu and GPU_SHARE * memory["hbm"] < memory["total"] <= memory["hbm"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in r["mesh"].items())
    lines = [
        f"{program}, {r['topology']} ({r['devices']} devices: {mesh}), global batch "
        f"{r['batch_size']}, compiled in {r['compile_seconds']:.0f} s",
        "",
        "Parameters",
        *(f"  {name:<12} {millions(count):>12}" for name, count in r["parameters"].items()),
        "",
        f"Memory of a device ({gib(memory['hbm'])})",
        *(
            f"  {name:<12} {gib(memory[name]):>12}"
            for name in ("arguments", "outputs", "temporaries", "code", "total")
        ),
        f"  {'fits' if r['fits'] else 'DOES NOT FIT'}, {memory['total'] / memory['hbm']:.0%} used"
        + (", more than JAX takes without XLA_CLIENT_MEM_FRACTION=0.95" if short else ""),
        "",
        "Work per step, all devices",
        f"  model FLOPs     {r['model_flops']:.4g} (matrix products of the program as written)",
        f"  executed FLOPs  {r['executed_flops']:.4g} (including rematerialization)",
        "Work per step, one device",
        f"  memory traffic  {r['hbm_bytes'] / 1e9:,.1f} GB (estimate: all operands and results "
        "of fusions)",
        "  collectives",
        *(
            f"    {kind:<20} {k['count']:>6} times, {k['bytes'] / 1e6:>12,.3f} MB, "
            f"{k['bytes_sent'] / 1e6:,.3f} MB sent"
            for kind, k in sorted(r["collectives_by_kind"].items())
        ),
    ]
    if r["unknown_loops"]:
        lines.append(
            f"  counted once: {r['unknown_loops']} loops whose trip count depends on the data "
            "(the clustering's)"
        )
    if r["kernels"]:
        lines.append("  kernels")
        lines += [f"    {name:<28} {n:>8,} times" for name, n in sorted(r["kernels"].items())]
    if r["custom_calls"]:
        lines.append(f"  FLOPs not counted: opaque kernels {r['custom_calls']}")
    lines += [
        "",
        f"Time per step ({r['estimate']})",
        *(f"  {name:<12} {milliseconds(times[name]):>12}" for name in ("compute", "hbm", "links")),
        f"  full overlap {milliseconds(times['seconds']):>12}, MFU {times['mfu']:.1%}, bound by "
        f"{times['bound']}",
        f"  no overlap   {milliseconds(times['seconds_no_overlap']):>12}, MFU "
        f"{times['mfu_no_overlap']:.1%}",
        "Shares of compute + hbm",
        *(
            f"  {name:<40} {seconds / total:>6.1%}"
            for name, seconds in sorted(by_module.items(), key=lambda item: -item[1])
            if seconds > 0
        ),
        "With full overlap",
        f"  {r['images_per_second']:,.0f} images per second",
    ]
    if r["program"] == "train":
        lines[-1] += (
            f", {r['steps_per_day']:,.0f} steps and {r['epochs_per_day']:,.1f} epochs per day"
        )
        (low, high), (least, most) = r["hours"], r["chip_hours"]
        lines += [
            f"The configured length, {r['steps']:,} steps",
            f"  {low:,.3g} to {high:,.3g} h, {least:,.4g} to {most:,.4g} chip-hours, without data, "
            "evaluations and saving",
            f"  ({MEASURED[0]:g} to {MEASURED[1]:g} times no overlap, as measured on one H100 and "
            "one H200)",
        ]
    return "\n".join(lines)
