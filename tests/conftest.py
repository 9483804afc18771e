"""What the tests share: the scripts as a user runs them, synthetic images, and one real run on the sample photos."""

import contextlib
import csv
import fcntl
import functools
import io
import os
import pickle
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from browsing import browser  # noqa: F401
from PIL import Image
from processes import ROOT, run_forked, run_script
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(ROOT))

import predict  # noqa: E402
import train  # noqa: E402
from transfer import architectures  # noqa: E402
from transfer.backbone import backbone_of, inference_copy  # noqa: E402
from transfer.checkpoint import load_backbone  # noqa: E402
from transfer.device import Compute, pick_compute  # noqa: E402
from transfer.extraction import extract_features  # noqa: E402
from transfer.features import Split  # noqa: E402
from transfer.inputs.images import read_image  # noqa: E402
from transfer.inputs.lists import read_list  # noqa: E402
from transfer.system.flags import parse_train_args  # noqa: E402
from transfer.training import Hyperparameters  # noqa: E402

BUNDLED = ROOT / "food" / "resnet18-grocery.pth"
HPARAMS = Hyperparameters.from_flags(vars(parse_train_args(["--size", "224"])))  # the recipe's
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220)}


def run_main(main, *args: object) -> tuple[int, str, str]:
    """A script's main in this process: exit status, stdout and stderr."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(arg) for arg in args])
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


def make_photos(folder: Path, per_class: int = 4, size: tuple[int, int] = (64, 64)) -> None:
    """train.txt, test.txt and PNGs of one solid colour a class, each image a little different, in a folder."""
    for name in ("train", "test"):
        lines = []
        for label, (colour, rgb) in enumerate(COLOURS.items()):
            (folder / colour).mkdir(exist_ok=True)
            for number in range(per_class):
                path = folder / colour / f"{name}_{number}.png"
                shade = 2 * number + (name == "test")
                Image.new("RGB", size, tuple(max(0, value - shade) for value in rgb)).save(path)
                lines.append(f"{colour}/{path.name} {label}\n")
        (folder / f"{name}.txt").write_text("".join(lines))


def save_photo(path: str | Path, colour: str = "red", shade: int = 0, size: tuple[int, int] = (64, 64)) -> None:
    """A PNG of one solid colour, with the folders that it lies in."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, tuple(max(0, value - shade) for value in COLOURS[colour])).save(path)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A working directory with photos/ of three class folders, of which one has a folder of its own."""
    monkeypatch.chdir(tmp_path)
    for colour in COLOURS:
        for number in range(10):
            inner = "older/" if colour == "red" and number < 3 else ""
            save_photo(f"photos/{colour}/{inner}{number}.png", colour, 2 * number)
    return tmp_path


@pytest.fixture
def uneven(tmp_path, monkeypatch):
    """A working directory with 33 photos of red, 3 of green, and the flags of a run on them."""
    monkeypatch.chdir(tmp_path)
    for colour, count in (("red", 33), ("green", 3)):
        for number in range(count):
            save_photo(f"photos/{colour}/{number}.png", colour, 3 * number)
            if number < 3:
                save_photo(f"held/{colour}/{number}.png", colour, 3 * number + 1)
    return "--train", "photos", "--test", "held", "--epochs", 2


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    """No test downloads anything, whatever machine it runs on."""
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.getbasetemp() / "torch"))


@pytest.fixture
def impatient(monkeypatch):
    """Let a DataLoader look after its workers five times a second instead of every five seconds."""
    look = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(look, "__defaults__", (0.2,))


