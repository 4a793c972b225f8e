"""Everything worth measuring on a GPU, in order of value, within some minutes.

    python -m benchmarks.gpu_suite --out=gpu --data_dir=data/emoji
    python -m benchmarks.gpu_suite --out=tiny --data_dir=data/emoji --tiny    # commands, on a CPU

Run it again to go on with what has no result yet; `timed` says what OUT holds. The generators that
it trains are exported to OUT/emoji.
"""

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.timed import Entry, run_all


def entries(args: argparse.Namespace) -> Iterator[Entry]:
    tiny = args.tiny

    def d16(module: str, batch: int) -> str:
        size = f"d16 --batch_size={batch} --rounds=3"
        if tiny:
            size = f"d16,runlocal --batch_size={min(batch, 2)} --rounds=1"
        return f"python -m benchmarks.{module} --config=configs/imagenet256.py:{size}"

    # (a) Sampling, with random weights. A student is a structure generator without guidance.
    steps = "--config.sampling.flow_steps"
    alone = "--config.sampling.structure_guidance='(1.0,1.0)'"
    samplers = {
        "published": "",
        "one_solve": f"{steps}=4 --config.sampling.structure_solves='(0,)'",
        "student_4": f"{steps}=4 {alone}",
        "student_1": f"{steps}=1 {alone}",
    }
    for name, flags in samplers.items():
        for batch in (64, 1):
            command = f"{d16('programs', batch)} --program=sample {flags}"
            yield Entry(f"sample_{name}_{batch}", command)

    # (b) Generators of emoji. The learning rate is constant, so that training may end at any step.
    sequences, run = args.sequences or args.work / "sequences", args.work / "emoji"
    meta = f"{sequences}/meta.json"
    if not os.path.exists(meta):
        encode = f"--data_dir='{args.data_dir}' --out='{sequences}' --crops={1 if tiny else 4}"
        command = f"python -m nvg_jax.encode --workdir=emoji_tokenizer --num_threads=4 {encode}"
        yield Entry("emoji_encode", command, limit=240, needs=f"{args.data_dir}/")
    recipe = "--config.generator_training"
    command = f"""python -m nvg_jax.train --config=configs/emoji.py --workdir='{run}'
        --config.part=generators --config.tokenizer_workdir=emoji_tokenizer
        --config.data.name=sequences --config.data.data_dir='{sequences}'
        {recipe}.optimizer.schedule=constant {recipe}.optimizer.ema_decay=0.999 """
    if tiny:
        command += f"""{recipe}.length='2 steps' {recipe}.batch_size=4 {recipe}.eval_images=4
            --config.content.depth=1 --config.structure.depth=1 {steps}=1"""
    else:
        command += f"""{recipe}.batch_size=128 {recipe}.optimizer.learning_rate=2e-3
            {recipe}.save_every=500 {recipe}.eval_every=1000
            --config.dtype=bfloat16 --config.data.num_workers=4"""
    yield Entry("emoji_train", command, 120, 360, meta, keep=40)
    command = (
        f"python -m nvg_jax.convert --workdir='{run}' --out='{args.out}/emoji' --dtype=float16"
    )
    yield Entry("emoji_export", command, 20, 60, f"{run}/generators")

    # (c) One image: its products are joint by default, and starting kernels is what takes the time.
    sample = f"{d16('programs', 1)} --program=sample"
    loops = "env XLA_FLAGS=--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL"
    yield Entry("sample_separate_1", f"{sample} --linears=separate")
    for name in ("published", "one_solve"):
        yield Entry(f"sample_{name}_command_buffers_1", f"{loops} {sample} {samplers[name]}")

    # (d) Compiled PyTorch.
    half = "XLA_CLIENT_MEM_FRACTION=0.5 PYTHONWARNINGS=ignore"
    flags = "--torch_compile --config.content.remat=none --config.structure.remat=none"
    flags += "" if tiny else " --dtype=bfloat16"
    samples = "structure guided", "content guided", "decoder"
    gradients = "structure gradient", "content gradient"
    for name, batch, rows in (
        ("samples", 64, samples),
        ("samples", 1, samples),
        ("gradients", 64, gradients),
    ):
        command = f"env {half} {d16('against_torch', batch)} {flags}"
        command += "".join(f" --rows='{row}'" for row in (rows[:1] if tiny else rows))
        yield Entry(f"torch_{name}_{batch}", command, 90, 300, "torch")

    # (e) A training step, with the attention of tokamax and with quantized products.
    step = d16("programs", 96)
    yield Entry("train", step, 90, 200)
    yield Entry("train_tokamax", f"{step} --attention=tokamax", 90, 200, "tokamax")
    command = "python -m benchmarks.attention --against=tokamax --dtypes=bfloat16"
    command += " --batch_size=1 --lengths=17 --rounds=1" if tiny else ""
    yield Entry("attention_tokamax", command, needs="tokamax")
    for kind in ("int8", "fp8"):
        yield Entry(f"train_{kind}", f"{step} --products={kind}", 90, 200, "qwix")

    # (f) Parity.
    command = f"env TEST_PLATFORM={'cpu' if tiny else 'cuda,cpu'} python -m pytest -q -W default"
    some = "-k 'time_embedding or schedule'" if tiny else ""
    yield Entry("parity", f"{command} tests/test_parity.py {some}", 90, 400, "pytest")


def main():
    parser = argparse.ArgumentParser(description="Measures a GPU within some minutes.")
    parser.add_argument("--out", type=Path, required=True, help="results, logs and the export")
    parser.add_argument("--work", type=Path, help="checkpoints and caches; by default OUT/work")
    parser.add_argument("--data_dir", type=Path, default=Path("data/emoji"), help="docs/data.md")
    parser.add_argument(
        "--sequences", type=Path, help="what nvg_jax.encode wrote before, if it did"
    )
    parser.add_argument("--minutes", type=float, default=12, help="in all")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, for a CPU")
    args = parser.parse_args()
    args.work = args.work or args.out / "work"
    for name in ("out", "work", "data_dir", "sequences"):  # the commands run in another folder
        if path := getattr(args, name):
            setattr(args, name, path.resolve())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # and the running entry with it
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{args.work}/compiled")
    if args.tiny:
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
    slower = 5 if args.tiny else 1
    chosen = (entry._replace(limit=slower * entry.limit) for entry in entries(args))
    run_all(chosen, args.out, args.minutes)


if __name__ == "__main__":
    main()
