"""Sampling: `python -m nvg_jax.sample --workdir=runs/digits --classes=0,1,2 --per_class=8`.

Writes a PNG for every sample, a grid of the first ones and a picture of the stages; or one .npz
with "arr_0", uint8 (N, H, W, 3), if --out ends in it. Killed at any moment, the same command goes
on where it was. What is not given is taken from the folder's own recommended settings.
"""

import dataclasses
import hashlib
import json
import logging
import reprlib
import shutil
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from nvg_jax import cli
from nvg_jax.data.transforms import decode
from nvg_jax.models import GENERATORS
from nvg_jax.pipeline import Output, Pipeline
from nvg_jax.runtime import checkpoint
from nvg_jax.visualize import image_grid, replacing, save_png, stages_grid, to_uint8

GRID_LIMIT = 400  # samples in the grid
STAGES_LIMIT = 8  # samples in the picture of the stages
SETTINGS_FILE = "settings.json"
CHECKSUM_BYTES = hashlib.sha256().digest_size

FLAGS = flags.FLAGS
logger = logging.getLogger("nvg_jax")


def define_flags():
    """The flags that sampling and evaluation share."""
    flags.DEFINE_string("workdir", None, "A run's folder, or an exported or converted one.")
    flags.DEFINE_integer("seed", 0, "Seed of all randomness.")
    flags.DEFINE_string("out", None, "Folder for the pictures, or a file ending in .npz.")
    flags.DEFINE_integer("batch_size", 64, "Samples that a process makes at once.", lower_bound=1)
    flags.DEFINE_float("temperature", None, "0 takes the most likely token.")
    for name in ("top_k", "top_p", "content_guidance", "structure_guidance"):
        flags.DEFINE_list(name, None, "A number, start,end, or one value a stage.")
    flags.DEFINE_integer("flow_steps", None, "Euler steps of a split.")
    flags.DEFINE_boolean("gumbel", None, "Draw the splits at random.")


def settings_from_flags() -> dict:
    """The sampling settings that the flags give, as `Pipeline.sample` takes them."""
    names = ("temperature", "flow_steps", "gumbel")
    given = {name: FLAGS[name].value for name in names if FLAGS[name].value is not None}
    for name in ("top_k", "top_p", "content_guidance", "structure_guidance"):
        values = FLAGS[name].value
        if values is not None:
            try:
                given[name] = tuple(float(value) for value in values)
            except ValueError:
                raise ValueError(f"--{name} takes numbers, got {','.join(values)!r}.") from None
    return given


# Work dealt out to the processes.


def own_share(count: int) -> range:
    """The items of 0 .. count - 1 that this process works on: its index, then every P-th."""
    return range(jax.process_index(), count, jax.process_count())


