"""Fine-tuning: what it changes, what it sees, when it is kept."""

import math
import os
import re
from pathlib import Path

import pytest
import torch
from conftest import BUNDLED, ROOT, go, rows_of, run_main, same, weights_of
from PIL import Image
from torch import nn
from torchvision.models import VisionTransformer

import predict
import train
from transfer.architectures import new_network, skeleton
from transfer.backbone import backbone_of, embed_dataset, inference_copy
from transfer.checkpoint import load_checkpoint
from transfer.device import Compute
from transfer.features import Features, Split
from transfer.finetune import FeatureMapLoader, Network, as_predicted, first_unfrozen, one_cycle, split_network
from transfer.inputs.lists import read_list
from transfer.metrics import Metrics

pytestmark = pytest.mark.usefixtures("tiny")


STAGES = {"layer4": ("layer4.",), "layer3": ("layer3.", "layer4."), "all": ("conv1.", "bn1.", "layer")}
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def script_accuracies(monkeypatch, *accuracies):
    """Let the evaluations give these accuracies, one after the other."""
    coming = iter(accuracies)
    monkeypatch.setattr(train, "evaluate", lambda model, loader: Metrics(1.0, next(coming), 0.0))


@pytest.mark.parametrize("stage", STAGES)
def test_fine_tuning_changes_the_named_stages_and_the_head_alone(few, monkeypatch, stage):
    script_accuracies(monkeypatch, 0.3, 0.6)
    go("--epochs", 1, "--finetune-epochs", 1, "--unfreeze", stage)
    before, after = train.build_model("resnet18", 3, None, seed=0).state_dict(), weights_of()
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    expected = {key for key in before if key.startswith((*STAGES[stage], "fc.")) and not key.endswith(BUFFERS)}
    assert changed == expected


@pytest.mark.parametrize(
    ("arch", "quarter", "half"),
    [
        ("resnet18", "layer4", "layer3"),
        ("wide_resnet50_2", "layer4", "layer3"),
        ("mobilenet_v3_large", "features.12", "features.8"),
        ("efficientnet_b0", "features.6", "features.4"),
        ("convnext_tiny", "features.6", "features.4"),
        ("swin_t", "features.6", "features.4"),
        ("vit_b_16", "encoder.layers.encoder_layer_9", "encoder.layers.encoder_layer_6"),
        ("regnet_y_800mf", "trunk_output.block4", "trunk_output.block3"),
        ("densenet121", "features.transition3", "features.transition2"),
        ("vgg16", "features.21", "features.14"),
    ],
)
def test_of_networks_without_stages_of_these_names_the_last_quarter_or_half_of_the_blocks_is_trained(
    arch, quarter, half
):
    backbone = backbone_of(skeleton(arch))
    assert [first_unfrozen(backbone, stage) for stage in ("layer4", "layer3")] == [quarter, half]


def small_vit():
    return VisionTransformer(image_size=64, patch_size=32, num_layers=8, num_heads=2, hidden_dim=32, mlp_dim=64)


@pytest.mark.parametrize("arch", ["vit", "googlenet", "shufflenet_v2_x0_5", "densenet121", "swin_t"])
def test_a_network_is_the_same_cut_in_two(arch):
    model = small_vit() if arch == "vit" else new_network(arch)
    backbone, images = backbone_of(model.eval()), torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        features = backbone(images)
        for stage in ("layer4", "layer3"):
            trunk, tail = split_network(backbone, first_unfrozen(backbone, stage))
            assert torch.equal(tail(trunk(images)), features)
            own = {id(parameter) for parameter in backbone.parameters()}
            parts = [id(parameter) for part in (trunk, tail) for parameter in part.parameters()]
            assert len(parts) == len(set(parts)) and set(parts) == own


