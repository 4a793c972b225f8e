"""ImageNet at 256 x 256 pixels, the published sizes: d16 (default), d20, d24.

python -m nvg_jax.train --config=configs/imagenet256.py:d16 --workdir=runs/imagenet-d16
docs/data.md says how to prepare the data. Variants combine with commas: d16,runlocal runs every
stage in a minute on a CPU, on the digits, without the losses that need pretrained networks.
"""

from configs import common

EPOCHS = {"d16": 200.0, "d20": 250.0, "d24": 350.0}


def get_config(arg: str | None = None):
    names = common.choose(arg, {**EPOCHS, "runlocal": None})
    sizes = [name for name in names if name in EPOCHS] or ["d16"]
    if len(sizes) > 1:
        raise ValueError(f"Choose one model size, got {', '.join(sizes)}.")
    size = sizes[0]
    depth = int(size[1:])
    config = common.base()
    config.dtype = "bfloat16"
    config.data.update(name="tfds:imagenet2012", num_workers=8, num_threads=4)
    config.content = common.transformer(64 * depth, depth)
    config.structure = common.transformer(32 * depth, depth)
    config.content.remat = config.structure.remat = True
    config.generator_training.epochs = EPOCHS[size]
    optimizer = config.generator_training.optimizer
    if size == "d24":  # trained for more than 300 epochs
        optimizer.update(decay_start=200 / 350, final=0.01)
    else:  # constant for 80% of the steps, counted from the end of the warm-up
        steps = EPOCHS[size] * 1_281_167 / config.generator_training.batch_size
        optimizer.decay_start = 0.8 + optimizer.warmup_steps / steps
    if "runlocal" in names:
        common.run_locally(config)
        config.data.update(name="digits", resize=8)
    return config
