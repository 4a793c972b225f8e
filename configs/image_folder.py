"""Your own images: a folder with one subfolder per class. Class names and counts are read from it.

    python -m nvg_jax.train --config=configs/image_folder.py --config.data.data_dir=FOLDER \\
        --workdir=runs/mine
    python -m nvg_jax.evaluate --workdir=runs/mine --num_samples=1000

Variants: `:64` (default), `:128` and `:256` are the image size in pixels. `:runlocal` trains tiny
models for a few steps on a CPU, and combines with a size (`:128,runlocal`).

`:finetune` continues training the published d16 generators, converted to models/d16, on your
images, without changing their tokenizer (docs/finetuning.md):

    python -m nvg_jax.train --config=configs/image_folder.py:finetune \\
        --config.data.data_dir=FOLDER --workdir=runs/mine
"""

from configs import common

# image size: (latent size, base channels, channel multipliers, generator depth, batch size)
SIZES = {
    "64": ((8, 8), 64, (1, 2, 4, 4), 8, 256),
    "128": ((16, 16), 96, (1, 2, 4, 4), 12, 256),
    "256": ((16, 16), 128, (1, 2, 4, 4, 4), 16, 256),
}


def get_config(arg: str | None = None):
    names = common.choose(arg, {**SIZES, "finetune": None, "runlocal": None})
    if "finetune" in names:
        if len(names) > 1:
            raise ValueError("The variant finetune has the sizes of d16; give it alone.")
        return finetune()
    sizes = [name for name in names if name in SIZES] or ["64"]
    if len(sizes) > 1:
        raise ValueError(f"Choose one image size, got {', '.join(sizes)}.")
    latent_size, channels, multipliers, depth, batch_size = SIZES[sizes[0]]
    config = common.base()
    common.without_pretrained(config)
    config.data.update(name="image_folder", num_workers=4)
    config.tokenizer.update(
        image_size=(int(sizes[0]),) * 2,
        latent_size=latent_size,
        base_channels=channels,
        channel_multipliers=multipliers,
    )
    config.content = common.transformer(64 * depth, depth)
    config.structure = common.transformer(32 * depth, depth)
    config.tokenizer_training.batch_size = 64
    config.generator_training.batch_size = batch_size
    for training in (config.tokenizer_training, config.generator_training):
        training.update(eval_every=2000, save_every=2000)
    config.generator_training.optimizer.ema_decay = 0.999
    few_steps(config)
    if "runlocal" in names:
        common.run_locally(config)
    return config


def few_steps(config):
    """Sets a length of distillation that also suits small folders."""
    config.distillation.update(length="2000 steps", batch_size=64, eval_every=1000, save_every=500)
    config.distillation.optimizer.update(warmup_steps=100, ema_decay=0.99)


def finetune():
    """The published d16 on other images and classes; the tokenizer stays unchanged."""
    config = common.base()
    common.without_pretrained(config)
    config.update(part="generators", init_from="models/d16", tokenizer_workdir="models/d16")
    config.dtype = "bfloat16"
    config.data.update(name="image_folder", num_workers=4)
    config.content = common.transformer(1024, 16)
    config.structure = common.transformer(512, 16)
    config.content.remat = config.structure.remat = "blocks"
    config.generator_training.update(
        length="20 epochs", batch_size=64, eval_every=1000, save_every=1000
    )
    few_steps(config)
    # A quarter of the usual rate at this batch size, without decay: the weights are already good.
    config.generator_training.optimizer.update(
        learning_rate=2.5e-5, schedule="constant", warmup_steps=200, ema_decay=0.999
    )
    return config
