"""Signs of life of a training, for launchers and people: where it is, and since when."""

import functools
import json
import logging
import os
import time

from etils import epath

from nvg_jax.runtime.processes import HEARTBEAT, is_main, is_restarted
from nvg_jax.runtime.storage import write_file

FILE = "heartbeat.json"
AGAIN = 60.0  # seconds

logger = logging.getLogger("nvg_jax")
_last = None  # the time and the arguments of the last beat
_step = 0  # the latest


def beat(workdir: epath.Path, part: str, start: int, step: int, **more):
    """Process 0 replaces WORKDIR/heartbeat.json; every process that of `HEARTBEAT`.

    The content is one line of JSON: the arguments in this order, and the time (Unix, seconds). A
    failure is logged and ends nothing.

    Args:
        start: the step from which this process started; it grows when a checkpoint was saved.
    """
    global _last, _step
    _step = max(_step, step)
    _last = time.monotonic(), functools.partial(beat, workdir, part, start, step, **more)
    text = json.dumps({"part": part, "start": start, "step": step, "time": time.time(), **more})
    places = [workdir / FILE] if is_main() else []
    if is_restarted():
        places.append(epath.Path(os.environ[HEARTBEAT]))
    for place in places:
        try:
            write_file(place, text + "\n", shared=True)  # parts may train side by side
        except Exception as error:  # libraries for buckets raise errors of many kinds
            logger.warning("%s cannot be written: %s", place, error)


def again():
    """Repeats the last beat, if it is older than `AGAIN`: what takes long goes on."""
    if _last and time.monotonic() - _last[0] > AGAIN:
        _last[1]()


def has_trained() -> bool:
    """Whether this run has ended a step before, perhaps in a process before this one."""
    return _step > 0


def stop():
    """Ends the repetition: there is no training any more."""
    global _last
    _last = None
