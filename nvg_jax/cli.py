"""What the command lines share: several processes, progress, mistakes that end in a sentence.

Exit codes: 0 done; 2 a mistake that a restart cannot mend (`error: ...`); 75 asked to end and saved
(see `preemption`); anything else is a crash.
"""

import logging
import sys

import absl.logging
import jax
from absl import app, flags

from nvg_jax.runtime import preemption

MISTAKE = 2

flags.DEFINE_boolean(
    "distributed",
    False,
    "One of several processes; JAX finds the others (TPU, GKE, SLURM).",
)
flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, where JAX cannot know.")
flags.DEFINE_integer("num_processes", None, "With --coordinator_address: how many processes.")
flags.DEFINE_integer("process_id", None, "With --coordinator_address: 0 .. num_processes - 1.")

logger = logging.getLogger("nvg_jax")


def run(main):
    """`absl.app.run(main)` with progress shown; --verbosity=1 also shows where errors come from."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False

    def start(argv):
        join_processes()
        if jax.process_index():  # one process tells the progress
            logger.setLevel(logging.WARNING)
        main(argv)

    try:
        app.run(start, flags_parser=parse_flags)
    except preemption.Preempted as notice:
        logger.warning("%s", notice)
        sys.exit(preemption.EXIT_CODE)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or flags.FLAGS.verbosity > 0:
            raise
        mistake(
            f"The devices have too little memory ({str(error).splitlines()[0]}). Use a smaller "
            "batch, more devices, or in training a larger --config.mesh.fsdp; python -m "
            "nvg_jax.compile tells what a step takes on a TPU."
        )
    except (ValueError, OSError, FloatingPointError) as error:
        if flags.FLAGS.verbosity > 0:
            raise
        # A --config file that is not there: the reason stands below a list of what was tried.
        mistake(
            str(error).strip().splitlines()[-1].strip() if isinstance(error, OSError) else error
        )


def mistake(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(MISTAKE)


def join_processes():
    """Joins the other processes of a run, as the flags say.

    Raises:
        ValueError: flags that do not fit together, or no cluster to be found.
    """
    address, count, index = (
        flags.FLAGS[name].value for name in ("coordinator_address", "num_processes", "process_id")
    )
    given = [value is not None for value in (address, count, index)]
    if any(given):
        if not all(given) or not 0 <= index < count:
            raise ValueError(
                "--coordinator_address, --num_processes and --process_id belong together, with "
                f"process_id in 0 .. num_processes - 1; got {address}, {count} and {index}."
            )
        jax.distributed.initialize(address, count, index)
    elif flags.FLAGS.distributed:
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise ValueError(
                f"JAX finds no cluster here ({error}). Leave --distributed away for one process, "
                "or give --coordinator_address, --num_processes and --process_id."
            ) from error


def parse_flags(argv):
    """Parses the flags; an error in a config file or an override is cut down to its message."""
    try:
        rest = flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ImportError) as error:
        if isinstance(error.__context__, KeyError):  # a misspelled key, quoted twice
            error = error.__context__
        text = str(error.args[0])
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        message = lines[-1].split("Error: ", 1)[-1] if "Traceback" in text else " ".join(lines)
        mistake(message)
    if not flags.FLAGS["verbosity"].present:  # of absl, which Orbax and Grain write to
        absl.logging.set_verbosity(absl.logging.WARNING)
    return rest
