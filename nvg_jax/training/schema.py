"""Whether a config has the settings of configs/common.py, and values of their kinds."""

import ml_collections

from nvg_jax import presets
from nvg_jax.errors import UserError, did_you_mean

KINDS = (  # (type in configs/common.py, types that it may have elsewhere, what to call them)
    (bool, bool, "True or False"),
    (str, str, "text"),
    (int, int, "a whole number"),
    (float, (int, float), "a number"),
    (tuple, (tuple, list, int, float, str), "numbers, such as (64, 64)"),
)


def check_schema(config, base: ml_collections.ConfigDict | None = None, path: str = ""):
    """Raises UserError for a setting that does not exist, is missing, or is of another kind.

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
        value = config[name]
        if isinstance(default, ml_collections.ConfigDict):
            check_schema(value, default, f"{path}{name}.")
            continue
        allowed, kind = next((a, k) for known, a, k in KINDS if isinstance(default, known))
        is_flag = isinstance(value, bool) and not isinstance(default, bool)  # True is an int
        if is_flag or not isinstance(value, allowed):
            raise UserError(f"{path}{name} must be {kind}, got {value!r}.")
