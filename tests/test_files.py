"""Files: whole or untouched, whatever kills the run or fills the disk."""

import errno
import io
import itertools
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from pathlib import Path

import pytest
from conftest import add_line, run_main
from processes import run_forked
from torchvision.models import get_model

import predict
import train
from transfer.metrics import Metrics
from transfer.pages.html import page
from transfer.system.console import UserError
from transfer.system.files import save_together, temporary_path
from transfer.system.outputs import STALE, STARTS, audit_outputs, table_path


def make_odd_file(kind):
    if kind == "FIFO":
        os.mkfifo("odd.png")
    elif kind == "device":
        os.symlink("/dev/zero", "odd.png")
    else:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("odd.png")


@pytest.mark.parametrize("kind", ["FIFO", "device", "socket"])
def test_only_regular_files_are_opened(trained, kind):
    make_odd_file(kind)
    assert not stat.S_ISREG(os.stat("odd.png").st_mode)
    add_line("train.txt", "odd.png 0\n")
    status, _, err = trained()
    assert (status, err) == (0, "warning: train.txt:13: odd.png: not a regular file; skipped\n")
    status, out, err = run_main(predict.main, "odd.png", "red/test_0.png", "--workers", 0)
    assert (status, err) == (1, "error: odd.png: not a regular file\n") and out.startswith("red/test_0.png  ")


def test_after_kill_9_at_any_moment_the_checkpoint_is_whole():
    # Over 3 s: ten runs up to their first checkpoint. In a process of its own: what is killed is forked from it, which
    # no other test's threads survive.
    done = run_forked("tests/fuzz.py", "--only", "kills", "--inputs", 10)
    assert done.returncode == 0 and done.stdout.startswith("kills: 10 inputs, 0 findings"), done.stdout + done.stderr


def test_what_a_killed_run_left_is_swept_by_the_next_and_nothing_else_is(job):
    os.mkdir("kept")
    stale = [Path(".best.pth.123.tmp"), Path(".best.csv.host-7-ab.tmp"), Path("kept/.01ab-cd.pt.host-7-ab.tmp")]
    others = [Path(".other.pth.123.tmp"), Path("best.pth.tmp"), Path(".best.pth.bak"), Path("kept/.note.tmp")]
    for path in (*stale, *others):
        path.write_bytes(b"half")
        os.utime(path, (time.time() - 2 * STALE,) * 2)
    others.append(Path("kept/.01ab-ce.pt.host-1-ab.tmp"))  # another run's, at work
    others[-1].write_bytes(b"half")
    assert job("--cache", "kept")[0] == 0
    assert not any(path.exists() for path in stale)
    assert all(path.read_bytes() == b"half" for path in others)


class Faults:
    """Makes the nth of one kind of call on the saved files fail, and remembers each file's last whole content."""

    def __init__(self, monkeypatch, call, number, code):
        self.left, self.call, self.code, self.whole = number, call, code, {}
        self.open, self.fsync, self.replace = io.open, os.fsync, os.replace
        monkeypatch.setattr("transfer.system.files.open", self.opened, raising=False)
        monkeypatch.setattr(os, "fsync", self.synced)
        monkeypatch.setattr(os, "replace", self.replaced)

    def count(self, call):
        self.left -= call == self.call
        if self.left == 0 and call == self.call:
            raise OSError(self.code, os.strerror(self.code))

    def opened(self, path, mode="r", *rest, **options):
        if "x" not in mode:
            return self.open(path, mode, *rest, **options)
        self.count("open")
        file = self.open(path, mode, *rest, **options)
        write = file.write

        class Writer:
            def __getattr__(self, name):
                return getattr(file, name)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def write(_, content):
                write(bytes(content)[:100])  # a full disk takes the first part
                self.count("write")
                return write(bytes(content)[100:])

        return Writer()

    def synced(self, descriptor):
        self.count("fsync")
        self.fsync(descriptor)

    def replaced(self, source, target):
        self.count("replace")
        self.replace(source, target)
        self.whole[Path(target).name] = Path(target).read_bytes()


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize(("code", "words"), [("ENOSPC", "disk full"), ("EIO", os.strerror(errno.EIO).lower())])
def test_whichever_write_fails_the_last_whole_files_stay(job, monkeypatch, call, code, words):
    failed = []
    for number in itertools.count(1):
        old = {"best.pth": b"the old one", "best.csv": b"epoch,train_loss,of the old one"}
        Path("best.previous.pth").unlink(missing_ok=True)  # which is no checkpoint of ours
        for name, content in old.items():
            Path(name).write_bytes(content)
        with monkeypatch.context() as patch:
            scores = iter((0.1, 0.2))  # both epochs save
            patch.setattr(train, "evaluate", lambda *_, scores=scores: Metrics(0.5, next(scores), 0.0))
            faults = Faults(patch, call, number, getattr(errno, code))
            status, _, err = job("--epochs", 2)
        whole = old | faults.whole
        assert {name: Path(name).read_bytes() for name in whole} == whole
        assert not list(Path().glob(".*.tmp"))
        if status == 0:
            break
        failed.append(re.fullmatch(rf"error: (best[.\w]+): {words}; what was saved before is intact\n", err)[1])
        assert status == 1
    kept = ["best.previous.pth", "best.previous.csv"] if call == "replace" else []  # links, which write nothing
    # Two epochs, and once more with the temperature.
    assert failed == [*kept, *["best.pth", "best.csv"] * 2, "best.pth"]


