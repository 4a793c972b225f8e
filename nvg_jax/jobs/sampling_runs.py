"""Sampling runs: files of samples that several processes write and that resume after a kill."""

import concurrent.futures
import dataclasses
import logging
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from nvg_jax.data.transforms import decode
from nvg_jax.errors import UserError
from nvg_jax.evaluation.sets import ImageSet
from nvg_jax.parts import GENERATORS
from nvg_jax.pipeline import Pipeline, SampleOutput
from nvg_jax.runtime.processes import barrier, from_main, is_main
from nvg_jax.runtime.progress import Progress
from nvg_jax.runtime.resumable import open_folder, own_missing, read_arrays, write_arrays
from nvg_jax.runtime.storage import alone, as_json, atomic_write, digest, fingerprint, storage_path
from nvg_jax.sampling import control
from nvg_jax.sampling.settings import MAX_SEED, Settings, check_integer
from nvg_jax.tokenizer import GranularitySequence
from nvg_jax.visualize import MIN_TILE, class_grid, labeled_grid, map_tile, save_png, to_uint8

UNFIT = r"[^\w.-]+"  # characters of a class name that a file name does without
GRID_LIMIT = 400  # samples in the grid
STAGES_LIMIT = 8  # samples in the picture of the stages

logger = logging.getLogger("nvg_jax")


class Constraint(NamedTuple):
    """What all samples of a job keep from a reference; see `Pipeline.sample`.

    sequence: maps and tokens, int (S, L) each. region: bool (L,), where to sample, or None.
    image, mask, feather: pixels float32 (H, W, 3) to paste back outside of a mask, bool (H, W),
    blended over `feather` pixels; without an image, nothing is pasted.
    """

    sequence: GranularitySequence
    structure_stages: int
    token_stages: int
    region: np.ndarray | None = None
    image: np.ndarray | None = None
    mask: np.ndarray | None = None
    feather: int = 0


