"""Handwritten digits: scikit-learn's 1,797 images of 8 x 8 pixels, on a CPU in about ten minutes.

    python -m nvg_jax.train --config=configs/digits.py --workdir=runs/digits
    python -m nvg_jax.evaluate --workdir=runs/digits --num_samples=1000

Reaches 25.5 dB PSNR and 91.9% agreement of guided samples with their class (docs/results.md).

`:demo` is the shorter training of `make demo` (two to four minutes, 23.4 dB, 92 to 97%):

    python -m nvg_jax.train --config=configs/digits.py:demo --workdir=runs/demo

`:runlocal` trains tiny models for a few steps, to test the installation.
"""

from configs import common


def get_config(arg: str | None = None):
    variants = common.choose(arg, ("demo", "runlocal"))
    config = common.base()
    common.without_pretrained(config)
    config.data.update(name="digits", resize=8)
    # Four channels and 32 codes: a latent with little unpredictable content.
    config.tokenizer.update(
        image_size=(8, 8),
        latent_size=(4, 4),
        latent_dim=4,
        codebook_size=32,
        base_channels=32,
        channel_multipliers=(1, 2),
        blocks_per_level=1,
    )
    config.content = common.transformer(64, 3, head_dim=32, drop_path=0.1)
    config.structure = common.transformer(64, 2, head_dim=32, drop_path=0.1)
    common.small_models(config)
    config.tokenizer_training.update(
        length="800 steps", batch_size=32, eval_every=400, save_every=400
    )
    config.tokenizer_training.optimizer.update(learning_rate=1.6e-2, warmup_steps=50)
    # After about 2,500 steps the content generator begins to memorize the 1,497 training images.
    config.generator_training.update(
        length="2400 steps", batch_size=32, log_every=100, eval_every=800, save_every=800
    )
    config.generator_training.optimizer.warmup_steps = 100
    config.distillation.update(
        length="800 steps", batch_size=32, eval_every=400, save_every=400, flow_steps=2
    )
    config.sampling.update(
        content_guidance=(3.0, 3.0),
        top_p=(0.5, 0.5),
        flow_steps=8,  # as good as 25 on these maps, in a third of the time
    )
    if "demo" in variants:
        config.tokenizer_training.update(length="500 steps", eval_every=500, save_every=250)
        # Half the rate costs 1 dB; its simpler tokens are learned better in 1,500 steps.
        config.tokenizer_training.optimizer.learning_rate = 8e-3
        config.generator_training.update(
            length="1500 steps", batch_size=16, eval_every=1500, save_every=750
        )
        config.generator_training.optimizer.update(learning_rate=3.2e-2, ema_decay=0.995)
    if "runlocal" in variants:
        common.run_locally(config)
    return config
