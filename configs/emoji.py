"""Emoji: 3,600 colored pictures in nine groups at 64 x 64 pixels, drawn from a font.

    apt-get install fonts-noto-color-emoji unicode-data
    python -m nvg_jax.data.emoji --out=data/emoji
    python -m nvg_jax.train --config=configs/emoji.py --workdir=runs/emoji

`:runlocal` trains tiny models for a few steps, to test the installation.
"""

from configs import common


def get_config(arg: str | None = None):
    variants = common.choose(arg, ("runlocal",))
    config = common.base()
    common.without_pretrained(config)
    config.data.update(name="image_folder", data_dir="data/emoji", resize=64)
    config.tokenizer.update(
        image_size=(64, 64),
        latent_size=(8, 8),
        latent_dim=16,
        codebook_size=1024,
        base_channels=32,
        channel_multipliers=(1, 1, 2, 4),
        blocks_per_level=1,
    )
    config.content = common.transformer(128, 4, head_dim=32)
    config.structure = common.transformer(64, 4, head_dim=32)
    common.small_models(config)
    config.tokenizer_training.update(length="8000 steps", eval_every=2000)
    config.generator_training.update(
        length="8000 steps", batch_size=16, log_every=50, eval_every=4000, save_every=500
    )
    config.distillation.update(length="1000 steps", eval_every=1000)
    if "runlocal" in variants:
        common.run_locally(config)
        config.data.resize = 8
    return config
