"""Shared by all commands: multi-process start-up, logging, flags, and user errors as one line.

Exit codes: 0 done; 2 a `UserError` (`error: ...`), which a restart cannot mend; 75 preempted, with
all work saved (see `runtime.preemption`); 130 ended by Ctrl-C (see `runtime.interrupts`); anything
else is a failure, with its traceback, after which launchers run the command again.
"""

import contextlib
import io
import logging
import os
import re
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import absl.logging
import jax
from absl import app, flags

from nvg_jax.errors import UserError, did_you_mean, is_failure
from nvg_jax.runtime import hardware, heartbeat, interrupts, preemption
from nvg_jax.runtime.processes import is_restarted
from nvg_jax.sampling.settings import DTYPES, MAX_SEED, Settings

if TYPE_CHECKING:  # not every command imports it
    from nvg_jax.metadata import RunMetadata

USER_ERROR = 2
MODEL = "A run's workdir, an exported or converted folder, a bundled model, or hf://ORG/NAME."

flags.DEFINE_boolean(
    "distributed",
    False,
    "Run as one of several processes; JAX discovers the others (TPU, GKE, SLURM).",
)
flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, where JAX cannot find it."
)
flags.DEFINE_integer("num_processes", None, "With --coordinator_address: number of processes.")
flags.DEFINE_integer("process_id", None, "With --coordinator_address: 0 .. num_processes - 1.")
flags.disclaim_key_flags()  # --help shows the flags that the functions below define