def test_another_network_is_fine_tuned_from_its_block_on_and_predict_is_as_often_right(few, monkeypatch):
    script_accuracies(monkeypatch, 0.3, 0.6)
    go("--arch", "mobilenet_v3_small", "--epochs", 1, "--finetune-epochs", 1)
    before, after = train.build_model("mobilenet_v3_small", 3, None, seed=0).state_dict(), weights_of()
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    tail = tuple(f"features.{number}." for number in range(9, 13)) + ("classifier.",)
    # With random weights some gradients of so deep a network are zero.
    assert changed < {key for key in before if key.startswith(tail) and not key.endswith(BUFFERS)}
    assert {"features.9.block.0.0.weight", "features.12.0.weight", "classifier.3.weight"} <= changed
    monkeypatch.undo()
    monkeypatch.chdir(few)
    rates = ("--lr", 1e-9, "--finetune-lr", 1e-3)  # at which the head learns nothing
    go("--arch", "mobilenet_v3_small", "--size", 64, "--epochs", 1, "--finetune-epochs", 3, *rates)
    metadata = load_checkpoint(Path("best.pth"))[1]
    status, out, err = run_main(predict.main, "test.txt", "--workers", 0)
    assert status == 0 and f"accuracy  {metadata['accuracy']:7.2%}  " in out, err


def test_evaluation_while_fine_tuning_has_predictions_own_bits_where_autocast_has_others():
    torch.manual_seed(0)
    tail = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 16), nn.LayerNorm(16))
    nn.init.normal_(tail[3].weight)
    network = Network(tail, nn.Linear(16, 4), Compute(torch.device("cpu"), torch.bfloat16))
    maps = torch.randn(5, 3, 8, 8).to(torch.bfloat16, memory_format=torch.channels_last)
    with torch.inference_mode():
        trained, evaluated = network(maps), as_predicted(network)(maps)
        predicted = network.head(inference_copy(tail, network.compute)(maps).float())
    assert torch.equal(evaluated, predicted) and not torch.equal(trained, predicted)
    assert tail[3].weight.dtype == torch.float32 and as_predicted(network.head) is network.head


def test_batch_norm_infers_and_only_the_tail_has_gradients_while_fine_tuning(few, monkeypatch):
    seen, step = [], torch.optim.Adam.step

    def spy(self, *args, **kwargs):
        seen.append({name for name, parameter in models[0].named_parameters() if parameter.grad is not None})
        assert not any(module.training for module in models[0].modules() if isinstance(module, nn.BatchNorm2d))
        return step(self, *args, **kwargs)

    models, build = [], train.build_model
    monkeypatch.setattr(train, "build_model", lambda *args: models.append(build(*args)) or models[0])
    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    go("--epochs", 1, "--finetune-epochs", 1, "--batch-size", 3, "--views", 2)
    head = {"fc.weight", "fc.bias"}
    tail = {name for name, _ in models[0].named_parameters() if name.startswith("layer4.")}
    assert seen == [head] * 4 + [head | tail] * 2  # the head has each image in two views


def test_fine_tuning_is_off_unless_asked_for(few, quick, monkeypatch):
    monkeypatch.setattr(train, "prepare_finetuning", lambda *args, **kwargs: pytest.fail("fine-tuned unasked"))
    go("--epochs", 3)
    plain, rows = weights_of(), rows_of()
    go("--epochs", 3, "--finetune-epochs", 0, "--unfreeze", "all", "--finetune-lr", 1)
    assert same(plain, weights_of()) and rows == rows_of()