@pytest.mark.parametrize(("arch", "need"), [("resnet18", 132), ("resnet152", 689)])  # three of 45 and 233 MB
def test_a_full_disk_is_found_before_training(trained, monkeypatch, arch, need):
    before = Path("best.pth").read_bytes()
    monkeypatch.setattr("transfer.architectures.get_model", get_model)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 5 << 20}))
    status, out, err = trained("--arch", arch)
    assert (status, out) == (2, "")
    assert err == f"error: --out best.pth: disk full (5 MB free, {need} needed); free some space\n"
    assert Path("best.pth").read_bytes() == before


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_folder_that_takes_no_files_is_found_before_training(job, monkeypatch, code):
    def refuse(**_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)  # the superuser may write anywhere
    status, out, err = job("--out", "sub/best.pth")
    assert (status, out) == (2, "")
    reason = os.strerror(code).lower()
    assert err == f"error: --out sub/best.pth: can't write in sub ({reason}); name another folder\n"


@pytest.mark.parametrize(
    ("out", "problem"),
    [
        ("red", "is a directory; name a file, such as red/best.pth"),
        ("none/best.pth", f"can't write in none ({os.strerror(errno.ENOENT).lower()}); name another folder"),
        ("best.csv", "a checkpoint's name does not end in .csv; the .csv beside it has this name; end it in .pth"),
        ("zz.txt", "a checkpoint's name does not end in .txt; end it in .pth"),
        ("best.html", "a checkpoint's name does not end in .html; end it in .pth"),
    ],
)
def test_an_impossible_output_is_found_before_training(job, out, problem):
    assert job("--out", out) == (2, "", f"error: --out {out}: {problem}\n")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--train", "data.csv", "--out", "data.pth"), "data.csv: is read by this run; name another file to write"),
        (("--classes", "names", "--out", "names"), "names: is read by this run; name another file to write"),
        (("--train", "best.previous.pth"), "best.previous.pth: is read by this run; name another file to write"),
        (("--out", "link.pth"), "link.pth: is read by this run; name another file to write"),
        (("--weights", "old.pth", "--out", "old.pth"), "old.pth: is read by this run; name another file to write"),
        (
            ("--train", "o.previous.csv", "--out", "o.pth"),
            "o.previous.csv: is read by this run; name another file to write",
        ),
        (("--out", "fifo.pth"), "fifo.pth: not a regular file; name another"),
        (("--out", "/dev/null"), "/dev/null: not a regular file; name another"),
    ],
)
def test_an_output_that_would_destroy_an_input_or_a_device_is_found_before_training(job, options, problem):
    shutil.copy("train.txt", "best.previous.pth")
    table = "path,label\n" + Path("train.txt").read_text().replace(" ", ",")
    for name in ("data.csv", "o.previous.csv"):
        Path(name).write_text(table)
    Path("names").write_text("red\ngreen\nblue\n")
    Path("old.pth").write_bytes(b"weights")
    os.symlink("test.txt", "link.pth")
    os.mkfifo("fifo.pth")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert job(*options) == (2, "", f"error: --out {problem}\n")
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_a_link_for_a_checkpoint_stays_one_and_what_it_names_is_replaced(job):
    os.mkdir("models")
    os.symlink("models/first.pth", "best.pth")
    assert job()[0] == 0  # there is nothing yet where it points
    first = Path("models/first.pth").read_bytes()
    assert job("--seed", 2)[0] == 0
    assert os.path.islink("best.pth") and Path("models/first.pth").read_bytes() != first
    assert Path("best.previous.pth").read_bytes() == first and os.listdir("models") == ["first.pth"]


