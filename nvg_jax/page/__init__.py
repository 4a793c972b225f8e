"""The web page of `nvg_jax.app`: sampling, structure control and editing in a browser (Gradio)."""

import base64
import dataclasses
import functools
import html
import io
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
from PIL import Image, ImageColor
from PIL.JpegImagePlugin import JpegImageFile

from nvg_jax import bundled
from nvg_jax.errors import UserError
from nvg_jax.jobs import editing
from nvg_jax.jobs.figures import picture_of
from nvg_jax.jobs.sampling_runs import Constraint, SamplingJob, stage_images
from nvg_jax.pipeline import Pipeline, SampleOutput
from nvg_jax.runtime.storage import as_json, digest
from nvg_jax.sampling import control
from nvg_jax.sampling.generate import SamplingPlan
from nvg_jax.sampling.settings import MAX_SEED, Settings, check_integer, text_of
from nvg_jax.visualize import marked, png, save_png, to_uint8

SAMPLES = 4  # made at once; fixed, since every batch size compiles a new program
PROGRAMS = 20  # kept: one for each combination of settings, of some 30 MB with the bundled models
SEEN = 2  # the stage that is shown first: its four regions can be told apart
COLORS = {"black": "#000000", "white": "#ffffff", "red": "#dc2828", "green": "#28a03c"}
COLORS |= {"blue": "#325adc", "yellow": "#f0c828"}
MASK = {"paint": "#ff2d9599", "erase": ""}
MAX_UPLOAD = "30mb"
# Of an upload; a small file can hold a picture that fills the memory. A JPEG is not decoded whole.
MAX_MEGAPIXELS, MAX_JPEG = 25, 65
ENOUGH = 1024  # pixels on the shorter side of an upload
MOST_STEPS = 100  # more gain nothing, and everyone waits for them
LABELS = {  # of the settings, in plain words
    "temperature": "Variety of the tokens",
    "top_k": "Only the most likely tokens: how many",
    "top_p": "Only the most likely tokens: up to which probability",
    "content_guidance": "How strictly the tokens follow the class",
    "structure_guidance": "How strictly the structure follows the class",
    "flow_steps": "Steps for each split of the structure",
    "solver": "How the steps are computed",
    "flow_shift": "Where the steps lie",
    "structure_solves": "Stages at which the structure is computed anew",
    "flow_restart": "Where later splits start",
    "gumbel": "Splits at random",
}

logger = logging.getLogger("nvg_jax")


class Kept(NamedTuple):
    """What samples keep: the object, the line of Python that makes it, the pictures it reads.

    shown: what the model saw, pictures by their captions.
    """

    constraint: Constraint | None = None
    line: str = ""
    files: dict[str, np.ndarray] = {}
    shown: dict[str, np.ndarray] = {}


# Pictures as data URLs, which the browser and this module exchange.