def test_fine_tuning_starts_from_an_early_head_and_best_pth_keeps_the_best(few, quick, monkeypatch):
    def train_one_epoch(model, *args, epoch, **options):
        if epoch == 9:
            start.append(model.head.weight.clone())
            return Metrics(1.0, 0.5, 0.5)
        return original(model, *args, epoch=epoch, **options)

    start, original = [], train.train_one_epoch
    monkeypatch.setattr("transfer.finetune.embed_dataset", cheap_trunk(embed_dataset))
    monkeypatch.setattr("transfer.calibration.fit_temperature", lambda logits, labels: 1.0)
    monkeypatch.setattr(train, "train_one_epoch", train_one_epoch)
    script_accuracies(monkeypatch, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.2)
    go("--epochs", 8, "--lr", 0.1, "--finetune-epochs", 1)
    best = weights_of()["fc.weight"]
    script_accuracies(monkeypatch, 0.1, 0.2, 0.3, 0.4, 0.5)
    go("--epochs", train.EARLY_EPOCHS, "--lr", 0.1)
    assert torch.equal(start[0], weights_of()["fc.weight"])
    script_accuracies(monkeypatch, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    go("--epochs", 8, "--lr", 0.1)
    assert torch.equal(best, weights_of()["fc.weight"])


@pytest.mark.parametrize(("accuracy", "replaced"), [(0.5, False), (0.75, True)])
def test_best_pth_is_replaced_only_where_fine_tuning_beats_the_head(few, small, monkeypatch, accuracy, replaced):
    script_accuracies(monkeypatch, 0.5)
    go("--epochs", 1, "--out", "head.pth")
    script_accuracies(monkeypatch, 0.5, accuracy)
    out = go("--epochs", 1, "--finetune-epochs", 1)
    assert same(weights_of("head.pth"), weights_of()) != replaced
    assert [row["best"] for row in rows_of()] == ["1", str(int(replaced))]
    metadata = load_checkpoint(Path("best.pth"))[1]
    assert (metadata["accuracy"], metadata["epoch"]) == ((0.75, 2) if replaced else (0.5, 1))
    assert f"accuracy {metadata['accuracy']:.2%}, epoch {metadata['epoch']} (" in out


def test_epochs_count_on_and_each_part_has_its_own_rates(few, quick, monkeypatch):
    def train_one_epoch(model, criterion, optimizer, loader, *, epoch, batch_scheduler):
        rates.append([group["lr"] for group in optimizer.param_groups])
        for _ in loader if epoch > 7 else ():
            optimizer.step()  # which has nothing to do, and the schedule counts
            batch_scheduler.step()
        return Metrics(1.0, 0.5, 0.5)

    rates = []
    monkeypatch.setattr("transfer.finetune.embed_dataset", cheap_trunk(embed_dataset))
    monkeypatch.setattr(train, "train_one_epoch", train_one_epoch)
    script_accuracies(monkeypatch, 0.9, *[0.5] * 12)
    go("--epochs", 7, "--lr", 0.02, "--finetune-epochs", 6, "--finetune-lr", 0.003)
    assert [int(row["epoch"]) for row in rows_of()] == list(range(1, 14))
    # The head's rate halves after its fifth epoch: the fourth without gain.
    assert rates[:7] == [[0.02]] * 5 + [[0.01]] * 2
    # One step an epoch: a fifth of six is one, at the peak; then along a cosine, of which a sixth is left at the end.
    shares = [1, *((1 + math.cos(math.pi * step / 6)) / 2 for step in range(1, 6))]
    expected = [[0.003 * share, 0.004 * share] for share in shares]
    assert all(found == pytest.approx(wanted) for found, wanted in zip(rates[7:], expected, strict=True))
    assert [float(row["lr"]) for row in rows_of()] == [each[0] for each in rates]


def cheap_trunk(original):
    """`embed_dataset` whose images reach fine-tuning as zeros, of which layer4 makes nothing."""

    def embed_dataset(module, dataset, rows, *, per_image=1, **_):
        return iter([(list(rows), torch.zeros(len(rows), per_image, 256, 1, 1).squeeze(1), {})])

    return embed_dataset


def test_fine_tuning_decodes_each_image_once_where_its_maps_fit_and_once_an_epoch_where_they_do_not(
    few, small, decoded, monkeypatch
):
    out = go("--epochs", 1, "--finetune-epochs", 3)
    assert "finetune  layer4; 0.0 GB of memory (" in out
    # Of three classes: the pass and the maps, and of the first image of each list once more, to measure them.
    assert decoded == {"train_0.png": 7, "train_1.png": 6, "test_0.png": 7, "test_1.png": 6}
    kept, rows = weights_of(), rows_of()
    decoded.clear()
    monkeypatch.setattr("transfer.finetune.free_memory", lambda: 1000)
    out = go("--epochs", 1, "--finetune-epochs", 3)
    assert "finetune  layer4; slow, since it would need 0.0 GB of memory (0.0 GB free)" in out
    tuned = any(row["best"] == "1" for row in rows[1:])  # then the temperature asks once more
    assert decoded["train_1.png"] == 3 * (1 + 3) and decoded["test_1.png"] == 3 * (1 + 3 + tuned)
    assert same(kept, weights_of()) and rows == rows_of()


@pytest.mark.parametrize("keep", [True, False])
def test_evaluation_view_and_mirror_image_come_by_turns(few, keep):
    image_list, _ = read_list(Path("train.txt"), Path())
    dataset, rows = train.ImageDataset(image_list, [0, 1], 0), torch.tensor([4, 1, 2])
    # A red corner, so that a mirror image shows.
    for row in rows.tolist():
        image = Image.new("RGB", (64, 64), (0, 0, 10 * row))
        image.paste((255, 0, 0), (0, 0, 32, 64))
        image.save(os.fsdecode(image_list.path(row)))
    split = Split(dataset, Features([torch.zeros(6, 2, 1)], 6, image_list.labels).only(rows))
    options = {"compute": Compute(torch.device("cpu"), torch.float32), "batch_size": 2, "keep": keep}
    evaluated, shuffled = (FeatureMapLoader(nn.Identity(), split, **options, shuffle_seed=seed) for seed in (None, 0))
    order = torch.Generator().manual_seed(0)
    for epoch in range(3):
        for loader, places in ((evaluated, torch.arange(3)), (shuffled, torch.randperm(3, generator=order))):
            loader.set_epoch(epoch)
            maps, labels = zip(*loader, strict=True)
            assert (
                len(labels) == len(loader) == 2
                and torch.cat(labels).tolist() == image_list.labels[rows[places]].tolist()
            )
            turned = (torch.cat(maps)[:, 0, 32, 60] > 0).tolist()  # the red is on the right
            assert turned == [(row + epoch) % 2 == 1 for row in rows[places].tolist()]


@pytest.mark.parametrize(("views", "expected"), [(1, {0}), (2, {0, 1}), (4, {0, 1})])
def test_fine_tuning_trains_on_no_view_that_was_not_asked_for(few, small, monkeypatch, views, expected):
    drawn, draw = set(), train.draw_views
    script_accuracies(monkeypatch, 0.3, 0.6)

    def fine_tune(*args, **kwargs):
        monkeypatch.setattr(
            train,
            "draw_views",
            lambda image, views, *rest, **options: drawn.update(views) or draw(image, views, *rest, **options),
        )
        prepare(*args, **kwargs)
        raise KeyboardInterrupt

    prepare = train.prepare_finetuning
    monkeypatch.setattr(train, "prepare_finetuning", fine_tune)
    lists = "--weights", "none", "--workers", 0, "--epochs", 1, "--finetune-epochs", 1
    assert run_main(train.main, *lists, "--views", views)[0] == 130
    assert drawn == expected


@pytest.mark.parametrize("steps", [1, 2, 5, 80])
def test_one_cycle_rises_for_a_fifth_falls_and_always_trains(steps):
    weights = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weights], lr=2.0)
    schedule, rates = one_cycle(optimizer, steps), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    peak = max(1, round(steps / 5)) - 1
    assert rates[peak] == max(rates) == 2 and min(rates) > 0
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 0.01 or steps < 80


