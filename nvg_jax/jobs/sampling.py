"""Makes many samples, on several processes, and writes them so that a killed run can resume."""

import dataclasses
import io
import json
import logging
import reprlib
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nvg_jax.data.transforms import decode
from nvg_jax.models import GENERATORS
from nvg_jax.pipeline import Output, Pipeline
from nvg_jax.runtime import processes
from nvg_jax.runtime.files import atomic_write, digest, fingerprint, read_json, write_json
from nvg_jax.runtime.progress import Progress
from nvg_jax.runtime.sharding import fill_batch
from nvg_jax.visualize import image_grid, save_png, stages_grid, to_uint8

GRID_LIMIT = 400  # samples in grid.png
STAGES_LIMIT = 8  # samples in stages.png
SETTINGS_FILE = "settings.json"

logger = logging.getLogger("nvg_jax")


@dataclasses.dataclass(frozen=True)
class SamplingJob:
    """The samples to make: sample i is of class classes[i // per_class].

    Batch n, the unit of work, holds `batch_size` samples, starting with n * batch_size.

    Attributes:
        classes: ids of classes.
        settings: keyword arguments of `Pipeline.sample`.
    """

    pipeline: Pipeline
    classes: Sequence[int]
    per_class: int
    batch_size: int
    seed: int
    settings: dict[str, Any]

    def __len__(self) -> int:
        return len(self.classes) * self.per_class

    @property
    def num_batches(self) -> int:
        return -(-len(self) // self.batch_size)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (*self.pipeline.tokenizer.config.image_size, 3)

    def indices(self, batch: int) -> range:
        """The samples of a batch; the last batch may be smaller."""
        first = batch * self.batch_size
        return range(first, min(first + self.batch_size, len(self)))

    def make(self, batch: int) -> Output:
        """Generates the samples of a batch."""
        indices = self.indices(batch)
        ids = np.array([self.classes[index // self.per_class] for index in indices])
        filled = fill_batch(ids, self.batch_size)  # one shape, so that it compiles once
        output = self.pipeline.sample(filled, self.seed, first_index=indices.start, **self.settings)
        return jax.tree.map(lambda x: x[: len(ids)], output)

    def make_all(self, batches: Sequence[int]) -> Iterator[tuple[int, Output]]:
        """Yields (batch, its samples) for all `batches`, and logs the progress."""
        total, done = sum(len(self.indices(batch)) for batch in batches), 0
        progress = Progress("sampling", total, "samples")
        for batch in batches:
            output = self.make(batch)
            done += len(output.images)
            progress.update(done)
            yield batch, output

    def describe(self) -> dict[str, Any]:
        """Everything the samples depend on, JSON-serializable; settings have a value per stage.

        Raises:
            ValueError: a setting out of range.
        """
        meta, config = self.pipeline.meta, self.pipeline.tokenizer.config
        model = {name: meta[name] for name in ("tokenizer", "canvas_scale", *GENERATORS)}
        model["weights"] = fingerprint(self.pipeline.params)
        settings = dataclasses.replace(self.pipeline.settings, **self.settings)
        description = {
            "model": digest(model)[:16],
            "classes": self.classes,
            "per_class": self.per_class,
            "seed": self.seed,
            "batch_size": self.batch_size,
            **dataclasses.asdict(settings.expand(config.num_stages, config.codebook_size)),
        }
        return json.loads(json.dumps(description))  # tuples become lists, as in a file


def draw(job: SamplingJob) -> tuple[np.ndarray, Output | None]:
    """Makes all samples, each process its share of the batches.

    Returns:
        Images, float32 (N, H, W, 3) in [-1, 1], on every process; and the first batch that this
        process made, None if it made none.
    """
    own, first = processes.own_share(job.num_batches), None
    images = np.zeros((len(own), job.batch_size, *job.image_shape), np.float32)
    for row, (_, output) in enumerate(job.make_all(own)):
        images[row, : len(output.images)] = output.images
        first = first or output
    images = processes.gather(images, job.num_batches)
    return images.reshape(-1, *job.image_shape)[: len(job)], first


def draw_stages(pipeline: Pipeline, output: Output, samples: np.ndarray) -> np.ndarray:
    """Shows how `samples` (indices into `output`) came about; see `stages_grid`."""
    canvases = output.canvases[samples]
    images = pipeline.decode_canvas(canvases.reshape(-1, *canvases.shape[2:]))
    return stages_grid(
        images.reshape(*canvases.shape[:2], *images.shape[1:]),
        output.sequence.structure[samples],
        pipeline.tokenizer.config.latent_size,
    )


# Resumable output: every file present is complete and was made with these settings.


def open_folder(folder: Path, pattern: str, description: dict[str, Any]):
    """Creates a folder for samples, or checks that it was created with the same settings.

    Args:
        pattern: matches the names of the files with samples.
        description: see `SamplingJob.describe`; stored in the folder.

    Raises:
        ValueError: the folder holds samples made with other or unknown settings, or a process
            does not see the folder.
    """
    path = folder / SETTINGS_FILE
    stored = read_json(path)
    if stored is not None:
        differences = [
            f"{name} was {reprlib.repr(stored.get(name))} and is {reprlib.repr(value)} now"
            for name, value in description.items()
            if stored.get(name) != value
        ]
        if differences:
            raise ValueError(
                f"{folder} holds samples made with other settings: {'; '.join(differences)}. "
                "Resume with the same settings, give another --out, or delete the folder to start "
                "over. (The model also differs if its run was trained further.)"
            )
    elif folder.is_dir() and any(folder.glob(pattern)):
        raise ValueError(
            f"{folder} holds samples but no {SETTINGS_FILE} that says how they were made. Give "
            "another --out, or move the samples away."
        )
    elif processes.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, description)
    processes.barrier(f"{path} is written")
    if not path.exists():
        raise ValueError(
            f"Process {jax.process_index()} does not see {path}, which process 0 wrote. --out "
            "must be on a file system that all processes share."
        )


def missing_batches(job: SamplingJob, files: Callable[[int], Iterable[Path]]) -> list[int]:
    """The batches of this process that lack a file; `files` gives the files of a batch."""
    own = processes.own_share(job.num_batches)
    missing = [batch for batch in own if not all(path.exists() for path in files(batch))]
    if len(missing) < len(own):
        logger.info("%d of %d batches are already there", len(own) - len(missing), len(own))
    return missing


# One .npz file.


def write_array(job: SamplingJob, out: Path):
    """Writes the samples to one .npz file with "arr_0", uint8 (N, H, W, 3).

    Each batch is first written to a file of its own in the folder `out`.parts. When all are
    there, process 0 joins and removes them.

    Raises:
        ValueError: `out` or its folder of parts was made with other settings.
        OSError: a file cannot be written.
    """
    description = job.describe()
    mark = digest(description).encode()  # the comment of the finished archive
    folder = out.with_name(out.name + ".parts")
    if out.exists():
        if read_comment(out) != mark:
            raise ValueError(
                f"{out} already exists and was made with other settings or by another program. "
                "Give another --out, or move the file away."
            )
        logger.info("%s is already there", out)
    else:
        open_folder(folder, "*.npz", description)
        missing = missing_batches(job, lambda batch: [part_path(folder, batch)])
        for batch, output in job.make_all(missing):
            with atomic_write(part_path(folder, batch)) as file:
                np.savez(file, to_uint8(output.images))
        processes.barrier(f"all parts of {out} are written")
        if processes.is_main():
            join_parts(job, folder, out, mark)
    if processes.is_main():
        shutil.rmtree(folder, ignore_errors=True)
    processes.barrier(f"{out} is written")


def read_comment(path: Path) -> bytes | None:
    """The comment of a zip archive, None for any other file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.comment
    except zipfile.BadZipFile:
        return None


def part_path(folder: Path, batch: int) -> Path:
    return folder / f"{batch:06d}.npz"


def read_part(path: Path) -> np.ndarray | None:
    """The uint8 images (B, H, W, 3) of a part, None if it is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            content = archive.read("arr_0.npy")  # all of it, which verifies the zip's CRC
        return np.lib.format.read_array(io.BytesIO(content))
    except Exception:  # damage comes as errors of many kinds
        return None


def join_parts(job: SamplingJob, folder: Path, out: Path, mark: bytes):
    """Joins the parts, one in memory at a time; makes missing and damaged ones again."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(job), *job.image_shape)}
    with atomic_write(out) as file, zipfile.ZipFile(file, "w") as archive:
        archive.comment = mark
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for batch in range(job.num_batches):
                images = read_part(part_path(folder, batch))
                if images is None:
                    logger.warning(
                        "%s is missing or damaged; making it again", part_path(folder, batch)
                    )
                    images = to_uint8(job.make(batch).images)
                member.write(images.tobytes())


# A folder of PNG files.


def write_images(job: SamplingJob, out: Path, columns: int):
    """Writes a folder with a PNG for each sample, grid.png, and stages.png of the first batch.

    Raises:
        ValueError: the folder holds samples made with other settings, or a damaged one.
        OSError: a file cannot be written.
    """
    classes = np.repeat(job.classes, job.per_class)
    paths = [out / f"{index:06d}_class{label}.png" for index, label in enumerate(classes)]
    stages = out / "stages.png"
    files = lambda batch: [paths[i] for i in job.indices(batch)] + [stages] * (batch == 0)
    open_folder(out, "*_class*.png", job.describe())
    for batch, output in job.make_all(missing_batches(job, files)):
        for index, image in zip(job.indices(batch), to_uint8(output.images)):
            save_png(paths[index], image)
        if batch == 0:
            shown = np.unique(np.linspace(0, len(output.images) - 1, STAGES_LIMIT).astype(int))
            save_png(stages, draw_stages(job.pipeline, output, shown))
    processes.barrier(f"all images in {out} are written")
    if processes.is_main():
        images = [read_image(path) for path in paths[:GRID_LIMIT]]
        save_png(out / "grid.png", image_grid(np.stack(images), columns))


def read_image(path: Path) -> np.ndarray:
    try:
        return np.asarray(decode(path.read_bytes()))
    except ValueError as error:
        raise ValueError(f"{path} is {error}. Delete it and run the same command again.") from error
