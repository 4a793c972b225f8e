"""The paper's figures for any model.

    python -m nvg_jax.figures --workdir=fashion_mnist --out=figures/

Writes sequence.png (Figure 1: canvases and maps, stage by stage), binary.png (Figure 5: samples and
their first map), drawings.png (Figure 6: samples that follow ready-made maps) and stages.png
(Figure 8: what each stage decides). With --image=FILE,..., sequence.png shows the stages of these
pictures, and --figures=reuse writes reuse.png: samples of other classes with their structure.
"""

from pathlib import Path

import numpy as np
from absl import flags
from etils import epy

from nvg_jax import cli
from nvg_jax.errors import UserError, comes_with

with epy.lazy_imports(error_callback=comes_with("train")):  # slow
    from nvg_jax import pipeline, visualize
    from nvg_jax.jobs import editing, figures, sampling_runs
    from nvg_jax.runtime import storage

FLAGS = flags.FLAGS
FIGURES = ("sequence", "binary", "drawings", "stages")  # by default
ALL_FIGURES = (*FIGURES, "reuse")


def main(_):
    unknown = [name for name in FLAGS.figures if name not in ALL_FIGURES]
    if unknown:
        raise UserError(f"--figures takes {', '.join(ALL_FIGURES)}; got {', '.join(unknown)}.")
    if FLAGS.image and not {"sequence", "reuse"} & set(FLAGS.figures):
        raise UserError("--image is shown by the figures sequence and reuse; add one to --figures.")
    if "" in FLAGS.image:
        raise UserError(f"--image has an empty name: {','.join(FLAGS.image)}")
    if "reuse" in FLAGS.figures and not FLAGS.image:
        raise UserError("The figure reuse takes its structures from --image=FILE,...; give some.")
    pipe = pipeline.Pipeline.from_pretrained(FLAGS.workdir)
    if not FLAGS.image or FLAGS.figures != ["sequence"]:
        pipe.check_can_sample()
    chosen = FLAGS.figures
    if "drawings" in chosen:
        if FLAGS["figures"].present:
            pipe.check_free_structure("follow drawings (--figures)")
        elif pipe.tokenizer.config.fixed_structure is not None:
            chosen = [name for name in chosen if name != "drawings"]
    classes = pipe.class_ids(FLAGS.classes or range(min(len(pipe.class_names), 8)))
    names = [Path(file).stem for file in FLAGS.image]
    images = [pipe.prepare(editing.read_picture(file)) for file in FLAGS.image]
    out = storage.storage_path(FLAGS.out)
    storage.make_folder(out)

    def draw(name: str) -> np.ndarray:
        if name == "sequence" and images:
            return sampling_runs.stages_picture(pipe, pipe.encode(np.stack(images)), names)
        if name == "sequence":
            sample = pipe.sample(classes[:4], seed=FLAGS.seed)
            rows = [pipe.class_names[c] for c in classes[:4]]
            return sampling_runs.stages_picture(pipe, sample.sequence, rows)
        if name == "binary":
            return figures.binary(pipe, classes, FLAGS.columns, FLAGS.seed)
        if name == "drawings":
            return figures.drawings(pipe, classes, FLAGS.seed)
        if name == "reuse":
            return figures.reuse(pipe, np.stack(images), names, classes, FLAGS.seed)
        return figures.stages(pipe, classes[0], FLAGS.columns, FLAGS.seed)

    for name in chosen:
        visualize.save_png(out / f"{name}.png", draw(name))
        print(out / f"{name}.png")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, cli.MODEL)
    flags.DEFINE_string("out", None, "Folder for the figures.")
    flags.DEFINE_list("figures", ",".join(FIGURES), f"Which of {', '.join(ALL_FIGURES)}.")
    flags.DEFINE_list(
        "classes",
        None,
        "Class names or ids (3, or id:3); by default the first eight. The figure sequence shows "
        "four of them, stages the first.",
    )
    flags.DEFINE_list("image", [], "Pictures for the figures sequence and reuse.")
    flags.DEFINE_integer("columns", 3, "Samples per row.", lower_bound=1)
    cli.define_seed_flag()
    flags.mark_flags_as_required(["workdir", "out"])
    cli.main(main)
