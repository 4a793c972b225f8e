"""What the command lines share: a mistake of the user ends in a sentence, not a stack trace."""

import sys

from absl import app, flags, logging


def run(main):
    """`absl.app.run(main)`; with the flag --verbosity=1 errors show where they were raised."""
    logging.set_verbosity(logging.INFO)
    try:
        app.run(main, flags_parser=parse_flags)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        logging.debug("raised here:", exc_info=True)
        sys.exit(f"error: {error}")


def parse_flags(argv):
    """Parses the flags; an error inside a config file is cut down to its message."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, FileNotFoundError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        message = lines[-1].split("Error: ", 1)[-1] if "Traceback" in str(error) else lines[0]
        sys.exit(f"error: {message}")
