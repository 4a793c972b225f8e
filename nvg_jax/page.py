"""The web page of `nvg_jax.app`: sampling, structure control and editing in a browser (Gradio)."""

import dataclasses
import io
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
from PIL import Image

from nvg_jax.errors import UserError
from nvg_jax.jobs import editing
from nvg_jax.jobs.figures import picture_of
from nvg_jax.jobs.sampling_runs import Constraint, SamplingJob, stage_images
from nvg_jax.pipeline import Pipeline
from nvg_jax.sampling import control
from nvg_jax.sampling.generate import SamplingPlan
from nvg_jax.sampling.settings import Settings, text_of
from nvg_jax.visualize import image_grid, to_uint8

SAMPLES = 4  # made at once; fixed, since every batch size compiles a new program
COLUMNS = 2  # columns of the sample grid and of the map grid
CANVAS = 320  # side of the painting canvas in pixels
SHOWN = 400  # maximum width of the samples in pixels
COLORS = {"white": (255, 255, 255), "black": (0, 0, 0), "red": (220, 40, 40)}
COLORS |= {"green": (40, 160, 60), "blue": (50, 90, 220), "yellow": (240, 200, 40)}
SHOW_STAGE = 0.4  # seconds that each stage is shown
MAX_UPLOAD = "10mb"
MAX_MEGAPIXELS = 25  # of an upload; a small file can hold a picture that fills the memory
KEEP_FILES = 3600  # seconds for which uploads and downloads are kept


class Kept(NamedTuple):
    """What samples keep: the object, the line of Python that makes it, the files that it reads."""

    constraint: Constraint | None = None
    line: str = ""
    files: tuple[Path, ...] = ()


# Reading what was painted or uploaded.


def check_size(file: str | io.BytesIO):
    """Checks the size of a picture without decoding it; other faults are left to its reader.

    Raises:
        UserError: a picture of more than `MAX_MEGAPIXELS`.
    """
    try:
        with Image.open(file) as opened:
            fits = opened.width * opened.height <= MAX_MEGAPIXELS * 10**6
    except Image.DecompressionBombError:  # so large that Pillow does not even open it
        fits = False
    except Exception:  # files that are not pictures raise errors of many kinds
        return
    if not fits:
        raise UserError(f"The picture has more than {MAX_MEGAPIXELS} megapixels; make it smaller.")


def raw_upload(image: gr.Image) -> gr.Image:
    """Makes a field pass on the path of its upload; by itself, Gradio first decodes the file."""
    image.preprocess = lambda payload: payload and payload.path
    return image


def checked_uploads(editor: gr.ImageEditor) -> gr.ImageEditor:
    """Makes an editor say in a sentence what is wrong with an upload."""
    convert = editor.convert_and_format_image

    def checked(file: gr.FileData | bytes | None, *args, **kwargs):
        if file is None:
            return None
        content = Path(file.path).read_bytes() if isinstance(file, gr.FileData) else file
        try:
            check_size(io.BytesIO(content))
        except UserError as error:
            raise gr.Error(str(error)) from None
        try:
            return convert(content, *args, **kwargs)
        except Exception:
            raise gr.Error("The picture is not a readable image.") from None

    editor.convert_and_format_image = checked
    return editor


def hex_color(color: tuple[int, int, int]) -> str:
    return "#" + "".join(f"{channel:02x}" for channel in color)


def drawing_of(painted: dict[str, Any] | None) -> np.ndarray:
    """The painted drawing, each pixel in the nearest brush color: uint8 (H, W, 3).

    Raises:
        UserError: nothing was painted.
    """
    if not painted or not any(layer[..., 3].any() for layer in painted["layers"]):
        raise UserError("Paint a drawing first: every color is a region.")
    pixels = np.asarray(Image.fromarray(painted["composite"]).convert("RGBA"), np.float32)
    opaque = pixels[..., 3:] / 255
    pixels = pixels[..., :3] * opaque + 255 * (1 - opaque)
    colors = np.array(list(COLORS.values()), np.uint8)
    distances = [np.square(pixels - color).sum(-1) for color in colors]
    return colors[np.argmin(distances, axis=0)]