def test_of_one_view_each_images_come_in_the_next_view_each(few):
    photos, _ = read_list(Path("train.txt"), Path())
    mixed, all_views = train.ImageDataset(photos, [0, 4], 1, one_view_each=True), train.ImageDataset(photos, [0, 4], 1)
    for index in range(len(photos)):
        assert torch.equal(mixed[index][1], all_views[index][1][index % 2 : index % 2 + 1])


@pytest.mark.parametrize("split", [(), ("--val-split", 0.5)])
def test_after_fine_tuning_predict_has_exactly_the_accuracy_that_training_printed(tmp_path, monkeypatch, split):
    monkeypatch.chdir(ROOT)
    for name, step in (("train", 4), ("test", 4)):
        lines = [line for line in (ROOT / f"{name}.txt").read_text().splitlines() if int(line.split()[-1]) < 4]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines[::step]))
    lists = ["--train", tmp_path / "train.txt", "--test", tmp_path / "test.txt", "--out", tmp_path / "best.pth"]
    # A rate at which the head learns nothing leaves the best epoch to fine-tuning.
    rates = ["--lr", 1e-9, "--finetune-lr", 1e-3]
    out = go(*lists, *rates, "--epochs", 1, "--finetune-epochs", 2, *split, weights=BUNDLED)
    metadata = load_checkpoint(tmp_path / "best.pth")[1]
    assert metadata["epoch"] > 1
    status, table, err = run_main(predict.main, tmp_path / "test.txt", "--model", tmp_path / "best.pth", "--workers", 0)
    assert status == 0, err
    right, count = re.search(r"^accuracy +[\d.]+%  (\d+) of (\d+)", table, re.MULTILINE).groups()
    figure = f"accuracy {int(right) / int(count):.0%} of {count} photos "
    if split:
        assert re.search(rf"^test      {figure}.*, scored once$", out, re.MULTILINE)
    else:
        assert metadata["accuracy"] == int(right) / int(count)
        assert re.search(rf"^best      test {figure}.*, epoch {metadata['epoch']} \(", out, re.MULTILINE)
