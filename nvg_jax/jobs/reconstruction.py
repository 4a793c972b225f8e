"""How well a tokenizer reconstructs images."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from nvg_jax import pretrained
from nvg_jax.evaluation.features import Moments, frechet_distance
from nvg_jax.evaluation.image import psnr, structural_similarity, to_float
from nvg_jax.evaluation.judges import make_judge
from nvg_jax.evaluation.report import digits, explain, gather_moments, too_few, write_results
from nvg_jax.evaluation.sets import ImageSet, Split
from nvg_jax.pipeline import Pipeline
from nvg_jax.runtime.processes import from_all, gather_rows, is_main
from nvg_jax.runtime.resumable import own_parts
from nvg_jax.runtime.sharding import local_batch, local_mesh, replicated
from nvg_jax.runtime.storage import fingerprint
from nvg_jax.tokenizer import codebook_usage
from nvg_jax.visualize import reconstruction_grid, save_png, to_uint8

DISTANCES = ("lpips_vgg", "lpips_alex", "psnr", "ssim")  # between an image and its reconstruction
EXTREMES = 8  # best and worst reconstructions in the picture


class Reconstructions(ImageSet):
    """The images of a set through a model's tokenizer and back."""

    def __init__(self, pipeline: Pipeline, originals: ImageSet):
        self._pipeline, self._originals = pipeline, originals
        self.batch_size, self.image_size = originals.batch_size, originals.image_size

    def __len__(self) -> int:
        return len(self._originals)

    def batches(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        for number, batch in zip(numbers, self._originals.filled(numbers)):
            restored = to_uint8(self._pipeline.reconstruct(batch))
            yield restored[: len(self) - number * self.batch_size]


class Measurements(NamedTuple):
    """The measurements of a batch of images and their reconstructions."""

    real: Any  # float32 (B, D), the judge's pool features
    restored: Any
    distances: Any  # float32 (B, 4), see DISTANCES
    codes: Any  # bool (S, V), whether the batch uses a code in a stage


def report(pipeline: Pipeline, images: Split, out: epath.Path, judge_name: str) -> dict[str, Any]:
    """rFID, LPIPS, PSNR, SSIM and codebook usage; writes metrics.json and extremes.png.

    As published: reconstructions are truncated to uint8, images are resized for Inception with
    antialiasing, and rFID compares the reconstructions with the same originals.

    Returns:
        The metrics on process 0, {} on the others.

    Raises:
        UserError: a network's weights are missing, or an image cannot be read.
    """
    judge = make_judge(judge_name, "reconstructions")
    mesh = local_mesh()
    networks = {name: pretrained.load(name) for name in ("lpips", "lpips_alex")}
    networks = jax.device_put(networks, replicated(mesh))

    @jax.jit
    def perceptual(networks, a, b):
        with jax.default_matmul_precision("highest"):  # as Inception: compared with others' results
            return (
                pretrained.lpips(networks["lpips"], a, b, jnp.float32),
                pretrained.lpips_alex(networks["lpips_alex"], a, b, jnp.float32),
            )

    config = pipeline.tokenizer.config

    def measure(batch: np.ndarray) -> Measurements:
        sequence = pipeline.encode(batch)
        restored = to_uint8(pipeline.decode(sequence))
        codes = np.zeros((config.num_stages, config.codebook_size), bool)
        for stage in range(config.num_stages):
            codes[stage, sequence.tokens[:, stage]] = True
        with jax.set_mesh(mesh):
            lpips = perceptual(networks, *local_batch((to_float(batch), to_float(restored)), mesh))
        distances = [np.asarray(distance)[: len(batch)] for distance in lpips]
        distances += [psnr(batch, restored), structural_similarity(batch, restored)]
        return Measurements(
            judge.image_features(batch).pool,
            judge.image_features(restored).pool,
            np.stack(distances, axis=1).astype(np.float32),
            codes,
        )

    count, size, num_batches = len(images), images.batch_size, images.num_batches
    description = {
        "network": judge.fingerprint,
        "lpips": [fingerprint(network) for network in networks.values()],
        "tokenizer": fingerprint(pipeline.params["tokenizer"]),
        "dtype": pipeline.dtype,
        "distances": list(DISTANCES),
        "batch_size": size,
        **images.describe(),
    }
    real, restored, distances = Moments(), Moments(), []
    codes = np.zeros((config.num_stages, config.codebook_size), int)
    for number, part in own_parts(
        lambda numbers: map(measure, images.filled(numbers)),
        num_batches,
        min(size, count),
        "reconstructions",
        out / "reconstructions",
        description,
    ):
        own = slice(min(size, count - number * size))  # the last batch was filled up
        real += Moments.of(part["real"][own])
        restored += Moments.of(part["restored"][own])
        distances.append(part["distances"])
        codes += part["codes"]
    real, restored = gather_moments(real).statistics, gather_moments(restored).statistics
    distances, codes = gather_rows(distances, num_batches)[:count], from_all(codes).sum(0)
    if not is_main():
        return {}
    results: dict[str, Any] = {"rfid": frechet_distance(real, restored)}
    results |= zip(DISTANCES, distances.mean(0, dtype=np.float64).tolist())
    usage = codebook_usage(codes)
    results["codebook_usage"] = float(usage["codebook_usage"])
    results["codebook_usage_of_stages"] = usage["codebook_usage_stage"].tolist()
    results |= {"images": count, "features": len(real[0])}
    results |= {"judge": judge.name, "network": judge.fingerprint, "dtype": pipeline.dtype}
    results["data"] = images.describe()
    save_png(out / "extremes.png", extremes(pipeline, images, distances[:, 0]))
    write_results(out / "metrics.json", results)
    return results


def table(results: dict[str, Any]) -> str:
    """The metrics of `report` as text."""
    names = {"rFID": "rfid", "LPIPS": "lpips_vgg", "PSNR": "psnr", "SSIM": "ssim"}
    names["codebook usage"] = "codebook_usage"
    lines = [f"{head:<16}{digits(results[name]):>11}" for head, name in names.items()]
    return "\n".join([*lines, *too_few(results), "", *explain(list(names))])


def extremes(pipeline: Pipeline, images: Split, distances: np.ndarray) -> np.ndarray:
    """The best and then the worst reconstructions by `distances`, below their images."""
    order = np.argsort(distances)
    count = min(EXTREMES, len(order) // 2)
    chosen = np.concatenate([order[:count], order[len(order) - count :]])
    size = images.batch_size
    shown = np.stack([next(images.batches([i // size]))[i % size] for i in chosen])
    labels = ["best"] * count + ["worst"] * count
    return reconstruction_grid(shown, pipeline.reconstruct(shown), columns=labels)
