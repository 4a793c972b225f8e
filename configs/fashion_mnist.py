"""Fashion-MNIST: 60,000 gray images of clothing at 32 x 32 pixels, on a CPU in under an hour.

    python -m nvg_jax.train --config=configs/fashion_mnist.py --workdir=runs/fashion
    python -m nvg_jax.evaluate --workdir=runs/fashion --num_samples=10000

Reaches 21.2 dB PSNR and 92.3% agreement of samples with their class (docs/results.md). The IDX
files are read from where Debian's package dataset-fashion-mnist installs them, or from
--config.data.data_dir=FOLDER.

`:fine` has 8 x 8 latents in seven stages, for sharper images; it takes several hours on one core.

`:adversarial` also trains the tokenizer against a small discriminator:

    python -m nvg_jax.train --config=configs/fashion_mnist.py:adversarial \\
        --config.part=tokenizer --workdir=runs/fashion_adversarial

`:runlocal` trains tiny models for a few steps, to test the installation.
"""

from configs import common


def get_config(arg: str | None = None):
    variants = common.choose(arg, ("fine", "adversarial", "runlocal"))
    config = common.base()
    common.without_pretrained(config)
    config.data.update(name="fashion_mnist", resize=32)
    config.data.credits = "Fashion-MNIST, Copyright (c) 2017 Zalando SE, MIT license"
    config.tokenizer.update(
        image_size=(32, 32),
        latent_size=(4, 4),
        latent_dim=8,
        codebook_size=128,
        base_channels=32,
        channel_multipliers=(1, 1, 2, 2),
        blocks_per_level=1,
    )
    config.content = common.transformer(64, 4, head_dim=32)
    config.structure = common.transformer(64, 2, head_dim=32)
    common.small_models(config)
    config.tokenizer_training.update(length="2000 steps", eval_every=2000)
    config.generator_training.update(
        length="5000 steps", batch_size=32, log_every=100, eval_every=5000, save_every=1000
    )
    config.distillation.update(length="800 steps", eval_every=800)
    if "fine" in variants:
        config.tokenizer.update(
            latent_size=(8, 8), codebook_size=512, channel_multipliers=(1, 2, 2)
        )
        config.content = common.transformer(96, 4, head_dim=32)
        config.structure = common.transformer(64, 3, head_dim=32)
        config.content.remat = config.structure.remat = "blocks"
        config.tokenizer_training.update(length="5000 steps")
        config.generator_training.update(length="4000 steps", batch_size=16, save_every=250)
    if "runlocal" in variants:
        common.run_locally(config)
    if "adversarial" in variants:
        config.tokenizer_training.update(adversarial_weight=0.1, discriminator="small")
    return config
