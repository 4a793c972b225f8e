"""ImageNet at 256 x 256 pixels, in the published sizes: `:d16` (default), `:d20`, `:d24`.

First prepare the data (docs/data.md) and the frozen networks (docs/pretrained.md). On one machine:

    python -m nvg_jax.train --config=configs/imagenet256.py:d16 --workdir=runs/d16 \\
        --config.data.data_dir=/data/tfds

On a TPU pod (docs/launch.md has SLURM and GKE):

    launch/tpu_vm.sh run --name=nvg-d16 --zone=ZONE --type=v5p-128 --spot \\
        --setup="mountpoint -q /mnt/data || COMMAND THAT MOUNTS IT" \\
        -- --config=configs/imagenet256.py:d16 --workdir=gs://BUCKET/d16 \\
           --config.data.data_dir=/mnt/data/tfds --config.pretrained_dir=/mnt/data/pretrained

The batch sizes are the published 768, 720 and 864 images, from which learning rates of 3e-4,
2.8125e-4 and 3.375e-4 follow. A batch must divide over the devices: 720 over up to 16 devices of a
power-of-two mesh, 864 over 32. With more of them give the nearest multiple, such as
--config.generator_training.batch_size=768; the learning rate follows it. docs/scaling.md estimates
memory and time for TPUs and GPUs, and says which recomputation (--config.content.remat,
structure.remat) suits them.

`:runlocal` trains tiny models for a few steps on the digits, without the losses that need
pretrained networks, and combines with a size (`:d20,runlocal`).
"""

from configs import common

EPOCHS = {"d16": 200, "d20": 250, "d24": 350}
BATCH_SIZES = {"d16": 768, "d20": 720, "d24": 864}


def get_config(arg: str | None = None):
    names = common.choose(arg, {**EPOCHS, "runlocal": None})
    sizes = [name for name in names if name in EPOCHS] or ["d16"]
    if len(sizes) > 1:
        raise ValueError(f"Choose one model size, got {', '.join(sizes)}.")
    size = sizes[0]
    depth = int(size[1:])
    config = common.base()
    config.dtype = "bfloat16"
    config.tokenizer_training.dtype = "float32"  # with the device's fast products, as published
    config.data.update(
        name="tfds:imagenet2012", resize_filter="published", num_workers=8, num_threads=4
    )
    config.content = common.transformer(64 * depth, depth)
    config.structure = common.transformer(32 * depth, depth)
    config.content.remat = config.structure.remat = "blocks"
    config.generator_training.update(length=f"{EPOCHS[size]} epochs", batch_size=BATCH_SIZES[size])
    optimizer = config.generator_training.optimizer
    if size == "d24":  # as published for training longer than 300 epochs
        optimizer.update(decay_start=200 / 350, final=0.01)
    else:  # constant for 80% of all steps, counted from the end of the warm-up
        steps = EPOCHS[size] * 1_281_167 / config.generator_training.batch_size
        optimizer.decay_start = 0.8 + optimizer.warmup_steps / steps
    if "runlocal" in names:
        common.run_locally(config)
        config.data.name = "digits"
    return config
