"""Preemption: turns the SIGTERM sent before a machine is reclaimed into a flag that loops poll."""

import itertools
import signal
import threading

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75  # EX_TEMPFAIL; the launchers run the command again when they see it

_asked = threading.Event()
_steps = itertools.count()


class Preempted(Exception):
    """The work stopped on request. Its state is saved; the same command resumes it."""


def watch():
    """Makes SIGTERM set the flag instead of killing this process.

    With several processes JAX itself watches for the signal, from `jax.distributed.initialize` on.
    """
    if jax.process_count() == 1:
        signal.signal(signal.SIGTERM, lambda *_: _asked.set())


def noticed() -> bool:
    """Whether to save and stop after the current step.

    Collective: every process must call this once per step; JAX finds the common stopping step by
    counting calls. A SIGTERM to any process stops all of them at the same step.
    """
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point(next(_steps))
    return _asked.is_set()
