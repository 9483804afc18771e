"""Ranks: slices, deaths, one model."""

import errno
import math
import os
import re
import socket
import time
from pathlib import Path

import pytest
import torch
from conftest import chunks_in, go, rows_of, run_main, same, weights_of
from hypothesis import given
from hypothesis import strategies as st
from processes import run_forked, torchrun

import predict
import train
from transfer.checkpoint import load_checkpoint
from transfer.distributed import init_distributed, rank_slice

pytestmark = pytest.mark.usefixtures("tiny")


@given(st.integers(0, 50), st.integers(1, 9))
def test_ranks_share_all_rows_in_order_in_equal_slices(count, world):
    def share(rank):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("transfer.distributed.get_world_size", lambda: world)
            patch.setattr("transfer.distributed.get_rank", lambda: rank)
            patch.setattr(torch.distributed, "is_initialized", lambda: True)
            return rank_slice(count)

    shares = [share(rank) for rank in range(world)]
    assert [row for each in shares for row in each] == list(range(count))
    assert max(map(len, shares)) == -(-count // world)


@pytest.mark.parametrize(
    ("device", "nccl", "backend"),
    [
        ("cpu", True, {"cpu": "gloo", "cuda": "gloo"}),
        ("cuda:1", True, {"cpu": "gloo", "cuda": "nccl"}),
        ("cuda:1", False, {"cpu": "gloo", "cuda": "gloo"}),  # Windows
    ],
)
def test_ranks_have_a_backend_for_the_cpu_whatever_the_device(monkeypatch, device, nccl, backend):
    met = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, timeout: met.append(backend))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    init_distributed(torch.device(device))
    assert torch.distributed.distributed_c10d.BackendConfig(met[0]).device_backend_map == backend


def feature_rows(folder):
    chunks = [torch.load(path, weights_only=True)["features"] for path in chunks_in(folder)]
    return sorted(row.numpy().tobytes() for chunk in chunks for row in chunk)


# Up to torch 2.10 all ranks print their connections on stdout at once.
GLOO = r"(?m)^(\[Gloo\].*|.*is connected to \d+ peer ranks.*|\d+ is connected.*)\n"


# On a machine with an accelerator, in chunks of 2 images. At its fifth, in the third chunk, rank 1 dies, but not when
# it is started again.
DIE = """
import os, sys, train
train.torch.accelerator.current_accelerator = lambda check_available=False: train.torch.device("mps")
from transfer import backbone, extraction
read, decoded = train.read_image, []
extraction.CHUNK_ROWS, backbone.PASS_BATCH["cpu"] = 2, 4
extraction.gather_rows = lambda *_: open("sent", "w")
first, rank = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0", os.environ["RANK"]
def read_photo(path, *rest):
    decoded.append(os.fsdecode(path))
    if first and rank == "1" and len(decoded) == 5:
        os._exit(1)
    return read(path, *rest)
train.read_image = read_photo
train.main(sys.argv[1:])
open(f"decoded{rank}", "w").write("\\n".join(decoded))
"""


