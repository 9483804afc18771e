"""History: the header, a line per epoch, the last lines and the CSV."""

import os
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import answer, go, rows_of, same, weights_of

import train
from transfer.checkpoint import is_own, load_checkpoint
from transfer.distributed import run_id
from transfer.history import History, class_sizes
from transfer.inputs.lists import ImageList
from transfer.metrics import Metrics
from transfer.system.files import path_digest


@pytest.mark.usefixtures("tiny")
def test_the_header_and_the_last_lines_name_the_list_that_chose_the_epoch(colours, quick):
    for split, chosen, name in ((), "test.txt", "test"), (("--val-split", 0.25), "25% of train.txt", "val"):
        start = time.perf_counter()
        out = go("--epochs", 2, *split)
        lines, longest = out.splitlines(), time.perf_counter() - start + 0.05  # which may be rounding
        assert float(re.search(r"^saved     best\.pth and best\.csv in ([\d.]+) s$", out, re.MULTILINE)[1]) <= longest
        assert f"best      epoch chosen on {chosen}" in lines[:4]
        figure = r"accuracy \d+% of \d+ photos \(95% interval \d+ to \d+%\)"
        assert re.search(rf"^best      {name} {figure}, epoch \d \({re.escape(chosen)}\)$", out, re.MULTILINE)
        assert ("scored once" in out) == bool(split)
        columns = ["epoch", "train_loss", "train_accuracy", f"{name}_loss", f"{name}_accuracy", "lr", "best"]
        assert list(rows_of()[0]) == columns
        metadata = load_checkpoint(Path("best.pth"))[1]
        assert metadata["chosen_on"] == chosen
        assert metadata["accuracy"] == max(float(row[f"{name}_accuracy"]) for row in rows_of())
    assert "data      12 training and 12 test images of 3 classes: red 4, green 4, blue 4" in lines
    assert metadata["train_images"] == 12  # the head is trained again on those that chose the epoch


@pytest.mark.usefixtures("small", "tiny")
@pytest.mark.parametrize(("better", "images"), [(False, 12), (True, 9)])
def test_a_checkpoint_counts_the_images_that_its_own_head_was_trained_on(colours, monkeypatch, better, images):
    monkeypatch.setattr(History, "is_best", lambda history, _: len(history.rows) == 1 + 2 * better)  # of two and one
    out = go("--epochs", 2, "--val-split", 0.25, "--finetune-epochs", 1)
    assert ("trained again on all 12" in out) != better
    assert load_checkpoint(Path("best.pth"))[1]["train_images"] == images


def test_of_many_classes_the_header_names_the_first_the_smallest_and_the_largest():
    counts = [3, 3, 2, 9, 1, 4, 4]
    labels = torch.arange(7).repeat_interleave(torch.tensor(counts))
    image_list = ImageList("photos", [b"1.png"] * len(labels), labels.tolist(), range(len(labels)))
    data = SimpleNamespace(train=image_list, classes=["Apfel", "banana", "c\x1b", "D" * 40, "E" * 24, "f", "g"])
    words = f"7 classes: Apfel 3, banana 3, c\\x1b 2, ...; smallest {'E' * 24} 1, largest "
    assert class_sizes(data) == f"{words}{'D' * 23}… 9"
    data.train, data.classes = image_list.subset(torch.arange(22)), data.classes[:6]
    assert class_sizes(data).endswith(f"{'E' * 24} 1, f 4")  # of six there is room for all
    data.train, data.classes = image_list.subset(torch.arange(8)), data.classes[:3]
    assert class_sizes(data) == "3 classes: Apfel 3, banana 3, c\\x1b 2"


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


@pytest.mark.parametrize("classes", [3, 2])
def test_a_run_beside_another_of_the_same_name_keeps_both_models_and_says_so(job, monkeypatch, classes):
    lines = {name: Path(name).read_text() for name in ("train.txt", "test.txt")}
    for name, text in lines.items():
        Path(name).write_text("".join(line for line in text.splitlines(True) if int(line.split()[-1]) < classes))
    assert job("--seed", 5, "--out", "other.pth")[0] == 0
    other = Path("other.pth").read_bytes()
    for name, text in lines.items():
        Path(name).write_text(text)
    evaluated, evaluate = [], train.evaluate

    def watched(*args):
        evaluated.append(None)
        if len(evaluated) == 3:  # of three epochs, of which the first is the best
            shutil.copy("other.pth", "best.pth")
        return evaluate(*args)._replace(accuracy=0.9 - 0.1 * len(evaluated))

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", watched)
        status, _, err = job("--epochs", 3)
    words = (
        "another run has saved there too; its checkpoint is now best.previous.pth; give each run an --out of its own"
    )
    assert status == 0 and f"warning: best.pth: {words}\n" in err
    assert Path("best.previous.pth").read_bytes() == other
    metadata = load_checkpoint(Path("best.pth"))[1]
    assert len(metadata["classes"]) == 3 and metadata["epoch"] == 1
    assert job("--epochs", 1, "--out", "alone.pth")[0] == 0 and same(weights_of("alone.pth"), weights_of())


