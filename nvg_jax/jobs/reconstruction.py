"""How well a tokenizer reconstructs images."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from nvg_jax import pretrained
from nvg_jax.evaluation.features import frechet_distance
from nvg_jax.evaluation.image import psnr, structural_similarity, to_float
from nvg_jax.evaluation.judges import make_judge
from nvg_jax.evaluation.report import digits, explain, too_few, write_results
from nvg_jax.evaluation.sets import ImageSet, Split
from nvg_jax.pipeline import Pipeline
from nvg_jax.runtime.processes import gather_rows, is_main
from nvg_jax.runtime.resumable import own_parts
from nvg_jax.runtime.sharding import local_batch, local_mesh, replicated
from nvg_jax.runtime.storage import fingerprint
from nvg_jax.tokenizer import codebook_usage
from nvg_jax.visualize import reconstruction_grid, save_png, to_uint8

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
    lpips_vgg: Any  # (B,); so are the next three
    lpips_alex: Any
    psnr: Any
    ssim: Any
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
    def distances(networks, a, b):
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
            lpips = distances(networks, *local_batch((to_float(batch), to_float(restored)), mesh))
        vgg, alex = (np.asarray(distance)[: len(batch)] for distance in lpips)
        return Measurements(
            judge.image_features(batch).pool,
            judge.image_features(restored).pool,
            vgg,
            alex,
            psnr(batch, restored),
            structural_similarity(batch, restored),
            codes,
        )

    count, num_batches = len(images), images.num_batches
    description = {
        "network": judge.fingerprint,
        "lpips": [fingerprint(network) for network in networks.values()],
        "tokenizer": fingerprint(pipeline.params["tokenizer"]),
        "dtype": pipeline.dtype,
        "batch_size": images.batch_size,
        **images.describe(),
    }
    parts = own_parts(
        lambda numbers: map(measure, images.filled(numbers)),
        num_batches,
        min(images.batch_size, count),
        "reconstructions",
        out / "reconstructions",
        description,
    )
    parts = [part for _, part in parts]

    def gathered(name: str) -> np.ndarray:
        rows = [part[name].astype(np.float32).reshape(len(part[name]), -1) for part in parts]
        return gather_rows(rows, num_batches)

    measured = Measurements(*map(gathered, Measurements._fields))
    if not is_main():
        return {}
    codes = measured.codes.reshape(num_batches, config.num_stages, -1)
    measured = jax.tree.map(lambda x: x[:count], measured)
    results: dict[str, Any] = {"rfid": frechet_distance(measured.real, measured.restored)}
    for name in ("lpips_vgg", "lpips_alex", "psnr", "ssim"):
        results[name] = float(getattr(measured, name).mean(dtype=np.float64))
    usage = codebook_usage(codes.sum(0))
    results["codebook_usage"] = float(usage["codebook_usage"])
    results["codebook_usage_of_stages"] = usage["codebook_usage_stage"].tolist()
    results |= {"images": count, "features": measured.real.shape[1]}
    results |= {"judge": judge.name, "network": judge.fingerprint, "dtype": pipeline.dtype}
    results["data"] = images.describe()
    save_png(out / "extremes.png", extremes(pipeline, images, measured.lpips_vgg[:, 0]))
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