def url_of(pixels: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode()


def pixels_of(url: str) -> np.ndarray:
    """uint8 (H, W, 4); raises UserError like `check_size`."""
    file = io.BytesIO(base64.b64decode(url.partition(",")[2]))
    check_size(file)
    with Image.open(file, formats=["PNG"]) as image:
        return np.asarray(image.convert("RGBA"))


def painted_part(painting: dict[str, Any] | None, nothing: str) -> tuple[np.ndarray, np.ndarray]:
    """What was painted: colors uint8 (H, W, 3), and where, bool (H, W).

    Raises:
        UserError: nothing was painted, with the message `nothing`.
    """
    if painting and painting.get("painted"):
        pixels = pixels_of(painting["painted"])
        if pixels[..., 3].any():
            return pixels[..., :3], pixels[..., 3] > 0
    raise UserError(nothing)


def picture_in(painting: dict[str, Any] | None) -> np.ndarray:
    """The picture under what was painted: uint8 (H, W, 3).

    Raises:
        UserError: there is none.
    """
    if not painting or not painting.get("picture"):
        raise UserError("Upload a picture first, or use the first sample.")
    return pixels_of(painting["picture"])[..., :3]


def check_size(file: str | io.BytesIO):
    """Checks the size of a picture without decoding it; other faults are left to its reader.

    Raises:
        UserError: a picture of more than `MAX_MEGAPIXELS`, or a JPEG of more than `MAX_JPEG`.
    """
    try:
        with Image.open(file) as opened:
            most = MAX_JPEG if isinstance(opened, JpegImageFile) else MAX_MEGAPIXELS
            fits = opened.width * opened.height <= most * 10**6
    except Image.DecompressionBombError:  # so large that Pillow does not even open it
        fits = False
    except Exception:  # files that are not pictures raise errors of many kinds
        return
    if not fits:
        raise UserError(
            f"The picture has more than {MAX_MEGAPIXELS} megapixels, or {MAX_JPEG} as a JPEG; make "
            "it smaller."
        )


class Page:
    """The page of one model. Its methods are the actions of the buttons.

    Args:
        name: the name or folder that `Pipeline.from_pretrained` opened.
    """

    def __init__(self, pipe: Pipeline, name: str):
        self.pipe, self.name = pipe, name
        self._compiled = set()  # the plans that were already sampled with

    # What is kept.

    def drawing(self, painting: dict[str, Any] | None) -> Kept:
        colors, part = painted_part(painting, "Paint a drawing first: every color is a region.")
        drawing = np.where(part[..., None], colors, 255).astype(np.uint8)
        kept = self._kept(editing.follow_drawing, {"drawing.png": drawing})
        return kept._replace(shown={"your drawing": drawing} | self._last_map(kept))

    def picture(
        self, painting: dict[str, Any] | None, maps: float | None, tokens: float | None
    ) -> Kept:
        picture = picture_in(painting)
        if maps is None or tokens is None:
            raise UserError("Say how many maps and tokens to keep.")
        if tokens > maps:
            raise UserError("Tokens need their maps: keep at least as many maps as tokens.")
        kept = self._kept(editing.keep_stages, {"picture.png": picture}, int(maps), int(tokens))
        return kept._replace(shown={"your picture": picture} | self._last_map(kept))

    def edit(self, painting: dict[str, Any] | None, start: float | None, paste: bool) -> Kept:
        picture = picture_in(painting)
        if start is None:
            raise UserError("Say from which stage on to sample.")
        _, part = painted_part(painting, "Paint over the part of the picture that is to change.")
        mask = np.repeat(255 * part[..., None].astype(np.uint8), 3, axis=-1)
        files = {"picture.png": picture, "mask.png": mask}
        kept = self._kept(editing.edit_region, files, int(start), 2 if paste else None)
        return kept._replace(shown={"before": picture, "to change": marked(picture, part)})

    def _kept(
        self, function: Callable[..., Constraint], files: dict[str, np.ndarray], *arguments
    ) -> Kept:
        """What a function of `jobs.editing` reads from files."""
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder, name) for name in files]
            for path, pixels in zip(paths, files.values()):
                path.write_bytes(png(pixels))
            constraint = function(self.pipe, *paths, *arguments)
        text = ", ".join(["pipe", *(f'"{name}"' for name in files), *map(str, arguments)])
        return Kept(constraint, f"constraint = editing.{function.__name__}({text})", files)

    def _last_map(self, kept: Kept) -> dict[str, np.ndarray]:
        """The finest map that is kept, with its caption."""
        assert kept.constraint is not None
        stage = kept.constraint.structure_stages - 1
        tile = picture_of(self.pipe, kept.constraint.sequence.structure[stage], stage)
        return {f"its map: {2**stage} regions": tile}

    # What the painting fields show.

    def upload(self, path: str) -> tuple[Any, str]:
        """For a field, a picture as the model sees it, and no message; or an error."""
        try:
            check_size(path)
            pixels = editing.read_picture(path, enough=ENOUGH)
        except UserError as error:  # without the folders of this machine
            return gr.skip(), failed(str(error).replace(path, Path(path).name))
        return {"picture": url_of(to_uint8(self.pipe.prepare(pixels)))}, ""

    def use(self, sample: str | None) -> tuple[Any, str]:
        """As `upload`, for the first sample, a URL; None before there is one."""
        if sample is None:
            return gr.skip(), failed("There is no sample yet: press Sample first.")
        return {"picture": sample}, ""

    def ready_made(self, name: str) -> dict[str, str]:
        size = self.pipe.tokenizer.config.image_size
        colors = np.array([ImageColor.getrgb(color) for color in COLORS.values()], np.uint8)
        return {"painted": url_of(colors[editing.ready_made(name, size)])}

    # Sampling.

    def value(self, name: str, shown: Any) -> Any:
        """The seed, or a setting, as its field shows it.

        Raises:
            UserError: an invalid value.
        """
        if name == "seed":
            seed = int(shown) if isinstance(shown, float) and shown % 1 == 0 else shown
            check_integer("The seed", seed, 0, MAX_SEED)
            return seed
        spec, sizes = Settings.specs()[name], self.pipe.tokenizer.config
        value: Any = shown
        if isinstance(shown, str):
            value = spec.parse(LABELS[name], shown)
        spec.expand(LABELS[name], value, sizes.num_stages, sizes.codebook_size)
        if name == "flow_steps" and value > MOST_STEPS:
            raise UserError(f"{LABELS[name]} can be at most {MOST_STEPS} on this page.")
        return value

    def check(self, name: str, shown: Any) -> dict:
        """Marks a field whose value is invalid, with a sentence."""
        try:
            self.value(name, shown)
            return gr.validate(True, "")
        except UserError as error:
            logger.info("page: %s", error)
            return gr.validate(False, str(error))

    def settings(self, shown: Sequence) -> dict[str, Any]:
        """The values of `settings_fields` that differ from the folder's settings."""
        own = self.pipe.settings
        return {
            name: self.value(name, value)
            for name, value in zip(Settings.specs(), shown)
            if value != field_value(getattr(own, name))
        }

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
                f"pipe = Pipeline.from_pretrained({self.name!r}, dtype={self.pipe.dtype!r})",
                *([kept.line] if kept.line else []),
                f"job = SamplingJob(pipe, [pipe.class_id({label!r})], {SAMPLES}, {SAMPLES}, "
                f"seed={seed}, settings={settings!r}{', constraint=constraint' * bool(kept.line)})",
                f'save_png("samples.png", image_grid(job.sample(0).images, columns={SAMPLES}))',
            ]
        )

    def stages(self, out: SampleOutput) -> np.ndarray:
        """Images and maps of every stage: uint8 (2, B, S, H, W, 3)."""
        frames = stage_images(self.pipe, out.sequence)[:, :-1]
        frames = np.concatenate([frames, out.images[:, None]], axis=1)  # pasted, if asked for
        maps = [
            [picture_of(self.pipe, labels, stage) for stage, labels in enumerate(maps)]
            for maps in out.sequence.structure
        ]
        return np.stack([to_uint8(frames), np.array(maps)])

    def sample(self, keep, num_inputs: int, *values):
        """Yields what the page shows: a message at first, then the samples or an error.

        Args:
            keep: says what is kept: a method of this page, or `Kept` for nothing.
            values: its `num_inputs` arguments, the class, the seed, and a value for each setting.

        Yields:
            (message, samples, the first of them, lines of Python, links to the files they read).
        """
        inputs, (label, seed, *settings) = values[:num_inputs], values[num_inputs:]
        rest = [gr.skip()] * 4
        try:
            seed, changes = self.value("seed", seed), self.settings(settings)
            kept, classes = keep(*inputs), [self.pipe.class_id(label)]
            job = SamplingJob(self.pipe, classes, SAMPLES, SAMPLES, seed, changes, kept.constraint)
            plan = self.plan(kept.constraint, changes)
            new = plan not in self._compiled
            note = "The first time, it compiles, which takes up to a minute on a CPU." * new
            yield f'<p role="status">Sampling. {note}</p>', *rest
            if new and len(self._compiled) >= PROGRAMS:
                self.pipe.program.sample.clear_cache()
                self._compiled.clear()
            out = job.sample(0)
            self._compiled.add(plan)
            stages, code = self.stages(out), self.lines(kept, label, seed, changes)
        except UserError as error:
            yield failed(str(error)), *rest
            return
        except Exception:  # such as too little memory
            logger.exception("page: no samples")
            yield failed("Sampling failed; the log of this page says why."), *rest
            return
        links = " ".join(
            f'<a href="{url_of(pixels)}" download="{name}">{name}</a>'
            for name, pixels in kept.files.items()
        )
        shown = result(stages, f"{label}, seed {seed}", kept.shown)
        yield "", shown, url_of(stages[0, 0, -1]), code, links

    # The samples that the page opens with.

    def opening_path(self) -> Any:
        return bundled.find(self.name) / "opening.png"

    def opening_mark(self) -> str:
        """What tells the model, and what "Sample" gives at first, from others."""
        settings = dataclasses.asdict(self.pipe.settings)
        return digest(as_json([self.pipe.fingerprint, settings, self.pipe.class_names[0]]))

    def write_opening(self):
        """Writes what "Sample" gives at first: rows of stages, of all samples, then of maps."""
        out = SamplingJob(self.pipe, [0], SAMPLES, SAMPLES, 0, {}).sample(0)
        sheet = self.stages(out).swapaxes(2, 3)
        height, stages, width = sheet.shape[2:5]
        sheet = sheet.reshape(-1, stages * width, 3)
        save_png(self.opening_path(), sheet, model=self.opening_mark())

    def opening(self) -> np.ndarray | None:
        """The samples that `write_opening` wrote for this model, as of `stages`."""
        path, sizes = self.opening_path(), self.pipe.tokenizer.config
        if not path.is_file():
            return None
        with Image.open(io.BytesIO(path.read_bytes())) as sheet:
            if sheet.info.get("model") != self.opening_mark():
                return None
            (height, width), stages = sizes.image_size, sizes.num_stages
            return np.asarray(sheet).reshape(2, -1, height, stages, width, 3).swapaxes(2, 3)


