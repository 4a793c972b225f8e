"""Time and memory of the figures of a generative model: `python -m benchmarks.evaluation`.

Random features of the published sizes: 50,000 samples x 2,048, compared with 10,000 images (the
ADM evaluator's reference file) and with 50,000; 1,008 class probabilities. Features are made
before the clock starts. Each figure runs in a process of its own, so that the peak memory is its
own, with the features that it needs (390 MiB for 50,000 x 2,048).

CPU is the time of all cores: on two idle cores the wall time is a little over half of it.
"""

import multiprocessing
import resource
import time

import numpy as np

from nvg_jax import evaluation

WIDTH, CLASSES = 2048, 1008


def features(count: int, seed: int) -> np.ndarray:
    """Not negative, as Inception's are; of 256 independent dimensions and noise."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((256, WIDTH), dtype=np.float32) / 16
    x = rng.standard_normal((count, 256), dtype=np.float32) @ mixing
    x += 0.1 * rng.standard_normal((count, WIDTH), dtype=np.float32)
    return np.maximum(x, 0, out=x)


def probabilities(count: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_exponential((count, CLASSES), dtype=np.float32) ** 4
    return x / x.sum(1, keepdims=True)


FIGURES = {
    "FID, 50,000 with 10,000": (
        evaluation.frechet_distance,
        lambda: (features(50_000, 0), features(10_000, 1)),
    ),
    "Inception Score, 50,000": (evaluation.inception_score, lambda: (probabilities(50_000, 0),)),
    "precision, recall, 10,000 with 50,000": (
        evaluation.precision_recall,
        lambda: (features(10_000, 1), features(50_000, 0)),
    ),
    "precision, recall, 50,000 with 50,000": (
        evaluation.precision_recall,
        lambda: (features(50_000, 1), features(50_000, 0)),
    ),
}


def measure(name: str):
    figure, arguments = FIGURES[name]
    arguments = arguments()
    wall, cpu = time.perf_counter(), time.process_time()
    value = figure(*arguments)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    value = ", ".join(f"{x:.4f}" for x in np.atleast_1d(value))
    print(
        f"{name:38s} {wall:6.1f} s wall, {cpu:6.1f} s CPU, {peak:.2f} GiB peak; {value}", flush=True
    )


def main():
    context = multiprocessing.get_context("spawn")
    for name in FIGURES:
        process = context.Process(target=measure, args=(name,))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{name} failed.")


if __name__ == "__main__":
    main()
