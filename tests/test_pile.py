"""Piles: what is labelled already is left out, by path and by bytes; each content is there once."""

import io
import os
import shutil
from pathlib import Path

import pytest
from conftest import COLOURS, save_photo

from transfer.inputs import pile
from transfer.inputs.pile import first_copies, read_pile
from transfer.inputs.sources import read_sources
from transfer.system.console import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a pile of three photos."""
    monkeypatch.chdir(tmp_path)
    for colour in COLOURS:
        save_photo(f"pile/{colour}.png", colour)
    return tmp_path


def pile_of(*arguments, leave_out=()):
    sources = read_sources(arguments, Path(), False)
    return [os.fsdecode(path) for path in read_pile(sources, read_sources(leave_out, Path(), False)).each_path()]


def test_what_is_labelled_already_is_left_out_by_path_and_by_bytes(folder, capsys):
    Path("labelled").mkdir()
    shutil.copy("pile/red.png", "labelled/other name.png")
    Path("train.txt").write_text("./pile/green.png 1\nnowhere.png 0\n")
    assert pile_of("pile") == ["pile/blue.png", "pile/green.png", "pile/red.png"]
    assert capsys.readouterr().err == ""
    assert pile_of("pile", leave_out=["train.txt", "labelled"]) == ["pile/blue.png"]
    assert capsys.readouterr().err == "left out 2 in --except, 0 copies; 1 photo to choose from\n"


def test_of_copies_and_of_a_path_named_twice_the_first_is_there(folder, capsys):
    shutil.copy("pile/red.png", "pile/zzz.png")
    assert pile_of("pile", "pile/blue.png") == ["pile/blue.png", "pile/green.png", "pile/red.png"]
    assert capsys.readouterr().err == "left out 0 in --except, 2 copies; 3 photos to choose from\n"


def test_empty_and_missing_files_are_no_copies_of_each_other(folder):
    paths = [b"empty", b"none", b"empty too", b"none either", b"none", b"nul\0", b"pile"]
    Path("empty").touch()
    Path("empty too").touch()
    assert first_copies(paths) == [0, 1, 2, 3, 1, 5, 6]


def test_only_what_may_be_a_copy_is_read(folder, monkeypatch):
    contents = {"a": b"1" * 10, "b": b"2" * 10, "c": b"3" * 11, "d": b"1" * 70_000, "e": b"1" * 69_999 + b"2"}
    for name, content in contents.items():
        Path(name).write_bytes(content)
    read = []

    def open_file(path):
        read.append(path)
        return io.BytesIO(Path(os.fsdecode(path)).read_bytes())

    monkeypatch.setattr(pile, "open_regular", open_file)
    assert first_copies([name.encode() for name in contents]) == [0, 1, 2, 3, 4]
    assert sorted(read) == [b"a", b"b", b"d", b"d", b"e", b"e"]  # these two also to the end


def test_where_no_photo_is_left_that_is_an_error(folder):
    with pytest.raises(UserError, match=r"no photo to label: all are left out \(3 in --except, 0 copies\)"):
        pile_of("pile", leave_out=["pile"])
