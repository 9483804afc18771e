"""Standard input: paths are answered as they come, in order, whatever dies; errors are one line."""

import errno
import io
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, answer, run_main

import predict
import train
from transfer.inputs.images import ImageError
from transfer.inputs.stdin import CHUNKS_AHEAD, StdinPaths


def test_paths_on_standard_input_are_answered_while_it_is_open_and_a_closed_pipe_ends_quietly(model):
    # Over 3 s: as a user starts it, in a Python that imports torch.
    options = ["--workers", "2", "--batch-size", "1", "--device", "cpu"]
    command = [sys.executable, str(ROOT / "predict.py"), "-", *options]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}
    with subprocess.Popen(command, env=buffered, **pipes) as piped:
        overdue = threading.Timer(60, piped.kill)  # what is not flushed would be waited for without end
        overdue.start()
        for colours in (["red"], ["red", "green", "blue"], ["red"], ["green"]):  # one needs no worker, three start them
            piped.stdin.write("".join(f"{colour}.png\n" for colour in colours).encode())
            piped.stdin.flush()
            for colour in colours:
                assert piped.stdout.readline().startswith(f"{colour}.png  {colour} ".encode())
        piped.stdout.close()  # as `| head -2` does
        piped.stdin.write(b"blue.png\n")
        piped.stdin.close()
        assert piped.stderr.read() == b""
        overdue.cancel()
    assert piped.returncode == 141  # as of any program that SIGPIPE ends


@pytest.fixture
def pipe(model, quick_model, monkeypatch, tmp_path):
    """A function that pipes bursts of lines, each once all before it are answered. Rows as (path, error), stderr, and
    the workers' ids.
    """

    def piped(*bursts, before_next=lambda: None):
        ours, theirs = os.pipe()
        answered, original = threading.Semaphore(0), StdinPaths.mark_answered

        def set_up(number):
            os.close(os.open(f"worker {os.getpid()}", os.O_CREAT))
            os.close(theirs)  # a fork of the writer's process, which else would keep the pipe open

        def write():
            with open(theirs, "wb", buffering=0) as end:
                for burst in bursts:
                    end.write("".join(f"{name}\n" for name in burst).encode())
                    for _ in burst:
                        assert answered.acquire(timeout=30)
                    before_next()

        monkeypatch.setattr("transfer.backbone.start_worker", set_up)
        monkeypatch.setattr(StdinPaths, "mark_answered", lambda self: (original(self), answered.release()))
        with open(ours, "rb") as source:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(source))
            threading.Thread(target=write, daemon=True).start()
            status, out, err = run_main(predict.main, "-", "--device", "cpu", "--workers", 2, "--format", "json")
        assert status == 0, err
        assert not multiprocessing.active_children()
        rows = [json.loads(line) for line in out.splitlines()]
        return [row["path"] for row in rows], err, [path.name for path in tmp_path.glob("worker *")]

    return piped


def test_a_whole_pipe_has_one_set_of_workers_and_rows_in_its_order(pipe):
    names = [f"{'./' * (number % 9)}{('red', 'green', 'blue')[number % 3]}.png" for number in range(1000)]
    bursts = [names[:1], names[1:4], names[4:200], names[200:210], names[210:211], names[211:600], names[600:]]
    paths, err, workers = pipe(*bursts)
    assert (paths, err, len(workers)) == (names, "", 2)


def test_few_piped_paths_start_no_workers(pipe):
    assert pipe(["red.png"], ["green.png"] * 8) == (["red.png", *["green.png"] * 8], "", [])


DIED = "warning: a decoding process died, perhaps out of memory; going on"


@pytest.mark.usefixtures("impatient")
def test_where_a_pipes_worker_dies_at_its_work_the_rest_is_done_with_fewer_and_then_without(pipe, monkeypatch):
    parent, read = os.getpid(), train.read_image

    def dying(path, *rest):
        if os.getpid() != parent and path == b"blue.png":
            os.kill(os.getpid(), signal.SIGKILL)
        return read(path, *rest)

    monkeypatch.setattr(train, "read_image", dying)
    names = ["red.png", "green.png"] * 20 + ["blue.png"] + ["green.png", "red.png"] * 40
    assert pipe(names, ["blue.png", "red.png"])[:2] == (
        [*names, "blue.png", "red.png"],
        f"{DIED} with 1\n{DIED} without\n",
    )


