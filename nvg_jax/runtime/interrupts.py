"""Ctrl-C. Imported first of all by `python -m nvg_jax.COMMAND`, so it imports nothing slow.

A command waits for it in a thread of its own, which also runs while the main thread compiles. The
first one ends the command at once, with one line, unless there is work to save: then the training
loop, which asks `requested`, saves it, and the second one ends the command. Started processes do
not receive it. In a notebook, where a KeyboardInterrupt ends a cell, the handler of `in_notebook`
does the same.
"""

import contextlib
import os
import signal
import sys
import threading

EXIT_CODE = 130  # as a shell reports a command that Ctrl-C ended
GRACE = 5.0  # seconds for the end of a process whose work is saved

listening = False  # whether this process is a command
requested = threading.Event()  # whether to save and stop
kept = ""  # what remains when a command is ended: a sentence
ending = False  # whether a command has said that its work is saved, and ends soon

_deferred = False
_also_sigterm = False


class Interrupted(KeyboardInterrupt):
    """Ctrl-C stopped the work. Its state is saved; calling the same again resumes it."""


def listen():
    """Makes this process a command that handles Ctrl-C, unless it ignores it, in the background."""
    global listening
    if listening or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    listening = True
    sys.warnoptions.append("ignore:resource_tracker")  # it says that it cleared up after `end`
    signal.pthread_sigmask(
        signal.SIG_BLOCK, {signal.SIGINT}
    )  # also of threads and processes to come
    threading.Thread(target=_wait, name="interrupts", daemon=True).start()


def _wait():
    while True:
        signal.sigwait({signal.SIGINT})
        if not _request():
            end()


def _request() -> bool:
    """Asks the work to save and stop; False if there is nothing to save, or it was asked before."""
    if not _deferred or requested.is_set():
        return False
    requested.set()
    if _also_sigterm:
        os.kill(os.getpid(), signal.SIGTERM)
    print("Saving after this step. Ctrl-C again ends at once.", file=sys.stderr, flush=True)
    return True


def defer(on: bool, also_sigterm: bool = False):
    """Whether Ctrl-C lets the work go on until it has asked `requested` and saved.

    Args:
        also_sigterm: sends SIGTERM, by which JAX stops all processes of a run at the same step.
    """
    global _deferred, _also_sigterm
    _deferred, _also_sigterm = on, also_sigterm


def end():
    """Ends this command at once and says what is kept."""
    print(f"Interrupted. {kept}".strip(), file=sys.stderr, flush=True)
    end_now(EXIT_CODE)


def end_now(code: int):
    """Ends this process with those that it started, without waiting for any thread."""
    if "multiprocessing" in sys.modules:
        children = sys.modules["multiprocessing"].active_children()
        for child in children:
            child.kill()
        for child in children:
            child.join(1.0)
    os._exit(code)


def end_soon(code: int):
    """Ends this command after `GRACE` seconds, whatever threads of libraries still wait for."""
    global ending
    ending = True
    timer = threading.Timer(GRACE, end_now, [code])
    timer.daemon = True
    timer.start()


@contextlib.contextmanager
def in_notebook():
    """Inside, the stop button of a notebook is Ctrl-C of a command; the second one raises."""
    ours = threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler and not listening
    )

    def handler(number, frame):
        if not _request():
            requested.set()  # for the next step: exceptions in some callbacks are dropped
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handler) if ours else None
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)
        if not listening:
            requested.clear()
        defer(False)
