"""Fine-tuning: what it changes, what it sees, when it is kept."""

import re
from pathlib import Path

import pytest
import torch
from conftest import BUNDLED, ROOT, go, rows_of, run_main, same, weights_of
from torch import nn

import predict
import train
from transfer.backbone import embed_in_order
from transfer.checkpoint import load_checkpoint
from transfer.lists import read_list

pytestmark = pytest.mark.usefixtures("tiny")


STAGES = {"layer4": ("layer4.",), "layer3": ("layer3.", "layer4."), "all": ("conv1.", "bn1.", "layer")}
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def script_accuracies(monkeypatch, *accuracies):
    """Let the evaluations give these accuracies, one after the other."""
    coming = iter(accuracies)
    monkeypatch.setattr(train, "evaluate", lambda model, batches: (1.0, next(coming)))


@pytest.mark.parametrize("stage", STAGES)
def test_fine_tuning_changes_the_named_stages_and_the_head_alone(few, monkeypatch, stage):
    script_accuracies(monkeypatch, 0.3, 0.6)
    go("--epochs", 1, "--finetune-epochs", 1, "--unfreeze", stage)
    before, after = train.build_model(3, None, seed=0).state_dict(), weights_of()
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    expected = {key for key in before if key.startswith((*STAGES[stage], "fc.")) and not key.endswith(BUFFERS)}
    assert changed == expected


def test_batch_norm_infers_and_only_the_tail_has_gradients_while_fine_tuning(few, monkeypatch):
    seen, step = [], torch.optim.Adam.step

    def spy(self, *args, **kwargs):
        seen.append({name for name, parameter in models[0].named_parameters() if parameter.grad is not None})
        assert not any(module.training for module in models[0].modules() if isinstance(module, nn.BatchNorm2d))
        return step(self, *args, **kwargs)

    models, build = [], train.build_model
    monkeypatch.setattr(train, "build_model", lambda *args: models.append(build(*args)) or models[0])
    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    go("--epochs", 1, "--finetune-epochs", 1, "--batch-size", 3)
    head = {"fc.weight", "fc.bias"}
    tail = {name for name, _ in models[0].named_parameters() if name.startswith("layer4.")}
    assert seen == [head, head, head | tail, head | tail]


def test_fine_tuning_is_off_unless_asked_for(few, quick, monkeypatch):
    monkeypatch.setattr(train.finetune, "prepare", lambda *args, **kwargs: pytest.fail("fine-tuned unasked"))
    go("--epochs", 3)
    plain, rows = weights_of(), rows_of()
    go("--epochs", 3, "--finetune-epochs", 0, "--unfreeze", "all", "--finetune-lr", 1)
    assert same(plain, weights_of()) and rows == rows_of()


def test_fine_tuning_starts_from_the_best_head_not_the_last(few, quick, monkeypatch):
    def train_one_epoch(model, batches, optimizer, epoch):
        if epoch == 5:
            heads.append((model.head.weight.clone(), weights_of()["fc.weight"]))
            return 1.0, 0.5
        return original(model, batches, optimizer, epoch)

    heads, original = [], train.train_one_epoch
    monkeypatch.setattr("transfer.finetune.embed_in_order", cheap_trunk(embed_in_order))
    monkeypatch.setattr(train, "train_one_epoch", train_one_epoch)
    script_accuracies(monkeypatch, 0.2, 0.9, 0.2, 0.2, 0.2)
    go("--epochs", 4, "--lr", 0.1, "--finetune-epochs", 1)
    ((start, saved),) = heads
    script_accuracies(monkeypatch, 0.2, 0.9)
    go("--epochs", 2, "--lr", 0.1)
    assert torch.equal(start, saved) and torch.equal(start, weights_of()["fc.weight"])


@pytest.mark.parametrize(("accuracy", "replaced"), [(0.5, False), (0.75, True)])
def test_best_pth_is_replaced_only_where_fine_tuning_beats_the_head(few, monkeypatch, accuracy, replaced):
    script_accuracies(monkeypatch, 0.5)
    go("--epochs", 1, "--out", "head.pth")
    script_accuracies(monkeypatch, 0.5, accuracy)
    out = go("--epochs", 1, "--finetune-epochs", 1)
    assert same(weights_of("head.pth"), weights_of()) != replaced
    assert [row["best"] for row in rows_of()] == ["1", str(int(replaced))]
    about = load_checkpoint(Path("best.pth"))[1]
    assert (about["accuracy"], about["epoch"]) == ((0.75, 2) if replaced else (0.5, 1))
    assert f"accuracy {about['accuracy']:.2%}, epoch {about['epoch']} (" in out


