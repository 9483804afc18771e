"""Devices: a card for each rank, and the precision that holds for training and prediction alike."""

import pytest
import torch
from conftest import run_main
from torch import nn
from torch.cuda._utils import _get_device_index

import train
from transfer.device import Compute, free_memory, pick_compute, pick_device, pick_precision
from transfer.finetune import Network
from transfer.system.console import UserError


@pytest.fixture
def cards(monkeypatch):
    """A function that pretends so many CUDA cards, and the list of those that were made current."""

    def pretend(count, bfloat16=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16)
        current = []
        # By torch's own rule for what is no card: a name without a number.
        monkeypatch.setattr(torch.cuda, "set_device", lambda card: current.append(_get_device_index(card)))
        return current

    return pretend


@pytest.fixture
def rank(monkeypatch):
    """A function that pretends to be the nth of so many ranks on this machine."""

    def pretend(local, here):
        for name, value in (("LOCAL_RANK", local), ("LOCAL_WORLD_SIZE", here), ("WORLD_SIZE", 2 * here)):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_ADDR", "localhost")

    return pretend


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_rank_gets_a_card_of_its_own_and_makes_it_current(cards, rank, name):
    current = cards(4)
    for local in range(4):
        rank(local, 4)
        assert pick_device(name) == torch.device(f"cuda:{local}")
    assert current == [*range(4)]


def test_more_ranks_than_cards_is_one_line_with_the_way_out(cards, rank):
    cards(2)
    rank(0, 8)  # also of a rank that would have found a card
    with pytest.raises(UserError, match="8 ranks on this machine and 2 cards; run torchrun --nproc-per-node 2, or"):
        pick_device("cuda")


def test_ranks_do_not_share_a_card_by_name(cards, rank):
    cards(2)
    rank(1, 2)
    with pytest.raises(UserError, match="--device cuda:0: 2 ranks would share it; name cuda"):
        pick_device("cuda:0")
    assert pick_device("cpu").type == "cpu"


def test_alone_the_named_card_is_made_current(cards):
    current = cards(2)
    assert pick_device("cuda:1") == torch.device("cuda:1") and current == [1]


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_alone_and_without_a_number_it_is_the_current_card(cards, name):
    current = cards(2)
    assert pick_device(name) == torch.device("cuda") and current == []


def test_a_device_that_is_not_there_is_one_line_with_those_that_are(cards):
    cards(0)
    status, out, err = run_main(train.main, "--device", "cuda")
    assert (status, out) == (2, "")
    assert err == "error: --device cuda: this machine offers cpu; pick one of them or auto\n"


def test_where_float16_is_the_fastest_what_is_fine_tuned_is_float32_in_both_scripts(cards):
    cards(1, bfloat16=False)
    card = torch.device("cuda")
    assert pick_precision("auto", card) == torch.float16
    assert pick_precision("auto", card, training=True) == torch.float32  # what best.pth says, and predict.py then takes
    cards(1, bfloat16=True)
    assert pick_precision("auto", card, training=True) == torch.bfloat16


def test_bfloat16_on_an_old_macos_is_refused_before_it_aborts(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version: False)
    with pytest.raises(UserError, match="needs macOS 14; run with --precision float32"):
        pick_precision("bfloat16", torch.device("mps"))
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version: version <= (14, 0))
    assert pick_precision("bfloat16", torch.device("mps")) == torch.bfloat16


def test_on_mps_ranks_pass_but_do_not_fine_tune(monkeypatch, rank):
    monkeypatch.setattr("transfer.device.pick_device", lambda _: torch.device("mps"))
    assert pick_compute("mps", "float32", 0, training=True).device.type == "mps"
    rank(0, 2)
    assert pick_compute("mps", "float32", 0).device.type == "mps"
    with pytest.raises(UserError, match="--finetune-epochs: .* on MPS; run one process, or --device cpu"):
        pick_compute("mps", "float32", 0, training=True)


@pytest.mark.parametrize(("name", "layout"), [("mps", torch.contiguous_format), ("cpu", torch.channels_last)])
def test_on_mps_the_trained_stages_keep_out_of_channels_last(name, layout):
    seen = []

    class Tail(nn.Module):
        def forward(self, inputs):
            seen.append(inputs.is_contiguous(memory_format=layout))
            return inputs.mean((2, 3))

    network = Network(Tail(), nn.Linear(4, 2), Compute(torch.device(name), torch.float32))
    network(torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last))
    assert seen == [True]


def test_in_a_container_files_that_were_read_take_no_memory_away(tmp_path, monkeypatch):
    monkeypatch.setattr("transfer.device.CGROUP", tmp_path)
    for name, content in (("max", "5000000"), ("current", "4000000"), ("stat", "anon 1\ninactive_file 2000000\n")):
        (tmp_path / f"memory.{name}").write_text(content)
    assert free_memory() == 3_000_000
    (tmp_path / "memory.max").write_text("max")  # no limit
    assert free_memory() > 3_000_000
