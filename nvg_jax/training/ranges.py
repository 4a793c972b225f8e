"""Whether a config has the settings of configs/common.py, with values of their kinds and ranges."""

import dataclasses
import math
from typing import Any

import ml_collections
import numpy as np

from nvg_jax import presets
from nvg_jax.errors import UserError, did_you_mean
from nvg_jax.parts import GENERATORS
from nvg_jax.sampling.settings import MAX_SEED
from nvg_jax.training.length import AUTO


@dataclasses.dataclass(frozen=True)
class Range:
    """Finite numbers from `low` to `high`, without `low` if `above`, without `high` if `below`.

    whole: integers alone.
    auto: a number outside with a meaning of its own, see the comment of the setting.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    whole: bool = False
    auto: float | None = None

    def __contains__(self, value: float) -> bool:
        low = value > self.low if self.above else value >= self.low
        high = value < self.high if self.below else value <= self.high
        return value == self.auto or (math.isfinite(value) and low and high)

    def __str__(self) -> str:
        if math.isinf(self.low):
            return "a finite number"
        text = f"above {self.low:g}" if self.above else f"{self.low:g} or more"
        if math.isfinite(self.high):
            text += f" and {'below' if self.below else 'at most'} {self.high:.10g}"
        return text + (f", or {self.auto:g}" if self.auto is not None else "")


KINDS = (  # (type in configs/common.py, types that it may have elsewhere, what to call them)
    (bool, bool, "True or False"),
    (str, str, "text"),
    (int, int, "a whole number"),
    (float, (int, float), "a number"),
    (tuple, (tuple, list, int, float, str), "numbers, such as (64, 64)"),
)

COUNT, NUMBER, SHARE = Range(1, whole=True), Range(0), Range(0, 1)
RATE = Range(0, 1, below=True)
OPTIMIZER = dict(
    learning_rate=NUMBER,  # 0 freezes a part
    warmup_steps=Range(0, auto=AUTO),
    warmup_start=SHARE,
    decay_start=SHARE,
    final=SHARE,
    b1=RATE,
    b2=RATE,
    weight_decay=NUMBER,
    clip=Range(0, above=True),  # 0 would multiply all gradients by zero
    ema_decay=Range(0, 1, below=True, auto=AUTO),
)
RECIPE = dict(
    batch_size=COUNT,
    log_every=Range(1, auto=AUTO),
    eval_every=Range(1, auto=AUTO),
    save_every=Range(1, auto=AUTO),
    eval_images=NUMBER,
    max_skipped_steps=NUMBER,
    keep=COUNT,
    fid_every=NUMBER,
    fid_samples=Range(2),
    optimizer=OPTIMIZER,
)
TRANSFORMER = dict(
    width=COUNT,
    depth=COUNT,
    head_dim=COUNT,
    mlp_ratio=COUNT,
    drop_path=Range(0, 1, below=True, auto=-1),
)
# Every number of a config, but for `sampling`, whose ranges are in `Settings`. Sizes must also fit
# each other, see `TokenizerConfig` and `TransformerConfig`.
RANGES = dict(
    seed=Range(0, MAX_SEED),
    stall_timeout=Range(0, 1e8),  # seconds; the clock has no room for many more
    profile_steps=COUNT,
    class_dropout=RATE,
    lora=dict(rank=NUMBER),
    mesh=dict.fromkeys(("data", "fsdp", "tensor"), Range(1, auto=-1)),
    data=dict(resize=NUMBER, pad=NUMBER, num_threads=COUNT, num_workers=NUMBER, prefetch=COUNT),
    tokenizer=dict.fromkeys(
        ("image_size", "latent_size", "latent_dim", "codebook_size", "base_channels")
        + ("channel_multipliers",),
        COUNT,
    )
    | dict(blocks_per_level=NUMBER),
    **dict.fromkeys(GENERATORS, TRANSFORMER),
    tokenizer_training=RECIPE
    | dict(
        perceptual_weight=NUMBER,
        adversarial_weight=NUMBER,
        lecam_weight=NUMBER,
        discriminator_weight_decay=NUMBER,
        index_backprop_epochs=NUMBER,
    ),
    generator_training=RECIPE | dict(repa_weight=NUMBER, repa_block=COUNT),
    distillation=RECIPE | dict(flow_steps=COUNT, teacher_steps=NUMBER, structure_guidance=Range()),
)


def check_settings(
    config,
    base: ml_collections.ConfigDict | None = None,
    ranges: dict[str, Any] = RANGES,
    path: str = "",
):
    """Raises UserError for a setting that does not exist, is missing, or has an invalid value.

    What a file adds to a config is not checked by ml_collections, as overrides are.
    """
    base = presets.base() if base is None else base
    if not isinstance(config, ml_collections.ConfigDict):
        what = f"{path[:-1]} must be a section" if path else "The config must be a ConfigDict"
        raise UserError(f"{what}, as in configs/common.py, not {type(config).__name__}.")
    for name in config:
        if name not in base:
            raise UserError(
                f"There is no setting {path}{name}.{did_you_mean(name, base)} Correct it in the "
                "config file, or remove it."
            )
    for name, default in base.items():
        if name not in config:
            raise UserError(
                f"The config has no {path}{name}: begin it with base() of configs/common.py, or "
                "with a preset, and change what differs."
            )
        value, limits = config[name], ranges.get(name)
        if isinstance(default, ml_collections.ConfigDict):
            check_settings(value, default, limits or {}, f"{path}{name}.")
            continue
        allowed, kind = next((a, k) for known, a, k in KINDS if isinstance(default, known))
        is_flag = isinstance(value, bool) and not isinstance(default, bool)  # True is an int
        if is_flag or not isinstance(value, allowed):
            raise UserError(f"{path}{name} must be {kind}, got {value!r}.")
        if limits is not None:
            check_range(f"{path}{name}", value, limits)


def check_range(name: str, value, allowed: Range):
    """Raises UserError for a number outside its range: all of a tuple's have the same."""
    numbers = np.atleast_1d(value).tolist()
    if any(isinstance(number, str) for number in numbers):
        given = value if isinstance(value, str) else ",".join(map(str, value))
        raise UserError(f"{name} takes numbers, such as 64,64; got {given!r}.")
    if any(number not in allowed for number in numbers):
        raise UserError(f"{name} must be {allowed}, got {value}.")
    if allowed.whole and any(number % 1 for number in numbers):
        raise UserError(f"{name} takes whole numbers, got {value}.")