def picture_and_mask_of(painted: dict[str, Any] | None) -> tuple[np.ndarray, np.ndarray]:
    """The uploaded picture, and the area painted over it in white: uint8 (H, W, 3) each.

    Raises:
        UserError: there is no picture, it is blank, or nothing was painted.
    """
    if not painted or painted["background"] is None or not painted["background"][..., 3].any():
        raise UserError("Upload a picture first, or take the first sample.")
    picture = painted["background"][..., :3]
    if (picture == picture[0, 0]).all():  # what the editor shows for a file that is not a picture
        raise UserError("The picture is blank; perhaps the browser could not read the file.")
    marked = np.zeros(picture.shape[:2], bool)
    for layer in painted["layers"]:
        marked |= layer[..., 3] > 127
    if not marked.any():
        raise UserError("Paint over the part of the picture that is to change.")
    mask = np.repeat(255 * marked[..., None].astype(np.uint8), 3, axis=-1)
    return picture, mask


class Page:
    """The page of one model. Its methods are the actions of the buttons.

    Args:
        name: the name or folder that `Pipeline.from_pretrained` opened.
    """

    def __init__(self, pipe: Pipeline, name: str):
        self.pipe, self.name = pipe, name
        self._folder = Path(tempfile.mkdtemp(prefix="nvg_jax_"))
        self._compiled = set()  # the plans that were already sampled with

    def _save(self, name: str, pixels: np.ndarray) -> Path:
        for old in self._folder.iterdir():
            if time.time() - old.stat().st_mtime > KEEP_FILES:
                shutil.rmtree(old)
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        Image.fromarray(pixels).save(folder / name)
        return folder / name

    # What is kept.

    def nothing(self) -> Kept:
        return Kept()

    def ready_made(self, name: str) -> Kept:
        constraint = editing.follow_drawing(self.pipe, name)
        return Kept(constraint, f'constraint = editing.follow_drawing(pipe, "{name}")')

    def drawing(self, painted: dict[str, Any] | None) -> Kept:
        path = self._save("drawing.png", drawing_of(painted))
        constraint = editing.follow_drawing(self.pipe, path)
        return Kept(constraint, 'constraint = editing.follow_drawing(pipe, "drawing.png")', (path,))

    def picture(self, path: str | None, structure_stages: float, token_stages: float) -> Kept:
        if not path:
            raise UserError("Upload a picture first: its structure is kept.")
        stages = int(structure_stages), int(token_stages)
        if stages[1] > stages[0]:
            raise UserError("Tokens need their maps: keep at least as many maps as tokens.")
        check_size(path)
        try:
            pixels = editing.read_picture(path)
        except UserError as error:  # without the folders of this machine
            raise UserError(str(error).replace(path, Path(path).name)) from None
        saved = self._save("picture.png", pixels)
        constraint = editing.keep_stages(self.pipe, saved, *stages)
        line = 'constraint = editing.keep_stages(pipe, "picture.png", {}, {})'.format(*stages)
        return Kept(constraint, line, (saved,))

    def edit(self, painted: dict[str, Any] | None, start: float, paste: bool) -> Kept:
        picture, mask = picture_and_mask_of(painted)
        files = self._save("picture.png", picture), self._save("mask.png", mask)
        feather = 2 if paste else None
        constraint = editing.edit_region(self.pipe, *files, int(start), feather)
        line = 'constraint = editing.edit_region(pipe, "picture.png", "mask.png", {}, {})'
        line = line.format(int(start), feather)
        return Kept(constraint, line, files)

    # Sampling.

    def settings(self, texts: tuple) -> dict[str, Any]:
        """The values of `settings_fields` that differ from the folder's settings."""
        config, changes = self.pipe.tokenizer.config, {}
        for (name, spec), value in zip(Settings.specs().items(), texts):
            if isinstance(value, str):
                try:
                    value = spec.parse(value.replace(" ", ""))
                except ValueError:
                    raise UserError(f"{name} takes numbers, got {value!r}.") from None
            if value != getattr(self.pipe.settings, name):
                changes[name] = value
        self.pipe.settings.updated(changes).expand(config.num_stages, config.codebook_size)
        return changes

    def plan(self, constraint: Constraint | None, settings: dict[str, Any]) -> SamplingPlan:
        """The compiled program that these inputs need."""
        stages = (constraint.structure_stages, constraint.token_stages) if constraint else (0, 0)
        region = constraint is not None and constraint.region is not None
        return self.pipe.program.plan(self.pipe.settings.updated(settings), *stages, region)[0]

    def lines(self, kept: Kept, label: str, seed: int, settings: dict[str, Any]) -> str:
        """The lines of Python that make the same samples."""
        imports = ["from nvg_jax import Pipeline"]
        imports += ["from nvg_jax.jobs import editing"] * bool(kept.line)
        return "\n".join(
            [
                *imports,
                "from nvg_jax.jobs.sampling_runs import SamplingJob",
                "from nvg_jax.visualize import image_grid, save_png",
                "",
                f'pipe = Pipeline.from_pretrained("{self.name}", dtype="{self.pipe.dtype}")',
                *([kept.line] if kept.line else []),
                f"job = SamplingJob(pipe, [pipe.class_id({label!r})], {SAMPLES}, {SAMPLES}, "
                f"seed={seed}, settings={settings!r}{', constraint=constraint' * bool(kept.line)})",
                f'save_png("samples.png", image_grid(job.sample(0).images, columns={COLUMNS}))',
            ]
        )

    def sample(self, keep, num_inputs: int, *values):
        """Yields what the page shows after each stage.

        Args:
            keep: a method of this page that says what is kept.
            values: its `num_inputs` arguments, the class, the seed, and a value for each setting.

        Yields:
            (canvases, maps, their caption, lines of Python, files, the first sample to edit).
        """
        inputs, (label, seed, *settings) = values[:num_inputs], values[num_inputs:]
        progress = gr.Progress()
        try:
            progress((0, 3), desc="Preparing")
            kept = keep(*inputs)
            changes = self.settings(tuple(settings))
            if not isinstance(seed, int | float) or seed % 1 != 0:
                raise UserError("The seed is a whole number.")
            classes = [self.pipe.class_id(label)]
            job = SamplingJob(
                self.pipe, classes, SAMPLES, SAMPLES, int(seed), changes, kept.constraint
            )
            plan = self.plan(kept.constraint, changes)
            compiled = plan in self._compiled
            progress((1, 3), desc="Sampling" if compiled else "Compiling (first time only)")
            out = job.sample(0)
            self._compiled.add(plan)
        except UserError as error:
            raise gr.Error(str(error)) from None
        progress((2, 3), desc="Decoding the stages")
        config = self.pipe.tokenizer.config
        frames = stage_images(self.pipe, out.sequence)[:, :-1]
        frames = np.concatenate([frames, out.images[:, None]], axis=1)  # pasted, if asked for
        code = self.lines(kept, label, int(seed), changes)
        files = [str(path) for path in kept.files] or None
        for stage in range(config.num_stages):
            maps = [picture_of(self.pipe, m, stage) for m in out.sequence.structure[:, stage]]
            text = f"Stage {stage} of {config.num_stages - 1}: {2**stage} tokens per image"
            yield (
                enlarged(image_grid(frames[:, stage], COLUMNS)),
                enlarged(image_grid(np.stack(maps), COLUMNS)),
                text,
                code,
                files,
                to_uint8(out.images[0]),
            )
            time.sleep(SHOW_STAGE)


