"""Being asked to end: SIGTERM, as clusters and clouds send it before they take a machine away."""

import itertools
import signal
import threading

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75  # EX_TEMPFAIL; the launchers start the command again on it

_asked = threading.Event()
_steps = itertools.count()


class Preempted(Exception):
    """Work was stopped on request; what was done is saved, and started again it goes on."""


def watch():
    """From now on SIGTERM does not kill this process but is noticed.

    With several processes JAX itself watches, from `jax.distributed.initialize` on.
    """
    if jax.process_count() == 1:
        signal.signal(signal.SIGTERM, lambda *_: _asked.set())


def noticed() -> bool:
    """Whether to save and stop after the present step.

    Every process asks as often as any other, after every step of its work.

    With several processes a SIGTERM to any of them counts, at one and the same step of all.
    """
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point(next(_steps))
    return _asked.is_set()