# Flags of XLA with which small programs compile faster on CPUs, and run slower.
FAST_COMPILE = ["--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version__.startswith("0.10."):  # later versions stop at this flag
    FAST_COMPILE.append("--xla_cpu_use_fusion_emitters=false")

# On CPUs, XLA starts independent collectives of a program on several threads, in any order, and
# gloo pairs those of two processes by their order: they exchange the wrong data, or wait for each
# other forever. Without these threads, the order is that of the program. (Seen with jax 0.10.2,
# which also loses this flag for programs that come from the compilation cache.)
ORDERED_COLLECTIVES = "--xla_cpu_multi_thread_eigen=false"

# XLA's words, on all platforms; other resources that are exhausted may be free again.
OUT_OF_MEMORY = re.compile("RESOURCE_EXHAUSTED.*(memory|allocat)", re.IGNORECASE | re.DOTALL)

logger = logging.getLogger("nvg_jax")


@contextlib.contextmanager
def ending_alone():
    """Ends one of several processes at once if it fails: JAX would let it wait for the others.

    They wait for it in turn, and after five minutes all are killed, with an exit code that says
    nothing.
    """
    try:
        yield
    except BaseException as error:
        ends = isinstance(error, SystemExit)
        if not jax.distributed.is_initialized() or (ends and error.code != USER_ERROR):
            raise
        if not ends:
            traceback.print_exc()
        sys.stdout.flush()
        interrupts.end_now(USER_ERROR if ends else 1)


@ending_alone()
def main(command, set_up=lambda: None, kept: str = ""):
    """Runs a command with logging; --verbosity=1 shows stack traces of user errors.

    Args:
        set_up: called when the flags are parsed, before JAX looks for devices.
        kept: what remains when Ctrl-C ends the command at once, a sentence.
    """
    interrupts.listen()
    interrupts.kept = kept
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False

    def start(argv):
        hardware.pin_options()
        set_up()
        join_processes()
        find_devices()
        if jax.process_count() > 1 and jax.default_backend() == "cpu":
            jax.config.update("jax_enable_compilation_cache", False)  # see ORDERED_COLLECTIVES
        if jax.process_index():  # one process reports the progress
            logger.setLevel(logging.WARNING)
        command(argv)

    try:
        app.run(start, flags_parser=parse_flags)
    except preemption.Preempted as notice:
        if not interrupts.ending:
            logger.warning("preempted; %s", notice)
        sys.exit(preemption.EXIT_CODE)
    except interrupts.Interrupted as notice:
        if not interrupts.ending:
            logger.warning("interrupted; %s", notice)
        sys.exit(interrupts.EXIT_CODE)
    except KeyboardInterrupt:  # before `interrupts` listened
        interrupts.end()
    except jax.errors.JaxRuntimeError as error:
        if not OUT_OF_MEMORY.search(str(error)) or flags.FLAGS.verbosity > 0:
            raise
        sentence = (
            f"The devices have too little memory ({str(error).splitlines()[0]}). Use a smaller "
            "batch, more devices, or in training a larger --config.mesh.fsdp; python -m "
            "nvg_jax.compile reports the memory that a step needs."
        )
        # What fitted before may fit again: the memory was another's, such as a killed process's.
        if is_restarted() and heartbeat.has_trained():
            logger.error(sentence)
            raise
        exit_with_error(sentence)
    except UserError as error:
        if flags.FLAGS.verbosity > 0:
            raise
        exit_with_error(error)


def add_xla_flags(*flags: str):
    """Sets flags of XLA; before JAX looks for devices.

    None twice, since the text of all is part of the key of the compilation cache.
    """
    before = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join(dict.fromkeys([*before, *flags]))


def compile_fast():
    """Compiles with little optimization if the config says so; before JAX looks for devices."""
    if flags.FLAGS.config.fast_compile:
        jax.config.update("jax_disable_most_optimizations", True)
        add_xla_flags(*FAST_COMPILE)


def define_resume_flags():
    """Defines how a training goes on with what its workdir holds."""
    flags.DEFINE_list(
        "allow_changes",
        [],
        "Settings that may differ from those the run was started with, such as learning_rate, "
        "length or data; the change is recorded.",
    )
    flags.DEFINE_integer(
        "resume_step",
        None,
        "Go back to the checkpoint of this step; later ones are renamed to abandoned_STEP.",
        lower_bound=1,
    )


def define_model_flags():
    flags.DEFINE_string("workdir", None, MODEL)
    define_seed_flag()
    flags.DEFINE_integer("batch_size", 64, "Images per batch and process.", lower_bound=1)


def define_seed_flag():
    flags.DEFINE_integer("seed", 0, "Seed of all randomness.", 0, MAX_SEED)


def define_data_flags():
    flags.DEFINE_string("data_name", None, "Data set, if not the one the model was trained on.")
    flags.DEFINE_string("data_dir", None, "Folder of the data set.")
    flags.DEFINE_integer(
        "resize",
        None,
        "Short side before the crop, if not the model's; 0: image size * 288 / 256.",
        0,
    )


def data_section(metadata: "RunMetadata") -> dict[str, Any]:
    """The `data` section of a model's config, overridden by the flags that were given.

    Other data are prepared as the model's own, unless --resize or --pad say otherwise: with the
    same filter and short side, and without its random shifts.

    Raises:
        UserError: there is neither a config nor --data_name.
    """
    own = {"resize_filter": metadata.resize_filter}
    changes = {"name": flags.FLAGS.data_name}
    changes |= {n: flags.FLAGS[n].value for n in ("data_dir", "resize", "pad") if n in flags.FLAGS}
    changes = {name: value for name, value in changes.items() if value is not None}
    if "name" in changes:
        of_model = (metadata.config or {}).get("data") or {}
        own["on_bad"] = of_model.get("on_bad", "error")
        return {"data_dir": "", "resize": of_model.get("resize", 0), "pad": 0} | changes | own
    if metadata.config is None:
        raise UserError(
            "This folder does not say what data it was trained on (converted weights do not); "
            "give --data_name, for example tfds:imagenet2012, and --data_dir."
        )
    return metadata.config["data"] | changes | own


def define_sampling_flags():
    """Defines a flag for each sampling setting, empty by default, and one for the dtype."""
    flags.DEFINE_enum(
        "dtype",
        None,
        DTYPES,
        "Arithmetic of sampling and decoding; by default bfloat16 on TPUs and on GPUs that have "
        "it, float32 elsewhere. float16 is for GPUs without bfloat16.",
    )
    for name, spec in Settings.specs().items():
        if spec.per_stage:
            flags.DEFINE_list(name, None, f"{spec.help} A number, start,end, or one per stage.")
        elif spec.kind is tuple:
            flags.DEFINE_list(name, None, spec.help)
        elif spec.kind is bool:
            flags.DEFINE_boolean(name, None, spec.help)
        elif spec.kind is str:
            flags.DEFINE_enum(name, None, spec.choices, spec.help)
        else:
            define = flags.DEFINE_integer if spec.kind is int else flags.DEFINE_float
            define(name, None, spec.help)


def sampling_settings() -> dict[str, Any]:
    """The sampling settings given as flags, as arguments of `Pipeline.sample`.

    Raises:
        UserError: a value is not a number.
    """
    settings = {}
    for name, spec in Settings.specs().items():
        value = flags.FLAGS[name].value
        if isinstance(value, list):
            value = spec.parse(f"--{name}", ",".join(value))
        if value is not None:
            settings[name] = value
    return settings


def exit_with_error(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(USER_ERROR)


def join_processes():
    """Joins the other processes of a run, according to the flags.

    Raises:
        UserError: inconsistent flags, or no cluster.
    """
    address, count, index = (
        flags.FLAGS[name].value for name in ("coordinator_address", "num_processes", "process_id")
    )
    if any(value is not None for value in (address, count, index)):
        if address is None or count is None or index is None or not 0 <= index < count:
            raise UserError(
                "--coordinator_address, --num_processes and --process_id belong together, with "
                f"process_id in 0 .. num_processes - 1; got {address}, {count} and {index}."
            )
        port = re.fullmatch(r".+:(\d{1,5})", address)
        if not port or not 0 < int(port[1]) < 2**16:
            raise UserError(f"--coordinator_address must be HOST:PORT, got {address!r}.")
        add_xla_flags(ORDERED_COLLECTIVES)
        jax.distributed.initialize(address, count, index)
    elif flags.FLAGS.distributed:
        add_xla_flags(ORDERED_COLLECTIVES)
        try:
            jax.distributed.initialize()
        except ValueError as error:
            if is_restarted():  # what tells JAX may be down for now
                raise
            raise UserError(
                f"JAX finds no cluster here ({error}). Omit --distributed for a single process, "
                "or give --coordinator_address, --num_processes and --process_id."
            ) from error


def find_devices():
    """Starts JAX on the devices of this machine.

    Raises:
        UserError: JAX_PLATFORMS asks for a platform that JAX cannot use here.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError: cuda without its plugin
        # JAX adds its options to `config` when it is imported.
        platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
        # A launcher asks for the devices that are there; that they cannot be started may pass.
        found = re.search("Unable to initialize backend '(tpu|cuda)'", str(error))
        passes = is_restarted() if found else is_failure(error)
        if not platforms or passes or "already in use" in str(error):
            raise
        raise UserError(
            f"JAX cannot use JAX_PLATFORMS={platforms} on this machine"
            f"{str(error) and f' ({str(error).splitlines()[0]})'}. Unset it to use what is there, "
            "or install JAX for that platform (README.md)."
        ) from error


def parse_flags(argv):
    """Parses the flags; an error in a config file or an override is cut down to its message."""
    try:
        rest = flags.FLAGS(argv)
        if "config" in flags.FLAGS:
            getattr(flags.FLAGS.config, "keys", None)  # raises if the file cannot be loaded
    except Exception as error:  # a wrong flag, or anything that the user's config file raises
        if mistake := mistake_in_config(error):
            exit_with_error(" ".join(mistake.split()))
        text = unknown_key(argv) if is_unknown_key(error) else str(error) or type(error).__name__
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if "Traceback" in text or isinstance(error, OSError):  # the reason comes last
            message = lines[-1].split("Error: ", 1)[-1]
        else:
            message = " ".join(lines)
        exit_with_error(message)
    if rest[1:]:
        exit_with_error(
            f"Unexpected arguments: {' '.join(rest[1:])}. Flags begin with --, and several values "
            "of a flag are separated by commas: --classes=0,1,2."
        )
    # Such as --edit=$FILE without a FILE; config values and tuples of stages may be empty.
    tuples = {name for name, spec in Settings.specs().items() if spec.kind is tuple}
    for name in flags.FLAGS:
        flag, may_be_empty = flags.FLAGS[name], name.startswith("config") or name in tuples
        if flag.present and flag.value in ("", []) and not may_be_empty:
            exit_with_error(f"--{name} is empty: give a value, or leave the flag out.")
    if not flags.FLAGS["verbosity"].present:  # absl's verbosity; Orbax and Grain log through absl
        absl.logging.set_verbosity(absl.logging.WARNING)
    return rest


def mistake_in_config(error: BaseException | None) -> str:
    """The place and text of an error that a config file raised by mistake; "" for others.

    absl and ml_collections raise other errors in its place. A config file raises ValueError on
    purpose, for example for an unknown variant.
    """
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        inside = [frame for frame in frames if frame.name in ("get_config", "<module>")]
        if inside:
            beside = Path(frames[-1].filename).parent == Path(inside[-1].filename).parent
            raised = beside and (frames[-1].line or "").startswith("raise")
            if isinstance(error, ValueError) and raised:
                return ""
            place = f"{inside[-1].filename}, line {inside[-1].lineno}"
            return f"{place}: {type(error).__name__}: {error}"
        error = error.__cause__ or error.__context__
    return ""


def is_unknown_key(error: Exception) -> bool:
    return isinstance(error, KeyError) or isinstance(error.__context__, KeyError)


def unknown_key(argv: list[str]) -> str:
    """The error message for the first override --config.KEY=... whose key does not exist."""
    overrides = [arg for arg in argv[1:] if arg.lstrip("-").startswith("config.")]
    sys.argv = [arg for arg in argv if arg not in overrides]  # where a config flag finds them
    flags.FLAGS(sys.argv)
    for override in overrides:
        section, path = flags.FLAGS.config, override.lstrip("-").split("=")[0].split(".")
        for depth, key in enumerate(path[1:], 1):
            keys = sorted(section) if hasattr(section, "keys") else []
            if key not in keys:
                return (
                    f"There is no {'.'.join(path[: depth + 1])}.{did_you_mean(key, keys)} "
                    f"{'.'.join(path[:depth])} has {', '.join(keys) or 'no keys'}."
                )
            section = section[key]
    return f"Invalid overrides: {' '.join(overrides)}."
