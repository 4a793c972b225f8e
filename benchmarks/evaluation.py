"""Time and memory of a generative model's metrics: `python -m benchmarks.evaluation`.

Random features of the published sizes: 50,000 samples x 2,048, compared with 10,000 images (the
ADM evaluator's reference file) and with 50,000; 1,008 class probabilities. Features are generated
before the clock starts. Each metric runs in its own process, so that the peak memory is its own,
including the features that it needs (390 MiB for 50,000 x 2,048). Two comparisons with the ADM
script follow.

CPU is the time of all cores: on two idle cores, the wall time is a little over half of it.
"""

import multiprocessing
import resource
import time

import numpy as np

from nvg_jax import evaluation

WIDTH, CLASSES = 2048, 1008


def features(count: int, seed: int) -> np.ndarray:
    """Features with 256 independent dimensions plus noise, nonnegative like Inception's."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((256, WIDTH), dtype=np.float32) / 16
    x = rng.standard_normal((count, 256), dtype=np.float32) @ mixing
    x += 0.1 * rng.standard_normal((count, WIDTH), dtype=np.float32)
    return np.maximum(x, 0, out=x)


def probabilities(count: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_exponential((count, CLASSES), dtype=np.float32) ** 4
    return x / x.sum(1, keepdims=True)


METRICS = {
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
    metric, arguments = METRICS[name]
    arguments = arguments()
    wall, cpu = time.perf_counter(), time.process_time()
    value = metric(*arguments)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    value = ", ".join(f"{x:.4f}" for x in np.atleast_1d(value))
    print(
        f"{name:38s} {wall:6.1f} s wall, {cpu:6.1f} s CPU, {peak:.2f} GiB peak; {value}", flush=True
    )


def in_float16(reference: np.ndarray, samples: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Precision and recall with every step of the distances rounded to float16."""
    half = lambda x: x.astype(np.float16).astype(np.float32)

    def distances(a, b):
        a, b = half(a), half(b)
        norms = half(np.square(a).sum(1))[:, None] + half(np.square(b).sum(1))
        return half(half(norms) - half(2 * (a @ b.T)))

    radius = lambda x: np.partition(distances(x, x), k, axis=1)[:, k]  # the nearest is itself
    between = distances(reference, samples)
    precise = (between <= radius(reference)[:, None]).any(0)
    recalled = (between <= radius(samples)).any(1)
    return precise.mean(), recalled.mean()


def print_differences():
    """Prints how our results differ from the ADM script's choices."""
    reference, samples = features(5_000, 1), features(5_000, 0)
    for name, function in (("float32", evaluation.precision_recall), ("float16", in_float16)):
        precision, recall = function(reference, samples)
        print(f"5,000 with 5,000, distances in {name}: {precision:.4f}, {recall:.4f}")
    # 50,000 samples of 1,000 classes, in class order and shuffled.
    rng = np.random.default_rng(0)
    order = rng.permutation(50_000)
    scores = rng.standard_normal((50_000, CLASSES), dtype=np.float32)
    scores[np.arange(50_000), np.arange(50_000) // 50] += 8
    own = np.exp(scores)
    own /= own.sum(1, keepdims=True)
    print(f"Inception Score by class: {evaluation.inception_score(own):.2f}, "
          f"shuffled: {evaluation.inception_score(own[order]):.2f}")  # fmt: skip


def main():
    context = multiprocessing.get_context("spawn")
    for name in METRICS:
        process = context.Process(target=measure, args=(name,))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{name} failed.")
    print_differences()


if __name__ == "__main__":
    main()
