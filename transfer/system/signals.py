"""Signals: Ctrl-C and SIGTERM end a run in one line, whenever they come, also while torch is being imported."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
PATIENCE = 5  # seconds after a first signal, while what runs is cleaned up; a second one then ends the process at once


class StopRequest:
    """The signal that asked this process to stop, if any, and when."""

    signum: int | None = None
    time = 0.0


def status_of(signum: int) -> int:
    """The exit status of a process that a signal has ended, as a shell gives it: 130 or 143."""
    return 128 + signum


def stop_at_once(signum: int, _: FrameType | None) -> None:
    """A signal handler: one line, and the end."""
    os.write(2, f"stopped by {NAMES[signum]}\n".encode())
    os._exit(status_of(signum))  # an exception could be lost, or come out as another, in whatever is being imported


def guard_imports() -> None:
    """From now on Ctrl-C ends this process in one line. Where it is ignored, as in the background, it stays so. And
    what is printed to a stream that the caller closed goes nowhere, not into the next file that is opened.
    """
    for number, name in enumerate(("stdout", "stderr"), 1):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            setattr(sys, name, open(number, "w"))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop_at_once)


def request_stop(signum: int, _: FrameType | None) -> None:
    """A signal handler: raises KeyboardInterrupt with the exit status, and leaves a mark for `check_stop`."""
    if StopRequest.signum is None:
        StopRequest.signum, StopRequest.time = signum, time.monotonic()
        if hasattr(signal, "SIGCHLD"):  # sent to the whole group, as by `timeout`, it ends the workers too: no news
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise KeyboardInterrupt(status_of(signum))
    if time.monotonic() - StopRequest.time > PATIENCE:
        stop_at_once(signum, None)


def check_stop() -> None:
    """Raises KeyboardInterrupt where a signal came before: for every loop that takes long.

    Python forgets what a handler raises in a destructor, in a callback of garbage collection or fork, and in C code
    that clears errors.
    """
    if StopRequest.signum is not None:
        raise KeyboardInterrupt(status_of(StopRequest.signum))


def report_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Python's own report of what it forgets, but for KeyboardInterrupt: `check_stop` sees to that."""
    if not isinstance(unraisable.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """In here SIGTERM and, where it is not ignored, Ctrl-C raise KeyboardInterrupt with the exit status.

    After it they end the process, since nothing is left to say; so does SIGTERM. In another thread than the main one
    the caller owns the signals.
    """
    StopRequest.signum, hook = None, sys.unraisablehook
    before = {signum: signal.getsignal(signum) for signum in NAMES}
    handled = [signal.SIGTERM]
    if before[signal.SIGINT] in (stop_at_once, signal.default_int_handler):
        handled.append(signal.SIGINT)
    sys.unraisablehook = report_unraisable
    try:
        with contextlib.suppress(ValueError):
            for signum in handled:
                signal.signal(signum, request_stop)
        yield
    finally:
        StopRequest.signum, sys.unraisablehook = None, hook
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if before[signal.SIGINT] is stop_at_once:  # a script of ours, and it is at its end
                signal.signal(signal.SIGINT, signal.SIG_DFL)
            elif signal.SIGINT in handled:
                signal.signal(signal.SIGINT, before[signal.SIGINT])


@contextlib.contextmanager
def hold_signals() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the end of the block, in which worker processes start: in the callbacks of a
    fork Python forgets what a handler raises, and a worker would print its traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])  # asked beforehand: the next one may raise
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, NAMES)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent() -> None:
    """In a worker: Ctrl-C reaches the whole process group, and the parent ends its workers; SIGTERM ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, NAMES)
