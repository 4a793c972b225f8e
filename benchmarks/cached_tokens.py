"""Times a generator training step from images and from cached sequences.

    python -m benchmarks.cached_tokens [--repeats=5] [--presets=digits,imagenet256]

"imagenet256" stands for the published tokenizer (256 pixels, L = 256) at batch size 2, with
two-block generators of d16's width; the full preset is too large for a CPU.
"""

import argparse
import os
import time

import jax
import numpy as np

from configs import common, digits, imagenet256
from nvg_jax.data.sequences import compact, crop_dtype
from nvg_jax.models import ModelConfig, init_tokenizer
from nvg_jax.parts import BOTH_GENERATORS
from nvg_jax.runtime import sharding
from nvg_jax.training.generators import encode
from nvg_jax.training.registry import make_trainer


def preset(name: str):
    if name == "digits":
        return digits.get_config()
    config = imagenet256.get_config("d16")
    config.dtype = "float32"
    config.generator_training.update(batch_size=2, repa_weight=0.0)  # REPA needs images
    config.content = common.transformer(1024, 2)
    config.structure = common.transformer(512, 2)
    return config


def smooth_images(batch: int, size: tuple[int, int]) -> np.ndarray:
    """Random float32 images (batch, *size, 3) in [-1, 1] with the smoothness of photographs."""
    noise = np.random.default_rng(0).normal(size=(batch, *size, 3))
    rows, columns = (np.fft.fftfreq(n)[:, None] for n in size)
    spectrum = 1 / np.maximum(np.hypot(rows, columns[:, 0]), 1 / max(size))
    images = np.fft.ifft2(np.fft.fft2(noise, axes=(1, 2)) * spectrum[..., None], axes=(1, 2)).real
    return (images / np.abs(images).max()).astype(np.float32)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--presets", default="digits,imagenet256")
    args = parser.parse_args()
    mesh = sharding.make_mesh()
    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {args.repeats} steps each")
    for name in args.presets.split(","):
        config = preset(name)
        model = ModelConfig.from_config(config, num_classes=10)
        count = config.generator_training.batch_size
        tokenizer = model.make_tokenizer()
        images = smooth_images(count, model.tokenizer.image_size)
        with sharding.in_mesh(mesh):
            params = jax.jit(lambda key: sharding.unbox(init_tokenizer(tokenizer, key)))(
                jax.random.key(0)
            )
            encoded = jax.jit(lambda params, images: encode(tokenizer, params, {"image": images}))
            sequence = encoded(params, images).sequence
            assert sequence is not None
            structure, tokens = map(np.asarray, sequence)
            stored = compact(structure, tokens, crop_dtype(config.tokenizer))
            batches = {
                "images": {"image": images},
                "sequences": {
                    key: np.ascontiguousarray(stored[key]) for key in stored.dtype.names or ()
                },
            }
            trainer = make_trainer(BOTH_GENERATORS, config, model, mesh, num_images=100_000)
            seconds = step_seconds(trainer, batches, params, args.repeats)
        print(
            f"{name}, batch size {count}, median per step, load average {os.getloadavg()[0]:.1f}:"
        )
        medians = {kind: np.median(values, axis=0) for kind, values in seconds.items()}
        for kind, (wall, cpu) in medians.items():
            print(f"    from {kind:9}  {1e3 * wall:9.1f} ms  {1e3 * cpu:9.1f} ms of CPU time")
        ratio = medians["images"] / medians["sequences"]
        print(f"    ratio           {ratio[0]:9.2f}     {ratio[1]:9.2f}", flush=True)


def step_seconds(trainer, batches, tokenizer_params, repeats: int):
    """{kind of batch: [(wall seconds, CPU seconds) of each step]}, without the compiling step.

    Kinds of batches alternate, so that other load on the machine affects all of them equally.
    """
    canvas_scale = np.ones(trainer.model.tokenizer.num_stages + 1, np.float32)
    inputs = {"tokenizer": tokenizer_params, "canvas_scale": canvas_scale}
    state = trainer.jit_init_state(jax.random.key(0), inputs)
    seconds = {kind: [] for kind in batches}
    for _ in range(1 + repeats):
        for kind, batch in batches.items():
            labels = np.arange(len(next(iter(batch.values()))), dtype=np.int32) % 10
            batch = sharding.global_batch({**batch, "label": labels}, trainer.mesh)
            wall, cpu = time.perf_counter(), time.process_time()
            state, metrics = trainer.jit_train_step(state, inputs, batch, jax.random.key(1))
            jax.block_until_ready((state, metrics))
            seconds[kind].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {kind: values[1:] for kind, values in seconds.items()}


if __name__ == "__main__":
    main()
