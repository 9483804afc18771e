"""Signals: whenever they come, and wherever Python forgets them, the run ends."""

import os
import signal

import pytest
from processes import run_code, run_script

from transfer.system.console import Progress
from transfer.system.signals import check_stop, hold_signals, stop_on_signals


class Forgetful:
    """Python forgets what a signal's handler raises in a destructor."""

    def __init__(self, signum):
        self.signum = signum

    def __del__(self):
        signal.raise_signal(self.signum)


@pytest.fixture(autouse=True)
def as_before():
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_python_forgets_ends_the_next_step_and_is_not_reported(capsys, signum, status):
    steps = []
    with pytest.raises(KeyboardInterrupt) as stop, stop_on_signals():
        for step in range(3):
            check_stop()
            Forgetful(signum)
            steps.append(step)
    assert stop.value.args == (status,) and steps == [0] and capsys.readouterr().err == ""


def test_the_pass_sees_a_forgotten_signal_at_its_next_image():
    progress = Progress("photos:", 2)
    with pytest.raises(KeyboardInterrupt), stop_on_signals():
        progress.add(1)
        Forgetful(signal.SIGTERM)
        progress.add(1)
    assert progress.done == 1


def test_other_errors_that_python_forgets_are_still_reported(capsys):
    class Broken:
        def __del__(self):
            raise ValueError("a bug")

    with stop_on_signals():
        Broken()
    assert "ValueError: a bug" in capsys.readouterr().err


def test_signals_are_held_back_while_workers_start_and_delivered_after():
    order = []
    with pytest.raises(KeyboardInterrupt), stop_on_signals():
        with hold_signals():
            signal.raise_signal(signal.SIGTERM)
            order.append("started")
        order.append("lost")
    assert order == ["started"]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGINT, signal.SIGTERM}


def test_a_second_signal_does_not_disturb_the_cleaning_up_of_the_first():
    cleaned = []
    with pytest.raises(KeyboardInterrupt) as stop, stop_on_signals():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGINT)
            cleaned.append(True)
    assert stop.value.args == (143,) and cleaned


def test_a_second_signal_long_after_the_first_ends_the_process_at_once():
    code = (
        "import signal, time; from transfer.system import signals; signals.PATIENCE = 0.1\n"
        "with signals.stop_on_signals():\n"
        "    try: signal.raise_signal(signal.SIGTERM)\n"
        "    finally: time.sleep(0.2); signal.raise_signal(signal.SIGINT); print('still here')"
    )
    done = run_code(code)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped by Ctrl-C\n")


def test_a_temporary_folder_with_a_long_name_hangs_no_worker(model, tmp_path):
    # Over 3 s: a Python that imports torch, and workers.
    # A tensor would travel by a socket below it, whose path may have 107 bytes. Started anew, since what is forked may
    # know of a temporary folder already.
    folder = tmp_path / ("a" * 100)
    folder.mkdir()
    os.link("red.png", "second.png")
    done = run_script(
        "predict.py", "red.png", "second.png", "--workers", 2, "--batch-size", 1, cwd=tmp_path, TMPDIR=folder
    )
    assert done.returncode == 0 and done.stderr == "" and len(done.stdout.splitlines()) == 2
