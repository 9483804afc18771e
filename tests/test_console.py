"""The console: errors in one line, names escaped, no orphans, progress."""

import errno
import io
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PLAIN, ROOT, add_line, make_photos, run_main
from processes import fork_script, run_code

import predict
from transfer.system import console
from transfer.system.console import one_line_errors
from transfer.system.files import save_atomically

ODD_NAMES = {
    "ünï 世界.png": "ünï 世界.png",
    "with  two spaces .png": "with  two spaces .png",
    "red\x1b[31m\x07.png": r"red\x1b[31m\x07.png",
    "right\u202eto left.png": r"right\u202eto left.png",
    os.fsdecode(b"latin-\xe9.png"): r"latin-\udce9.png",
    "new\nline.png": r"new\nline.png",
    "back\rto start.png": r"back\rto start.png",
}


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_odd_names_work_and_are_printed_escaped(trained, name):
    try:
        os.link("red/test_0.png", name)
    except OSError:
        pytest.skip("the file system has no such names")
    os.mkdir("folder")
    os.link(name, f"folder/{name}")
    status, out, err = run_main(predict.main, name, "folder", f"gone/{name}", "--workers", 0)
    assert [line.rsplit("  ", 1)[0] for line in out.splitlines()] == [ODD_NAMES[name], f"folder/{ODD_NAMES[name]}"]
    assert (status, err) == (1, f"error: gone/{ODD_NAMES[name]}: {os.strerror(errno.ENOENT).lower()}\n")
    if "\n" not in name and "latin" not in name:  # neither can stand in a UTF-8 list
        os.remove(name)
        Path(name).write_bytes(b"text")
        add_line("train.txt", f"{name} 0\n")
        assert trained()[::2] == (0, f"warning: train.txt:13: {ODD_NAMES[name]}: not an image; skipped\n")


SLOW_RUN = """
import os, sys, time, train
read = train.read_image

def slow(path, *rest):
    open(f"{sys.argv[-1]}.{os.getpid()}", "w").close()
    time.sleep(0.2)
    return read(path, *rest)

train.read_image = slow
train.main(sys.argv[1:])
"""


def test_ctrl_c_and_sigterm_end_a_run_with_one_line_and_no_orphans(tmp_path):
    make_photos(tmp_path, per_class=30)
    cases = [("int", signal.SIGINT, os.killpg), ("term", signal.SIGTERM, os.kill), ("all", signal.SIGTERM, os.killpg)]
    runs = []
    for name, *_ in cases:
        (tmp_path / f"{name}.pth").write_bytes(b"the old one")
        runs.append(fork_script(SLOW_RUN, *PLAIN, "--workers", 2, "--out", f"{name}.pth", cwd=tmp_path))
    for (name, number, send), run in zip(cases, runs, strict=True):
        while len(list(tmp_path.glob(f"{name}.pth.*"))) < 2:  # both workers are at it, for nine seconds
            assert run.poll() is None, run.communicate()
            time.sleep(0.05)
        send(run.pid, number)
    for (name, number, _), run in zip(cases, runs, strict=True):
        _, err = run.communicate(timeout=20)
        by = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        assert (run.returncode, err) == (128 + number, f"stopped by {by}; nothing was saved\n"), name
        assert (tmp_path / f"{name}.pth").read_bytes() == b"the old one"
        with pytest.raises(ProcessLookupError):  # nobody is left in its group
            for _ in range(20):
                os.killpg(run.pid, 0)
                time.sleep(0.1)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.parametrize(("save", "words"), [(True, "what was saved is whole"), (False, "nothing was saved")])
def test_a_stopped_run_says_whether_it_has_saved_anything(tmp_path, capsys, save, words):
    save_atomically(tmp_path / "earlier", b"by another run")
    with pytest.raises(SystemExit) as stop, one_line_errors():
        if save:
            save_atomically(tmp_path / "file", b"")
        raise KeyboardInterrupt(130)
    assert (stop.value.code, capsys.readouterr().err) == (130, f"stopped by Ctrl-C; {words}\n")


@pytest.mark.parametrize("script", ["train.py", "predict.py"])
def test_ctrl_c_while_torch_is_being_imported_is_one_line(tmp_path, script):
    # The moment is certain: a torch that says when its import begins, and goes on.
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    code = f"import runpy, sys; sys.path.insert(0, {str(tmp_path)!r}); runpy.run_path('{script}', run_name='__main__')"
    arguments = ["none.txt"] if script == "predict.py" else []
    with subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, **pipes) as run:
        assert run.stdout.readline() == "importing\n"
        run.send_signal(signal.SIGINT)
        assert (run.stderr.read(), run.wait(20)) == ("stopped by Ctrl-C\n", 130)


@pytest.mark.parametrize("script", ["train.py", "predict.py"])
def test_ctrl_c_a_moment_after_the_start_shows_no_traceback(script):
    for seconds in (0.3, 0.7):
        with subprocess.Popen([sys.executable, script, "none.txt"], cwd=ROOT, stderr=subprocess.PIPE, text=True) as run:
            time.sleep(seconds)
            run.send_signal(signal.SIGINT)
            assert "Traceback" not in run.stderr.read()


