"""The object that a notebook or a command uses: sample, encode, decode, reconstruct."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from nvg_jax import bundled, granularity, hub, workdir
from nvg_jax.data.sources import composed
from nvg_jax.data.transforms import decode
from nvg_jax.errors import UserError, did_you_mean, listed
from nvg_jax.evaluation.image import to_float
from nvg_jax.metadata import RunMetadata, read_model_metadata
from nvg_jax.models import check_networks, generators_for, parameter_counts
from nvg_jax.parts import GENERATORS
from nvg_jax.runtime.hardware import fast_dtype, usual_options
from nvg_jax.runtime.sharding import local_batch, local_mesh, replicated
from nvg_jax.runtime.storage import fingerprint
from nvg_jax.sampling.generate import SampleRequests
from nvg_jax.sampling.networks import sampling_program
from nvg_jax.sampling.settings import (
    MAX_SEED,
    Settings,
    as_array,
    check_dtype,
    check_finite,
    check_integer,
    is_integer,
    scalar,
)
from nvg_jax.tokenizer import GranularitySequence, Tokenizer


class SampleOutput(NamedTuple):
    """Samples.

    images: float32 (B, H, W, 3) in [-1, 1]. sequence: maps and tokens, int32 (B, S, L) each.
    canvases: float32 (B, S, L, D) after each stage if requested, else None.
    """

    images: np.ndarray
    sequence: GranularitySequence
    canvases: np.ndarray | None = None


def first_rows(tree: Any, count: int) -> Any:
    """The first rows of every array on the host, as arrays that a notebook may change."""
    return jax.tree.map(lambda x: np.array(x[:count]), jax.device_get(tree))


class _TracedError(UserError):
    """A pipeline is used inside jax.jit, grad or vmap."""

    def __init__(self):
        super().__init__(
            "A pipeline checks values and returns NumPy arrays: call it outside of jax.jit, "
            "jax.grad and jax.vmap. Inside, use the networks: `metadata.model` makes them, and "
            "`params` are their weights."
        )


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Around a call: a notebook's options count for nothing, and JAX must not trace it.

    Raises:
        UserError: it is called inside jax.jit, grad or vmap.
    """
    try:
        with usual_options():
            yield
    except jax.errors.JAXTypeError as error:
        raise _TracedError() from error


