"""Architectures: each ResNet from the pass to the prediction, inferred from its weights alone."""

import os
import re
from pathlib import Path

import pytest
import torch
from conftest import BUNDLED, chunks_in, go, rows_of, run_main, same, weights_of
from PIL import Image
from torch import nn
from torchvision.models import get_model, get_model_weights

import predict
import train
from transfer.architectures import ARCHITECTURES, checkpoint_bytes, infer_arch, meta_state_dict
from transfer.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("tiny")

OTHERS = ARCHITECTURES[1:]


def calm(arch):
    """A network of random weights whose blocks add little to each other's: its features differ little by image."""
    torch.manual_seed(0)
    network = get_model(arch)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 0.5)
    return network


@pytest.fixture
def start(few):
    """A function that saves the random weights of an architecture in a working directory: the name of the file."""

    def save(arch):
        torch.save(calm(arch).state_dict(), f"{arch}.pth")
        return f"{arch}.pth"

    return save


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_an_architecture_is_inferred_from_its_weights_with_a_head_of_any_size_or_none_and_without_counts(arch):
    names = meta_state_dict(arch, classes=7).keys()
    assert (
        infer_arch(names)
        == arch
        == infer_arch(names, arch_asked="resnet18")
        == infer_arch(names, arch_asked="resnet101")
    )
    assert infer_arch([name for name in names if not name.startswith("fc.") and "num_batches" not in name]) == arch


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_of_damaged_weights_the_nearest_architecture_is_inferred_unless_one_is_asked_for(arch):
    for lost in ("conv1.", "layer1.", "layer4."):
        names = [name for name in meta_state_dict(arch) if not name.startswith(lost)]
        assert infer_arch(names) == arch and infer_arch(names, arch_asked="resnet34") == "resnet34"


@pytest.mark.parametrize("arch", ["resnet34", "resnet50"])
def test_another_architecture_trains_and_predicts_what_plain_torchvision_does_and_needs_no_metadata(start, arch):
    file = start(arch)
    out = go("--arch", arch, "--epochs", 2, "--views", 2, "--precision", "float32", weights=file)
    assert f"backbone  ResNet-{arch.removeprefix('resnet')}, {file}\n" in out
    model, metadata = load_checkpoint(Path("best.pth"))
    assert (metadata["arch"], metadata["recipe"]["arch"], metadata["classes"]) == (arch, arch, ["red", "green", "blue"])
    saved, given = weights_of(), weights_of(file)
    assert all(torch.equal(saved[key], given[key]) for key in saved if not key.startswith("fc."))
    assert os.path.getsize("best.pth") == pytest.approx(checkpoint_bytes(arch, 3), rel=0.01)

    plain = get_model(arch, num_classes=3)
    plain.load_state_dict(saved)
    with Image.open("green/test_0.png") as image:
        views = train.draw_views(image, [0], 0)
    images = get_model_weights(arch).DEFAULT.transforms(crop_size=64, resize_size=64)(views.permute(0, 3, 1, 2))
    with torch.inference_mode():
        logits = plain.eval()(images)[0]
        assert torch.allclose(model(images)[0], logits, rtol=1e-4, atol=1e-4)
    classifier = predict.load("best.pth", "cpu")
    probs = dict(predict.predict(classifier, ["green/test_0.png"])[0])
    assert [probs[each] for each in classifier.classes] == pytest.approx(logits.softmax(0).tolist(), abs=1e-4)
    torch.save(dict(saved), "bare.pth")
    bare, metadata = load_checkpoint(Path("bare.pth"))
    assert same(bare.state_dict(), saved) and metadata == {"arch": arch, "classes": ["0", "1", "2"]}


@pytest.mark.parametrize("arch", ["resnet101"])  # resnet152 has the same parts, and takes longer
def test_a_larger_architecture_trains_and_predicts_too(start, arch):
    go("--arch", arch, "--epochs", 1, "--views", 1, weights=start(arch))
    status, out, err = run_main(predict.main, "test.txt", "--workers", 0)
    assert status == 0, err
    accuracy = float(rows_of()[0]["test_accuracy"])
    assert re.search(rf"^accuracy +{accuracy:.2%}  ", out, re.MULTILINE)


def test_an_architecture_named_in_the_metadata_is_not_believed(start):
    state = get_model("resnet34", num_classes=2).state_dict()
    state._metadata["train.py"] = {"format": 1, "classes": ["a", "b"], "arch": "resnet152"}
    torch.save(state, "liar.pth")
    assert load_checkpoint(Path("liar.pth"))[1] == {"format": 1, "classes": ["a", "b"], "arch": "resnet34"}


