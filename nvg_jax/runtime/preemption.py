"""Requests to stop: SIGTERM, sent before a machine is reclaimed, and Ctrl-C. Loops poll them."""

import contextlib
import itertools
import logging
import signal
import threading
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

from nvg_jax.runtime import interrupts

logger = logging.getLogger("nvg_jax")

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


@contextlib.contextmanager
def interruptible():
    """Inside, Ctrl-C stops the work like SIGTERM, and raises Interrupted instead of Preempted."""
    with interrupts.in_notebook():
        try:
            yield
        except Preempted as notice:
            if interrupts.requested.is_set():
                raise interrupts.Interrupted(str(notice)) from None
            raise


def defer_interrupts(on: bool):
    """Whether there is something to save, so that Ctrl-C waits until `noticed` is polled."""
    interrupts.defer(on, also_sigterm=jax.process_count() > 1)


def noticed() -> bool:
    """Whether to save and stop after the current step.

    Collective: every process must call this once per step; JAX finds the common stopping step by
    counting calls. A SIGTERM to any process stops all of them at the same step.
    """
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point(next(_steps))
    return _asked.is_set() or interrupts.requested.is_set()


def stop(notice: str) -> NoReturn:
    """Raises Preempted when everything is saved; a command says so at once, and ends soon."""
    interrupted = interrupts.requested.is_set()
    if interrupts.listening:
        logger.warning("%s; %s", "interrupted" if interrupted else "preempted", notice)
        interrupts.end_soon(interrupts.EXIT_CODE if interrupted else EXIT_CODE)
    raise Preempted(notice)
