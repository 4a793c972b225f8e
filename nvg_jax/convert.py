"""The published weights: `python -m nvg_jax.convert --autoencoder=ae.ckpt --out=models/d16`.

With --generator=d16.ckpt, the written folder can also sample; without, it encodes and reconstructs.
`--workdir=runs/digits --out=FOLDER` exports a run: the model alone, in the same format, with
`--dtype=bfloat16` or `float16` at half the size. With --to-safetensors, the weights have the
published names instead. --out=hf://ORG/NAME uploads the model to the Hugging Face hub, and
--from_hub=ORG/NAME takes the published checkpoints from there. `--pretrained=dino --from=FILE`
imports a network for the training losses or for evaluation (docs/pretrained.md).
"""

from absl import flags
from etils import epy

from nvg_jax import cli, hub, pretrained
from nvg_jax.errors import UserError
from nvg_jax.runtime import export
from nvg_jax.torch_interop import weight_names

with epy.lazy_imports():  # slow, and not needed to report a wrong flag
    from nvg_jax.jobs import conversion

FLAGS = flags.FLAGS
NAMES = {
    "autoencoder", "generator", "from_hub", "autoencoder_weights", "generator_weights", "workdir",
    "dtype", "to_safetensors", "out", "license", "private", "pretrained", "from", "pretrained_dir",
}  # fmt: skip


def main(_):
    given = {name for name in NAMES if FLAGS[name].value != FLAGS[name].default}
    if FLAGS.pretrained:
        if given - {"pretrained", "from", "pretrained_dir"} or not FLAGS["from"].value:
            raise UserError("--pretrained takes --from (and --pretrained_dir), and nothing else.")
        files = [file for files in FLAGS["from"].value for file in files.split(",")]
        written = pretrained.convert(FLAGS.pretrained, files, FLAGS.pretrained_dir)
        print(f"written: {written}")
        return
    if "out" not in given:
        raise UserError("Give --out, a new folder to write.")
    if alone := given & {"from", "pretrained_dir"}:
        raise UserError(f"--{min(alone)} belongs to --pretrained.")
    upload = {name: FLAGS[name].value for name in given & {"license", "private"}}
    if upload and not hub.is_remote(FLAGS.out):
        raise UserError(f"--{min(upload)} is for models on the hub: give --out=hf://ORG/NAME.")
    if FLAGS.to_safetensors:
        if given != {"to_safetensors", "workdir", "out"}:
            raise UserError("--to-safetensors takes --workdir and --out, and nothing else.")
        conversion.to_safetensors(FLAGS.workdir, FLAGS.out)
    elif "workdir" in given and given <= {"workdir", "out", "dtype", *upload}:
        conversion.export_model(FLAGS.workdir, FLAGS.out, FLAGS.dtype, **upload)
    else:
        if "workdir" in given or not given & {"autoencoder", "from_hub"}:
            raise UserError(
                "Give --autoencoder (and --generator) or --from_hub to convert published "
                "checkpoints, or only --workdir to export a model."
            )
        if "generator_weights" in given and not given & {"generator", "from_hub"}:
            raise UserError("--generator_weights belongs to --generator.")
        files = FLAGS.autoencoder, FLAGS.generator
        if FLAGS.from_hub:
            files = hub.download_published(FLAGS.from_hub, *files)
            if hub.is_remote(FLAGS.out) and "license" not in upload:
                upload["license"] = hub.stated_license(FLAGS.from_hub)
        weights = FLAGS.autoencoder_weights, FLAGS.generator_weights
        conversion.convert(FLAGS.out, *files, *weights, FLAGS.dtype, **upload)
    print(f"written: {FLAGS.out}")


if __name__ == "__main__":
    flags.DEFINE_string("autoencoder", None, "Published checkpoint of the autoencoder.")
    flags.DEFINE_string("generator", None, "Published checkpoint of its generators.")
    flags.DEFINE_string("from_hub", None, "ORG/NAME on the Hugging Face hub that has both files.")
    for file, default in weight_names.DEFAULTS.items():
        flags.DEFINE_enum(
            f"{file}_weights", default, weight_names.WEIGHTS, "Weights, or their moving average."
        )
    flags.DEFINE_string("workdir", None, cli.MODEL)
    flags.DEFINE_enum("dtype", "float32", export.DTYPES, "Type of the weights in the files.")
    flags.DEFINE_boolean("to_safetensors", False, "Write --workdir under the published names.")
    flags.DEFINE_alias("to-safetensors", "to_safetensors")
    flags.DEFINE_string("out", None, "Folder to write, new or empty, or hf://ORG/NAME.")
    flags.DEFINE_string("license", None, "On the hub, such as mit; by default that of --from_hub.")
    flags.DEFINE_boolean("private", None, "On the hub, whether others cannot see a new model.")
    flags.DEFINE_enum("pretrained", None, pretrained.NAMES, "A network of losses or metrics.")
    flags.DEFINE_multi_string("from", None, "Its published file, or files.")
    flags.DEFINE_string("pretrained_dir", None, "Where it is kept; by default $NVG_CACHE.")
    cli.main(main)
