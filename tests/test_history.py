"""History: the header, a line per epoch, the last lines and the CSV."""

import os
import re
from pathlib import Path

import pytest
from conftest import go, rows_of

import train
from transfer.checkpoint import load_checkpoint
from transfer.metrics import Metrics


@pytest.mark.usefixtures("tiny")
def test_the_header_and_the_last_lines_name_the_list_that_chose_the_epoch(colours, quick):
    for split, chosen, name in ((), "test.txt", "test"), (("--val-split", 0.25), "25% of train.txt", "val"):
        out = go("--epochs", 2, *split)
        lines = out.splitlines()
        assert f"best      epoch chosen on {chosen}" in lines[:4]
        assert re.search(rf"^best      {name} accuracy [\d.]+%, epoch \d \({re.escape(chosen)}\)$", out, re.MULTILINE)
        assert ("scored once" in out) == bool(split)
        columns = ["epoch", "train_loss", "train_accuracy", f"{name}_loss", f"{name}_accuracy", "lr", "best"]
        assert list(rows_of()[0]) == columns
        metadata = load_checkpoint(Path("best.pth"))[1]
        assert metadata["chosen_on"] == chosen
        assert metadata["accuracy"] == max(float(row[f"{name}_accuracy"]) for row in rows_of())
    assert "data      12 training and 12 test images of 3 classes" in lines
    assert metadata["train_images"] < 12  # the rest chose the epoch


def test_a_run_names_what_it_replaces_and_keeps_it(trained):
    first = Path("best.pth").read_bytes()
    metadata = load_checkpoint(Path("best.pth"))[1]
    rows = Path("best.csv").read_text()
    status, out, _ = trained("--seed", 3)
    existing = f"best.pth, {metadata['accuracy']:.2%} on test.txt, {metadata['date']}"
    assert status == 0 and f"replaces  {existing}; kept as best.previous.pth" in out.splitlines()[:6]
    assert Path("best.previous.pth").read_bytes() == first != Path("best.pth").read_bytes()
    assert Path("best.previous.csv").read_text() == rows
    Path("best.pth").write_bytes(b"a poem")
    status, out, _ = trained()
    assert status == 0 and "replaces  best.pth (no checkpoint of ours); kept as best.previous.pth" in out
    assert Path("best.previous.pth").read_bytes() == b"a poem"


def test_the_header_names_the_flag_where_classes_are_very_unequal_and_only_there(uneven, quick):
    line = "          3 of green, 33 of red: --balance weighs all classes alike\n"
    assert line in go(*uneven)
    assert "--balance" not in go(*uneven, "--balance")
    for number in range(30, 33):
        os.unlink(f"photos/red/{number}.png")
    assert "--balance" not in go(*uneven)


def test_balance_chooses_the_epoch_by_macro_recall_and_prints_it(uneven, quick, monkeypatch):
    figures = iter([Metrics(1.0, 0.9, 0.5), Metrics(1.0, 0.6, 0.7)])
    monkeypatch.setattr(train, "evaluate", lambda *_: next(figures))
    out = go(*uneven, "--balance")
    assert "epoch  train loss  train acc  test loss  test acc  test recall        lr\n" in out
    assert re.search(r"^    2 .* 60\.00% +70\.00%  0\.005000  best$", out, re.MULTILINE)
    assert "best      test accuracy 60.00%, macro recall 70.00%, epoch 2 (held)\n" in out
    metadata = load_checkpoint(Path("best.pth"))[1]
    assert (metadata["epoch"], metadata["accuracy"], metadata["recall"]) == (2, 0.6, 0.7)
    assert Path("best.csv").read_text().splitlines()[0].endswith("test_accuracy,test_recall,lr,best")