def gather(own: np.ndarray, count: int) -> np.ndarray:
    """The rows of all processes in order, (count, ...), from the rows of `own_share(count)`.

    Every process has to call it; each gets all rows.
    """
    processes = jax.process_count()
    if processes == 1:
        return own
    most = -(-count // processes)  # rows of a process
    whole = np.empty((most, processes, *own.shape[1:]), own.dtype)
    for place in range(most):  # one row at a time: the way leads through the devices' memory
        row = own[place] if place < len(own) else np.zeros(own.shape[1:], own.dtype)
        # As bytes, which keep float64.
        rows = multihost_utils.process_allgather(row.reshape(-1).view(np.uint8))
        whole[place] = np.ascontiguousarray(rows).view(own.dtype).reshape(whole.shape[1:])
    return whole.reshape(-1, *own.shape[1:])[:count]


@dataclasses.dataclass(frozen=True)
class Samples:
    """The samples to make: sample i is of the class classes[i // per_class].

    Batch n, the unit of work, has the `batch_size` samples from n * batch_size.

    Attributes:
        classes: ids of classes.
        settings: of `Pipeline.sample`.
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
        indices = self.indices(batch)
        ids = [self.classes[index // self.per_class] for index in indices]
        filled = ids + ids[-1:] * (self.batch_size - len(ids))  # one program for all batches
        out = self.pipeline.sample(filled, self.seed, first_index=indices.start, **self.settings)
        keep = slice(len(ids))
        return Output(
            out.images[keep],
            type(out.sequence)(*(part[keep] for part in out.sequence)),
            out.canvases[keep],
        )

    def make_all(self, batches: Sequence[int]) -> Iterator[tuple[int, Output]]:
        """Yields every batch with its number, and logs progress with an ETA."""
        total, done = sum(len(self.indices(batch)) for batch in batches), 0
        start = time.monotonic()
        for batch in batches:
            output = self.make(batch)
            done += len(output.images)
            remaining = (time.monotonic() - start) / done * (total - done)
            logger.info("%d of the %d samples to make here, ETA %d s", done, total, remaining)
            yield batch, output

    def describe(self) -> dict[str, Any]:
        """Everything that the samples depend on, JSON-able, the settings one value a stage.

        Raises:
            ValueError: a setting out of range.
        """
        meta, config = self.pipeline.meta, self.pipeline.tokenizer.config
        model = {name: meta[name] for name in ("tokenizer", "canvas_scale", *GENERATORS)}
        model["weights"] = checkpoint.fingerprint(self.pipeline.params)
        settings = dataclasses.replace(self.pipeline.settings, **self.settings)
        return json.loads(
            json.dumps(
                {
                    "model": checkpoint.digest(model)[:16],
                    "classes": self.classes,
                    "per_class": self.per_class,
                    "seed": self.seed,
                    "batch_size": self.batch_size,
                    **dataclasses.asdict(settings.expand(config.num_stages, config.codebook_size)),
                }
            )
        )


def stages_picture(pipeline: Pipeline, output: Output, picks: np.ndarray) -> np.ndarray:
    """The samples `picks` of an Output: the canvases after every stage above their maps."""
    canvases = output.canvases[picks]
    images = pipeline.decode_canvas(canvases.reshape(-1, *canvases.shape[2:]))
    return stages_grid(
        images.reshape(*canvases.shape[:2], *images.shape[1:]),
        output.sequence.structure[picks],
        pipeline.tokenizer.config.latent_size,
    )


# Runs that go on after a kill: what is there is whole, and was made with the same settings.


def open_folder(folder: Path, pattern: str, description: dict[str, Any]):
    """Begins a folder of samples, or checks that it was begun with the same settings.

    Args:
        pattern: of the names of the files with samples.
        description: see `Samples.describe`; kept in the folder.

    Raises:
        ValueError: the folder holds samples of other or unknown settings, or not all processes
            see the same folder.
    """
    path = folder / SETTINGS_FILE
    if path.exists():
        try:
            begun = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(
                f"{path}, which says how the samples there were made, is damaged ({error}). Give "
                "another --out, or delete that folder to start anew."
            ) from error
        differ = [
            f"{name} was {reprlib.repr(begun.get(name))} and is {reprlib.repr(value)} now"
            for name, value in description.items()
            if begun.get(name) != value
        ]
        if differ:
            raise ValueError(
                f"{folder} holds samples of other settings: {'; '.join(differ)}. Give the same "
                "settings to go on with them, or another --out; or delete that folder to start "
                "anew. (Another model: a run that was trained on since has other weights.)"
            )
    elif folder.is_dir() and any(folder.glob(pattern)):
        raise ValueError(
            f"{folder} holds samples but no {SETTINGS_FILE} that says how they were made. Give "
            "another --out, or move them away."
        )
    elif jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(json.dumps(description).encode())
    multihost_utils.sync_global_devices(f"{path} is there")
    if not path.exists():
        raise ValueError(
            f"Process {jax.process_index()} does not see {path}, which process 0 wrote: --out "
            "must lie in a file system that all processes share."
        )


def own_missing(samples: Samples, files) -> list[int]:
    """The batches of this process of which one of `files(batch)` is not there yet."""
    own = own_share(samples.num_batches)
    missing = [batch for batch in own if not all(path.exists() for path in files(batch))]
    if len(missing) < len(own):
        logger.info("%d of %d batches are there already", len(own) - len(missing), len(own))
    return missing


def write_array(samples: Samples, out: Path):
    """Writes the samples to one .npz with "arr_0", uint8 (N, H, W, 3), by way of a folder of parts.

    The parts, a file for each batch, are joined and removed when all are there.

    Raises:
        ValueError: `out`, or the folder of parts, is of other settings.
        OSError: a file cannot be written.
    """
    description = samples.describe()
    mark = checkpoint.digest(description).encode()  # the comment of the finished archive
    folder = out.with_name(out.name + ".parts")
    part = lambda batch: folder / f"{batch:06d}.part"
    if out.exists():
        if read_mark(out) != mark:
            raise ValueError(
                f"{out} is there already and was made with other settings, or not by this "
                "command. Give another --out, or move it away."
            )
        logger.info("%s is there already", out)
    else:
        open_folder(folder, "*.part", description)
        for batch, output in samples.make_all(own_missing(samples, lambda batch: [part(batch)])):
            write_part(part(batch), to_uint8(output.images))
        multihost_utils.sync_global_devices(f"the parts of {out} are there")
        if jax.process_index() == 0:
            join_parts(samples, part, out, mark)
    if jax.process_index() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    multihost_utils.sync_global_devices(f"{out} is there")


def read_mark(path: Path) -> bytes | None:
    """The comment of an archive, None of any other file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.comment
    except zipfile.BadZipFile:
        return None


def write_part(path: Path, images: np.ndarray):
    """Writes uint8 (B, H, W, 3) behind its checksum."""
    content = images.tobytes()
    with replacing(path) as file:
        file.write(hashlib.sha256(content).digest() + content)


def read_part(path: Path) -> bytes | None:
    """The images of a part as their bytes, None if it is damaged or not there."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    checksum, content = content[:CHECKSUM_BYTES], content[CHECKSUM_BYTES:]
    return content if hashlib.sha256(content).digest() == checksum else None


def join_parts(samples: Samples, part, out: Path, mark: bytes):
    """Joins the parts to the .npz, one in memory at a time; makes damaged ones again."""
    header = {
        "descr": "|u1",
        "fortran_order": False,
        "shape": (len(samples), *samples.image_shape),
    }
    with replacing(out) as file, zipfile.ZipFile(file, "w") as archive:
        archive.comment = mark
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for batch in range(samples.num_batches):
                content = read_part(part(batch))
                if content is None:
                    logger.warning("%s is damaged or gone; it is made again", part(batch))
                    content = to_uint8(samples.make(batch).images).tobytes()
                member.write(content)


def write_pictures(samples: Samples, out: Path, columns: int):
    """Writes a PNG for every sample, grid.png and, of the first batch, stages.png into a folder.

    Raises:
        ValueError: the folder holds pictures of other settings, or a damaged one.
        OSError: a file cannot be written.
    """
    classes = np.repeat(samples.classes, samples.per_class)
    pictures = [out / f"{index:06d}_class{label}.png" for index, label in enumerate(classes)]
    stages = out / "stages.png"
    files = lambda batch: [pictures[i] for i in samples.indices(batch)] + [stages] * (batch == 0)
    open_folder(out, "*_class*.png", samples.describe())
    for batch, output in samples.make_all(own_missing(samples, files)):
        for index, image in zip(samples.indices(batch), to_uint8(output.images)):
            save_png(pictures[index], image)
        if batch == 0:
            picks = np.unique(np.linspace(0, len(output.images) - 1, STAGES_LIMIT).astype(int))
            save_png(stages, stages_picture(samples.pipeline, output, picks))
    multihost_utils.sync_global_devices(f"the pictures in {out} are there")
    if jax.process_index() == 0:
        shown = []
        for path in pictures[:GRID_LIMIT]:
            try:
                shown.append(np.asarray(decode(path.read_bytes())))
            except ValueError as error:
                raise ValueError(
                    f"{path} is {error}. Delete it and run the same command again."
                ) from error
        save_png(out / "grid.png", image_grid(np.stack(shown), columns))


def main(_):
    pipeline = Pipeline.from_pretrained(FLAGS.workdir)
    pipeline.check_can_sample()
    names = FLAGS.classes or range(len(pipeline.class_names))
    classes = [pipeline.class_id(name) for name in names]
    batch_size = min(FLAGS.batch_size, len(classes) * FLAGS.per_class)
    samples = Samples(
        pipeline, classes, FLAGS.per_class, batch_size, FLAGS.seed, settings_from_flags()
    )
    out = Path(FLAGS.out)
    if out.suffix == ".npz":
        write_array(samples, out)
    else:
        write_pictures(samples, out, columns=min(FLAGS.per_class, 20))
    if jax.process_index() == 0:
        print(f"{len(samples)} samples: {out}")


if __name__ == "__main__":
    define_flags()
    flags.DEFINE_list("classes", None, "Class names or ids; all classes if not given.")
    flags.DEFINE_integer("per_class", 8, "Samples of each class.", lower_bound=1)
    flags.mark_flags_as_required(["workdir", "out"])
    cli.main(main)
