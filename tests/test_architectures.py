"""Architectures: torchvision's classifiers from the pass to the prediction, inferred from their weights alone."""

import os
import re
from pathlib import Path

import pytest
import torch
from conftest import BUNDLED, MAKE_TRANSFORMS, chunks_in, go, rows_of, run_main, same, weights_of
from PIL import Image
from torch import nn
from torchvision.models import get_model, get_model_weights

import predict
import train
from transfer.architectures import (
    STEMS,
    backbone_shapes,
    check_arch,
    checkpoint_bytes,
    families,
    head_name,
    head_of,
    head_prefix,
    infer_arch,
    meta_state_dict,
    preprocessing,
    skeleton,
)
from transfer.backbone import backbone_of, embed
from transfer.checkpoint import load_checkpoint
from transfer.device import pick_compute
from transfer.system.flags import parse_train_args

pytestmark = pytest.mark.usefixtures("tiny")

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
FAMILIES = (
    *("mobilenet_v3_small", "efficientnet_b0", "convnext_tiny", "swin_t", "vit_b_32", "googlenet", "mnasnet0_5"),
)


def calm(arch):
    """A network of random weights whose blocks add little to each other's: its features differ little by image."""
    torch.manual_seed(0)
    network = plain_network(arch)
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


@pytest.mark.parametrize("arch", RESNETS)
def test_an_architecture_is_inferred_from_its_weights_with_a_head_of_any_size_or_none_and_without_counts(arch):
    state = meta_state_dict(arch, classes=7)
    assert infer_arch(state) == arch == infer_arch(state, "resnet18") == infer_arch(state, "resnet101", "resnet34")
    assert infer_arch({key: state[key] for key in state if not key.startswith("fc.") and "batches" not in key}) == arch


@pytest.mark.parametrize("arch", RESNETS)
def test_of_damaged_weights_the_nearest_architecture_is_inferred_unless_one_is_asked_for(arch):
    for lost in ("conv1.", "layer1.", "layer4."):
        state = {key: value for key, value in meta_state_dict(arch).items() if not key.startswith(lost)}
        assert infer_arch(state) == arch and infer_arch(state, "resnet34") == "resnet34"


def test_each_familys_smallest_is_found_by_one_name_and_told_from_all_others():
    # Of the others `benchmark.py architectures` says it: to build all 78 takes seconds, though without numbers.
    known = [*families()]
    assert len(known) == 16 and sum(map(len, known)) == 78
    seen = {}
    for arch in [family[0] for family in known]:
        assert head_of(skeleton(arch)).out_features == 1000, arch
        names = [*skeleton(arch).state_dict()]
        stems = [(stem, name) for stem in STEMS for name in names if name.endswith(stem)]
        assert len(stems) == 1 and stems[0][0] == stems[0][1], arch
        assert seen.setdefault(tuple(sorted(backbone_shapes(arch).items())), arch) == arch
        state = meta_state_dict(arch, classes=7)
        assert infer_arch(state) == arch
        assert infer_arch({key: state[key] for key in state if not key.startswith(head_prefix(arch))}) == arch


@pytest.mark.parametrize("arch", FAMILIES)
def test_of_each_family_pass_and_prediction_give_what_plain_torchvision_gives(start, monkeypatch, arch):
    # Over 3 s: vit_b_32 has 88 million weights, and takes no side but 224; swin_t and convnext_tiny have 28 million.
    if arch == "vit_b_32":  # takes no other size than its own
        monkeypatch.setattr(train, "make_transforms", MAKE_TRANSFORMS)
    file = start(arch)
    out = go("--arch", arch, "--epochs", 1, "--views", 1, "--precision", "float32", weights=file)
    assert f"backbone  {arch}, {file}\n" in out
    model, metadata = load_checkpoint(Path("best.pth"))
    assert (metadata["arch"], metadata["classes"]) == (arch, ["red", "green", "blue"])
    assert os.path.getsize("best.pth") == pytest.approx(checkpoint_bytes(arch, 3), rel=0.03)
    saved, plain = weights_of(), plain_network(arch, 3)
    plain.load_state_dict(saved, strict=True)
    model.load_state_dict(plain.state_dict(), strict=True)
    assert plain.state_dict().keys() == saved.keys()

    with Image.open("green/test_0.png") as image:
        views = train.draw_views(image, [0], 0)
    size = views.shape[1]
    images = get_model_weights(arch).DEFAULT.transforms(crop_size=size, resize_size=size)(views.permute(0, 3, 1, 2))
    compute = pick_compute("cpu", "float32", 0, arch=arch)
    features = embed(backbone_of(model), views, compute)
    with torch.inference_mode():
        logits = plain.eval()(images)
        plain.set_submodule(head_name(plain), nn.Identity())
        assert torch.allclose(features, plain(images), rtol=1e-3, atol=1e-4 * float(features.abs().max()))
        assert torch.allclose(head_of(model)(features), logits, rtol=1e-3, atol=1e-3)
    classifier = predict.load("best.pth", "cpu")
    probs = dict(predict.predict(classifier, ["green/test_0.png"])[0])
    assert [probs[each] for each in classifier.classes] == pytest.approx(logits[0].softmax(0).tolist(), abs=1e-3)
    status, out, err = run_main(predict.main, "test.txt", "--workers", 0)
    assert status == 0, err
    assert re.search(rf"^accuracy +{metadata['accuracy']:.2%}  ", out, re.MULTILINE)


