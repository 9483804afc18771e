"""Every architecture by hand: trained, fine-tuned, saved, loaded, used and audited on 40 images; and how fast some are.

    python tests/benchmark.py architectures                  # all 78, in float32: hours
    python tests/benchmark.py architectures swin_t vgg16     # those named
    python tests/benchmark.py speeds                         # the pass of seven, in turns

Weights are random, since what is checked is arithmetic. Each architecture has a process of its own, so that memory is
its own too, and views of 64 pixels where it takes them.
"""

import contextlib
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SPEEDS = ("mobilenet_v3_large", "efficientnet_b0", "resnet18", "resnet50", "convnext_tiny", "swin_t", "vit_b_16")
IMAGES = 20  # of training and of test each
TOO_LARGE = {"vit_h_14"}  # a minute an image in float32: run it by name


def table(*names: str) -> None:
    """A row for each architecture: what it was checked with, and what came of it."""
    from transfer.architectures import families

    known = sorted(arch for family in families() for arch in family)
    print("| name | side | unfrozen from | features, logits: largest difference | time | memory |")
    print("|---|---|---|---|---|---|")
    for arch in names or [arch for arch in known if arch not in TOO_LARGE]:
        began = time.perf_counter()
        command = [sys.executable, str(ROOT / "tests/benchmark.py"), "architecture", arch]
        done = subprocess.run(command, capture_output=True, text=True)
        seconds = time.perf_counter() - began
        if done.returncode:
            print(f"| {arch} | MISSED: {(done.stderr.splitlines() or ['killed'])[-1][:150]} | | | | |", flush=True)
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        difference = f"{row['features']:.0e}, {row['logits']:.0e}"
        cells = arch, row["size"], row["block"], difference, f"{seconds:.0f} s", f"{row['memory']:,.0f} MB"
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def make_lists(folder: Path) -> None:
    """Lists of some sample photos of two classes, small."""
    from PIL import Image

    for name in ("train", "test"):
        lines = (ROOT / f"{name}.txt").read_text().splitlines()
        with open(folder / f"{name}.txt", "w") as file:
            for label in (0, 1):
                own = [line.split()[0] for line in lines if line.split()[1:] == [str(label)]]
                for number in range(IMAGES // 2):
                    path = folder / f"{label}_{name}_{number}.png"
                    photo = Image.open(ROOT / own[number % len(own)]).convert("RGB").resize((96, 72))
                    photo.rotate(5 * (number // len(own))).save(path)  # where a class has fewer
                    file.write(f"{path.name} {label}\n")


def call(main, *arguments: object) -> str:
    """What a script's main prints; it must end well."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main([str(argument) for argument in arguments])
    return out.getvalue()


def check(arch: str) -> None:
    """One architecture, from the command line to plain torchvision; prints the row's figures."""
    import torch

    import predict
    import train
    from transfer.architectures import check_arch, preprocessing, takes_images
    from transfer.backbone import backbone_of
    from transfer.checkpoint import load_checkpoint
    from transfer.finetune import first_unfrozen

    torch.manual_seed(0)
    size = next(side for side in (64, 96, preprocessing(arch).size) if takes_images(arch, side))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_lists(Path())
        torch.save(calm(arch), "weights.pth")
        flags = ["--arch", arch, "--precision", "float32", "--views", 2, "--workers", 0, "--weights", "weights.pth"]
        # So that the second run makes no pass; and of vit_h_14 a larger batch takes over 20 GB.
        flags += ["--cache", "kept", "--batch-size", 8]
        flags += [] if size == check_arch(arch, None) else ["--size", size]
        call(train.main, *flags, "--epochs", 2, "--audit", "audit.html")
        compare(arch, size)
        call(train.main, *flags, "--epochs", 1, "--lr", 1e-9, "--finetune-epochs", 1, "--finetune-lr", 1e-4)
        model, metadata = load_checkpoint(Path("best.pth"))
        out = call(predict.main, "test.txt", "--workers", 0)
        assert f"accuracy  {metadata['accuracy']:7.2%}  " in out and metadata["size"] == size, out
        features, logits = compare(arch, size)
        block = first_unfrozen(backbone_of(model), "layer4")
        os.chdir(ROOT)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    row = {"size": size, "block": block, "features": features, "logits": logits, "memory": memory}
    print(json.dumps(row))


def plain_network(arch: str, classes: int):
    """As torchvision builds it for its ImageNet weights."""
    from torchvision.models import get_model

    if arch in ("googlenet", "inception_v3"):
        return get_model(arch, num_classes=classes, aux_logits=False, transform_input=True, init_weights=False)
    if arch == "vit_h_14":
        return get_model(arch, num_classes=classes, image_size=518)
    return get_model(arch, num_classes=classes)


def calm(arch: str) -> dict:
    """Random weights whose blocks add little to each other's, so that depth does not make the numbers overflow."""
    from torch import nn

    network = plain_network(arch, 1000)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 0.5)
    return network.state_dict()


def compare(arch: str, size: int) -> tuple[float, float]:
    """How far best.pth's features and logits are from plain torchvision's, by their largest; it must be little."""
    import torch
    from PIL import Image
    from torch import nn
    from torchvision.models import get_model_weights

    import train
    from transfer.architectures import head_name, head_of
    from transfer.backbone import backbone_of, embed
    from transfer.checkpoint import load_checkpoint
    from transfer.device import pick_compute

    model, _ = load_checkpoint(Path("best.pth"))
    plain, saved = plain_network(arch, 2).eval(), torch.load("best.pth", weights_only=True)
    plain.load_state_dict(saved, strict=True)
    model.load_state_dict(plain.state_dict(), strict=True)
    views = torch.cat([train.draw_views(Image.open(f"{label}_test_0.png"), [0], 0, size=size) for label in (0, 1)])
    images = get_model_weights(arch).DEFAULT.transforms(crop_size=size, resize_size=size)(views.permute(0, 3, 1, 2))
    with torch.inference_mode():
        features = embed(backbone_of(model), views, pick_compute("cpu", "float32", 0, arch=arch))
        pairs = [(head_of(model)(features), plain(images))]
        plain.set_submodule(head_name(plain), nn.Identity())
        pairs.insert(0, (features, plain(images)))
    found = [float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in pairs]
    assert max(found) < 1e-3, found
    return found[0], found[1]


def speeds(*names: str, repeats: int = 3, photos: int = 48) -> None:
    """Views a second of the pass and of the backbone on ready tensors, with all threads and with one; the architectures
    take turns.
    """
    from torchvision.models import get_model_weights

    found = {arch: [] for arch in names or SPEEDS}
    for _ in range(repeats):
        for arch in found:
            command = [sys.executable, ROOT / "tests/benchmark.py", "pass", ROOT / "food", photos, arch, 1]
            out = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout
            found[arch].append(json.loads(out.splitlines()[-1]))
    print("| `--arch` | ImageNet accuracy | GFLOPs | ready tensors, one thread | all threads | the pass | its share |")
    print("|---|---|---|---|---|---|---|")
    for arch, runs in found.items():
        meta = get_model_weights(arch).DEFAULT.meta
        accuracy, cost = meta["_metrics"]["ImageNet-1K"]["acc@1"], meta["_ops"]
        one, ready, passed = (statistics.median(run[key] for run in runs) for key in ("one", "ready", "pass"))
        ratio = statistics.median(run["pass"] / run["ready"] for run in runs)
        print(f"| `{arch}` | {accuracy:.1f}% | {cost:.1f} | {one:.1f} | {ready:.1f} | {passed:.1f} | {ratio:.2f} |")