def test_a_checkpoint_that_is_removed_during_a_run_is_there_at_its_end(job, monkeypatch):
    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *args: Path("best.pth").unlink(missing_ok=True) or evaluate(*args))
    status, _, err = job("--epochs", 2)
    assert (status, "another run" in err, Path("best.pth").exists()) == (0, False, True)


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
    assert "epoch  train loss  train acc  test loss  test acc  test recall        lr\n    1 " in out
    assert re.search(r"^    2 .* 60\.00% +70\.00%  0\.005000  best$", out, re.MULTILINE)
    assert "best      test accuracy 60.00%, macro recall 70.00%, epoch 2 (held)\n" in out
    metadata = load_checkpoint(Path("best.pth"))[1]
    assert (metadata["epoch"], metadata["accuracy"], metadata["recall"]) == (2, 0.6, 0.7)
    assert Path("best.csv").read_text().splitlines()[0].endswith("test_accuracy,test_recall,lr,best")


@pytest.mark.parametrize("test", ["held", "held.lst", "./held.txt"])
@pytest.mark.usefixtures("tiny")
def test_the_printed_command_works_for_test_images_of_any_kind(uneven, quick, test):
    Path("names.txt").write_text("grün\nrot\n")
    if test != "held":
        lines = [
            f"held/{name}/{number}.png {label}\n" for label, name in enumerate(("green", "red")) for number in range(3)
        ]
        Path(test).write_text("".join(lines))
    out = go("--train", "photos", "--test", test, "--classes", "names.txt", "--epochs", 1)
    command = re.search(r"^next      python \S*predict\.py (.*)$", out, re.MULTILINE)[1]
    table, _ = answer(*command.split())
    accuracy = load_checkpoint(Path("best.pth"))[1]["accuracy"]
    assert f"accuracy  {accuracy:7.2%}  " in table and "rot  " in table
    assert Path("report.html").exists()


@pytest.mark.usefixtures("tiny")
def test_a_checkpoint_knows_again_which_lists_it_was_trained_and_chosen_on(colours, quick):
    go("--epochs", 1)
    metadata = load_checkpoint(Path("best.pth"))[1]
    assert metadata["trained_lists"] == [path_digest("./train.txt")]
    assert metadata["chosen_list"] == path_digest(colours / "test.txt")
    assert "folders" not in metadata and str(colours) not in str(metadata)
    go("--epochs", 1, "--val-split", 0.5)
    assert load_checkpoint(Path("best.pth"))[1]["chosen_list"] == path_digest("train.txt")
    os.unlink("test.txt")
    go("--epochs", 1, "--train", "train.txt")
    metadata = load_checkpoint(Path("best.pth"))[1]
    assert metadata["trained_lists"] == [path_digest("train.txt"), path_digest("best.train.txt")]
    assert metadata["chosen_list"] == path_digest("best.test.txt")


def test_of_epochs_with_equal_accuracy_the_one_with_the_lower_loss_is_the_best(colours, quick, monkeypatch):
    figures = [(1.08, 0.8), (0.9, 0.8), (0.95, 0.8), (0.5, 0.7), (0.9, 0.8)]
    coming = iter(figures)
    monkeypatch.setattr(train, "evaluate", lambda *_: Metrics(*next(coming), 0.5, 15))
    out = go("--epochs", 5)
    assert [row["best"] for row in rows_of()] == ["1", "1", "0", "0", "0"]
    assert load_checkpoint(Path("best.pth"))[1]["epoch"] == 2
    # Wilson, of 12 of 15.
    assert "\nbest      test accuracy 80% of 15 photos (95% interval 55 to 93%), epoch 2 (test.txt)\n" in out


@pytest.mark.parametrize(
    ("images", "words"), [(99, "accuracy 81% of 99 photos (95% interval 72 to 87%)"), (100, "accuracy 80.81%")]
)
def test_an_accuracy_of_few_photos_is_told_with_its_interval(images, words):
    assert History(Path("best.pth"), "test").describe(Metrics(1.0, 80 / 99, 0.5, images)) == words


@pytest.mark.parametrize(("lr", "warned"), [(5, True), (0.11, True), (0.1, False), (0.005, False)])
def test_a_very_large_rate_is_warned_of(job, lr, warned):
    status, _, err = job("--lr", lr)
    line = f"warning: --lr {lr} is very large, and the accuracy will be poor; the default is 0.005\n"
    assert status == 0 and (line in err) == warned


@pytest.mark.usefixtures("quick")
def test_a_restarted_attempt_replaces_what_its_run_saved_and_keeps_what_lay_there_before(trained, monkeypatch):
    kept, figures = Path("best.pth").read_bytes(), Path("best.csv").read_bytes()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # as torchrun has it where no --rdzv-id is given
    first = trained("--seed", 1)[1]
    assert "; kept as best.previous.pth\n" in first and Path("best.previous.pth").read_bytes() == kept
    again = trained("--seed", 1)[1]
    assert "replaces  best.pth of this run before it was restarted; best.previous.pth stays\n" in again
    assert (Path("best.previous.pth").read_bytes(), Path("best.previous.csv").read_bytes()) == (kept, figures)
    attempt = Path("best.pth").read_bytes()
    monkeypatch.setattr(os, "getppid", lambda: 1)  # another torchrun, later
    assert trained("--seed", 2)[0] == 0 and Path("best.previous.pth").read_bytes() == attempt


def test_an_attempt_is_one_of_this_run_by_its_torchrun_or_by_its_id_where_it_was_cut_short(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    alone = run_id()
    assert not is_own({"run": alone}, run_id())  # each lone process is a run of its own
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job/7")
    here = run_id()
    assert here == run_id() and is_own({"run": here, "temperature": 1.0}, here)
    elsewhere = f"{here.rpartition('/')[0]}/other-9-"
    assert is_own({"run": elsewhere}, here) and not is_own({"run": elsewhere, "temperature": 1.0}, here)
    assert not is_own({"run": "none/other-9-"}, "none/here-9-") and not is_own({}, here)
