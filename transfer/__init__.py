"""Everything that train.py and predict.py stand on, one subject a file; and Ctrl-C while torch is being imported."""

import os
import signal


def stop_at_once(*_) -> None:
    """A signal handler: one line, and the exit status of Ctrl-C."""
    os.write(2, b"stopped by Ctrl-C\n")
    os._exit(130)  # an exception could be lost, or come out as another, in whatever is being imported


def guard_imports() -> None:
    """From now on Ctrl-C ends this process in one line. Where it is ignored, as in the background, it stays so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop_at_once)


def unguard_imports() -> None:
    """From now on Ctrl-C is a KeyboardInterrupt again, where `guard_imports` took it."""
    if signal.getsignal(signal.SIGINT) is stop_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
