"""The object that a notebook or a command line uses: sample, encode, decode, reconstruct."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from nvg_jax import granularity
from nvg_jax.content.model import ContentGenerator
from nvg_jax.models import GENERATORS, abstract_params, make_generator
from nvg_jax.runtime import checkpoint
from nvg_jax.runtime.files import storage_path
from nvg_jax.runtime.sharding import BATCH_SPEC, make_mesh
from nvg_jax.sampling import generate as sampling
from nvg_jax.structure.model import StructureGenerator
from nvg_jax.tokenizer import GranularitySequence, Tokenizer, TokenizerConfig

EXPORT_FOLDER = "pipeline"
TOKENIZER_META = ("tokenizer", "class_names", "canvas_scale", "hash")  # what generators build on


class Output(NamedTuple):
    """What sampling gives.

    images: float32 (B, H, W, 3) in [-1, 1]. sequence: maps and tokens int32 (B, S, L).
    canvases: float32 (B, S, L, D), after each stage.
    """

    images: np.ndarray
    sequence: GranularitySequence
    canvases: np.ndarray


def generate_batch(
    params,
    canvas_scale,
    class_ids,
    keys,
    noise,
    values,
    given,
    *,
    program: sampling.Program,
    tokenizer: Tokenizer,
    content: ContentGenerator,
    structure: StructureGenerator,
):
    """The whole generation of a batch as one function to compile; see `sampling.generate`.

    Args:
        params: {"tokenizer", "content", "structure"}.

    Returns:
        (images float32 (B, H, W, 3), GranularitySequence, canvases float32 (B, S, L, D)).
    """
    num_bits = noise.shape[-1]
    length = noise.shape[1]

    def logits(canvas, labels, stage, classes):
        stages = jnp.full(classes.shape, stage)
        embedding = granularity.structure_embedding(labels, stage, num_bits)
        apply = functools.partial(content.apply, {"params": params["content"]})
        final, _ = apply(canvas, embedding, stages, classes, canvas_scale, method="predict_canvas")
        missing = granularity.cluster_means(final - canvas, labels, length)
        return apply(missing, method="token_logits")

    def velocity(z, time, labels, canvas, stage, classes):
        return structure.apply(
            {"params": params["structure"]},
            z,
            jnp.full(classes.shape, time),
            granularity.structure_embedding(labels, stage, num_bits),
            canvas,
            jnp.full(classes.shape, stage),
            classes,
        )

    apply = functools.partial(tokenizer.apply, {"params": params["tokenizer"]})
    networks = sampling.Networks(
        logits=logits,
        velocity=velocity,
        add_stage=functools.partial(apply, method="add_stage"),
        null_id=content.num_classes,
        latent_dim=tokenizer.config.latent_dim,
    )
    sequence, canvases = sampling.generate(networks, class_ids, keys, noise, program, values, given)
    return apply(canvases[:, -1], method="decode"), sequence, canvases


class Pipeline:
    """A tokenizer and, for sampling, its content and structure generator.

    Attributes:
        meta: everything the folder says of itself: sizes, class names, canvas scales, settings.
        class_names: the name of every class.
        settings: the folder's recommended sampling settings.
    """

    def __init__(self, meta: dict[str, Any], params: dict[str, Any]):
        """
        Args:
            meta: {"tokenizer": sizes, "class_names", "canvas_scale", "content": sizes,
                "structure": sizes, "sampling": settings}, JSON-able; a tokenizer alone needs only
                the first two.
            params: {"tokenizer": tree, "content": tree, "structure": tree}.
        """
        self.meta = meta
        self.class_names = tuple(meta["class_names"])
        self.settings = sampling.Settings.from_dict(meta.get("sampling", {}))
        self.tokenizer = Tokenizer(TokenizerConfig(**meta["tokenizer"]))
        # All local devices share the batch; the parameters are on each of them.
        self._mesh = make_mesh(devices=jax.local_devices())
        self.params = params
        self._apply = jax.jit(
            lambda params, *args, method: self.tokenizer.apply(
                {"params": params}, *args, method=method
            ),
            static_argnames="method",
        )
        if self.can_sample:
            generators = {
                name: make_generator(name, meta[name], self.tokenizer.config, len(self.class_names))
                for name in GENERATORS
            }
            self._generate = jax.jit(
                functools.partial(generate_batch, tokenizer=self.tokenizer, **generators),
                static_argnames="program",
            )

    @property
    def params(self) -> dict[str, Any]:
        """The weights: {"tokenizer": tree} and, to sample, "content" and "structure"."""
        return self._params

    @params.setter
    def params(self, params: dict[str, Any]):
        self._params = jax.device_put(params, NamedSharding(self._mesh, PartitionSpec()))

    @property
    def can_sample(self) -> bool:
        return all(name in self.params for name in GENERATORS)

    def check_can_sample(self):
        """Raises ValueError if the folder lacks a generator, with what to do."""
        if not self.can_sample:
            missing = [name for name in GENERATORS if name not in self.params]
            raise ValueError(
                f"This folder has no {' and no '.join(missing)} generator yet, so it cannot "
                "sample; train with --config.part=generators (or all), or convert one."
            )

    def class_id(self, name: int | str) -> int:
        """The id of a class given by its name or its id, which may be a string.

        Raises:
            ValueError: there is no such class.
        """
        count = len(self.class_names)
        if name in self.class_names:
            return self.class_names.index(name)
        if isinstance(name, str) and name.isdecimal():
            name = int(name)
        if isinstance(name, (int, np.integer)) and 0 <= name < count:
            return int(name)
        raise ValueError(
            f"Unknown class {name!r}: this model has the classes 0 to {count - 1} "
            f"({', '.join(self.class_names[:10])}{', ...' if count > 10 else ''})."
        )

    # Reading and writing.

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> "Pipeline":
        """Opens a workdir, or a folder that `save_pretrained` or a conversion wrote.

        Raises:
            ValueError: there is no such folder, or no model in it.
        """
        folder = storage_path(folder)
        found = checkpoint.read(
            folder / EXPORT_FOLDER,
            lambda meta: {
                name: abstract_params(meta, name)
                for name in ("tokenizer", *GENERATORS)
                if name in meta
            },
        )
        return cls(*found) if found else cls.from_workdir(folder)

    @classmethod
    def from_workdir(cls, workdir: str | os.PathLike) -> "Pipeline":
        """Opens the latest checkpoints of a training run: raw tokenizer, averaged generators.

        The tokenizer is the workdir's own, or the one that its generators say they used.

        Raises:
            ValueError: no such folder, no tokenizer to be found, or a generator that was trained
                with another tokenizer.
        """
        workdir = storage_path(workdir)
        if not workdir.is_dir():
            raise ValueError(
                f"There is no folder {workdir}. Give the --workdir of a training run, or a folder "
                "that was exported or converted."
            )
        runs = {}
        for run in (workdir / "generators", *(workdir / name for name in GENERATORS)):
            run_meta = checkpoint.read_meta(run)
            for name in GENERATORS:
                if run_meta is None or name not in run_meta:
                    continue
                if name in runs:
                    raise ValueError(
                        f"{workdir} holds two {name} generators, in {runs[name][0].name}/ and in "
                        f"{run.name}/. Move the one you do not want to another folder."
                    )
                runs[name] = run, run_meta
        tokenizer = find_tokenizer(
            workdir, *(meta["tokenizer_workdir"] for _, meta in runs.values())
        )
        found = checkpoint.read(tokenizer, lambda m: {"params": abstract_params(m, "tokenizer")})
        if found is None:
            raise ValueError(
                f"{workdir} holds no trained tokenizer. Train one with `python -m nvg_jax.train "
                f"--config=... --workdir={workdir}`."
            )
        meta = {key: found[0][key] for key in (*TOKENIZER_META, "config")}
        if runs and meta["hash"] is None:
            raise ValueError(
                f"The tokenizer in {tokenizer} stands at step {found[0]['step']}, before the end "
                "of its training, and the generators need the finished one. Put back a copy of "
                "its last checkpoint, or let `python -m nvg_jax.train` finish it."
            )
        params = {"tokenizer": found[1]["params"]}
        for name, (run, run_meta) in runs.items():
            check_tokenizer(run_meta, meta, run)
            run_meta, part = checkpoint.read(
                run, lambda m: {name: {"ema_params": abstract_params(m, name)}}
            )
            meta |= {key: run_meta[key] for key in (name, "sampling", "step")}
            params[name] = part[name]["ema_params"]
        return cls(meta, params)

    def save_pretrained(self, folder: str | os.PathLike):
        """Writes everything to a folder for `from_pretrained`; an earlier export is replaced.

        Raises:
            ValueError: the folder is a training run's, whose checkpoints the export would hide.
        """
        folder = storage_path(folder)
        if any((folder / run).is_dir() for run in ("tokenizer", "generators", *GENERATORS)):
            raise ValueError(f"{folder} holds a training run; export to another folder.")
        folder = folder / EXPORT_FOLDER
        if folder.exists():
            folder.rmtree()
        checkpoints = checkpoint.Checkpoints(folder)
        checkpoints.save(0, self.params, self.meta)
        checkpoints.close()

    # Images and sequences.

    def encode(self, images) -> GranularitySequence:
        """The visual granularity sequences of images.

        Args:
            images: uint8, or float in [-1, 1], (B, H, W, 3).

        Returns:
            A GranularitySequence of .structure and .tokens, int32 (B, S, L): the cluster of, and
            the token id at, every position in every stage.

        Raises:
            ValueError: another shape, type or range.
        """
        return jax.device_get(self._tokenize(self._check_images(images), method="encode").sequence)

    def decode(self, sequence: GranularitySequence) -> np.ndarray:
        """The images of sequences, float32 (B, H, W, 3) in [-1, 1].

        Raises:
            ValueError: maps that do not split every parent in half, token ids outside the
                codebook, tokens that differ within a cluster, or other shapes.
        """
        sequence = self._check_sequence(sequence)
        canvases = self._tokenize(sequence, method="canvases")
        return self.decode_canvas(canvases[:, -1])

    def decode_canvas(self, canvas) -> np.ndarray:
        """The images of canvases (B, L, D) after any stage, float32 (B, H, W, 3) in [-1, 1]."""
        return np.asarray(self._tokenize(jnp.asarray(canvas), method="decode"))

    def reconstruct(self, images) -> np.ndarray:
        """Images through the tokenizer and back, float32 (B, H, W, 3) in [-1, 1]."""
        return self.decode(self.encode(images))

    # Sampling.

    def sample(
        self,
        class_ids: Sequence[int | str],
        seed: int = 0,
        structure_noise=None,
        temperature: float | None = None,
        top_k=None,
        top_p=None,
        content_guidance=None,
        structure_guidance=None,
        flow_steps: int | None = None,
        gumbel: bool | None = None,
        *,
        first_index: int = 0,
        given: GranularitySequence | None = None,
        given_tokens: int = 0,
        given_structure: int = 0,
    ) -> Output:
        """Generates an image for each class id.

        A sample depends on the seed and its index (first_index + its place in class_ids) alone,
        not on the batch it is in. What is None is taken from the folder's own settings, which are
        those of `sampling.Settings` where the folder has none.

        Args:
            class_ids: ids in 0 .. number of classes - 1, or class names.
            seed: of all randomness.
            structure_noise: float32 (B, L, K), the noise every stage's flow starts from; drawn
                from the seed if None.
            temperature: 0 takes the most likely token.
            top_k, top_p, content_guidance, structure_guidance: a number, a (start, end) pair or S
                values; top_k 0, top_p 1 and guidance 1 are off.
            flow_steps: Euler steps of a split.
            gumbel: draw the splits at random instead of taking the larger half.
            given: a sequence (B, S, L) of which the maps of the first `given_structure` stages
                and the tokens of the first `given_tokens` stages are kept; the rest is generated.

        Raises:
            ValueError: anything out of range, with what would do.
        """
        self.check_can_sample()
        ids = np.array([self.class_id(c) for c in class_ids], np.int32)
        if ids.size == 0:
            raise ValueError("class_ids is empty; give at least one class.")
        chosen = dict(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            content_guidance=content_guidance,
            structure_guidance=structure_guidance,
            flow_steps=flow_steps,
            gumbel=gumbel,
        )
        config = self.tokenizer.config
        settings = dataclasses.replace(
            self.settings, **{k: v for k, v in chosen.items() if v is not None}
        ).expand(config.num_stages, config.codebook_size)
        shape = (len(ids), config.num_stages, config.num_positions)
        if given is None:
            if given_tokens or given_structure:
                raise ValueError("given_tokens and given_structure need a `given` sequence.")
            given = GranularitySequence(np.zeros(shape, np.int32), np.zeros(shape, np.int32))
        else:
            given = self._check_given(given, shape, given_tokens, given_structure)
        keys = sample_keys(seed, first_index + np.arange(len(ids)))
        noise_keys, keys = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
        noise_shape = (config.num_positions, config.num_stages - 1)
        if structure_noise is None:
            structure_noise = jax.vmap(lambda key: jax.random.normal(key, noise_shape))(noise_keys)
        structure_noise = jnp.asarray(structure_noise, jnp.float32)
        if structure_noise.shape != (len(ids), *noise_shape):
            raise ValueError(
                f"structure_noise must have the shape {(len(ids), *noise_shape)}, got "
                f"{structure_noise.shape}."
            )
        values = {
            name: jnp.asarray(getattr(settings, name))
            for name in (
                "temperature", "top_k", "top_p", "content_guidance", "structure_guidance"
            )
        }  # fmt: skip
        program = sampling.make_program(settings, given_tokens, given_structure)
        batch = self._place((ids, keys, structure_noise, given))
        with jax.set_mesh(self._mesh):
            out = self._generate(
                self.params,
                jnp.asarray(self.meta["canvas_scale"], jnp.float32),
                *batch[:3],
                values,
                batch[3],
                program=program,
            )
        images, sequence, canvases = jax.device_get(out)
        count = len(ids)
        return Output(
            images[:count],
            GranularitySequence(sequence.structure[:count], sequence.tokens[:count]),
            canvases[:count],
        )

    # Checks and placement.

    def _place(self, tree):
        """Fills the batch up to a multiple of the devices and splits it over them."""
        devices, split = self._mesh.size, NamedSharding(self._mesh, BATCH_SPEC)

        def place(x):
            x = jnp.asarray(x)
            missing = -len(x) % devices
            if missing:
                x = jnp.concatenate([x, jnp.repeat(x[-1:], missing, axis=0)])
            return jax.device_put(x, split)

        return jax.tree.map(place, tree)

    def _tokenize(self, batch, method: str):
        """Runs a method of the tokenizer on a batch over all devices."""
        count = len(jax.tree.leaves(batch)[0])
        with jax.set_mesh(self._mesh):
            out = self._apply(self.params["tokenizer"], self._place(batch), method=method)
        if method == "encode":
            return out._replace(sequence=jax.tree.map(lambda x: x[:count], out.sequence))
        return out[:count]

    def _check_images(self, images) -> jax.Array:
        images = np.asarray(images)
        expected = (*self.tokenizer.config.image_size, 3)
        if images.ndim != 4 or images.shape[1:] != expected or len(images) == 0:
            raise ValueError(
                f"Images must have the shape (batch, {', '.join(map(str, expected))}), got "
                f"{images.shape}."
            )
        if images.dtype == np.uint8:
            return jnp.asarray(images, jnp.float32) / 127.5 - 1
        if not np.issubdtype(images.dtype, np.floating):
            raise ValueError(f"Images must be uint8, or float in [-1, 1]; got {images.dtype}.")
        if not (np.abs(images) <= 1 + 1e-6).all():
            raise ValueError(
                "Float images must be in [-1, 1] (x / 127.5 - 1 of uint8 values), got values in "
                f"[{images.min()}, {images.max()}]."
            )
        return jnp.asarray(images, jnp.float32)

    def _check_sequence(self, sequence: GranularitySequence) -> GranularitySequence:
        structure, tokens = (np.asarray(part) for part in sequence)
        config = self.tokenizer.config
        expected = (len(structure), config.num_stages, config.num_positions)
        for name, part in (("structure", structure), ("tokens", tokens)):
            if part.shape != expected or not np.issubdtype(part.dtype, np.integer):
                raise ValueError(
                    f"sequence.{name} must be integers of shape (batch, {expected[1]}, "
                    f"{expected[2]}), got {part.dtype} {part.shape}."
                )
        self._check_structure(structure)
        self._check_tokens(structure, tokens)
        return GranularitySequence(
            jnp.asarray(structure, jnp.int32), jnp.asarray(tokens, jnp.int32)
        )

    def _check_structure(self, structure: np.ndarray):
        for stage in range(structure.shape[1]):
            size = structure.shape[2] >> stage
            even = np.sort(structure[:, stage]) == np.arange(structure.shape[2]) // size
            split = stage == 0 or (structure[:, stage] // 2 == structure[:, stage - 1]).all()
            if not (even.all() and split):
                raise ValueError(
                    f"The structure map of stage {stage} must use each label 0 .. "
                    f"{2**stage - 1} at exactly {size} positions and split every cluster j of the "
                    "stage before into 2j and 2j+1."
                )

    def _check_tokens(self, structure: np.ndarray, tokens: np.ndarray):
        size = self.tokenizer.config.codebook_size
        if tokens.size and not (0 <= tokens.min() and tokens.max() < size):
            raise ValueError(
                f"Token ids must be in 0 .. {size - 1}, got {tokens.min()} .. {tokens.max()}."
            )
        for stage in range(tokens.shape[1]):
            first = np.zeros((len(tokens), 2**stage), np.int64)
            np.put_along_axis(first, structure[:, stage], tokens[:, stage], axis=1)
            shared = np.take_along_axis(first, structure[:, stage], axis=1)
            if (shared != tokens[:, stage]).any():
                raise ValueError(
                    f"The tokens of stage {stage} differ within a cluster; all positions of a "
                    "cluster must hold the same token id."
                )

    def _check_given(
        self,
        given: GranularitySequence,
        shape: tuple[int, ...],
        given_tokens: int,
        given_structure: int,
    ) -> GranularitySequence:
        structure, tokens = (np.asarray(part) for part in given)
        if structure.shape != shape or tokens.shape != shape:
            raise ValueError(
                f"given.structure and given.tokens must have the shape {shape} (one for each "
                f"class id), got {structure.shape} and {tokens.shape}."
            )
        for name, count in (("given_tokens", given_tokens), ("given_structure", given_structure)):
            if not 0 <= count <= shape[1]:
                raise ValueError(f"{name} must be in 0 .. {shape[1]} (stages), got {count}.")
        if given_tokens > max(given_structure, 1):
            raise ValueError(
                f"The tokens of {given_tokens} stages need their maps: give at least "
                f"given_structure={given_tokens}."
            )
        self._check_structure(structure[:, :given_structure])
        self._check_tokens(structure[:, :given_tokens], tokens[:, :given_tokens])
        return GranularitySequence(structure.astype(np.int32), tokens.astype(np.int32))


def sample_keys(seed: int, indices: np.ndarray):
    """One random key for each sample index; sample i of a seed is always the same."""
    fold = lambda index: jax.random.fold_in(jax.random.key(seed), index)
    return jax.vmap(fold)(jnp.asarray(indices, jnp.uint32))


def find_tokenizer(workdir: epath.Path, *elsewhere: str) -> epath.Path:
    """The folder of the tokenizer's run: in the workdir, else in one of the workdirs elsewhere."""
    for folder in (workdir, *map(storage_path, elsewhere)):
        if (folder / "tokenizer").is_dir():
            return folder / "tokenizer"
    return workdir / "tokenizer"


def check_tokenizer(run_meta: dict[str, Any], tokenizer_meta: dict[str, Any], run: epath.Path):
    """Raises ValueError if a generator's run used another tokenizer than the one beside it."""
    if run_meta["hash"] != tokenizer_meta["hash"]:
        raise ValueError(
            f"The generator in {run} was trained with another tokenizer (weights "
            f"{run_meta['hash']}) than the one beside it ({tokenizer_meta['hash']}). Train it "
            "again with this tokenizer, or put its own tokenizer back."
        )