class Pipeline(hub.Storable):
    """A tokenizer and, for sampling, its content and structure generators.

    Attributes:
        metadata: what the folder says about its model: sizes, class names, canvas scales, settings.
        class_names: the name of every class, read-only.
        settings: the sampling settings; at first, those that the folder recommends.
        dtype: the dtype in which sampling and decoding are computed, read-only.
        tokenizer: the tokenizer module; its `config` has all sizes.
        program: the compiled sampler.
    """

    def __init__(self, metadata: RunMetadata, params: dict[str, Any], dtype: str | None = None):
        """
        Args:
            params: {"tokenizer": tree} and, to sample, "content" and "structure".
            dtype: "float32", "bfloat16" or "float16"; None chooses by device, see
                `from_pretrained`.
        """
        if dtype is not None:
            check_dtype(dtype)
        self._dtype = dtype or fast_dtype()
        self.metadata = metadata
        self.tokenizer = dataclasses.replace(metadata.model, dtype="float32").make_tokenizer()
        model = dataclasses.replace(metadata.model, dtype=self.dtype)
        self._decoder = model.make_tokenizer()
        # All local devices share the batch; the parameters are replicated on each of them.
        self._mesh = local_mesh()
        self._params = jax.device_put(params, replicated(self._mesh))
        self.program = sampling_program(model)

    def __reduce__(self):
        return Pipeline, (self.metadata, jax.device_get(self.params), self.dtype)

    def __repr__(self) -> str:
        tokenizer, classes = self.tokenizer.config, self.class_names
        sizes = lambda pair: " x ".join(map(str, pair))
        counts = parameter_counts(self.params)
        networks = [name for name in self.metadata.model.networks if name in counts]
        lines = [
            f"images: {sizes(tokenizer.image_size)} pixels, latents {sizes(tokenizer.latent_size)} "
            f"in {tokenizer.num_stages} stages, {tokenizer.codebook_size:,} codes",
            "parameters: " + ", ".join(f"{name} {counts[name]:,}" for name in networks),
            f"classes: {len(classes):,} ({listed(classes, 5)})",
            f"settings: {self.settings}" if self.can_sample else "no generators: cannot sample",
            f"computes in {self.dtype} on {self._mesh.size} x {jax.local_devices()[0].device_kind}",
        ]
        return "\n  ".join(["Pipeline", *lines])

    @property
    def dtype(self) -> str:
        return self._dtype

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.metadata.class_names

    @property
    def settings(self) -> Settings:
        """The sampling settings; `sample` and `save_pretrained` use those that are assigned."""
        return self.metadata.sampling

    @settings.setter
    def settings(self, settings: Settings):
        if not isinstance(settings, Settings):
            raise UserError(f"settings must be nvg_jax.sampling.Settings, got {settings!r}.")
        self.metadata.expand_settings(settings)
        self.metadata = self.metadata.replace(sampling=settings, fid=None)

    @property
    def params(self) -> dict[str, Any]:
        """The weights: {"tokenizer": tree} and, to sample, "content" and "structure".

        To change them, assign a whole tree: `fingerprint` is then computed anew.
        """
        return self._params

    @params.setter
    def params(self, params: dict[str, Any]):
        check_networks("This tree", params, ("tokenizer",), "Assign the weights of all networks.")
        self.__dict__.pop("fingerprint", None)
        self._params = jax.device_put(params, replicated(self._mesh))
        known = self.metadata.fingerprint and fingerprint(self._params["tokenizer"])
        self.metadata = self.metadata.replace(fingerprint=known, fid=None)

    @functools.cached_property
    def fingerprint(self) -> str:
        """The fingerprint of all parameters."""
        return fingerprint(self.params)

    @property
    def can_sample(self) -> bool:
        return all(name in self.params for name in generators_for(self.tokenizer.config))

    def check_can_sample(self):
        """Raises UserError if the folder lacks a generator."""
        needed = generators_for(self.tokenizer.config)
        part = "content" if "structure" not in needed else "generators (or all)"
        remedy = f"To sample, train with --config.part={part}, or convert one."
        check_networks("This folder", self.params, needed, remedy)

    def check_free_structure(self, wish: str):
        """Raises UserError if all samples have the same structure; so they cannot `wish`."""
        if self.tokenizer.config.fixed_structure is not None:
            raise UserError(
                "All samples of this model have the same structure (tokenizer.structure=grid): "
                f"they cannot {wish}."
            )

    @isolated()
    def class_id(self, name: int | str) -> int:
        """The id of a class given by its name or, if no class has that name, by its id.

        Raises:
            UserError: there is no such class.
        """
        names, count = self.class_names, len(self.class_names)
        name = scalar(name)
        if isinstance(name, str):
            name = composed(name)
            if name in names:
                return names.index(name)
            digits = name.removeprefix("id:")
            name = int(digits) if digits.isdecimal() and len(digits) < 20 else name
        if is_integer(name) and 0 <= name < count:
            return int(name)
        hint = did_you_mean(name, names) if isinstance(name, str) else ""
        raise UserError(
            f"Unknown class {name!r}.{hint} This model has the classes 0 to {count - 1} "
            f"({listed(names)})."
        )

    @isolated()
    def class_ids(self, classes: Iterable[int | str]) -> list[int]:
        """The ids of classes given by ids or by names.

        Ids may be strings: the strings of a list are all names or all ids. "id:3" is always an id.

        Raises:
            UserError: there is no such class, or strings that mean other classes as names than as
                ids.
        """
        if isinstance(classes, (np.ndarray, jax.Array)):
            classes = classes.tolist()
        if isinstance(classes, (str, bytes)) or not hasattr(classes, "__iter__"):
            raise UserError(
                f"class_ids must be a list of class ids or names, got {classes!r}; for one image "
                f"give [{classes!r}]."
            )
        given: list[Any] = [scalar(c) for c in classes]
        given = [composed(c) if isinstance(c, str) else c for c in given]
        ids = [self.class_id(c) for c in given]
        texts = [c for c in given if isinstance(c, str) and not c.startswith("id:")]
        as_names: dict[Any, int] = {
            c: self.class_names.index(c) for c in texts if c in self.class_names
        }
        as_ids: dict[Any, int] = {
            c: int(c) for c in texts if c.isdecimal() and int(c) < len(self.class_names)
        }
        readings = [found for found in (as_names, as_ids) if found.keys() == set(texts)]
        if not readings:
            raise UserError(
                f"The classes {', '.join(texts)} are names and ids; write id:3 for the class with "
                "the id 3."
            )
        if readings[0] != readings[-1]:
            raise UserError(
                f"The classes {', '.join(texts)} can be read as names and as ids, which mean other "
                "classes. Write id:3 for the class with the id 3."
            )
        return [readings[0].get(c, index) for c, index in zip(given, ids)]

    # Reading and writing.

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, dtype: str | None = None, *, revision: str | None = None
    ) -> "Pipeline":
        """Opens a workdir, an exported or converted folder, a bundled model, or one of a hub.

        From a workdir, the latest checkpoints are read: the raw weights of the tokenizer and the
        averaged weights of the generators.

        Args:
            folder: a path or, if no model is there, the name of a model in `bundled` or, if there
                is no such path, "org/name" on the Hugging Face hub (always: "hf://org/name").
            dtype: the dtype for sampling and decoding, "float32", "bfloat16" or "float16". The
                default is bfloat16, like the published sampler, on TPUs and on GPUs that support
                it, and float32 elsewhere; float16 is for GPUs older than those, such as a T4.
                Weights, normalizations, softmax, the integration of the flow, and all of encoding
                are float32 in any case.

            revision: on the hub, a branch, a tag or a commit.

        Raises:
            UserError: the folder does not exist or holds no model, its parts do not belong
                together, the hub does not give the model, or the dtype is invalid.
        """
        return cls(*workdir.read_model(folder, revision), dtype)

    @staticmethod
    def bundled() -> dict[str, str]:
        """{name: description} of the models that come with the package, for `from_pretrained`."""
        found = {name: read_model_metadata(bundled.FOLDER / name) for name in bundled.MODELS}
        return {name: f"{bundled.MODELS[name]} ({m.credits})" for name, m in found.items() if m}

    def load_lora(
        self, folder: str | os.PathLike, scale: float = 1.0, *, revision: str | None = None
    ) -> "Pipeline":
        """A model with low-rank adapters added to its generators; this one stays as it is.

        It has the adapters' classes: those that this model does not have start from the mean of its
        classes. At scale 0, all other weights are this model's, bit for bit.

        Args:
            folder: as for `Adapters.from_pretrained`.
            scale: what the adapters are multiplied by: 1 is what was trained.
            revision: on the hub, a branch, a tag or a commit.

        Raises:
            UserError: there are no adapters, or they were trained on another model.
        """
        scale = check_finite("The scale of adapters", scale)
        adapters = workdir.Adapters.from_pretrained(folder, revision=revision)
        generators = jax.device_get({k: self.params[k] for k in GENERATORS if k in self.params})
        added = workdir.add_adapters(
            self.metadata, generators, adapters.metadata, adapters.params, folder, scale
        )
        metadata = self.metadata.of_generators(adapters.metadata).replace(fid=None)
        return Pipeline(metadata, self.params | added, self.dtype)

    # Images and sequences.

    @isolated()
    def prepare(self, image) -> np.ndarray:
        """An image of any size as the model expects it, float32 (H, W, 3) in [-1, 1].

        It is resized and center-cropped as the images that the model was trained with were. An
        image that has the model's size already keeps its pixels.

        Args:
            image: a PIL image (integers of mode I are 16 bits, 0..65535), or uint8 (h, w) or
                (h, w, 3).

        Raises:
            UserError: an image of another shape or type.
        """
        if isinstance(image, Image.Image):
            if 0 in image.size:
                raise UserError(f"An image to prepare has no pixels: its size is {image.size}.")
        else:
            image = as_array(image)
            gray_or_rgb = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
            if image.dtype != np.uint8 or not gray_or_rgb or 0 in image.shape:
                raise UserError(
                    "An image to prepare must be a PIL image, or uint8 of shape (height, width) or "
                    f"(height, width, 3), got {image.dtype} {image.shape}."
                )
        image, transform = decode(image), self.metadata.transform
        if (image.height, image.width) == transform.image_size:
            return np.asarray(image).astype(np.float32) / 127.5 - 1
        return transform(image)

    @isolated()
    def encode(self, images) -> GranularitySequence:
        """The visual granularity sequences of images.

        Args:
            images: uint8, or float in [-1, 1], (B, H, W, 3).

        Returns:
            A GranularitySequence of .structure and .tokens, int32 (B, S, L): the cluster and the
            token id of every position in every stage.

        Raises:
            UserError: images of another shape, type or range.
        """
        return self._tokenize(self._check_images(images), method="encode")

    @isolated()
    def decode(self, sequence: GranularitySequence) -> np.ndarray:
        """The images of sequences, float32 (B, H, W, 3) in [-1, 1].

        Raises:
            UserError: maps that do not split every parent in half, token ids outside the
                codebook, tokens that differ within a cluster, or other shapes.
        """
        return self.decode_canvas(self.canvases(sequence)[:, -1])

    @isolated()
    def canvases(self, sequence: GranularitySequence) -> np.ndarray:
        """The canvases of sequences after each stage, float32 (B, S, L, D).

        Raises:
            UserError: same as for `decode`.
        """
        return self._tokenize(self._check_sequence(sequence, "sequence"), method="canvases")

    @isolated()
    def decode_canvas(self, canvas) -> np.ndarray:
        """The images of canvases (B, L, D) after any stage, float32 (B, H, W, 3) in [-1, 1].

        Raises:
            UserError: another shape, or values that are not finite.
        """
        config = self.tokenizer.config
        canvas = as_finite(canvas, "canvas", (None, config.num_positions, config.latent_dim))
        return self._tokenize(canvas, method="decode")

    @isolated()
    def reconstruct(self, images) -> np.ndarray:
        """Images through the tokenizer and back, float32 (B, H, W, 3) in [-1, 1]."""
        return self.decode(self.encode(images))

    # Sampling.

    @isolated()
    def sample(
        self,
        class_ids: Sequence[int | str] | np.ndarray | jax.Array,
        seed: int = 0,
        structure_noise=None,
        *,
        first_index: int = 0,
        prefix: GranularitySequence | None = None,
        structure_stages: int | None = None,
        token_stages: int | None = None,
        region=None,
        canvases: bool = False,
        **settings,
    ) -> SampleOutput:
        """Samples an image for each class id.

        A sample depends only on the seed and on its index (first_index + its position in
        class_ids), not on the batch it is in.

        Args:
            class_ids: ids in 0 .. number of classes - 1, or class names.
            seed: 0 .. 2**32 - 1.
            structure_noise: float32 (B, L, K), starting noise of every stage's flow; drawn from the
                seed by default, see the method `structure_noise`.
            first_index: the index of the first sample.
            prefix: a sequence (B, S, L). The maps of its first `structure_stages` stages and the
                tokens of its first `token_stages` stages are kept; the rest is sampled.
            region: bool (L,) or (B, L), the positions of the latent to sample; everywhere else, all
                maps and tokens of `prefix` are kept. `sampling.control.region_of_mask` makes it
                from a mask of pixels.
            canvases: whether to return the canvases too.
            settings: the fields of `nvg_jax.sampling.Settings`: temperature, top_k, top_p,
                content_guidance, structure_guidance, flow_steps, solver, flow_shift,
                structure_solves, flow_restart, gumbel. A setting that is missing or None takes its
                value in `settings`.

        Raises:
            UserError: an invalid argument; the message says what is valid.
            TypeError: an unknown setting.
        """
        self.check_can_sample()
        if prefix is not None and structure_stages is token_stages is region is None:
            raise UserError(
                "Nothing of prefix is kept: give structure_stages, token_stages or region."
            )
        structure_stages, token_stages = (
            0 if stages is None else stages for stages in (structure_stages, token_stages)
        )
        plan, values = self._plan(settings, structure_stages, token_stages, region is not None)
        ids, keys, noise = self._batch(class_ids, seed, structure_noise, first_index)
        count, region = len(ids), self._check_region(region, len(ids))
        prefix = self._check_prefix(prefix, count, structure_stages, token_stages, plan.region)
        requests = local_batch((ids, keys, noise, prefix, region), self._mesh)
        canvas_scale = np.asarray(self.metadata.canvas_scale, np.float32)
        with self._in_mesh():
            out = self.program.sample(
                self.params, canvas_scale, SampleRequests(*requests), values, plan=plan
            )
        out = SampleOutput(*first_rows(out, count))
        return out._replace(canvases=self.canvases(out.sequence)) if canvases else out

    def _plan(
        self, settings: dict[str, Any], structure_stages: int, token_stages: int, region: bool
    ):
        stages = self.tokenizer.config.num_stages
        structure_stages = check_integer("structure_stages", structure_stages, 0, stages)
        token_stages = check_integer("token_stages", token_stages, 0, stages)
        if token_stages > max(structure_stages, 1):
            raise UserError(
                f"The tokens of {token_stages} stages need their maps: give at least "
                f"structure_stages={token_stages}."
            )
        chosen = self.metadata.expand_settings(self.settings.updated(settings))
        return self.program.plan(chosen, structure_stages, token_stages, region)

    def _batch(self, class_ids, seed, structure_noise, first_index):
        """(ids, keys, noise) of a batch, checked."""
        ids = np.array(self.class_ids(class_ids), np.int32)
        if ids.size == 0:
            raise UserError("class_ids is empty; give at least one class.")
        noise, keys = self._randomness(seed, first_index, len(ids))
        if structure_noise is not None:
            noise = as_finite(structure_noise, "structure_noise", noise.shape)
        return ids, keys, noise

    @isolated()
    def structure_noise(self, seed: int = 0, count: int = 1, first_index: int = 0) -> np.ndarray:
        """The noise from which `sample` starts the structure flows: float32 (count, L, K)."""
        return np.array(self._randomness(seed, first_index, count)[0])

    def _randomness(self, seed: int, first_index: int, count: int):
        """(structure noise, keys) of `count` samples."""
        seed = check_integer("seed", seed, 0, MAX_SEED)
        count = check_integer("count", count, 1, MAX_SEED)
        first_index = check_integer("first_index", first_index, 0, MAX_SEED - count)
        keys = sample_keys(seed, first_index + np.arange(count))
        noise_keys, keys = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
        shape = self.tokenizer.config.num_positions, self.tokenizer.config.num_stages - 1
        return jax.vmap(lambda key: jax.random.normal(key, shape))(noise_keys), keys

    def _check_prefix(
        self,
        prefix: GranularitySequence | None,
        count: int,
        structure_stages: int,
        token_stages: int,
        region: bool,
    ) -> GranularitySequence:
        config = self.tokenizer.config
        shape, fixed = (count, config.num_stages, config.num_positions), config.fixed_structure
        if prefix is None:
            if token_stages or structure_stages or region:
                raise UserError(
                    "structure_stages, token_stages and region need a `prefix` sequence."
                )
            zeros = np.zeros(shape, np.int32)
            maps = zeros if fixed is None else np.broadcast_to(fixed, shape)
            return GranularitySequence(maps, zeros)
        if region:  # every stage is kept outside of it
            structure_stages = token_stages = config.num_stages
        structure_stages = max(structure_stages, 1)  # sampling always starts from the first map
        prefix = self._check_sequence(prefix, "prefix", count, structure_stages, token_stages)
        if fixed is None:
            return prefix
        if (prefix.structure[:, :structure_stages] != fixed[:structure_stages]).any():
            self.check_free_structure("follow other maps than those of images that it encodes")
        return prefix._replace(structure=np.broadcast_to(fixed, shape))

    def _check_region(self, region, count: int) -> np.ndarray:
        shape = (count, self.tokenizer.config.num_positions)
        if region is None:
            return np.zeros(shape, bool)
        region = as_array(region)
        if region.dtype != bool or region.shape not in (shape, shape[1:]):
            raise UserError(
                f"region must be bool of shape ({shape[1]},) or {shape}, True where to sample; got "
                f"{region.dtype} {region.shape}."
            )
        return np.broadcast_to(region, shape)

    # Calls of the tokenizer, and checks.

    def _in_mesh(self):
        """The context in which programs run; JAX refuses it inside of a traced function."""
        try:
            return jax.set_mesh(self._mesh)
        except ValueError as error:
            raise _TracedError() from error

    def _tokenize(self, batch, method: str):
        """Runs a method of the tokenizer on a batch over all devices; returns NumPy arrays."""
        count = len(jax.tree.leaves(batch)[0])
        with self._in_mesh():
            out = apply_tokenizer(
                self._decoder if method == "decode" else self.tokenizer,
                self.params["tokenizer"],
                local_batch(batch, self._mesh),
                method=method,
            )
        if method == "encode":
            out = out.sequence
        return first_rows(out, count)

    def _check_images(self, images) -> jax.Array:
        images = as_array(images)
        expected = (*self.tokenizer.config.image_size, 3)
        if images.ndim != 4 or images.shape[1:] != expected or len(images) == 0:
            single = images.shape == expected
            remedy = "`prepare` makes a picture of any size fit."
            raise UserError(
                f"Images must have the shape (batch, {', '.join(map(str, expected))}), got "
                f"{images.shape}. {'For one image give image[None].' if single else remedy}"
            )
        return jnp.asarray(to_float(images, slack=1e-6))

    def _check_sequence(
        self,
        sequence: GranularitySequence,
        name: str,
        count: int | None = None,
        structure_stages: int | None = None,
        token_stages: int | None = None,
    ) -> GranularitySequence:
        """Checks a sequence of `count` images (any number but 0 if None), of its first stages."""
        if not isinstance(sequence, (tuple, list)) or len(sequence) != 2:
            raise UserError(
                f"{name} must be a GranularitySequence, (structure, tokens), got "
                f"{type(sequence).__name__}."
            )
        config = self.tokenizer.config
        batch, parts = count or "batch", []
        for field, part in zip(GranularitySequence._fields, sequence):
            part = as_array(part)
            count = count or len(np.atleast_1d(part))
            expected = (count, config.num_stages, config.num_positions)
            if part.shape != expected or 0 in expected or part.dtype.kind not in "iu":
                raise UserError(
                    f"{name}.{field} must be integers of shape ({batch}, {expected[1]}, "
                    f"{expected[2]}), got {part.dtype} {part.shape}."
                )
            parts.append(part)
        structure, tokens = parts
        granularity.check_structure(structure[:, :structure_stages])
        granularity.check_tokens(
            structure[:, :token_stages], tokens[:, :token_stages], config.codebook_size
        )
        return GranularitySequence(structure.astype(np.int32), tokens.astype(np.int32))