def plain_network(arch, classes=1000):
    """As torchvision builds it for its ImageNet weights, but with random ones and without auxiliary heads."""
    if arch == "googlenet":
        return get_model(arch, num_classes=classes, aux_logits=False, transform_input=True, init_weights=False)
    return get_model(arch, num_classes=classes)


def test_googlenet_is_built_as_torchvision_builds_it_for_its_imagenet_weights(monkeypatch):
    weights = get_model_weights("googlenet").DEFAULT
    # Random weights of the network with its auxiliary heads, as the file has them.
    full = get_model("googlenet", aux_logits=True, init_weights=False).state_dict()
    monkeypatch.setattr(type(weights), "get_state_dict", lambda *_, **__: full)
    theirs, ours = get_model("googlenet", weights=weights).eval(), skeleton("googlenet")
    assert theirs.transform_input is ours.transform_input is True and ours.aux1 is theirs.aux1 is None
    assert theirs.state_dict().keys() == ours.state_dict().keys()


@pytest.mark.parametrize(
    ("arch", "size", "line"),
    [
        ("resnet19", None, "--arch resnet19: torchvision has no classifier of that name; did you mean resnet18?"),
        ("xyzzy", None, "--arch xyzzy: torchvision has no classifier of that name; --arch list shows the names"),
        (
            "squeezenet1_1",
            None,
            "--arch squeezenet1_1: its last layer is no linear one, so it has no head to train; ",
        ),
        ("vit_b_16", 288, "--size 288: vit_b_16 takes no images of that size; leave --size out for its own, 224"),
        ("inception_v3", 64, "--size 64: inception_v3 takes no images of that size; leave --size out for its own, 299"),
    ],
)
def test_an_architecture_that_is_not_to_be_had_or_not_in_that_size_is_one_line(few, arch, size, line):
    flags = ["--arch", arch, *(["--size", size] if size else [])]
    status, out, err = run_main(train.main, *flags)
    assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith(f"error: {line}")
    if not size:
        assert run_main(predict.main, "red/test_0.png", "--model", BUNDLED, *flags) == (status, out, err)


@pytest.mark.parametrize(
    ("arch", "size"), [("resnet50", 224), ("efficientnet_b2", 288), ("inception_v3", 299), ("vit_h_14", 518)]
)
def test_the_size_is_the_one_that_the_imagenet_weights_expect_unless_another_is_asked_for(arch, size):
    assert check_arch(arch, parse_train_args(["--arch", arch]).size) == size == preprocessing(arch).size
    assert arch == "vit_h_14" or check_arch(arch, 160) == 160


def test_arch_list_shows_all_names_the_cheapest_first_and_ends_well():
    status, out, err = run_main(train.main, "--arch", "list")
    rows = [line.split() for line in out.splitlines()[1:]]
    assert (status or 0, err, len(rows)) == (0, "", 78)
    costs = [float(row[2]) for row in rows]
    assert costs == sorted(costs) and ["mobilenet_v3_large", "75.3%", "0.22", "21", "MB", "224"] in rows


def test_other_means_and_deviations_travel_with_the_checkpoint_and_the_usual_ones_do_not(job):
    assert job("--arch", "efficientnet_v2_l", "--size", 64)[0] == 0
    metadata = load_checkpoint(Path("best.pth"), "efficientnet_v2_l")[1]
    assert metadata["mean"] == metadata["std"] == [0.5, 0.5, 0.5]
    normalize = predict.load("best.pth", "cpu", arch="efficientnet_v2_l").compute.normalize
    assert normalize.mean == normalize.std == [0.5, 0.5, 0.5]
    assert job("--size", 64)[0] == 0
    assert not {"mean", "std"} & load_checkpoint(Path("best.pth"))[1].keys()


@pytest.mark.parametrize("arch", ["resnet34", "resnet50"])
def test_another_architecture_trains_and_predicts_what_plain_torchvision_does_and_needs_no_metadata(start, arch):
    # Over 3 s: a whole run of a ResNet-50, and its file loaded three times.
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
    # Over 3 s: a whole run of a network of 44 million weights.
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
    names = [f"ResNet-{arch.removeprefix('resnet')}" for arch in (given, asked)]
    assert (status, out) == (2, "")
    assert err == f"error: {file}: is {names[0]}, not {names[1]}; add --arch {given}\n"
    assert not Path("best.pth").exists()


def test_the_error_of_a_damaged_file_of_another_architecture_names_its_own_weights(start):
    state = weights_of(start("resnet50"))
    state["bn1.bias"][3] = torch.nan
    torch.save(state, "damaged.pth")
    status, _, err = run_main(train.main, "--weights", "damaged.pth")
    reason = "does not fit ResNet-50: bn1.bias has values that are not finite; give one made for resnet18"
    assert (status, err) == (2, f"error: damaged.pth: {reason}\n")
    del state["layer4.0.conv3.weight"], state["bn1.bias"]
    torch.save(state, "damaged.pth")
    status, _, err = run_main(predict.main, "red/test_0.png", "--model", "damaged.pth")
    reason = "does not fit ResNet-50: no bn1.bias, no layer4.0.conv3.weight; give one made for resnet50, "
    reason += "or name its architecture by --arch, of those that train.py --arch list shows"
    assert (status, err) == (2, f"error: damaged.pth: {reason}\n")


@pytest.mark.parametrize("arch", RESNETS[1:])
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
    # Over 3 s: two whole runs of a ResNet-50.
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
    # Over 3 s: a whole run of each, one of them a ResNet-50.
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
