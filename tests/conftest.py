"""What the tests share: the scripts as a user runs them, synthetic images, and one real run on the sample photos."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220)}


def run_script(script: str, *args: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """A script by subprocess, as a user runs it, on a machine where every download is refused."""
    refused = {"https_proxy": "http://127.0.0.1:9", "no_proxy": "", "TORCH_HOME": "/nonexistent/torch"}
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, args)],
        cwd=cwd,
        env=os.environ | refused | environment,
        capture_output=True,
        text=True,
        timeout=170,
    )


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


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    """No test downloads anything, whatever machine it runs on."""
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.getbasetemp() / "torch"))


@pytest.fixture
def one_thread():
    """For tiny tensors, or where other work shares the cores, a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def colours(tmp_path, monkeypatch):
    """A working directory with lists of solid colours."""
    make_photos(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def sample_run(tmp_path_factory):
    """The main job on the sample photos: the finished process, its output lines and the checkpoint."""
    out = tmp_path_factory.mktemp("sample") / "best.pth"
    done = run_script("train.py", "--epochs", 20, "--out", out)
    assert done.returncode == 0, done.stderr
    return done, out


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """A float32 checkpoint trained for two epochs on solid colours with the bundled backbone, and its folder."""
    folder = tmp_path_factory.mktemp("small")
    make_photos(folder)
    done = run_script(
        "train.py", "--epochs", 2, "--precision", "float32", "--weights", ROOT / "food/resnet18-grocery.pth", cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return folder
