"""Signs of life of a training, for launchers and people: where it is, and since when."""

import functools
import json
import logging
import os
import time

from etils import epath

from nvg_jax.runtime.processes import is_main
from nvg_jax.runtime.storage import write_file

FILE = "heartbeat.json"
VARIABLE = "NVG_HEARTBEAT"  # names a file on this machine, which launch/restart.sh reads
AGAIN = 60.0  # seconds

logger = logging.getLogger("nvg_jax")
_last = None  # the time and the arguments of the last beat


def is_read() -> bool:
    """Whether a launcher reads the heartbeat: it repeats the command after a failure."""
    return bool(os.environ.get(VARIABLE))


def beat(workdir: epath.Path, part: str, start: int, step: int, **more):
    """Process 0 replaces WORKDIR/heartbeat.json; every process replaces the file of `VARIABLE`.

    The content is one line of JSON: the arguments in this order, and the time (Unix, seconds). A
    failure is logged and ends nothing.

    Args:
        start: the step from which this process started; it grows when a checkpoint was saved.
    """
    global _last
    _last = time.monotonic(), functools.partial(beat, workdir, part, start, step, **more)
    text = json.dumps({"part": part, "start": start, "step": step, "time": time.time(), **more})
    places = [workdir / FILE] if is_main() else []
    if is_read():
        places.append(epath.Path(os.environ[VARIABLE]))
    for place in places:
        try:
            write_file(place, text + "\n", shared=True)  # parts may train side by side
        except Exception as error:  # libraries for buckets raise errors of many kinds
            logger.warning("%s cannot be written: %s", place, error)


def again():
    """Repeats the last beat, if it is older than `AGAIN`: what takes long goes on."""
    if _last and time.monotonic() - _last[0] > AGAIN:
        _last[1]()


def stop():
    """Ends the repetition: there is no training any more."""
    global _last
    _last = None