@pytest.mark.usefixtures("impatient")
def test_where_a_pipes_worker_dies_while_no_path_is_there_the_rest_is_done_by_who_is_left(pipe, monkeypatch):
    waiting, original = threading.Event(), StdinPaths.receive

    def receive(self, wait):
        (waiting.set if wait else waiting.clear)()
        original(self, wait)

    monkeypatch.setattr(StdinPaths, "receive", receive)

    def kill():
        assert waiting.wait(30)
        for child in multiprocessing.active_children()[:1]:
            child.kill()
            time.sleep(0.3)  # its parent, which waits for a path, hears of it

    names = ["red.png", "green.png"] * 10
    assert pipe(names, ["blue.png"], names, before_next=kill)[:2] == (
        [*names, "blue.png", *names],
        f"{DIED} with 1\n{DIED} without\n",
    )


class Source(io.RawIOBase):
    """Standard input that is read piece by piece."""

    def __init__(self, pieces):
        self.pieces, self.reads = iter(pieces), 0

    def read(self, size):
        self.reads += 1
        piece = next(self.pieces, b"")
        if isinstance(piece, OSError):
            raise piece
        return piece

    def readable(self):
        return True


def put_in(monkeypatch, pieces):
    source = Source(pieces)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(source)))
    return source


def test_of_an_endless_pipe_little_is_read_ahead(monkeypatch):
    source = put_in(monkeypatch, itertools.repeat(b"red.png\n" * 100))
    pipe = StdinPaths(8)
    for number, batch in enumerate(itertools.islice(pipe.batches(few=False), 50)):
        assert [count for count, _ in batch] == list(range(8 * number, 8 * number + 8))
        for _ in batch:
            pipe.mark_answered()
        assert len(pipe.pending) <= 108
    time.sleep(0.2)
    assert source.reads <= 4 + CHUNKS_AHEAD + 2  # 400 lines were answered


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ([b"red.png\n", *[b"x" * 60_000] * 3], "a line too long for a path; give one path a line"),
        (
            [b"red.png\n", OSError(errno.EIO, "Input/output error")],
            "input/output error; pipe paths into it, one a line",
        ),
    ],
)
def test_standard_input_that_holds_no_lines_is_an_error(model, monkeypatch, pieces, words):
    source = put_in(monkeypatch, pieces)
    out, err = answer("-", "--format", "csv", status=1)
    assert out.count("red.png") == 1 and err == f"error: standard input: {words}\n"
    assert source.reads <= 3


def test_standard_input_is_a_path_a_line_in_either_systems_line_ends(model, monkeypatch):
    pipe = io.BufferedReader(io.BytesIO(b"red.png\r\n\nnone.png\n green.png\nblue.png"))
    os.rename("green.png", " green.png")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(pipe))
    out, err = answer("-", "--format", "json", status=1)
    rows = [json.loads(line) for line in out.splitlines()]
    expected = [("red.png", "red"), ("none.png", None), (" green.png", "green"), ("blue.png", "blue")]
    assert [(row["path"], row["name"]) for row in rows] == expected and err == ""


def predicted(monkeypatch, content, status=0):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(content))))
    out, err = answer("-", "--format", "json", status=status)
    return [(row["path"], row["name"] or row["error"]) for row in map(json.loads, out.splitlines())], err


def test_nul_separates_too_and_then_names_hold_line_breaks(model, monkeypatch):
    os.rename("red.png", "r\ned.png\r")
    rows, err = predicted(monkeypatch, b"green.png\0r\ned.png\r\0\0blue.png\0")
    assert rows == [("green.png", "green"), ("r\ned.png\r", "red"), ("blue.png", "blue")] and err == ""


def test_a_byte_order_mark_is_no_part_of_a_path(model, quick_model, monkeypatch):
    rows, _ = predicted(monkeypatch, b"\xef\xbb\xbfgreen.png\n\xef\xbb\xbf.png\n", status=1)
    assert [path for path, _ in rows] == ["green.png", "\ufeff.png"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_named(model, monkeypatch, encoding):
    rows, err = predicted(monkeypatch, "green.png\r\nred.png\r\n".encode(encoding), status=1)
    assert rows == [] and err == "error: standard input: looks like UTF-16; give it as UTF-8\n"


def test_a_nul_in_a_name_is_an_error_of_that_image(model, quick_model):
    with pytest.raises(ImageError, match="^a NUL character in its name$"):
        predict.predict(model, ["a\0.png"])


def test_standard_input_stands_alone(model):
    out, err = answer("-", "red.png", status=2)
    assert out == "" and "- stands alone" in err