def enlarged(image: np.ndarray, width: int = SHOWN) -> np.ndarray:
    """An image enlarged by the largest integer factor at which it fits into `width` pixels."""
    factor = max(1, width // image.shape[1])
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def to_canvas(image: np.ndarray | None) -> np.ndarray:
    """A sample, enlarged to be painted on."""
    if image is None:
        raise gr.Error("Sample first.")
    return enlarged(image, CANVAS)


def settings_fields(settings: Settings) -> list[gr.Component]:
    """A field for each sampling setting, showing the folder's value."""
    fields = []
    for name, spec in Settings.specs().items():
        value = getattr(settings, name)
        facts: dict[str, Any]
        facts = dict(label=name, info=spec.help, interactive=True, elem_id=name)
        if spec.kind is bool:
            fields.append(gr.Checkbox(value, **facts))
        elif spec.kind is str:
            fields.append(gr.Dropdown(list(spec.choices), value=value, **facts))
        else:  # a number, or several for a per-stage setting
            fields.append(gr.Textbox(text_of(value), **facts))
    return fields


def build(page: Page) -> gr.Blocks:
    """The page's layout, for `launch`."""
    pipe, stages = page.pipe, page.pipe.tokenizer.config.num_stages
    brush = gr.Brush(
        default_size=CANVAS // 8,
        colors=[hex_color(color) for color in COLORS.values()],
        default_color=hex_color(COLORS["black"]),
        color_mode="fixed",
    )
    white = dataclasses.replace(brush, colors=["#ffffff"], default_color="#ffffff")
    eraser = gr.Eraser(default_size=CANVAS // 8)
    canvas: dict[str, Any] = dict(
        eraser=eraser, transforms=(), layers=False, type="numpy", image_mode="RGBA", format="png"
    )
    with gr.Blocks(
        title="nvg_jax", analytics_enabled=False, delete_cache=(KEEP_FILES, KEEP_FILES)
    ) as blocks:
        gr.Markdown(
            f"# Next Visual Granularity: {page.name}\n"
            "An image grows in stages, each with twice as many tokens. The structure says which "
            "positions share a token; it can be drawn, or taken from a picture. The first request "
            "of each kind takes longer, up to a minute on a CPU, because it compiles."
        )
        with gr.Row():
            with gr.Column(scale=2):
                with gr.Row():
                    label = gr.Dropdown(
                        list(pipe.class_names), value=pipe.class_names[0], label="Class"
                    )
                    seed = gr.Number(0, label="Seed", elem_id="seed")
                with gr.Tab("Sample"):
                    free = gr.Button("Sample", variant="primary", elem_id="free")
                with gr.Tab("Draw a structure"):
                    painted = checked_uploads(
                        gr.ImageEditor(
                            label="Choose the brush and paint; every color is a region",
                            sources=(),
                            brush=brush,
                            canvas_size=(CANVAS, CANVAS),
                            fixed_canvas=True,
                            elem_id="drawing",
                            **canvas,
                        )
                    )
                    draw = gr.Button("Follow the drawing", variant="primary", elem_id="draw")
                    ready = gr.Dropdown(
                        list(control.DRAWINGS), value="circle_center", label="Or a ready-made one"
                    )
                    follow = gr.Button("Follow the ready-made drawing", elem_id="follow")
                with gr.Tab("Structure of a picture"):
                    reference = raw_upload(
                        gr.Image(
                            label="Picture",
                            type="filepath",
                            sources=["upload", "clipboard"],
                            elem_id="reference",
                        )
                    )
                    keep_maps = gr.Slider(1, stages, min(3, stages), step=1, label="Maps to keep")
                    keep_tokens = gr.Slider(0, stages, 0, step=1, label="Stages of tokens to keep")
                    keep = gr.Button("Keep its structure", variant="primary", elem_id="keep")
                with gr.Tab("Edit a picture"):
                    masked = checked_uploads(
                        gr.ImageEditor(
                            label="Upload a picture and paint over what is to change",
                            sources=["upload", "clipboard"],
                            brush=white,
                            canvas_size=(CANVAS, CANVAS),
                            elem_id="mask",
                            **canvas,
                        )
                    )
                    take = gr.Button("Take the first sample", elem_id="take")
                    start = gr.Slider(0, stages - 1, 0, step=1, label="Resample from stage")
                    paste = gr.Checkbox(True, label="Put the original pixels back outside")
                    edit = gr.Button("Resample the painted part", variant="primary", elem_id="edit")
                with gr.Accordion("Settings", open=False):
                    fields = settings_fields(pipe.settings)
            with gr.Column(scale=3):
                text = gr.Markdown("", elem_id="stage")
                with gr.Row():
                    images = gr.Image(label="Samples", format="png", elem_id="samples")
                    maps = gr.Image(label="Structure", format="png", elem_id="maps")
                with gr.Accordion("Python lines that make this picture", open=False):
                    code = gr.Code(language="python", elem_id="code")
                    files = gr.Files(label="The files that they read", interactive=False)
        first = gr.State(None)
        shown = [images, maps, text, code, files, first]
        for button, keep_what, inputs in (
            (free, page.nothing, []),
            (draw, page.drawing, [painted]),
            (follow, page.ready_made, [ready]),
            (keep, page.picture, [reference, keep_maps, keep_tokens]),
            (edit, page.edit, [masked, start, paste]),
        ):
            # A generator bound to the arguments of its button; all buttons share one queue.
            def run(*values, keep_what=keep_what, inputs=inputs):
                yield from page.sample(keep_what, len(inputs), *values)

            button.click(
                run,
                [*inputs, label, seed, *fields],
                shown,
                concurrency_limit=1,
                concurrency_id="model",
                show_progress_on=images,
            )
        take.click(to_canvas, first, masked)
    return blocks
