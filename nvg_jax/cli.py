"""What the command lines share: progress on the terminal, and mistakes that end in a sentence."""

import logging
import sys

import absl.logging
from absl import app, flags

logger = logging.getLogger("nvg_jax")


def run(main):
    """`absl.app.run(main)` with progress shown; --verbosity=1 also shows where errors come from."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        app.run(main, flags_parser=parse_flags)
    except (ValueError, OSError, FloatingPointError) as error:
        if flags.FLAGS.verbosity > 0:
            raise
        # A --config file that is not there: the reason stands below a list of what was tried.
        message = (
            str(error).strip().splitlines()[-1].strip() if isinstance(error, OSError) else error
        )
        sys.exit(f"error: {message}")


def parse_flags(argv):
    """Parses the flags; an error in a config file or an override is cut down to its message."""
    try:
        rest = flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ImportError) as error:
        if isinstance(error.__context__, KeyError):  # a misspelt key, quoted twice
            error = error.__context__
        text = str(error.args[0])
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        message = lines[-1].split("Error: ", 1)[-1] if "Traceback" in text else " ".join(lines)
        sys.exit(f"error: {message}")
    if not flags.FLAGS["verbosity"].present:  # of absl, which Orbax and Grain write to
        absl.logging.set_verbosity(absl.logging.WARNING)
    return rest