# What is shown.


def in_browser(name: str) -> dict[str, Any]:
    """The style and the script of a field, as arguments of `gr.HTML`."""
    read = lambda suffix: Path(__file__).with_name(name + suffix).read_text(encoding="utf-8")
    return {"css_template": read(".css"), "js_on_load": read(".js")}


def failed(message: str) -> str:
    """An error as HTML; one line in the log."""
    logger.info("page: %s", message)
    return f'<p role="alert">{html.escape(message)}</p>'


def image(pixels: np.ndarray, alt: str) -> str:
    return f'<img src="{url_of(pixels)}" alt="{html.escape(alt)}">'


def result(stages: np.ndarray, title: str, shown: dict[str, np.ndarray]) -> str:
    """Samples with what they keep, and their stages as a film strip with a slider.

    Args:
        stages: as of `Page.stages`. shown: pictures by their captions.
    """
    frames, maps = stages
    count = frames.shape[1]
    seen = min(SEEN, count - 1)
    names = [f"Stage {i + 1} of {count}: {2**i} token{'s' * (i > 0)}" for i in range(count)]
    only = lambda stage: f'data-stage="{stage}"' + " hidden" * (stage != seen)
    given = [
        f"<figure>{image(pixels, caption)}<figcaption>{html.escape(caption)}</figcaption></figure>"
        for caption, pixels in shown.items()
    ]
    figures = [f"<div>{''.join(given)}</div>"] if given else []
    for number, (images, own_maps) in enumerate(zip(frames, maps), 1):
        pairs = [
            f"<div {only(stage)}>{image(images[stage], f'Sample {number} after stage {stage + 1}')}"
            f"{image(own_maps[stage], f'Its structure at stage {stage + 1}')}</div>"
            for stage in range(count)
        ]
        caption = f"sample {number}"
        figures.append(
            f"<figure>{image(images[-1], f'{title}, {caption}')}<figcaption>{caption}</figcaption>"
            f"{''.join(pairs)}</figure>"
        )
    strip = [
        f'<button type="button" data-go="{stage}" aria-label="{names[stage]}" '
        f'aria-pressed="{"true" if stage == seen else "false"}">'
        f"{image(frames[0, stage], '')}{image(maps[0, stage], '')}{2**stage}</button>"
        for stage in range(count)
    ]
    texts = [f"<span {only(stage)}>{names[stage]}</span>" for stage in range(count)]
    return (
        f'<h3>{html.escape(title)}</h3><div class="samples">{"".join(figures)}</div>'
        f'<p aria-live="polite">{"".join(texts)}: sample 1 grows from left to right</p>'
        f'<div class="strip">{"".join(strip)}</div>'
        f'<input type="range" min="0" max="{count - 1}" value="{seen}" aria-label="Stage">'
    )


