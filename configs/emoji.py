"""Emoji: 10,600 colored pictures of three designs at 64 x 64 pixels, in 27 classes.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 \\
        @lobehub/fluent-emoji-3d@1.1.0
    python -m nvg_jax.data.emoji --packages=. --out=data/emoji
    python -m nvg_jax.train --config=configs/emoji.py --workdir=runs/emoji

The geometry is the published one: 16 x 16 latents in nine stages. A CPU core trains the tokenizer;
the generators need an accelerator (docs/data.md).

`:small` has 32 x 32 pixels and 8 x 8 latents in seven stages; a CPU trains it in hours, not days,
with finer classes (`python -m nvg_jax.data.emoji --help`).

`:runlocal` trains tiny models for a few steps, to test the installation.
"""

from configs import common


def get_config(arg: str | None = None):
    variants = common.choose(arg, ("small", "runlocal"))
    config = common.base()
    common.without_pretrained(config)
    config.data.update(name="image_folder", data_dir="data/emoji", resize=64, pad=2)
    config.data.credits = (
        "Noto Emoji by Google, Apache 2.0; Twemoji by Twitter and other contributors, CC-BY 4.0; "
        "Fluent Emoji, Copyright (c) Microsoft Corporation, MIT"
    )
    config.tokenizer.update(
        image_size=(64, 64),
        latent_size=(16, 16),
        latent_dim=16,
        codebook_size=1024,
        base_channels=32,
        channel_multipliers=(1, 1, 2),
        blocks_per_level=0,
    )
    config.content = common.transformer(192, 6)
    config.structure = common.transformer(128, 4)
    common.small_models(config)
    config.tokenizer_training.update(
        length="12000 steps", batch_size=8, eval_every=1000, eval_images=256
    )
    config.tokenizer_training.optimizer.update(
        learning_rate=4.8e-2, schedule="linear", decay_start=0.5, ema_decay=0.999
    )
    config.generator_training.update(
        length="100000 steps", batch_size=8, log_every=50, eval_every=4000, save_every=250
    )
    config.distillation.update(length="1000 steps", eval_every=1000)
    if "small" in variants:
        config.data.update(resize=32, pad=1)
        config.tokenizer.update(
            image_size=(32, 32),
            latent_size=(8, 8),
            codebook_size=512,
            channel_multipliers=(1, 2, 2),
        )
        config.content = common.transformer(128, 4)
        config.structure = common.transformer(96, 3, head_dim=48)
        config.content.remat = config.structure.remat = "linears"  # 30% faster than "blocks" here
        config.tokenizer_training.update(length="6000 steps", batch_size=16)
        config.tokenizer_training.optimizer.learning_rate = 2.4e-2
        config.generator_training.update(length="12000 steps", batch_size=16)
        config.generator_training.optimizer.learning_rate = 4.8e-2
        config.sampling.update(content_guidance=(3.0, 3.0), top_p=(0.8, 0.8), flow_steps=2)
    if "runlocal" in variants:
        common.run_locally(config)
    return config