@functools.partial(jax.jit, static_argnames=("tokenizer", "method"))
def apply_tokenizer(tokenizer: Tokenizer, params, batch, *, method: str):
    """Compiled once for all tokenizers of the same sizes and dtype."""
    return tokenizer.apply({"params": params}, batch, method=method)


def sample_keys(seed: int, indices: np.ndarray):
    """A random key for each sample index; sample i of a seed is always the same."""
    key = jax.random.wrap_key_data(jnp.array([0, seed], jnp.uint32), impl="threefry2x32")
    fold = lambda index: jax.random.fold_in(key, index)
    return jax.vmap(fold)(jnp.asarray(indices, jnp.uint32))


def as_finite(values, name: str, shape: tuple[int | None, ...]) -> jax.Array:
    """Values as float32 of the given shape, in which None stands for any size but 0.

    Raises:
        UserError: another shape, or values that are not numbers or not finite.
    """
    expected = f"({', '.join('batch' if n is None else str(n) for n in shape)})"
    try:
        values = np.asarray(values, np.float32)
    except jax.errors.JAXTypeError:  # traced, see `isolated`
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} must be numbers of shape {expected} ({error}).") from error
    fits = values.ndim == len(shape) and all(
        size == wanted or (wanted is None and size) for size, wanted in zip(values.shape, shape)
    )
    if not fits:
        raise UserError(f"{name} must have the shape {expected}, got {values.shape}.")
    if not np.isfinite(values).all():
        raise UserError(f"{name} must be finite, and has NaN or infinite values.")
    return jnp.asarray(values)
