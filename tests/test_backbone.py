"""The frozen backbone over images: its numbers, dead workers, small devices."""

import gc
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import BUNDLED, ROOT, run_main
from processes import finished, fork_script
from torch import nn
from torchvision.models import resnet18

import train
from transfer import backbone
from transfer.architectures import NORMALIZE, head_of
from transfer.backbone import (
    PASS_BATCH,
    backbone_of,
    embed,
    embed_dataset,
    inference_copy,
    unbatch,
    with_oom_retry,
)
from transfer.checkpoint import load_backbone, load_checkpoint
from transfer.device import Compute
from transfer.extraction import extract_features
from transfer.inputs.images import read_image
from transfer.inputs.lists import ImageList, read_list
from transfer.system.console import warn_once

CPU = Compute(torch.device("cpu"), torch.float32)
DIED = "warning: a decoding process died, perhaps out of memory; going on"


def sample(name="train", count=12):
    photos, problems = read_list(ROOT / f"{name}.txt", ROOT)
    assert not problems
    step = len(photos) // count
    kept = range(0, step * count, step)
    paths = photos.paths()
    return ImageList(name, [paths[i] for i in kept], [int(photos.labels[i]) for i in kept], list(kept))


def bundled_backbone():
    return backbone_of(train.build_model("resnet18", 20, load_backbone(BUNDLED, "resnet18"), seed=0))


def test_the_backbone_gives_what_plain_torchvision_gives():
    plain = resnet18()
    plain.load_state_dict(torch.load(BUNDLED, weights_only=True), strict=False)
    plain.fc = nn.Identity()
    views = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8)
    images = NORMALIZE(views.permute(0, 3, 1, 2) / 255)
    with torch.inference_mode():
        expected = plain.eval()(images)
    assert torch.allclose(embed(bundled_backbone(), views, CPU), expected, atol=1e-4)


def test_weights_cast_once_give_the_bits_of_autocast():
    images = torch.randn(3, 3, 224, 224).to(memory_format=torch.channels_last)
    cast = inference_copy(bundled_backbone(), Compute(torch.device("cpu"), torch.bfloat16))
    with torch.inference_mode():
        found = cast(images.to(torch.bfloat16))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(found, bundled_backbone()(images))


def test_bfloat16_features_are_within_a_percent_of_float32_and_as_often_right(sample_run):
    # Over 3 s: photos through a ResNet-18 in float32, and in bfloat16, which some CPUs only imitate.
    model, _ = load_checkpoint(sample_run[1])
    test = sample("test", 60)
    features = {}
    for dtype in (torch.float32, torch.bfloat16):
        compute = Compute(torch.device("cpu"), dtype, workers=2)
        backbone = inference_copy(backbone_of(model), compute)
        found = extract_features(backbone, train.ImageDataset(test, [0], 0, 128), compute=compute)
        features[dtype] = found.chunks[0][:, 0]
    exact, fast = features.values()
    errors = (fast - exact).norm(dim=1) / exact.norm(dim=1)
    assert 0 < errors.max() < 0.01
    right = [(head_of(model)(each).argmax(1) == test.labels).sum().item() for each in (exact, fast)]
    assert abs(right[0] - right[1]) < len(test) / 100


def test_features_do_not_depend_on_workers_batches_or_order():
    photos, backbone = sample(count=6), bundled_backbone()  # over 3 s: four passes of a ResNet-18, none can be shared
    views = train.ImageDataset(photos, range(3), seed=5)

    def extract(workers):
        return extract_features(backbone, views, compute=replace(CPU, workers=workers)).chunks[0]

    plain = extract(0)
    assert torch.equal(plain, extract(1))
    assert torch.equal(plain, extract(3))
    options = {"batch_size": 3, "per_image": 3, "compute": CPU}
    backwards = [v for _, v, _ in embed_dataset(backbone, views, range(6)[::-1], **options)]
    assert torch.equal(plain, torch.cat(backwards).flip(0))