def test_two_ranks_one_of_which_dies_once_give_the_features_and_the_head_of_one_byte_for_byte(
    colours, full_size, monkeypatch
):
    # Over 3 s: four passes of a ResNet-18, two of them by ranks that share the cores and start twice.
    lines = Path("train.txt").read_text().splitlines()
    Path("train.txt").write_text("\n".join(lines[:-1]))  # 11 images, of which 3 are for the validation
    Path("die.py").write_text(DIE)
    options = ("--epochs", 3, "--views", 2, "--batch-size", 4, "--val-split", 0.25)
    audit = ("--audit", "look.html")
    out = go(*options, *audit, "--cache", "one")
    expected, rows, findings = weights_of(), rows_of(), Path("look.csv").read_text()
    os.unlink("best.pth")
    done = torchrun("die.py", "--weights", "none", "--workers", 0, *options, *audit, "--cache", "two", restarts=1)
    assert done.returncode == 0, done.stderr
    assert same(expected, weights_of()) and rows == rows_of() and feature_rows("one") == feature_rows("two")
    assert Path("look.csv").read_text() == findings
    assert len(chunks_in("two")) == 2 * 2 + (1 + 1) + 2 * 3  # of both ranks: 8 training, 3 validation, 12 test images
    # Rank 1 had kept 4 of its 6 test images; of validation and training list it has one and four.
    decoded = Path("decoded1").read_text().splitlines()
    assert ["train" in path for path in decoded] == [False] * 2 + [True] * 5
    assert not Path("sent").exists()  # rank 0 mapped what both had kept
    # Rank 0 alone prints: the same lines, each once, after those of the first attempt.
    timeless = lambda text: re.sub(r"in [\d.]+ s$", "", text, flags=re.MULTILINE)  # noqa: E731
    printed = re.sub(GLOO, "", done.stdout)
    assert timeless(printed).endswith(timeless(out)) and printed.count("saved  ") == 1
    assert "Traceback" not in done.stderr and "warning: " not in done.stderr
    # And one process finds all that two had kept.
    monkeypatch.setattr("transfer.extraction.CHUNK_ROWS", 2)
    monkeypatch.setattr(train, "read_image", lambda path, *_: pytest.fail(f"decoded {path} again"))
    go(*options, "--cache", "two")
    assert same(expected, weights_of())


# Fine-tuning with scripted accuracies; a rank notes its weights of each step, and after the fifth rank 1 dies.
TUNE = """
import os, sys, train
step, rank, steps, evaluated = train.torch.optim.Adam.step, int(os.environ["RANK"]), [], []
scripted = iter([0.25, 0.5, 0.75, 0.875])
def spy(self, *args, **kwargs):
    step(self, *args, **kwargs)
    if len(self.param_groups) == 2:
        steps.append([parameter.detach().clone() for group in self.param_groups for parameter in group["params"]])
        if len(steps) == 5 and rank == 1:
            os._exit(1)
def evaluate(model, loader):
    evaluated.append(sum(len(labels) for _, labels in loader))
    train.torch.save({"steps": steps, "evaluated": evaluated}, f"rank{rank}.pt")
    return train.Metrics(1.0, next(scripted), 0.0)
train.torch.optim.Adam.step, train.evaluate = spy, evaluate
train.main(sys.argv[1:])
"""


def test_two_ranks_fine_tune_one_model_and_the_death_of_one_ends_the_run_with_best_pth_whole(few):
    # Over 3 s: two ranks start and fine-tune, then find that one is gone.
    Path("tune.py").write_text(TUNE)
    options = "--weights none --workers 0 --epochs 1 --views 1 --batch-size 4 --finetune-epochs 3".split()
    began = time.monotonic()
    done = torchrun("tune.py", *options)
    assert done.returncode == 1 and time.monotonic() - began < 60
    assert re.search(r"^error: another rank died|^stopped by SIGTERM", done.stderr, re.MULTILINE), done.stderr
    assert "[rank0]: Traceback" not in done.stderr
    # Of 6 images each rank trains on 3 an epoch, in batches of 2 and 1, and evaluates 3; the head is rank 0's alone.
    rank0, rank1 = (weights_of(f"rank{rank}.pt") for rank in (0, 1))
    assert rank0["evaluated"] == [6, 3, 3] and rank1["evaluated"] == [3, 3]
    for first, second in zip(rank0["steps"], rank1["steps"], strict=True):
        assert len(first) == 15 + 2 and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    # The second epoch, the last whole one, took steps 3 and 4.
    model, metadata = load_checkpoint(Path("best.pth"))
    assert (metadata["epoch"], metadata["accuracy"]) == (3, 0.75)
    tail = [value for name, value in model.named_parameters() if name.startswith(("layer4.", "fc."))]
    assert all(torch.equal(a, b) for a, b in zip(tail, rank0["steps"][-1], strict=True))
    epochs = [line.split()[0] for line in done.stdout.splitlines() if line[:5].strip().isdigit()]
    assert epochs == ["1", "2", "3"] == [row["epoch"] for row in rows_of()]
    assert not list(Path().glob(".*.tmp"))