@pytest.mark.parametrize(("given", "asked"), [("resnet50", "resnet18"), ("resnet18", "resnet50")])
def test_weights_of_another_architecture_are_refused_with_the_flag_that_fits(start, given, asked):
    file = BUNDLED if given == "resnet18" else start(given)
    status, out, err = run_main(train.main, "--weights", file, "--arch", asked)
    names = [f"a ResNet-{arch.removeprefix('resnet')}" for arch in (given, asked)]
    assert (status, out) == (2, "")
    assert err == f"error: {file}: is {names[0]}, not {names[1]}; add --arch {given}\n"
    assert not Path("best.pth").exists()


def test_the_error_of_a_damaged_file_of_another_architecture_names_its_own_weights(start):
    state = weights_of(start("resnet50"))
    state["bn1.bias"][3] = torch.nan
    torch.save(state, "damaged.pth")
    status, _, err = run_main(train.main, "--weights", "damaged.pth")
    reason = "does not fit a ResNet-50: bn1.bias has values that are not finite; give one made for resnet18"
    assert (status, err) == (2, f"error: damaged.pth: {reason}\n")
    del state["layer4.0.conv3.weight"], state["bn1.bias"]
    torch.save(state, "damaged.pth")
    status, _, err = run_main(predict.main, "red/test_0.png", "--model", "damaged.pth")
    reason = "does not fit a ResNet-50: no bn1.bias, no layer4.0.conv3.weight; give one made for resnet50"
    assert (status, err) == (2, f"error: damaged.pth: {reason}\n")


@pytest.mark.parametrize("arch", OTHERS)
def test_offline_another_architecture_than_the_bundled_one_says_what_to_fetch_and_where_to_put_it(few, arch):
    status, out, err = run_main(train.main, "--arch", arch)
    weights = get_model_weights(arch).DEFAULT
    size = {"resnet34": 83, "resnet50": 98, "resnet101": 171, "resnet152": 230}[arch]
    place = Path(os.environ["TORCH_HOME"], "hub/checkpoints", os.path.basename(weights.url))
    waiting, line = err.splitlines()
    assert (status, out) == (2, "")
    assert waiting == f"downloading ImageNet weights ({size} MB) from download.pytorch.org ..."
    fix = f"fetch {weights.url} elsewhere and put it at {place}, or give it as --weights FILE"
    assert re.fullmatch(rf"error: ImageNet weights can't be downloaded \(.*refused.*\); {re.escape(fix)}", line)
    assert not Path("best.pth").exists()


def test_weights_that_were_put_where_the_message_says_are_used(start, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", os.path.abspath("home"))
    weights = get_model_weights("resnet34").DEFAULT
    os.makedirs("home/hub/checkpoints")
    os.rename(start("resnet34"), f"home/hub/checkpoints/{os.path.basename(weights.url)}")
    status, out, err = run_main(train.main, "--arch", "resnet34", "--epochs", 1, "--views", 1, "--workers", 0)
    assert (status, err) == (0, "") and f"backbone  ResNet-34, ImageNet ({weights})\n" in out


def test_fine_tuning_a_resnet50_trains_its_layer4_and_predict_is_as_often_right(start):
    file = start("resnet50")
    # A rate at which the head learns nothing leaves the best epoch to fine-tuning.
    rates = ("--lr", 1e-9, "--finetune-lr", 1e-3)
    go("--arch", "resnet50", "--epochs", 1, "--finetune-epochs", 6, *rates, weights=file)
    metadata = load_checkpoint(Path("best.pth"))[1]
    assert metadata["epoch"] > 1
    before, after = weights_of(file), weights_of()
    changed = {
        key.split(".")[0] for key in after if not key.startswith("fc.") and not torch.equal(after[key], before[key])
    }
    assert changed == {"layer4"}
    status, out, err = run_main(predict.main, "test.txt", "--workers", 0)
    assert status == 0, err
    assert f"accuracy  {metadata['accuracy']:7.2%}  " in out


def test_each_architecture_keeps_features_of_its_own(few):
    sizes = {}
    for arch in ("resnet18", "resnet50"):
        before = set(chunks_in("kept"))
        go("--arch", arch, "--epochs", 1, "--views", 1, "--cache", "kept")
        sizes[arch] = sorted(path.stat().st_size for path in set(chunks_in("kept")) - before)
        plain = weights_of()
        go("--arch", arch, "--epochs", 1, "--views", 1)
        assert same(plain, weights_of())
    for arch, kilobytes in (("resnet18", 2), ("resnet50", 8)):
        assert len(sizes[arch]) == 2 and all(0 <= size - 6 * kilobytes * 1024 < 3000 for size in sizes[arch])