def test_epochs_count_on_and_each_part_has_its_own_rate_and_plateau(few, quick, monkeypatch):
    def train_one_epoch(model, batches, optimizer, epoch):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return 1.0, 0.5

    rates = []
    monkeypatch.setattr("transfer.finetune.embed_in_order", cheap_trunk(embed_in_order))
    monkeypatch.setattr(train, "train_one_epoch", train_one_epoch)
    script_accuracies(monkeypatch, 0.9, *[0.5] * 12)
    go("--epochs", 7, "--lr", 0.02, "--finetune-epochs", 6, "--finetune-lr", 0.003)
    assert [int(row["epoch"]) for row in rows_of()] == list(range(1, 14))
    # The head's rate halves after its fifth epoch: the fourth without gain. Fine-tuning counts from its own first.
    assert rates[:7] == [[0.02]] * 5 + [[0.01]] * 2
    assert rates[7:] == [[0.003, 0.002]] * 5 + [[0.0015, 0.001]]
    assert [float(row["lr"]) for row in rows_of()] == [each[0] for each in rates]


def cheap_trunk(original):
    """`embed_in_order` whose images reach fine-tuning as zeros."""

    def embed_in_order(module, dataset, rows, **how):
        if how.get("per_image") is None:
            return iter([(list(rows), torch.zeros(len(rows), 1), {})])
        return original(module, dataset, rows, **how)

    return embed_in_order


def test_an_epoch_of_fine_tuning_decodes_training_images_once_and_test_images_never_again(few, decoded):
    go("--epochs", 1, "--finetune-epochs", 3)
    assert decoded["train_0.png"] == decoded["train_1.png"] == 3 * (1 + 3)  # of three classes: the pass, each epoch
    assert decoded["test_0.png"] == decoded["test_1.png"] == 3 * (1 + 1)  # the pass and the trunk's output, once


@pytest.mark.parametrize("cache", [(), ("--cache", "kept")])
def test_fine_tuning_sees_fresh_views_and_the_evaluation_view_by_turns_with_and_without_a_cache(
    few, quick, monkeypatch, cache
):
    seen, original = [], train.Views

    def spy(photos, views, seed, by_turns=False):
        seen.append((photos.name, list(views), by_turns))
        return original(photos, views, seed, by_turns)

    monkeypatch.setattr(train, "Views", spy)
    monkeypatch.setattr("transfer.finetune.embed_in_order", cheap_trunk(embed_in_order))
    monkeypatch.setattr(train, "train_one_epoch", lambda *args: (1.0, 0.5))
    script_accuracies(monkeypatch, *[0.5] * 5)
    go("--epochs", 2, "--finetune-epochs", 3, "--views", 4, *cache)
    mixed = [(views, by_turns) for name, views, by_turns in seen if name == "train.txt"][-3:]
    assert mixed == [([0, 4], True), ([5, 0], True), ([0, 6], True)]


def test_by_turns_each_image_comes_in_one_of_the_views(few):
    photos, _ = read_list(Path("train.txt"), Path())
    mixed, all_views = train.Views(photos, [0, 4], 1, by_turns=True), train.Views(photos, [0, 4], 1)
    for index in range(len(photos)):
        assert torch.equal(mixed[index][1], all_views[index][1][index % 2 : index % 2 + 1])


@pytest.mark.parametrize("split", [(), ("--val-split", 0.5)])
def test_after_fine_tuning_predict_is_right_exactly_as_often_as_training_said(tmp_path, monkeypatch, split):
    monkeypatch.chdir(ROOT)
    for name, step in (("train", 4), ("test", 4)):
        lines = [line for line in (ROOT / f"{name}.txt").read_text().splitlines() if int(line.split()[-1]) < 4]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines[::step]))
    lists = ["--train", tmp_path / "train.txt", "--test", tmp_path / "test.txt", "--out", tmp_path / "best.pth"]
    # A rate at which the head learns nothing leaves the best epoch to fine-tuning.
    rates = ["--lr", 1e-9, "--finetune-lr", 1e-3]
    out = go(*lists, *rates, "--epochs", 1, "--finetune-epochs", 2, *split, weights=BUNDLED)
    about = load_checkpoint(tmp_path / "best.pth")[1]
    assert about["epoch"] > 1
    status, table, err = run_main(predict.main, tmp_path / "test.txt", "--model", tmp_path / "best.pth", "--workers", 0)
    assert status == 0, err
    percent, right, count = re.search(r"^accuracy +([\d.]+%)  (\d+) of (\d+)", table, re.MULTILINE).groups()
    if split:
        assert f"test      accuracy {percent}, scored once" in out
    else:
        assert about["accuracy"] == int(right) / int(count)
        assert f"best      test accuracy {percent}, epoch {about['epoch']} (" in out