# On a machine with an accelerator a fine-tuned epoch is the best, on rank 0; what the temperature is fitted on is noted.
FIT = """
import os, sys, train
train.torch.accelerator.current_accelerator = lambda check_available=False: train.torch.device("mps")
calibrate, accuracies = train.calibrate, iter([0.25, 0.75, 0.5])
def spy(head, logits, labels):
    train.torch.save({"logits": logits, "labels": labels}, "fitted" + os.environ["RANK"] + ".pt")
    return calibrate(head, logits, labels)
train.calibrate = spy
train.evaluate = lambda *_: train.Metrics(1.0, next(accuracies), 0.0)
train.main(sys.argv[1:])
"""


def test_the_temperature_is_fitted_on_the_images_of_all_ranks(few, full_size):
    Path("fit.py").write_text(FIT)
    options = "--weights none --workers 0 --epochs 1 --views 1 --batch-size 4 --finetune-epochs 2".split()
    done = torchrun("fit.py", *options)
    assert done.returncode == 0, done.stderr
    fitted = weights_of("fitted0.pt")
    assert "broadcast_buffers" not in done.stderr  # torch 2.14 would warn of the argument
    assert fitted["labels"].tolist() == [0, 0, 1, 1, 2, 2] and not Path("fitted1.pt").exists()
    # The last epoch was not the best: both ranks went back to the one before.
    model, metadata = load_checkpoint(Path("best.pth"))
    assert metadata["epoch"] == 2
    probs = predict.predict(predict.load("best.pth", "cpu"), [line.split()[0] for line in open("test.txt")])
    logs = [[math.log(dict(each)[name]) for name in metadata["classes"]] for each in probs]
    expected = (fitted["logits"] / metadata["temperature"]).log_softmax(1)
    assert torch.allclose(torch.tensor(logs), expected, atol=0.05)  # bfloat16


def test_three_ranks_fine_tune_and_evaluate_four_test_images_of_which_one_rank_has_none(few):
    # Over 3 s: three ranks share two cores.
    lines = Path("test.txt").read_text().splitlines()
    Path("test.txt").write_text("\n".join(lines[:4]))
    Path("tiny.py").write_text(TINY)
    options = "--weights none --workers 0 --epochs 1 --views 2 --batch-size 6 --finetune-epochs 2".split()
    done = torchrun("tiny.py", *options, ranks=3)
    assert done.returncode == 0, done.stderr
    (accuracy,) = re.findall(r"best      test accuracy (\d+)% of 4 photos", done.stdout)
    status, out, err = run_main(predict.main, "test.txt", "--workers", 0)
    assert status == 0 and f"accuracy  {int(accuracy) / 100:7.2%}  " in out, err
    rows = rows_of()
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    # Without a cache the features were sent to rank 0, and are those of one process.
    go("--epochs", 1, "--views", 2, "--batch-size", 6)
    assert rows_of() == rows[:1]


def test_each_rank_prints_its_own_error_with_its_number_and_host(few):
    other = "['--test', 'gone.lst'] if os.environ['RANK'] == '1' else []"
    Path("other.py").write_text(f"import os, sys, train\ntrain.main([*sys.argv[1:], *({other})])")
    done = torchrun("other.py", "--weights", "none", "--workers", 0, "--epochs", 1)
    assert done.returncode == 1
    reason = os.strerror(errno.ENOENT).lower()
    line = f"error: rank 1 on {socket.gethostname()}: gone.lst: {reason}; name a list, or a folder of class folders"
    assert line in done.stderr.splitlines() and not Path("best.pth").exists()


# The views of 64 pixels that this process has too.
TINY = """
import sys, train
make = train.make_transforms
train.make_transforms = lambda size: make(64)
train.main(sys.argv[1:])
"""


def test_a_rank_left_over_in_a_shell_makes_no_silent_run(few):
    options = ("--weights", "none", "--workers", 0, "--epochs", 1, "--views", 1)
    done = run_forked("train.py", *options, cwd=few, RANK="1", LOCAL_RANK="1")
    assert done.returncode == 0 and "saved     best.pth" in done.stdout
    assert Path("best.pth").exists()
