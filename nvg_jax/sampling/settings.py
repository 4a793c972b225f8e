"""The sampling settings. Each is fully defined by its field in `Settings`.

Command-line flags, checks, `Pipeline.sample`, descriptions of samples and the arguments of the
compiled sampler are derived from the fields. A new setting is added here, to `sampling` in
configs/common.py, to `LABELS` of the page and to docs/sampling.md, and read where it is used: as
`plan.settings.NAME` if it shapes the program (bool and str settings do: traced=False), as
`values["NAME"]` if it is traced, or as `x["NAME"]` inside a stage if it has a value for each.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, TypeGuard

import numpy as np
from jaxtyping import Float64

from nvg_jax.errors import UserError
from nvg_jax.structure.flow import SOLVERS

DTYPES = ("float32", "bfloat16", "float16")  # for sampling
TRAINING_DTYPES = ("float32", "bfloat16")  # gradients underflow in float16
MAX_STEPS = 10_000  # of a flow; a hundred are as good as any
MAX_SEED = 2**32 - 1  # largest seed of a random key without 64-bit mode


def check_dtype(dtype: str, choices: tuple[str, ...] = DTYPES):
    """Raises UserError unless the computation can be in `dtype`."""
    if not isinstance(dtype, str) or dtype not in choices:  # np.dtype equals its name
        raise UserError(f"dtype must be {' or '.join(choices)}, got {dtype!r}.")


def top_p_range(start: float, end: float, num_stages: int) -> Float64[np.ndarray, " stages"]:
    """Top-p of every stage: u_i = K ** (i / K) mapped linearly from (u_0, u_K) to (start, end)."""
    last = num_stages - 1
    u = np.float64(last) ** (np.arange(num_stages) / last)
    return end + (start - end) * (u[-1] - u) / (u[-1] - u[0])


def top_k_range(start: float, end: float, num_stages: int) -> Float64[np.ndarray, " stages"]:
    """Top-k of every stage, linear from `start` to `end` and rounded."""
    if (start == 0) != (end == 0):
        raise UserError(
            f"top_k cannot go from {start:g} to {end:g}: 0 keeps all tokens, so that a range would "
            f"pass through the smallest k. Give the codebook's size instead of 0, or {num_stages} "
            "values."
        )
    return np.round(np.linspace(start, end, num_stages))


@dataclasses.dataclass(frozen=True)
class Spec:
    """The facts about one setting.

    Attributes:
        help: one sentence for flags and documentation.
        kind: float, int, bool, str for one of `choices`, or tuple for distinct stages.
        allowed: the valid values in words, completing "must be ..."; "{V}" is the codebook size,
            "{last_split}" the last stage whose split is drawn by the flow.
        valid: (values float64 (...), codebook size) -> bool (...).
        per_stage: expands a (start, end) pair to one value per stage; None for a setting with one
            value for all stages.
        traced: True if the value is an argument of the compiled sampler, False if it shapes the
            program, so that every value compiles a new one.
    """

    help: str
    kind: type = float
    allowed: str = "finite"
    valid: Callable[[np.ndarray, int], np.ndarray] = lambda x, codebook_size: x == x
    per_stage: Callable[[float, float, int], np.ndarray] | None = None
    traced: bool = True
    choices: tuple[str, ...] = ()

    def parse(self, name: str, text: str):
        """Parses a text such as "8", "1,3.5" (one value per stage, or start, end) or "true".

        Raises:
            UserError: the text is not a value of this setting's kind.
        """
        if self.kind is bool:
            if text not in ("true", "false"):
                raise UserError(f"{name} takes true or false, got {text!r}.")
            return text == "true"
        try:
            if self.kind is tuple:
                return tuple(int(number) for number in text.split(",") if number)
            if self.per_stage is None:
                return self.kind(text)
            numbers = [float(number) for number in text.split(",")]
        except ValueError:
            what = "numbers" if self.per_stage or self.kind is float else "whole numbers"
            raise UserError(f"{name} takes {what}, got {text!r}.") from None
        return tuple(numbers) if len(numbers) > 1 else numbers[0]

    def expand(self, name: str, value, num_stages: int, codebook_size: int):
        """A checked value of `kind`, or a tuple of one per stage.

        Raises:
            UserError: a value of another type or outside the range, or the wrong number of values.
        """
        allowed = self.allowed.format(V=codebook_size, last_split=num_stages - 3)
        outside = UserError(f"{name} must be {allowed}, got {value!r}.")
        if self.kind is bool:
            if not isinstance(value, (bool, np.bool_)):
                raise outside
            return bool(value)
        if self.kind is str:
            if not isinstance(value, str) or value not in self.choices:
                raise outside
            return value
        if self.kind is tuple:
            stages = range(num_stages - 2)
            if not isinstance(value, (tuple, list)) or any(
                not is_integer(x) or x not in stages for x in value
            ):
                raise outside
            return tuple(sorted(map(int, set(value))))
        values = as_array(value)
        if values.dtype.kind not in "iuf" or not (abs(values) <= np.finfo(np.float32).max).all():
            raise UserError(f"{name} takes finite numbers, got {value!r}.")
        if self.per_stage is None and values.ndim:
            raise UserError(f"{name} takes one number for all stages, got {value!r}.")
        values = np.atleast_1d(values.astype(np.float64))
        if values.shape == (1,):
            values = np.repeat(values, num_stages)
        elif self.per_stage is not None and values.shape == (2,) and num_stages != 2:
            start, end = values
            values = self.per_stage(start, end, num_stages)
        if values.shape != (num_stages,):
            raise UserError(
                f"{name} takes a number, a (start, end) pair or {num_stages} values (one per "
                f"stage), got {value!r}."
            )
        if not self.valid(values, codebook_size).all():
            raise outside
        values = tuple(map(self.kind, values))
        return values[0] if self.per_stage is None else values


def as_array(values) -> np.ndarray:
    """Values as an array; a list of lists of different lengths as one of shape ()."""
    try:
        return np.asarray(values)
    except ValueError:
        return np.array(None)


def scalar(value):
    """A value, taken out of an array of NumPy or JAX that has no axes."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def is_integer(value) -> TypeGuard[int | np.integer]:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def check_integer(name: str, value, low: int, high: int) -> int:
    """The value as an int; raises UserError if it is not an integer in low .. high."""
    value = scalar(value)
    if not is_integer(value) or not low <= value <= high:
        raise UserError(f"{name} must be a whole number in {low} .. {high}, got {value!r}.")
    return int(value)


