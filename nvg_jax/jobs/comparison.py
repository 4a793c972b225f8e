"""Metrics comparable with published ones: of samples, of reconstructions, of a sweep."""

import dataclasses
import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from nvg_jax import pretrained
from nvg_jax.data import Source, Transform, open_source
from nvg_jax.data.sources import SPLITS
from nvg_jax.errors import UserError
from nvg_jax.evaluation import metrics
from nvg_jax.evaluation.generation import FeatureSet, generation_metrics
from nvg_jax.jobs import features
from nvg_jax.jobs.features import Archive, ImageSet, Inception, Split
from nvg_jax.jobs.sampling import SamplingJob
from nvg_jax.pipeline import Pipeline
from nvg_jax.runtime.files import atomic_write, digest, fingerprint
from nvg_jax.runtime.processes import is_main
from nvg_jax.runtime.sharding import local_batch, make_mesh
from nvg_jax.sampling.settings import Settings, text_of
from nvg_jax.visualize import reconstruction_grid, save_png, to_uint8

logger = logging.getLogger("nvg_jax")
EXTREMES = 8  # best and worst reconstructions in the picture


def open_split(data: dict[str, Any], split: str) -> Source:
    """A split of a data set; `data` is as in a config."""
    return open_source(data["name"], split, data_dir=data["data_dir"] or None)


def split_images(
    data: dict[str, Any], split: str, image_size: tuple[int, int], batch_size: int
) -> Split:
    """The images of a split, cropped to one size; `data` is as in a config."""
    source = open_split(data, split)
    transform = Transform(image_size, data["resize"] or None)
    return Split(source, transform, {**data, "split": split}, batch_size)


def compare(
    images: ImageSet, reference: FeatureSet, judge: Inception, out: Path, settings: dict[str, Any]
) -> dict[str, Any]:
    """The five metrics of a set of images; writes metrics.json into `out`.

    Args:
        settings: how the images were made, to be included in the result.

    Returns:
        {"fid", "sfid", "inception_score", "precision", "recall", "images", ...} on process 0, {} on
        the others.

    Raises:
        UserError: images that cannot be read, or too few of them.
    """
    found = features.extract(images, judge, out / "features")
    if not is_main():
        return {}
    results = generation_metrics(reference, found)
    results |= {"images": found.count, "reference_images": reference.count}
    results |= {"judge": judge.name, "network": judge.fingerprint, **settings}
    write_results(out / "metrics.json", results)
    return results


def write_results(path: Path, results: dict[str, Any] | list[dict[str, Any]]):
    with atomic_write(path) as file:
        file.write((json.dumps(results, indent=1) + "\n").encode())


def check_sizes(images: ImageSet, reference: ImageSet):
    """Warns if two sets have images of different sizes, which the network's resizing would hide."""
    if tuple(images.image_size) != tuple(reference.image_size):
        logger.warning(
            "the samples have %d x %d pixels and the reference %d x %d: both are resized to the "
            "network's input, so the figures also measure the difference in resolution",
            *images.image_size,
            *reference.image_size,
        )


# Sweeps.


def parse_sweep(text: str) -> list[dict[str, Any]]:
    """All combinations of "NAME=VALUE;VALUE NAME=VALUE;..."; a value may be START,END.

    Raises:
        UserError: an unknown setting, or a value that is not a number.
    """
    specs, choices = Settings.specs(), {}
    for item in text.split():
        name, _, values = item.partition("=")
        if name not in specs or not values:
            raise UserError(
                f"--sweep takes NAME=VALUE;VALUE, for example content_guidance=1,3.5;1,4.5, with "
                f"the names {', '.join(specs)}; got {item!r}."
            )
        try:
            choices[name] = [specs[name].parse(value) for value in values.split(";")]
        except ValueError:
            kind = "true or false" if specs[name].kind is bool else "numbers"
            raise UserError(f"--sweep: {name} takes {kind}, got {values!r}.") from None
    return [dict(zip(choices, values)) for values in itertools.product(*choices.values())]


def sweep(
    job: SamplingJob,
    points: Sequence[dict[str, Any]],
    reference: FeatureSet,
    judge: Inception,
    out: Path,
) -> list[dict[str, Any]]:
    """Compares the samples of every point with the reference; writes metrics.json.

    Returns:
        The results of all points, each with its settings as "sweep"; [] on all processes but 0.
    """
    results = []
    for number, point in enumerate(points, 1):
        logger.info("sweep: %d of %d: %s", number, len(points), point)
        changed = at_point(job, point)
        folder = out / digest(json.loads(json.dumps(point)))[:8]
        found = compare(changed, reference, judge, folder, sampling_facts(changed))
        results.append({"sweep": point, **found})
    if not is_main():
        return []
    write_results(out / "metrics.json", results)
    return results


def at_point(job: SamplingJob, point: dict[str, Any]) -> SamplingJob:
    """The job with the settings of one point of a sweep."""
    return dataclasses.replace(job, settings={**job.settings, **point})


def sampling_facts(job: SamplingJob) -> dict[str, Any]:
    """How samples were made, without the list of their classes."""
    return {name: value for name, value in job.describe().items() if name != "classes"}


def table(results: Sequence[dict[str, Any]]) -> str:
    """Results as lines of text; if there are several, the one with the lowest FID is marked."""
    columns = ("fid", "sfid", "inception_score", "precision", "recall")
    heads = ("FID", "sFID", "IS", "precision", "recall")
    best = min(range(len(results)), key=lambda i: results[i]["fid"])
    lines = ["".join(f"{head:>11}" for head in heads)]
    for index, result in enumerate(results):
        line = "".join(f"{result[column]:11.4f}" for column in columns)
        if "sweep" in result:
            line += "  " + " ".join(f"{k}={text_of(v)}" for k, v in result["sweep"].items())
            line += "  <- lowest FID" if index == best else ""
        lines.append(line)
    return "\n".join(lines)