@dataclasses.dataclass(frozen=True)
class SamplingJob(ImageSet):
    """The samples to draw: sample i is of the class classes[i // per_class].

    Batch n, the unit of work, has the `batch_size` samples from n * batch_size on.

    Attributes:
        classes: class ids.
        settings: sampling settings for `Pipeline.sample`.
        constraint: what all samples keep from a reference; None is nothing.
        walk_to: None, or the seed at which the samples of each class end. They then differ only in
            their structure noise, which is interpolated on a sphere, and begin at `seed`.

    Raises:
        UserError: an invalid seed, or a walk of fewer than two samples or of a model whose
            structure is fixed.
    """

    pipeline: Pipeline
    classes: Sequence[int]
    per_class: int
    batch_size: int
    seed: int
    settings: dict[str, Any]
    constraint: Constraint | None = None
    walk_to: int | None = None

    def __post_init__(self):
        check_integer("seed", self.seed, 0, MAX_SEED)
        if self.walk_to is not None:
            check_integer("walk_to", self.walk_to, 0, MAX_SEED)
            if self.per_class < 2:
                raise UserError(
                    f"A walk needs two samples or more, got per_class={self.per_class}."
                )
            self.pipeline.check_free_structure("walk from one to another")

    @classmethod
    def cycling(
        cls,
        pipeline: Pipeline,
        count: int,
        batch_size: int,
        seed: int,
        settings: dict[str, Any],
    ) -> "SamplingJob":
        """`count` samples to measure: of each class in turn, again and again.

        Fewer samples than classes are of classes spread over all.
        """
        num_classes = pipeline.metadata.model.num_classes
        shown = min(count, num_classes)
        classes = [index % shown * num_classes // shown for index in range(count)]
        return cls(pipeline, classes, 1, min(batch_size, count), seed, settings)

    def __len__(self) -> int:
        return len(self.classes) * self.per_class

    @property
    def image_size(self) -> tuple[int, int]:
        return self.pipeline.tokenizer.config.image_size

    def expanded_settings(self) -> Settings:
        """The settings of every stage; a setting that is not given takes the folder's value.

        Raises:
            UserError: a setting is out of range.
        """
        pipeline = self.pipeline
        return pipeline.metadata.expand_settings(pipeline.settings.updated(self.settings))

    def with_settings(self, changes: dict[str, Any]) -> "SamplingJob":
        return dataclasses.replace(self, settings={**self.settings, **changes})

    def indices(self, batch: int) -> range:
        """The samples of a batch; the last batch may be smaller."""
        first = batch * self.batch_size
        return range(first, min(first + self.batch_size, len(self)))

    def sample(self, batch: int) -> SampleOutput:
        indices, constraint = self.indices(batch), self.constraint
        ids = [self.classes[index // self.per_class] for index in indices]
        if self.walk_to is None:
            filled = ids + ids[-1:] * (self.batch_size - len(ids))  # one program for all batches
            out = self._sample(filled, indices.start)
        else:
            frames = [self._frame(index) for index in indices]
            out = jax.tree.map(lambda *parts: np.concatenate(parts), *frames)
        if constraint and constraint.image is not None:
            assert constraint.mask is not None  # they come together
            images = control.paste(
                constraint.image, out.images, constraint.mask, constraint.feather
            )
            out = out._replace(images=images)
        return jax.tree.map(lambda x: x[: len(ids)], out)

    def _sample(self, ids: Sequence[int], first_index: int, noise=None) -> SampleOutput:
        kept, constraint = {}, self.constraint
        if constraint:
            repeat = lambda x: np.broadcast_to(x, (len(ids), *x.shape))
            kept["prefix"] = jax.tree.map(repeat, constraint.sequence)
            for name in ("structure_stages", "token_stages", "region"):
                kept[name] = getattr(constraint, name)
        return self.pipeline.sample(
            ids, self.seed, noise, first_index=first_index, **kept, **self.settings
        )

    def _frame(self, index: int) -> SampleOutput:
        """A sample of a walk, as a batch of one."""
        number, step = divmod(index, self.per_class)
        first = number * self.per_class
        assert self.walk_to is not None
        start = self.pipeline.structure_noise(self.seed, 1, first)
        end = self.pipeline.structure_noise(self.walk_to, 1, first)
        noise = control.between(start, end, step / (self.per_class - 1))
        return self._sample([self.classes[number]], first, noise)

    def batches(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        for output in self._ahead(numbers):
            yield to_uint8(output.images)

    def _ahead(self, batches: Sequence[int]) -> Iterator[SampleOutput]:
        """Yields the batches; samples the next one while the caller works on the current one."""
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            pending = None
            for batch in batches:
                following = thread.submit(self.sample, batch)
                if pending is not None:
                    yield pending.result()
                pending = following
            if pending is not None:
                yield pending.result()

    def sample_all(self, batches: Sequence[int]) -> Iterator[tuple[int, SampleOutput]]:
        """Yields each batch with its number, and logs progress."""
        progress = Progress("sampling", sum(len(self.indices(n)) for n in batches), "samples")
        done = 0
        for batch, output in zip(batches, self._ahead(batches)):
            done += len(output.images)
            progress.update(done)
            yield batch, output

    def describe(self) -> dict[str, Any]:
        """Everything the samples depend on, JSON-serializable, with settings expanded per stage.

        Raises:
            UserError: a setting is out of range.
        """
        metadata = self.pipeline.metadata.to_json()
        model = {name: metadata[name] for name in ("tokenizer", "canvas_scale", *GENERATORS)}
        model["weights"] = self.pipeline.fingerprint
        description = {
            "model": digest(model)[:16],
            "dtype": self.pipeline.dtype,
            "classes": self.classes,
            "per_class": self.per_class,
            "seed": self.seed,
            "walk_to": self.walk_to,
            "batch_size": self.batch_size,
            "given": self.constraint and fingerprint(jax.tree.map(np.asarray, self.constraint)),
            **dataclasses.asdict(self.expanded_settings()),
        }
        return as_json(description)

    def facts(self) -> dict[str, Any]:
        """`describe` for metrics.json: without the classes, a long list."""
        return {name: value for name, value in self.describe().items() if name != "classes"}


def stage_images(pipeline: Pipeline, sequence: GranularitySequence) -> np.ndarray:
    """The canvas decoded after every stage, float32 (B, S, H, W, 3) in [-1, 1]."""
    canvases = pipeline.canvases(sequence).swapaxes(0, 1)
    return np.stack([pipeline.decode_canvas(canvas) for canvas in canvases], axis=1)


def stages_picture(
    pipeline: Pipeline, visual: GranularitySequence, names: Sequence[str], tile: int = MIN_TILE
) -> np.ndarray:
    """Canvases and maps, stage by stage (Figure 1 of the paper): two rows per image.

    Args:
        visual: the sequences of B images.
        names: the labels of their rows.
        tile: the pixels to which smaller images are enlarged.
    """
    config, tiles = pipeline.tokenizer.config, []
    for images, maps in zip(to_uint8(stage_images(pipeline, visual)), visual.structure):
        tiles.append(list(images))
        sizes = config.latent_size, config.image_size
        tiles.append([map_tile(labels, stage, *sizes) for stage, labels in enumerate(maps)])
    rows = [text for name in names for text in (name, "structure")]
    counts = [2**stage for stage in range(config.num_stages)]
    return labeled_grid(tiles, rows, [f"{n} token{'s' if n > 1 else ''}" for n in counts], tile)


# Files of samples.


def write_array(job: SamplingJob, out: str | os.PathLike):
    """Writes the samples to one .npz with "arr_0", uint8 (N, H, W, 3).

    Each batch is first written to a file in a folder of parts. When all parts exist, they are
    joined and removed.

    Raises:
        UserError: `out`, or the folder of parts, was made with other settings, cannot be written,
            or is being written by another command.
    """
    out, description = storage_path(out), job.describe()
    mark = digest(description).encode()  # the comment of the finished archive
    folder = out.with_name(out.name + ".parts")
    part = lambda batch: folder / f"{batch:06d}.npz"
    if from_main(out.exists()):
        if read_mark(out) != mark:
            raise UserError(
                f"{out} already exists and was made with other settings, or not by this command. "
                "Give another --out, or move it away."
            )
        logger.info("%s already exists", out)
    else:
        with alone(folder, out):
            if not from_main(out.exists()):  # another command may have ended just now
                open_folder(folder, "*.npz", description, "samples")
                missing = own_missing(job.num_batches, lambda batch: [part(batch)])
                for batch, output in job.sample_all(missing):
                    write_arrays(part(batch), {"arr_0": to_uint8(output.images)})
                barrier(f"the parts of {out} are there")
                if is_main():
                    join_parts(job, part, out, mark)
    if is_main():
        folder.rmtree(missing_ok=True)
    barrier(f"{out} is there")


def read_mark(path: epath.Path) -> bytes | None:
    """The comment of an archive, or None for any other file."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            return archive.comment
    except (zipfile.BadZipFile, IsADirectoryError):
        return None


def read_part(path: epath.Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The images of a part; None if it is missing, fails the archive's CRC, or has other images."""
    images = (read_arrays(path) or {}).get("arr_0")
    if images is None or images.shape != shape or images.dtype != np.uint8:
        return None
    return images


def join_parts(job: SamplingJob, part, out: epath.Path, mark: bytes):
    """Joins the parts into the .npz, one in memory at a time; recreates damaged ones."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(job), *job.image_size, 3)}
    with atomic_write(out) as file, zipfile.ZipFile(file, "w") as archive:
        archive.comment = mark
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for batch in range(job.num_batches):
                images = read_part(part(batch), (len(job.indices(batch)), *job.image_size, 3))
                if images is None:
                    images = to_uint8(job.sample(batch).images)
                member.write(images.tobytes())


def in_file_name(name: str) -> str:
    """A class name as a part of a file name, which may have 255 bytes."""
    return re.sub(UNFIT, "_", name).encode()[:200].decode(errors="ignore")


def write_pictures(job: SamplingJob, out: str | os.PathLike, columns: int):
    """Writes a PNG per sample, grid.png and, for the first batch, stages.png into a folder.

    Raises:
        UserError: the folder holds pictures with other settings, or a damaged one, cannot be
            written, or is being written by another command.
    """
    out, classes = storage_path(out), np.repeat(job.classes, job.per_class)
    names = [job.pipeline.class_names[label] for label in classes]
    pictures = [out / f"{i:06d}_{in_file_name(name)}.png" for i, name in enumerate(names)]
    stages = out / "stages.png"
    files = lambda batch: [pictures[i] for i in job.indices(batch)] + [stages] * (batch == 0)
    with alone(out):
        open_folder(out, "[0-9]*_*.png", job.describe(), "samples")
        for batch, output in job.sample_all(own_missing(job.num_batches, files)):
            for index, image in zip(job.indices(batch), to_uint8(output.images)):
                save_png(pictures[index], image)
            if batch == 0:
                picks = np.unique(np.linspace(0, len(output.images) - 1, STAGES_LIMIT).astype(int))
                visual = GranularitySequence(*(part[picks] for part in output.sequence))
                save_png(stages, stages_picture(job.pipeline, visual, [names[i] for i in picks]))
        barrier(f"the pictures in {out} are there")
    if is_main():
        shown = []
        for path in pictures[:GRID_LIMIT]:
            try:
                shown.append(np.asarray(decode(path.read_bytes())))
            except UserError as error:
                raise UserError(
                    f"{path} is {error}. Delete it and run the same command again."
                ) from error
        save_png(out / "grid.png", class_grid(np.stack(shown), names[: len(shown)], columns))