def check_finite(name: str, value) -> float:
    """The value as a float; raises UserError if it is not one finite number."""
    number = as_array(value)
    if number.ndim or number.dtype.kind not in "iuf" or not np.isfinite(number):
        raise UserError(f"{name} must be a finite number, got {value!r}.")
    return float(number)


def text_of(value) -> str:
    """A value as text for a flag: the inverse of `Spec.parse`, except that a bool is 0 or 1."""
    if isinstance(value, str):
        return value
    return ",".join(map(text_of, value)) if isinstance(value, tuple) else f"{value:.15g}"


def setting(default, help: str, **facts):
    return dataclasses.field(default=default, metadata={"spec": Spec(help, **facts)})


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to sample. The defaults sample from the model as it is, without guidance or filters.

    A per-stage setting takes a number, a (start, end) pair, or S values.
    """

    temperature: float = setting(
        1.0,
        "Temperature of the token logits; 0 takes the most likely token.",
        allowed="0, or at least 1e-6",
        valid=lambda x, codebook_size: (x == 0) | (x >= 1e-6),
    )
    top_k: int | tuple[int, ...] = setting(
        0,
        "Sample from the k most likely tokens; 0 keeps all.",
        kind=int,
        allowed="whole numbers from 0 (no filter) to the codebook's {V}",
        valid=lambda x, codebook_size: (x == np.round(x)) & (x >= 0) & (x <= codebook_size),
        per_stage=top_k_range,
    )
    top_p: float | tuple[float, ...] = setting(
        1.0,
        "Sample from the most likely tokens whose probabilities add up to p; 1 keeps all.",
        allowed="above 0 and at most 1",
        valid=lambda x, codebook_size: (x > 0) & (x <= 1),
        per_stage=top_p_range,
    )
    content_guidance: float | tuple[float, ...] = setting(
        1.0,
        "Classifier-free guidance scale of the token logits; 1 is off.",
        per_stage=np.linspace,
    )
    structure_guidance: float | tuple[float, ...] = setting(
        1.0,
        "Classifier-free guidance scale of the structure flow; 1 is off.",
        per_stage=np.linspace,
    )
    flow_steps: int = setting(
        25,
        "Steps of the structure flow for each split.",
        kind=int,
        allowed=f"a whole number from 1 to {MAX_STEPS}",
        valid=lambda x, codebook_size: (x == np.round(x)) & (x >= 1) & (x <= MAX_STEPS),
        traced=False,
    )
    solver: str = setting(
        "euler",
        "How the structure flow is integrated; heun evaluates the network twice a step.",
        kind=str,
        allowed=f"one of {', '.join(SOLVERS)}",
        choices=tuple(SOLVERS),
        traced=False,
    )
    flow_shift: float = setting(
        0.0,
        "Time shift of the flow: 1 spaces the steps evenly, more puts more of them where it is "
        "noisy; 0 is the published shift for the latent's size.",
        allowed="0 (the published shift), or 0.01 to 100",
        valid=lambda x, codebook_size: (x == 0) | ((x >= 0.01) & (x <= 100)),
        traced=False,
    )
    structure_solves: tuple[int, ...] = setting(
        (),
        "The stages at which the structure flow is solved, such as 0,3; the other splits use the "
        "last solution, which predicts all bits at once. Empty: all.",
        kind=tuple,
        allowed="a list of stages from 0 to {last_split}, or empty for all",
        traced=False,
    )
    flow_restart: float = setting(
        1.0,
        "Time at which the flow of every split but the first starts, from the last solution; 1 "
        "starts it from noise.",
        allowed="above 0 and at most 1",
        valid=lambda x, codebook_size: (x > 0) & (x <= 1),
        traced=False,
    )
    gumbel: bool = setting(
        False,
        "Draw each split at random (Gumbel top-k) instead of taking the larger half.",
        kind=bool,
        allowed="True or False",
        traced=False,
    )

    @classmethod
    def specs(cls) -> dict[str, Spec]:
        """{name: spec} of every setting."""
        return {field.name: field.metadata["spec"] for field in dataclasses.fields(cls)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Settings":
        """Settings from a dictionary, possibly read from JSON, which turns tuples into lists."""
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**values)

    def updated(self, changes: dict[str, Any]) -> "Settings":
        """These settings, updated with the values of `changes` that are not None.

        Raises:
            TypeError: an unknown setting, as for an unknown argument in Python.
        """
        unknown = changes.keys() - self.specs().keys()
        if unknown:
            raise TypeError(
                f"Unknown sampling setting {min(unknown)!r}; there are {', '.join(self.specs())}."
            )
        return dataclasses.replace(self, **{k: v for k, v in changes.items() if v is not None})

    def expand(self, num_stages: int, codebook_size: int) -> "Settings":
        """Checked settings, with per-stage settings expanded to one value per stage.

        Raises:
            UserError: an invalid value; the message names the setting and the valid range.
        """
        values: dict[str, Any] = {
            name: spec.expand(name, getattr(self, name), num_stages, codebook_size)
            for name, spec in self.specs().items()
        }
        return Settings(**values)

    def per_stage(self, name: str) -> tuple[float, ...]:
        """The values of a per-stage setting, after `expand`."""
        return getattr(self, name)

    def traced(self) -> dict[str, np.ndarray]:
        """The values that the compiled sampler takes as arguments: float32 or int32, () or (S,)."""
        return {
            name: np.asarray(getattr(self, name), {float: np.float32, int: np.int32}[spec.kind])
            for name, spec in self.specs().items()
            if spec.traced
        }

    def static(self) -> "Settings":
        """The settings that shape the program; traced ones are None."""
        return dataclasses.replace(
            self, **{name: None for name, spec in self.specs().items() if spec.traced}
        )


# The settings of the published results (paper, Section 4.2).
PUBLISHED = Settings(
    top_p=(1.0, 0.5), content_guidance=(1.0, 3.5), structure_guidance=(1.0, 2.5), flow_steps=25
)


def parse_sweep(text: str) -> list[dict[str, Any]]:
    """All combinations of "NAME=VALUE;VALUE NAME=VALUE;..."; a value may be START,END.

    Raises:
        UserError: an unknown setting, one that is given twice, or a value that is not a number.
    """
    specs, choices = Settings.specs(), {}
    for item in text.split():
        name, _, values = item.partition("=")
        if name not in specs or not values:
            raise UserError(
                f"--sweep takes NAME=VALUE;VALUE, for example content_guidance=1,3.5;1,4.5, with "
                f"the names {', '.join(specs)}; got {item!r}."
            )
        if name in choices:
            raise UserError(
                f"--sweep has {name} twice; give its values together, as {name}=VALUE;VALUE."
            )
        choices[name] = [
            specs[name].parse(f"--sweep: {name}", value) for value in values.split(";")
        ]
    return [dict(zip(choices, values)) for values in itertools.product(*choices.values())]