SPAWN = """
import runpy, sys, transfer.backbone
transfer.backbone.START_METHOD = "spawn"
runpy.run_path(sys.argv.pop(0) and sys.argv[0], run_name="__main__")
"""


def test_spawned_workers_as_on_macos_and_windows_find_what_they_unpickle(colours):
    # Over 3 s: each of the two workers is a new Python, which imports torch.
    Path("sitecustomize.py").write_text("import sys\nopen('started', 'a').write(' '.join(sys.orig_argv) + '\\n')\n")
    options = ("--weights", "none", "--epochs", 2, "--views", 2, "--precision", "float32", "--device", "cpu")
    options += ("--cache", "kept")
    assert run_main(train.main, *options, "--workers", 0)[0] == 0
    max(Path("kept").iterdir(), key=os.path.getsize).unlink()  # the training list's: two views
    spawning = {"cwd": colours, "PYTHONPATH": os.pathsep.join((str(colours), str(ROOT))), "OMP_NUM_THREADS": "1"}
    labelled = ("test.txt", "--workers", 1, "--batch-size", 4, "--device", "cpu")
    runs = [
        fork_script(SPAWN, ROOT / "train.py", *options, "--workers", 1, "--out", "spawned.pth", **spawning),
        fork_script(SPAWN, ROOT / "predict.py", *labelled, **spawning),
    ]
    trained, predicted = map(finished, runs)
    assert (trained.returncode, trained.stderr) == (predicted.returncode, predicted.stderr) == (0, "")
    assert Path("started").read_text().count("--multiprocessing-fork") == 2  # a forked worker starts no Python
    assert Path("spawned.csv").read_text() == Path("best.csv").read_text()
    assert predicted.stdout.count(".png  ") == 12


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("death", ["killed", "out of memory"])
def test_a_dead_worker_gets_a_warning_and_the_run_goes_on(trained, monkeypatch, death):
    Path("best.csv").rename("expected.csv")
    parent, read = os.getpid(), read_image

    def dying(path, *rest):
        if os.getpid() != parent and b"green" in path:
            if death == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return read(path, *rest)

    monkeypatch.setattr(train, "read_image", dying)
    monkeypatch.setitem(PASS_BATCH, "cpu", 3)
    status, _, err = trained("--workers", 2)
    assert status == 0
    assert set(err.splitlines()) == {f"{DIED} with 1", f"{DIED} without"}
    assert Path("best.csv").read_text() == Path("expected.csv").read_text()
    assert not multiprocessing.active_children()


@pytest.mark.usefixtures("impatient")
def test_a_worker_that_dies_while_its_results_are_used_disturbs_nobody(few, capsys):
    photos, _ = read_list(Path("train.txt"), Path())
    backbone = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
    options = {"compute": replace(CPU, workers=2), "batch_size": 1}
    rows = []
    for indices, _, _ in embed_dataset(backbone, train.ImageDataset(photos, [0], 0), range(6), **options):
        if not rows:
            for child in multiprocessing.active_children():
                child.kill()
            time.sleep(0.3)  # a use of the result, in which the news comes
        rows += indices
    assert rows == list(range(6)) and capsys.readouterr().err.count(DIED) == 1


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried ..."), RuntimeError("MPS backend out of memory (...)")]
)
def test_out_of_memory_halves_the_batch_up_to_three_times(job, monkeypatch, error):
    # A device in name only: no parameter is moved to it.
    monkeypatch.setattr("transfer.device.pick_device", lambda _: torch.device("mps"))
    stand_in = nn.Identity()
    stand_in.feature_dim = 512
    monkeypatch.setattr(train, "backbone_of", lambda _: stand_in)
    monkeypatch.setitem(PASS_BATCH, "mps", 12)
    sizes, room = [], 2

    def embed(module, views, *_, **__):
        sizes.append(len(views))
        if len(views) > room:
            raise error
        return torch.ones(len(views), 512)

    monkeypatch.setattr("transfer.backbone.embed", embed)
    warning = "warning: the device is out of memory; the pass goes on in smaller batches\n"
    warn_once.cache_clear()
    status, _, err = job("--views", 1)
    assert (status, err.count(warning), "error" in err) == (0, 1, False)
    assert sizes == [12, 6, 3, 2, 2, 2, 2, 2, 2] * 2  # in both lists' passes
    room = 1
    warn_once.cache_clear()
    status, _, err = job("--out", "other.pth")
    assert (status, err) == (1, f"{warning}error: the device is out of memory; run with --device cpu\n")
    assert not Path("other.pth").exists()


