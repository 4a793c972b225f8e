"""Your own images: a folder with one subfolder per class. Class names and counts are read from it.

    python -m nvg_jax.train --config=configs/image_folder.py:small --config.data.data_dir=FOLDER \\
        --workdir=runs/mine
    python -m nvg_jax.sample --workdir=runs/mine --out=samples/

docs/own_images.md leads from a folder to an edited picture. `:small` is for a laptop or a Colab
runtime: 64 x 64 pixels, 8 x 8 latents in seven stages, a tokenizer of 0.7 and generators of 1.0 and
0.5 million parameters; 1.3 CPU hours for 300 images, 2.2 for 3,000 and more. `:64` (default),
`:128` and `:256` are image sizes for a GPU. The number of steps, the warm-up, the average of the
weights and the intervals follow from the number of images (nvg_jax/training/length.py). `:runlocal`
trains tiny models for a few steps on a CPU, and combines with a size (`:128,runlocal`).

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
    sizes = ("small", *SIZES)
    names = common.choose(arg, (*sizes, "finetune", "runlocal"))
    if "finetune" in names:
        if len(names) > 1:
            raise ValueError("The variant finetune has the sizes of d16; give it alone.")
        return finetune()
    chosen = [name for name in names if name in sizes] or ["64"]
    if len(chosen) > 1:
        raise ValueError(f"Choose one size, got {', '.join(chosen)}.")
    config = common.base()
    common.without_pretrained(config)
    config.data.update(name="image_folder")
    if chosen[0] == "small":
        small(config)
    else:
        sized(config, chosen[0])
    for training in (config.tokenizer_training, config.generator_training):
        common.follow_length(training)
    if "runlocal" in names:
        common.run_locally(config)
    return config


def small(config):
    """Sizes and lengths for one to three CPU hours."""
    config.tokenizer.update(
        image_size=(64, 64),
        latent_size=(8, 8),
        latent_dim=16,
        codebook_size=512,
        base_channels=32,
        channel_multipliers=(1, 1, 2, 2),
        blocks_per_level=0,
    )
    config.content = common.transformer(128, 4, head_dim=32)
    config.structure = common.transformer(96, 3, head_dim=32)
    common.small_models(config)
    config.tokenizer_training.length = "50 epochs, at least 1000 steps, at most 3000 steps"
    config.generator_training.update(
        length="100 epochs, at least 4000 steps, at most 6000 steps", batch_size=16
    )
    config.distillation.length = "800 steps"


def sized(config, size: str):
    """Sizes and lengths for an image size in pixels."""
    latent_size, channels, multipliers, depth, batch_size = SIZES[size]
    config.data.num_workers = 4
    config.tokenizer.update(
        image_size=(int(size),) * 2,
        latent_size=latent_size,
        base_channels=channels,
        channel_multipliers=multipliers,
    )
    config.content = common.transformer(64 * depth, depth)
    config.structure = common.transformer(32 * depth, depth)
    config.tokenizer_training.update(length="100 epochs, at least 5000 steps", batch_size=64)
    config.tokenizer_training.optimizer.learning_rate = 4e-4  # 1e-4 at this batch size
    config.generator_training.update(
        length="200 epochs, at least 5000 steps", batch_size=batch_size
    )
    few_steps(config)


def few_steps(config):
    """Sets a length of distillation that also suits small folders."""
    config.distillation.update(length="2000 steps", batch_size=64, eval_every=1000, save_every=500)
    config.distillation.optimizer.update(warmup_steps=100, ema_decay=0.99)


def finetune():
    """The published d16 on other images and classes; the tokenizer stays unchanged."""
    config = common.base()
    common.without_pretrained(config)
    config.update(part="generators", init_from="models/d16", tokenizer_workdir="models/d16")
    config.dtype, config.tokenizer_training.dtype = "bfloat16", "float32"  # as ImageNet's
    config.data.update(name="image_folder", num_workers=4)
    config.content.remat = config.structure.remat = "blocks"
    config.generator_training.update(length="20 epochs, at least 1000 steps", batch_size=64)
    common.follow_length(config.generator_training)
    few_steps(config)
    # A quarter of the usual rate at this batch size, without decay: the weights are already good.
    config.generator_training.optimizer.update(
        learning_rate=2.5e-5, schedule="constant", ema_warmup=False
    )
    return config
