"""A watchdog that ends a process which stands still, so that its launcher starts it again.

Commands start it with `config.stall_timeout`; everything that goes on resets its clock. The clock
is faulthandler's: a thread in C, which also runs while a stuck call holds Python's lock. The exit
code is 1, as of a crash.
"""

import faulthandler

SLOW = 1800.0  # seconds

_timeout = 0.0


def start(timeout: float):
    """Ends this process when `timeout` seconds pass without `reset`; 0: never.

    The stacks of all threads then go to stderr, after the line "Timeout (H:MM:SS)!".
    """
    global _timeout
    _timeout = timeout
    if timeout:
        reset(slow=True)
    else:
        faulthandler.cancel_dump_traceback_later()


def reset(slow: bool = False):
    """Resets the clock.

    Args:
        slow: what comes next may compile, read or write a checkpoint, or wait for a batch of an
            evaluation, so it has at least `SLOW` seconds.
    """
    if _timeout:
        limit = max(_timeout, SLOW) if slow else _timeout
        faulthandler.dump_traceback_later(limit, exit=True)