def test_pixels_travel_in_small_parts_and_go_to_the_device_in_large_batches(few, monkeypatch):
    image_list, _ = read_list(Path("train.txt"), Path())
    views, sizes, travelled = train.ImageDataset(image_list, [0, 1], 0), [], []
    monkeypatch.setattr("transfer.backbone.PART_VIEWS", 4)
    monkeypatch.setattr("transfer.backbone.embed", lambda module, views, compute: sizes.append(len(views)) or views)
    original = backbone.collate
    monkeypatch.setattr(
        backbone, "collate", lambda *args, **kw: travelled.append(len(args[0])) or original(*args, **kw)
    )
    Path("green/train_0.png").write_bytes(b"no image")
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_, **__: self)  # a device in name only
    compute = Compute(torch.device("mps"), torch.float32)
    found = list(embed_dataset(nn.Identity(), views, range(6), compute=compute, batch_size=5, per_image=2))
    assert travelled == [2, 2, 1, 1] and sizes == [8, 2]
    assert [rows for rows, *_ in found] == [[0, 1, 3, 4], [5]] and [bad for *_, bad in found] == [
        {2: "not an image"},
        {},
    ]
    for row, values in unbatch(found):
        assert isinstance(values, str) or torch.equal(values, views[row][1].float())


@pytest.mark.usefixtures("impatient")
def test_a_worker_whose_results_cannot_be_sent_dies_and_the_run_goes_on(trained, monkeypatch):
    Path("best.csv").rename("expected.csv")
    parent, collate = os.getpid(), backbone.collate

    def unsendable(samples, embed_views):
        packed = collate(samples, embed_views)
        return (lambda: packed) if os.getpid() != parent else packed  # which the worker's thread can't pickle

    monkeypatch.setattr(backbone, "collate", unsendable)
    monkeypatch.setitem(PASS_BATCH, "cpu", 3)
    status, _, err = trained("--workers", 2)
    assert status == 0 and err.endswith(f"{DIED} without\n") and err.count(DIED) >= 2
    assert Path("best.csv").read_text() == Path("expected.csv").read_text()


@pytest.mark.usefixtures("impatient")
def test_a_bug_in_a_worker_is_a_traceback_and_no_death(trained, monkeypatch, capfd):
    monkeypatch.setattr(train, "read_image", lambda *_: {}["a bug"])
    with pytest.raises(KeyError, match="a bug"):
        trained("--workers", 2)
    began = time.monotonic()
    gc.collect()
    assert time.monotonic() - began < 4  # in vain torch would wait 5 s for each worker
    assert "died" not in capfd.readouterr().err


def test_where_no_worker_can_start_the_run_goes_on_without_and_says_so(trained, monkeypatch):
    def fail(*_):
        raise OSError(38, "Function not implemented")  # as without /dev/shm

    monkeypatch.setattr("multiprocessing.context.BaseContext.Lock", fail)
    status, _, err = trained("--workers", 2)
    assert status == 0 and err.splitlines()[-1] == f"{DIED} without" and "Exception ignored" not in err


def test_other_errors_of_the_device_are_bugs_that_keep_their_traceback():
    def fail(_):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        with_oom_retry(fail)(torch.zeros(4, 1))
