"""The sampling flags, which the commands `sample` and `evaluate` share."""

from absl import flags

FLAGS = flags.FLAGS
PER_STAGE = ("top_k", "top_p", "content_guidance", "structure_guidance")


def define_flags():
    flags.DEFINE_float("temperature", None, "0 takes the most likely token.")
    for name in PER_STAGE:
        flags.DEFINE_list(name, None, "A number, start,end, or one value for each stage.")
    flags.DEFINE_integer("flow_steps", None, "Euler steps of each split.")
    flags.DEFINE_boolean("gumbel", None, "Draw the splits at random.")


def settings_from_flags() -> dict:
    """The sampling settings given as flags, as keyword arguments of `Pipeline.sample`.

    Raises:
        ValueError: a value that is not a number.
    """
    names = ("temperature", "flow_steps", "gumbel", *PER_STAGE)
    settings = {name: FLAGS[name].value for name in names if FLAGS[name].value is not None}
    for name in settings.keys() & set(PER_STAGE):
        try:
            settings[name] = tuple(float(value) for value in settings[name])
        except ValueError:
            raise ValueError(f"--{name} takes numbers, got {','.join(settings[name])!r}.") from None
    return settings
