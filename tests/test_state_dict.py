"""State dicts in files of others: of every architecture, under old names, wrapped, tampered with."""

import re
from pathlib import Path

import pytest
import torch
from conftest import run_main, save_photo

import predict
import train
from transfer.architectures import head_prefix, meta_state_dict
from transfer.checkpoint import load_backbone, load_checkpoint
from transfer.system.console import UserError

VIT, DENSE = "vit_b_32", "densenet121"


def tiny(arch, classes=3):
    """A state dict of a few kB: each tensor one number, repeated; but indices are as they must be."""
    state = meta_state_dict(arch, classes)
    for key, value in state.items():
        if value.is_meta:
            state[key] = torch.full((1,) * value.dim(), 0.01).expand(value.shape)
    return state


def saved(tmp_path, state):
    torch.save(state, tmp_path / "model.pth")
    return tmp_path / "model.pth"


@pytest.mark.parametrize("arch", ["mobilenet_v3_large", "regnet_y_400mf", "swin_t", "wide_resnet50_2", "vgg11_bn"])
def test_a_bare_state_dict_shows_what_it_is(tmp_path, arch):
    model, metadata = load_checkpoint(saved(tmp_path, dict(tiny(arch))))
    assert metadata == {"arch": arch, "classes": ["0", "1", "2"]}
    assert load_backbone(tmp_path / "model.pth", arch).keys() == {
        key for key in model.state_dict() if not key.startswith(head_prefix(arch))
    }


@pytest.mark.parametrize(
    ("arch", "pattern", "old"),
    [
        (DENSE, r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2"),
        (VIT, r"\.mlp\.0\.", ".mlp.linear_1."),
        (VIT, r"\.mlp\.3\.", ".mlp.linear_2."),
    ],
)
def test_the_names_in_files_of_imagenet_weights_are_brought_up_to_date(tmp_path, arch, pattern, old):
    state = tiny(arch, 1000)
    renamed = {re.sub(pattern, old, key): value for key, value in state.items()}
    assert renamed.keys() != state.keys()
    found = load_backbone(saved(tmp_path, renamed), arch)
    assert found.keys() == {key for key in state if not key.startswith(head_prefix(arch))}


@pytest.mark.parametrize(("arch", "key"), [("googlenet", "aux1.fc1.weight"), ("inception_v3", "AuxLogits.fc.weight")])
def test_auxiliary_heads_are_left_out(tmp_path, arch, key):
    state = tiny(arch, 1000)
    assert key not in state
    assert key not in load_backbone(saved(tmp_path, state | {key: torch.zeros(2, 2)}), arch)


@pytest.mark.parametrize("prefix", ["module.", "model.backbone."])
def test_a_prefix_is_found_and_a_head_of_another_kind_beside_it_left_out(tmp_path, prefix):
    state = {f"{prefix}{key}": value for key, value in tiny("mobilenet_v3_small").items() if "classifier.3" not in key}
    path = saved(tmp_path, {"model": state | {"head.weight": torch.zeros(9, 9), "fc.1.bias": torch.zeros(9)}})
    assert "classifier.0.weight" in load_backbone(path, "mobilenet_v3_small")


def test_weights_of_another_architecture_are_refused_with_the_flag_that_fits(tmp_path):
    with pytest.raises(UserError, match=r"model.pth: is efficientnet_b0, not ResNet-18; add --arch efficientnet_b0$"):
        load_backbone(saved(tmp_path, tiny("efficientnet_b0")), "resnet18")
    with pytest.raises(UserError, match=r"model.pth: is efficientnet_b0, not swin_t; add --arch efficientnet_b0$"):
        load_checkpoint(tmp_path / "model.pth", "swin_t")


def test_what_is_none_of_them_asks_for_its_architecture_and_then_shows_where_it_differs(tmp_path):
    state = tiny("efficientnet_b0")
    del state["features.3.0.block.0.0.weight"]
    with pytest.raises(
        UserError, match=r"does not fit efficientnet_b0: no features.*, or name its architecture by --ar"
    ):
        load_checkpoint(saved(tmp_path, state))
    with pytest.raises(UserError, match=r"does not fit efficientnet_b1: no .*; give one made for efficientnet_b1$"):
        load_checkpoint(tmp_path / "model.pth", "efficientnet_b1")


def test_indices_that_would_reach_beyond_a_table_are_refused(tmp_path):
    state = tiny("swin_t")
    state["features.1.0.attn.relative_position_index"] = state["features.1.0.attn.relative_position_index"] + 10**6
    with pytest.raises(UserError, match="relative_position_index has other indices than torchvision's"):
        load_checkpoint(saved(tmp_path, state))


def test_both_scripts_take_a_foreign_file_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for colour in ("red", "green"):
        for number in range(4):
            save_photo(f"photos/{colour}/{number}.png", colour, 5 * number)
    torch.save({"state_dict": dict(tiny("shufflenet_v2_x0_5", 2))}, "foreign.pth")
    status, out, err = run_main(predict.main, "photos/red/0.png", "--model", "foreign.pth", "--workers", 0)
    assert (status, err) == (0, "") and re.search(r"0\.png  [01] 50\.0%, [01] 50\.0%", out)
    flags = ["--train", "photos", "--weights", "foreign.pth", "--arch", "shufflenet_v2_x0_5", "--size", 64]
    status, _, err = run_main(train.main, *flags, "--epochs", 1, "--views", 1, "--workers", 0)
    assert status == 0, err
    assert load_checkpoint(Path("best.pth"))[1]["arch"] == "shufflenet_v2_x0_5"