def test_where_ctrl_c_is_ignored_as_in_the_background_it_stays_so():
    code = (
        "import signal; from transfer.system import signals; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "signals.guard_imports()\n"
        "with signals.stop_on_signals(): signal.raise_signal(signal.SIGINT)\n"
        "signal.raise_signal(signal.SIGINT); print('still here')"
    )
    done = run_code(code)
    assert (done.stdout, done.stderr) == ("still here\n", "")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (11.6, "12 s"),
        (59.7, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 00 min"),
        (3900, "1 h 05 min"),
        (86400 * 30, "720 h 00 min"),
    ],
)
def test_times_are_printed_in_the_two_units_that_matter(seconds, words):
    assert console.duration(seconds) == words


@pytest.fixture
def watch(monkeypatch):
    """A function that returns what Progress prints of 1,000 images, one every so many seconds."""

    class Stream(io.StringIO):
        terminal = False

        def isatty(self):
            return self.terminal

    def watched(seconds_each, terminal=False):
        now, stream = [0.0], Stream()
        stream.terminal = terminal
        monkeypatch.setattr(console.time, "perf_counter", lambda: now[0])
        monkeypatch.setattr(console.sys, "stderr", stream)
        progress = console.Progress("epoch 3:", 1000)
        for _ in range(1000):
            now[0] += seconds_each
            progress.add(1)
        return stream.getvalue()

    return watched


def test_a_log_gets_a_line_of_progress_every_tenth_and_at_most_one_a_minute(watch):
    lines = watch(4).splitlines()  # 400 s a tenth
    assert len(lines) == 10 and lines[0] == "epoch 3: 100/1,000 images  0.2/s  1 h 00 min left"
    assert lines[9] == "epoch 3: 1,000/1,000 images  0.2/s  0 s left"
    done = [line.split("/")[0] for line in watch(0.25).splitlines()]  # 25 s a tenth
    assert done == ["epoch 3: 240", "epoch 3: 480", "epoch 3: 720", "epoch 3: 960"]
    assert watch(0.059) == ""


def test_a_terminal_gets_one_line_of_progress_that_renews_itself(watch):
    text = watch(0.25, terminal=True)
    assert text.count("\n") == 1 and text.endswith("\repoch 3: 1,000/1,000 images  4.0/s  0 s left\n")
    assert "\repoch 3: 200/1,000 images  4.0/s  3 min 20 s left\r" in text


def test_before_anything_is_done_progress_says_nothing(watch, monkeypatch):
    assert "images" in watch(1, terminal=True)  # from here on stderr is a terminal
    progress = console.Progress("neighbours:", 10)
    monkeypatch.setattr(console.time, "perf_counter", lambda: 1e9)
    progress.add(0)
    assert "neighbours" not in console.sys.stderr.getvalue()
    progress.add(5)
    assert "neighbours: 5/10 images" in console.sys.stderr.getvalue()


def test_progress_is_rank_0s_alone(watch, monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    assert watch(4) == watch(4, terminal=True) == ""


LATE = """
import os, signal, sys, threading, time
from transfer.system.console import UserError, one_line_errors
threading.Thread(target=lambda: (time.sleep(0.5), os.kill(os.getpid(), signal.SIGTERM), time.sleep(1))).start()
with one_line_errors():
    raise UserError("first")
"""


def test_sigterm_while_the_interpreter_ends_shows_no_traceback():
    # The interpreter waits for the thread; torchrun sends SIGTERM to ranks that are at their end already.
    done = subprocess.run(
        [sys.executable, "-c", LATE], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (-signal.SIGTERM, "error: first\n")


def test_a_full_disk_behind_stdout_is_one_line(monkeypatch, capsys):
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as stop, one_line_errors():
            print("an answer")
    reason = os.strerror(errno.ENOSPC).lower()
    assert stop.value.code == 1 and capsys.readouterr().err == f"error: standard output: {reason}\n"
    with pytest.raises(FileNotFoundError), one_line_errors():  # a bug
        open("gone")


# Without torch, as at a script's start.
CLOSED = """
import sys
from transfer.system.signals import guard_imports
guard_imports()
file = open(sys.argv[1], "w")
print("to nowhere", flush=True)
print("to nowhere", file=sys.stderr, flush=True)
file.write(f"{sys.stdout.isatty()} {sys.stderr.isatty()}")
"""


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_what_is_printed_to_a_closed_stream_goes_nowhere(tmp_path, closed):
    path, silent = tmp_path / "file", subprocess.DEVNULL
    command = f"{shlex.join([sys.executable, '-c', CLOSED, str(path)])} {closed}"
    subprocess.run(["bash", "-c", command], cwd=ROOT, stdout=silent, stderr=silent, check=True)
    assert path.read_text() == "False False"