@pytest.fixture
def colours(tmp_path, monkeypatch):
    """A working directory with lists of solid colours."""
    make_photos(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pytest_configure():
    """For tiny tensors, or where other work shares the cores, a second thread only waits for the first."""
    torch.set_num_threads(1)


def run_once(folder, *command):
    """The finished process of a script: of the processes that share the tests, the first to come runs it in the shared
    folder, and the others wait.
    """
    result = folder / f"{command[0]}.pickle"
    with open(folder / f"{command[0]}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            result.write_bytes(pickle.dumps(run_script(*command)))
    done = pickle.loads(result.read_bytes())
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="session")
def sample_folder(tmp_path_factory):
    """A folder that the processes which share the tests have in common."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "sample"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def sample_run(sample_folder):
    """The main job on the sample photos, without random views: the finished process and the checkpoint; its features
    lie in `kept` beside.

    It takes 10 to 60 s, once for all tests that are about real photos.
    """
    out = sample_folder / "best.pth"
    options = "--epochs", 20, "--views", 2, "--out", out, "--cache", out.parent / "kept"
    return run_once(sample_folder, "train.py", *options), out


@pytest.fixture(scope="session")
def sample_answers(sample_run):
    """What predict.py says of the sample's test list: the finished process, and its report."""
    page = sample_run[1].with_name("report.html")
    options = "test.txt", "--model", sample_run[1], "--report", page, "--format", "text"
    return run_once(page.parent, "predict.py", *options), page


@pytest.fixture(scope="session")
def backbone():
    """The bundled backbone, as the main job has it."""
    model = train.build_model("resnet18", 20, load_backbone(BUNDLED, "resnet18"), 0)
    return inference_copy(backbone_of(model), pick_compute("cpu", "auto", None))


def new_head():
    """The recipe's first head for the sample, of 512 features and 20 classes."""
    return train.build_model("resnet18", 20, None, seed=0).fc


@pytest.fixture(scope="session")
def sample(sample_run, backbone):
    """The sample's training list and test list as splits: features of two views, and of the evaluation view."""
    compute = pick_compute("cpu", "auto", None)
    lists = {name: read_list(ROOT / f"{name}.txt", ROOT)[0] for name in ("train", "test")}
    views, options = {"train": range(2), "test": [0]}, {"compute": compute, "cache": sample_run[1].parent / "kept"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # whose paths the kept features are of
        datasets = {name: train.ImageDataset(image_list, views[name], 0) for name, image_list in lists.items()}
        return {name: Split(each, extract_features(backbone, each, **options)) for name, each in datasets.items()}


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """A float32 checkpoint trained for two epochs on solid colours with the bundled backbone, and its folder."""
    folder = tmp_path_factory.mktemp("small")
    make_photos(folder)
    done = run_forked("train.py", "--epochs", 2, "--precision", "float32", "--weights", BUNDLED, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


PLAIN = ("--weights", "none", "--workers", 0, "--epochs", 1)


class SmallNetwork(nn.Module):
    """A ResNet-18's parts by their names, each but two convolutions and the head empty: 0.6 MB instead of 45."""

    def __init__(self, num_classes=1000):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 256, 4, stride=32)
        for name in ("bn1", "relu", "maxpool", "layer1", "layer2", "layer3"):
            setattr(self, name, nn.Identity())
        self.layer4, self.avgpool = nn.Conv2d(256, 512, 1), nn.AdaptiveAvgPool2d(1)
        nn.init.kaiming_normal_(self.layer4.weight)  # as in the ResNets: from small features a head learns slowly
        self.fc = nn.Linear(512, num_classes)

    def forward(self, images):
        for part in [*self.children()][:-1]:
            images = part(images)
        return self.fc(images.flatten(1))


@pytest.fixture
def small(monkeypatch):
    """A small network in place of the ResNets, and no waiting for the disk: for tests that are about neither. A run
    with a ResNet-18 takes 0.8 s to build, save and load it.
    """
    monkeypatch.setattr("transfer.architectures.get_model", lambda arch, num_classes, **_: SmallNetwork(num_classes))
    for name in ("skeleton", "backbone_shapes"):  # nothing kept of other networks
        monkeypatch.setattr(architectures, name, getattr(architectures, name).__wrapped__)
        monkeypatch.setattr(f"transfer.state_dict.{name}", getattr(architectures, name), raising=False)
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def job(colours, small, tiny):
    """In a folder with lists of solid colours: what train.py makes of more arguments, network and views small."""
    return lambda *args: run_main(train.main, *PLAIN, *args)


@pytest.fixture
def trained(job):
    """The same after one run: best.pth is there."""
    assert job()[0] == 0
    return job


@pytest.fixture
def quick_model(model, monkeypatch):
    """The same, with a backbone of next to no work: for tests in which what the network sees plays no part."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(1), nn.Linear(48, 512)).eval()

    def load(path, device, workers, mirror, *, arch):
        return replace(model, backbone=backbone, compute=replace(model.compute, workers=workers))

    monkeypatch.setattr(predict, "load", load)


def answer(*args, status=0):
    """A run of predict.py with this exit status: stdout and stderr."""
    found, out, err = run_main(predict.main, "--workers", 0, "--device", "cpu", *args)
    assert found == status, err
    return out, err


def put(name, image, **options):
    image.save(name, **options)
    return name


def add_line(name, line):
    with open(name, "ab") as file:
        file.write(line if isinstance(line, bytes) else line.encode())


def growth(work):
    """Bytes of memory that some work takes at its peak, in a process of its own, since a peak only ever rises;
    it must end well.
    """
    import fuzz

    ours, theirs = os.pipe()

    def measure():
        before = fuzz.peak()
        try:
            work()
            os.write(theirs, b"%d" % (fuzz.peak() - before))
        except Exception as error:
            os.write(theirs, f"{type(error).__name__}: {error}"[:1000].encode(errors="backslashreplace"))

    pid = fuzz.forked(measure)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        measured = pipe.read()
    os.waitpid(pid, 0)
    assert measured.isdigit(), measured.decode() or "the process died"
    return int(measured)


def patched(content, at, new):
    return content[:at] + new + content[at + len(new) :]


def make_unreadable(kind, monkeypatch):
    if kind == "directory":
        os.mkdir("odd.png")
    elif kind == "link loop":
        os.symlink("odd.png", "odd.png")
    elif kind == "no permission":
        put("odd.png", Image.new("RGB", (1, 1)))
        os.chmod("odd.png", 0)
        access = os.access  # which lets the superuser read everything
        monkeypatch.setattr(os, "access", lambda path, mode: os.fsdecode(path) != "odd.png" and access(path, mode))


def try_seeds(kind, count):
    import fuzz

    def work():
        for seed in range(count):
            try:
                fuzz.try_seed(kind, seed)
            except Exception as error:
                raise AssertionError(f"seed {seed}: {error}") from error

    assert growth(work) < fuzz.MEMORY


MAKE_TRANSFORMS = train.make_transforms


@pytest.fixture
def tiny(monkeypatch):
    """Views of 64 pixels instead of 224, one thread and no waiting for the disk: nothing here depends on these."""
    monkeypatch.setattr(train, "make_transforms", lambda size: MAKE_TRANSFORMS(64 if size == 224 else size))
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def full_size(tiny, monkeypatch):
    """The views as they are: for tests that compare with a process of its own."""
    monkeypatch.setattr(train, "make_transforms", MAKE_TRANSFORMS)


@pytest.fixture
def few(tmp_path, monkeypatch):
    """A working directory with two solid-colour images a class and list."""
    make_photos(tmp_path, per_class=2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def quick(small, tiny, monkeypatch):
    """Small network and views, and features that are the pixels at low resolution: for tests in which the network's own
    arithmetic plays no part.
    """

    def embed(module, views, compute):
        return F.adaptive_avg_pool2d(views.permute(0, 3, 1, 2) / 255, (13, 14)).flatten(1)[:, :512]

    monkeypatch.setattr("transfer.backbone.embed", embed)


@pytest.fixture
def decoded(monkeypatch):
    """How often each image is decoded, by its file name."""
    counts, original = Counter(), read_image

    def read_photo(path, *rest):
        counts[os.path.basename(os.fsdecode(path))] += 1
        return original(path, *rest)

    monkeypatch.setattr(train, "read_image", read_photo)
    return counts


def go(*args, weights="none"):
    """A run of train.py that must succeed: its stdout."""
    status, out, err = run_main(train.main, "--weights", weights, "--workers", 0, *args)
    assert status == 0, err
    return out


def weights_of(path="best.pth"):
    return torch.load(path, weights_only=True)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


def rows_of(path="best.csv"):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def chunks_in(folder):
    return sorted(Path(folder).glob("*.pt"))


def plain_backbone():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    backbone.feature_dim = 512  # of what `quick` gives
    return backbone


@pytest.fixture
def extract(few, quick, monkeypatch):
    """A function that extracts two views of the training images in two cached chunks of three."""
    monkeypatch.setattr("transfer.extraction.CHUNK_ROWS", 3)
    photos, _ = read_list(Path("train.txt"), Path())
    compute, dataset = Compute(torch.device("cpu"), torch.float32), train.ImageDataset(photos, [0, 1], 0)
    return lambda max_unreadable=0: extract_features(
        plain_backbone(), dataset, compute=compute, cache=Path(), max_unreadable=max_unreadable
    )


LOAD = predict.load
load_once = functools.cache(LOAD)


@pytest.fixture
def model(small_run, tmp_path, monkeypatch):
    """A working directory with a best.pth that tells red, green and blue apart, and one image of each.

    Loaded once, since it is always the same file.
    """
    monkeypatch.chdir(tmp_path)
    os.link(small_run / "best.pth", "best.pth")
    for colour in ("red", "green", "blue"):
        shutil.copy(small_run / colour / "test_0.png", f"{colour}.png")
    loaded = load_once("best.pth", "cpu")

    def load(path, *args, **options):
        return loaded if str(path) == "best.pth" else LOAD(path, *args, **options)

    monkeypatch.setattr(predict, "load", load)
    return loaded