def painting(
    page: Page, text: str, colors: dict[str, str], picture: str | None, elem_id: str
) -> gr.HTML:
    """A field to paint on, over a picture (a data URL), at the model's resolution.

    Args:
        text: what it is for. colors: of the brush, by their names; the first is chosen. Without
            any, the field only shows its picture. "" erases.
    """
    height, width = page.pipe.tokenizer.config.image_size
    buttons = [
        f'<button type="button" data-color="{color}" style="background: {color}" '
        f'title="{name}" aria-label="{name}">{"" if color.startswith("#") else name}</button>'
        for name, color in colors.items()
    ]
    if colors:
        buttons.append('<button type="button">clear</button>')
    keys = " Arrow keys move the brush, the space bar paints." if colors else ""
    return gr.HTML(
        {"picture": picture},
        html_template=f'<p>{text}</p><div class="palette">{"".join(buttons)}</div>'
        f'<div class="board"><canvas width="{width}" height="{height}" role="img" '
        f'{"tabindex=0" if colors else ""} aria-label="{text}.{keys}"></canvas>'
        f'<span class="cursor"></span></div>',
        **in_browser("painting"),
        elem_id=elem_id,
    )


def field_value(value: Any) -> Any:
    """A setting as its field shows it: a number if all stages share it."""
    if isinstance(value, tuple) and len(value) > 1 and len(set(value)) == 1:
        value = value[0]
    return value if isinstance(value, bool) else text_of(value)


