"""What the user is told: one line, names escaped, no orphans."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PLAIN, ROOT, add_line, make_photos, run_main

import predict

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
    status, out, err = run_main(predict.main, name, "folder", f"no {name}", "--workers", 0)
    assert [line.rsplit("  ", 1)[0] for line in out.splitlines()] == [ODD_NAMES[name], f"folder/{ODD_NAMES[name]}"]
    assert (status, err) == (1, f"error: no {ODD_NAMES[name]}: {os.strerror(errno.ENOENT).lower()}\n")
    if "\n" not in name and "latin" not in name:  # neither can stand in a UTF-8 list
        os.remove(name)
        Path(name).write_bytes(b"text")
        add_line("train.txt", f"{name} 0\n")
        assert trained()[::2] == (0, f"warning: train.txt:13: {ODD_NAMES[name]}: not an image; skipped\n")


@pytest.mark.parametrize("rate", ["1e37", "1e300", "inf", "nan", "0", "-1", "fast"])
def test_a_rate_that_arithmetic_cannot_hold_is_found_before_training(job, rate):
    status, out, err = job(f"--lr={rate}")
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].endswith(f"argument --lr: '{rate}' is not a number above 0 and below 1e37")


SLOW_RUN = """
import os, sys, time
sys.path.insert(0, sys.argv.pop(1))
import train
read = train.read_image

def slow(path):
    open(f"{sys.argv[-1]}.{os.getpid()}", "w").close()
    time.sleep(0.2)
    return read(path)

train.read_image = slow
train.main(sys.argv[1:])
"""


def test_ctrl_c_and_sigterm_end_a_run_with_one_line_and_no_orphans(tmp_path):
    make_photos(tmp_path, per_class=30)
    cases = [("int", signal.SIGINT, os.killpg), ("term", signal.SIGTERM, os.kill), ("all", signal.SIGTERM, os.killpg)]
    runs = []
    for name, *_ in cases:
        (tmp_path / f"{name}.pth").write_bytes(b"the old one")
        command = [
            sys.executable,
            "-c",
            SLOW_RUN,
            str(ROOT),
            *map(str, PLAIN),
            "--workers",
            "2",
            "--out",
            f"{name}.pth",
        ]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        runs.append(subprocess.Popen(command, cwd=tmp_path, **pipes))
    for (name, number, send), run in zip(cases, runs, strict=True):
        while len(list(tmp_path.glob(f"{name}.pth.*"))) < 2:  # both workers are at it, for nine seconds
            assert run.poll() is None, run.stderr.read()
            time.sleep(0.05)
        send(run.pid, number)
    for (name, number, _), run in zip(cases, runs, strict=True):
        _, err = run.communicate(timeout=20)
        said = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        assert (run.returncode, err) == (128 + number, f"stopped by {said}; what was saved is whole\n"), name
        assert (tmp_path / f"{name}.pth").read_bytes() == b"the old one"
        with pytest.raises(ProcessLookupError):  # nobody is left in its group
            for _ in range(20):
                os.killpg(run.pid, 0)
                time.sleep(0.1)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