# Reconstruction.


class Reconstructions(NamedTuple):
    """The measurements of a batch of images and their reconstructions."""

    real: Any  # float32 (B, D), Inception's pool features
    restored: Any
    lpips_vgg: Any  # (B,); so are the next three
    lpips_alex: Any
    psnr: Any
    ssim: Any
    codes: Any  # bool (S, V), whether the batch uses a code in a stage


def reconstruction(pipeline: Pipeline, images: Split, out: Path) -> dict[str, Any]:
    """rFID, LPIPS, PSNR, SSIM and codebook usage; writes metrics.json and extremes.png.

    As published: reconstructions are truncated to uint8, images are resized for Inception with
    antialiasing, and rFID compares the reconstructions with the same originals.

    Returns:
        The metrics on process 0, {} on the others.

    Raises:
        UserError: a network's weights are missing, or an image cannot be read.
    """
    judge = Inception(pretrained.antialiased_inception_input)
    mesh = make_mesh(devices=jax.local_devices())
    networks = {name: pretrained.load(name) for name in ("lpips", "lpips_alex")}
    networks = jax.device_put(networks, NamedSharding(mesh, PartitionSpec()))
    distances = jax.jit(
        lambda networks, a, b: (
            pretrained.lpips(networks["lpips"], a, b, jnp.float32),
            pretrained.lpips_alex(networks["lpips_alex"], a, b, jnp.float32),
        )
    )
    config = pipeline.tokenizer.config

    def measure(batch: np.ndarray) -> Reconstructions:
        sequence = pipeline.encode(batch)
        restored = to_uint8(pipeline.decode(sequence))
        a, b = (metrics.to_float(x) for x in (batch, restored))
        codes = np.zeros((config.num_stages, config.codebook_size), bool)
        for stage in range(config.num_stages):
            codes[stage, sequence.tokens[:, stage]] = True
        with jax.set_mesh(mesh):
            lpips = distances(networks, *local_batch((a, b), mesh))
        return Reconstructions(
            judge.image_features(a).pool,
            judge.image_features(b).pool,
            *(np.asarray(distance)[: len(batch)] for distance in lpips),
            metrics.psnr(batch, restored),
            metrics.structural_similarity(batch, restored),
            codes,
        )

    def compute(numbers: Sequence[int]) -> Iterator[Reconstructions]:
        return map(measure, features.filled(images, numbers))

    count, num_batches = len(images), images.num_batches
    description = {
        "network": judge.fingerprint,
        "lpips": [fingerprint(network) for network in networks.values()],
        "tokenizer": fingerprint(pipeline.params["tokenizer"]),
        "dtype": pipeline.dtype,
        "batch_size": images.batch_size,
        **images.describe(),
    }
    folder = out / "reconstructions"
    parts = list(features.in_parts(images, folder, description, compute, "reconstruction"))

    def gathered(name: str) -> np.ndarray:
        rows = [part[name].astype(np.float32).reshape(len(part[name]), -1) for part in parts]
        return features.gather_rows(rows, num_batches)

    found = Reconstructions(*map(gathered, Reconstructions._fields))
    if not is_main():
        return {}
    codes = found.codes.reshape(num_batches, config.num_stages, -1)
    found = jax.tree.map(lambda x: x[:count], found)
    results = {"rfid": metrics.frechet_distance(found.real, found.restored)}
    for name in ("lpips_vgg", "lpips_alex", "psnr", "ssim"):
        results[name] = float(getattr(found, name).mean(dtype=np.float64))
    used = metrics.codebook_usage(codes.sum(0))
    results["codebook_usage"] = float(used["codebook_usage"])
    results["codebook_usage_of_stages"] = used["codebook_usage_stage"].tolist()
    results |= {"images": count, "network": judge.fingerprint, "dtype": pipeline.dtype}
    results["data"] = images.describe()
    save_png(out / "extremes.png", extremes(pipeline, images, found.lpips_vgg[:, 0]))
    write_results(out / "metrics.json", results)
    return results


def extremes(pipeline: Pipeline, images: Split, distances: np.ndarray) -> np.ndarray:
    """The best and then the worst reconstructions by `distances`, below their images."""
    order = np.argsort(distances)
    count = min(EXTREMES, len(order) // 2)
    chosen = np.concatenate([order[:count], order[len(order) - count :]])
    size = images.batch_size
    shown = np.stack([next(images.batches([i // size]))[i % size] for i in chosen])
    restored = pipeline.reconstruct(shown)
    return reconstruction_grid(metrics.to_float(shown), restored)


def open_reference(
    text: str,
    batch_size: int,
    image_size: tuple[int, int] | None = None,
    data: dict[str, Any] | None = None,
) -> ImageSet:
    """The reference images that --reference names: an .npz file, or a split of the data set.

    Args:
        image_size, data: the model's image size, and `data` as in a config; only for a split.

    Raises:
        UserError: `text` is neither, or `data` is missing.
    """
    if text in SPLITS:
        if data is None:
            raise UserError(
                f"--reference={text} is a split of a data set, cropped to a model's image size; "
                "give --workdir, or a reference file."
            )
        return split_images(data, text, image_size, batch_size)
    if not text.endswith(".npz"):
        raise UserError(f"--reference must be train, test or an .npz file, got {text!r}.")
    return Archive(text, batch_size)
