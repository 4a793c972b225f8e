"""Compiles a program for TPUs or GPUs on a machine without any, and reports what it would need.

python -m nvg_jax.compile --config=configs/imagenet256.py:d16 --topology=v5p:8x8x8
python -m nvg_jax.compile --config=configs/imagenet256.py:d16 --topology=h100:8

Compiles the training step that `train` runs or, with --program=sample, the sampler.
`--config.part=` chooses what is trained (tokenizer, structure, content, generators, distillation;
all means generators), and `--config.mesh.fsdp=` etc. set the mesh. `--find_batch` finds the largest
global batch that fits, `--find_remat` what the backward pass should recompute. Requires the
compiler: pip install "jax[tpu]" or "jax[cuda13]". Times are roofline estimates from the compiled
program; nothing is measured.
"""

import json

from absl import flags
from etils import epy

from nvg_jax import cli, presets
from nvg_jax.aot.chips import find_target, hide_accelerators
from nvg_jax.errors import UserError, comes_with
from nvg_jax.parts import GENERATORS
from nvg_jax.runtime.storage import make_folder, storage_path, write_file
from nvg_jax.training.checks import check_process

with epy.lazy_imports(error_callback=comes_with("train")):  # slow
    from nvg_jax.aot import batch, lowering
    from nvg_jax.aot import report as reports
    from nvg_jax.runtime import sharding

FLAGS = flags.FLAGS


def main(_):
    check_process(FLAGS.config)
    file = storage_path(FLAGS.json) if FLAGS.json else None
    if file:
        make_folder(file.parent)
    if FLAGS.find_remat:
        has_blocks = set(GENERATORS) & set(lowering.training_part(FLAGS.config).networks)
        if FLAGS.program == "sample" or not has_blocks:
            raise UserError("--find_remat is for the training of generators, which have blocks.")
    target = find_target(FLAGS.topology, FLAGS.config.mesh.to_dict())
    compiler = lowering.Compiler(FLAGS.config, target, FLAGS.program)
    if FLAGS.find_batch:
        batch_size = batch.find_batch(compiler)
    else:
        batch_size = FLAGS.batch_size or batch.default_batch(compiler)
        sharding.check_batch(batch_size, target.batch_shards)
    if FLAGS.find_remat:
        report = reports.best_remat(FLAGS.config, target, batch_size)
        print(*(f"--config.{name}.remat={report['remat']}" for name in GENERATORS))
    else:
        report = reports.make_report(compiler, batch_size)
    print(reports.format_report(report))
    if file:
        write_file(file, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    hide_accelerators()
    presets.define_flag()
    flags.DEFINE_string("topology", None, "CHIP:SHAPE, such as v5e:16x16, 2xv5p:4x4x4 or h100:8.")
    flags.DEFINE_enum("program", "train", ["train", "sample"], "The program to compile.")
    flags.DEFINE_integer(
        "batch_size",
        None,
        "Global batch; by default the config's, or 64 samples.",
        lower_bound=1,
    )
    flags.DEFINE_boolean("find_batch", None, "Find the largest global batch that fits.")
    flags.DEFINE_boolean("find_remat", None, "Find the remat policy with the shortest step.")
    flags.DEFINE_string("json", None, "File for the report as JSON.")
    flags.mark_flags_as_required(["config", "topology"])
    flags.mark_flags_as_mutual_exclusive(["batch_size", "find_batch"])
    flags.mark_flags_as_mutual_exclusive(["find_remat", "find_batch"])
    cli.main(main)