def settings_fields(settings: Settings) -> list[gr.Component]:
    """A field for each sampling setting, showing the folder's value."""
    fields = []
    for name, spec in Settings.specs().items():
        value = field_value(getattr(settings, name))
        facts: dict[str, Any] = dict(
            label=LABELS[name], info=f"{name}: {spec.help}", interactive=True, elem_id=name
        )
        if spec.kind is bool:
            fields.append(gr.Checkbox(value, **facts))
        elif spec.kind is str:
            fields.append(gr.Dropdown(list(spec.choices), value=value, **facts))
        else:  # a number, or several for a per-stage setting
            fields.append(gr.Textbox(value, **facts))
    return fields


def build(page: Page) -> gr.Blocks:
    """The page's layout, for `serve`."""
    pipe, stages = page.pipe, page.pipe.tokenizer.config.num_stages
    opening, own_class = page.opening(), pipe.class_names[0]
    shown, picture = "<p>Choose a class and press Sample.</p>", None
    if opening is not None:
        shown, picture = result(opening, f"{own_class}, seed 0", {}), url_of(opening[0, 0, -1])
    actions, sources = [], []

    def message() -> gr.HTML:
        return gr.HTML(css_template="[role=alert] { color: #dc2626; font-weight: 600; }")

    def action(text: str, keep, inputs: list, elem_id: str):
        button = gr.Button(text, variant="primary", elem_id=elem_id)
        actions.append((button, keep, inputs, message()))

    def picture_source():
        with gr.Row():
            upload = gr.UploadButton("Upload a picture", min_width=100)
            use = gr.Button("Use sample 1", min_width=100)
        return upload, use, message()

    with gr.Blocks(
        title=f"nvg_jax: {page.name}", analytics_enabled=False, delete_cache=(3600, 3600)
    ) as blocks:
        credits = pipe.metadata.credits
        gr.Markdown(
            f"# Next Visual Granularity: {page.name}\n"
            "An image grows in stages, each with twice as many tokens. The structure says which "
            "regions share a token; it can be drawn, or taken from a picture."
            + (f" Trained on: {credits}." if credits else "")
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                with gr.Row():
                    label = gr.Dropdown(
                        list(pipe.class_names), value=own_class, label="Class", min_width=120
                    )
                    seed = gr.Number(0, label="Seed", elem_id="seed", min_width=120)
                random = gr.Button("Random seed", size="sm", elem_id="random")
                with gr.Tab("Sample"):
                    action("Sample", Kept, [], "free")
                with gr.Tab("Draw"):
                    drawn = painting(
                        page, "Paint: every color is a region", COLORS, None, "drawing"
                    )
                    ready = gr.Dropdown(
                        [(name.replace("_", " "), name) for name in control.DRAWINGS],
                        value=None,
                        label="Or begin with a drawing",
                    )
                    action("Follow the drawing", page.drawing, [drawn], "draw")
                with gr.Tab("Picture"):
                    source = picture_source()
                    reference = painting(page, "As the model sees it", {}, picture, "reference")
                    sources.append((*source, reference))
                    maps = gr.Slider(1, stages, min(3, stages), step=1, label="Maps to keep")
                    tokens = gr.Slider(0, stages, 0, step=1, label="Stages of tokens to keep")
                    action("Keep its structure", page.picture, [reference, maps, tokens], "keep")
                with gr.Tab("Edit"):
                    source = picture_source()
                    masked = painting(page, "Paint over what is to change", MASK, picture, "mask")
                    sources.append((*source, masked))
                    start = gr.Slider(0, stages - 1, 0, step=1, label="Stages to keep everywhere")
                    paste = gr.Checkbox(True, label="Put the original pixels back outside")
                    action("Change the painted part", page.edit, [masked, start, paste], "edit")
                with gr.Accordion("How to sample", open=False):
                    fields = settings_fields(pipe.settings)
            with gr.Column(scale=3, min_width=300):
                samples = gr.HTML(shown, **in_browser("samples"), elem_id="samples")
                with gr.Accordion("Python lines that make these samples", open=False):
                    lines = page.lines(Kept(), own_class, 0, {})
                    code = gr.Code(lines, language="python", elem_id="code")
                    files = gr.HTML(elem_id="files")
        first = gr.State(picture)
        # A press while another is served waits; it is not lost.
        queued: dict[str, Any] = dict(trigger_mode="always_last")
        for button, keep, inputs, said in actions:
            button.click(
                functools.partial(page.sample, keep, len(inputs)),
                [*inputs, label, seed, *fields],
                [said, samples, first, code, files],
                concurrency_limit=1,  # all buttons share one queue
                concurrency_id="model",
                show_progress_on=said,
                **queued,
            )
        for name, field in zip(["seed", *Settings.specs()], [seed, *fields]):
            if isinstance(field, gr.Number | gr.Textbox):
                check = functools.partial(page.check, name)
                # While one types: a message that comes or goes at a press would move the button.
                field.input(
                    lambda _: None, field, validator=check, show_progress="hidden", **queued
                )
        for upload, use, said, field in sources:
            upload.upload(page.upload, upload, [field, said], show_progress_on=said, **queued)
            use.click(page.use, first, [field, said], **queued)
        ready.select(page.ready_made, ready, drawn, **queued)
        random.click(None, None, seed, js="() => Math.floor(Math.random() * 2 ** 32)")
    return blocks


def serve(blocks: gr.Blocks, host: str, port: int) -> str:
    """Starts to serve a page; returns its address.

    Raises:
        UserError: the port cannot be used.
    """
    # Gradio asks its own server at the start, where a proxy would answer.
    beside_proxy = [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "localhost", host]
    os.environ["no_proxy"] = ",".join(filter(None, beside_proxy))
    try:
        return blocks.launch(
            server_name=host,
            server_port=port,
            share=False,  # by default, Gradio opens it to everyone where it sees a hosted notebook
            max_file_size=MAX_UPLOAD,
            footer_links=["gradio"],
            prevent_thread_lock=True,
            quiet=True,
        )[1]
    except OSError as error:
        if "port" not in str(error):
            raise
        raise UserError(
            f"The page cannot listen on port {port} of {host}; another program, perhaps another "
            "page, may use it, or this machine has no such address. Give another --port or --host."
        ) from error