def test_an_audit_is_a_page_and_a_command_takes_paths_that_begin_with_a_dash(job):
    assert job("--audit", "a.csv") == (2, "", "error: --audit a.csv: is a web page; name it a.html\n")
    assert "predict.py test.txt --report report.html --model ./-o.pth\n" in job("--out=-o.pth")[1]


FOREIGN = {
    "sales.csv": ("--audit", "sales.html"),
    "sales.html": ("--audit", "sales.html"),
    "best.csv": (),
    "best.previous.csv": (),
    "best.train.txt": ("--train", "all.txt"),
    "best.test.previous.txt": ("--train", "all.txt"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_no_run_wrote_is_never_replaced_by_what_is_written_beside_a_checkpoint_or_a_page(job, name):
    shutil.copy("train.txt", "all.txt")
    Path("test.txt").unlink() if "all.txt" in FOREIGN[name] else None
    Path(name).write_text("# of my photos, for the summer\n" if "all.txt" in FOREIGN[name] else "month;sum\n1;200\n")
    before = {path: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    status, out, err = job(*FOREIGN[name])
    flag = FOREIGN[name][0] if "sales" in name else "--out"
    assert (status, out) == (2, "") and re.fullmatch(
        rf"error: {flag} {name}: is there already, and is not (an?|the) [\w' ]+; move it, or name another file\n", err
    )
    assert {path: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before


def test_what_a_run_wrote_beside_a_page_is_replaced_by_the_next(trained):
    for _ in range(2):
        assert trained("--audit", "look.html")[0] == 0
    Path("look.csv").touch()
    Path("look.html").write_bytes(b"")
    assert trained("--audit", "look.html")[0] == 0 and Path("look.html").stat().st_size > 1000
    assert STARTS["a page of ours"].match(page("A", "b", []).encode())
    status, _, err = trained("--out", "look.pth")  # whose figures would take the table's place
    assert status == 2 and err.startswith("error: --out look.csv: is there already, and is not a run's figures; ")


def test_an_audit_of_the_checkpoints_name_has_a_table_of_its_own(job):
    assert job("--out", "a.pth", "--audit", "a.html")[0] == 0
    assert Path("a.csv").read_text().startswith("epoch,") and Path("a.audit.csv").read_text().startswith("list,")
    assert "a.audit.csv" in Path("a.html").read_text()
    assert table_path(Path("b.html"), Path("a.pth")) == Path("b.csv")
    assert table_path(Path("a.previous.html"), Path("./a.pth")) == Path("a.previous.audit.csv")
    assert [output.path.name for output in audit_outputs(Path("a.html"), Path("a.pth"))] == ["a.html", "a.audit.csv"]


@pytest.mark.parametrize("cache", ["photos/kept", "photos", "photos/red/kept"])
def test_features_are_not_kept_among_the_photos(job, cache):
    os.mkdir("photos")
    for colour in ("red", "green", "blue"):
        os.rename(colour, f"photos/{colour}")
    why = f"--cache {cache}: lies in photos, among the photos; name a folder beside that"
    assert job("--train", "photos", "--cache", cache) == (2, "", f"error: {why}\n")
    assert not list(Path("photos").rglob("kept"))
    for _ in range(2):
        assert job("--train", "photos", "--cache", "photos-kept")[0] == 0


def test_two_writers_of_one_file_with_one_process_number_never_meet(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)
    target = tmp_path / "chunk.pt"
    assert temporary_path(target) != temporary_path(target)
    replace = os.replace

    def another_writes_first(source, place):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            save_together([(target, b"the other's")])
        replace(source, place)

    monkeypatch.setattr(os, "replace", another_writes_first)
    save_together([(target, b"ours")])
    assert target.read_bytes() == b"ours" and os.listdir(tmp_path) == ["chunk.pt"]


def test_files_that_belong_together_stay_the_old_ones_until_all_new_ones_are_on_the_disk(tmp_path):
    first, second = tmp_path / "first", tmp_path / "none" / "second"
    first.write_bytes(b"old")
    with pytest.raises(UserError, match="second: .*; what was saved before is intact"):
        save_together([(first, b"new"), (second, b"new")], backups=[first])
    assert first.read_bytes() == b"old" and os.listdir(tmp_path) == ["first"]
