"""Fashion-MNIST (60,000 grey images of clothing) at 32 x 32 pixels, on a CPU in under an hour.

python -m nvg_jax.train --config=configs/fashion_mnist.py --workdir=runs/fashion
python -m nvg_jax.evaluate --workdir=runs/fashion --num_samples=10000

The IDX files are looked for where Debian's package dataset-fashion-mnist puts them; give another
folder with --config.data.data_dir. Variant: `:runlocal`.
"""

from configs import common


def get_config(arg: str | None = None):
    variants = common.choose(arg, ("runlocal",))
    config = common.base()
    config.data.update(name="fashion_mnist", resize=32)
    config.tokenizer.update(
        image_size=(32, 32),
        latent_size=(4, 4),
        latent_dim=16,
        codebook_size=128,
        base_channels=32,
        channel_multipliers=(1, 1, 1, 2),
        blocks_per_level=1,
    )
    if "runlocal" in variants:
        common.run_locally(config)
    return config
