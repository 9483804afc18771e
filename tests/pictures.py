"""README's pictures, of the pages that its commands make of the sample photos: tests/audit.png and tests/report.png.

python tests/pictures.py
"""

import base64
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
from browsing import call, open_browser, show  # noqa: E402

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
SIZES = {"audit": (1180, 1160), "report": (870, 1060)}  # of the part of each page that is shown, in pixels


def photograph(browser: str, page: Path, size: tuple[int, int]) -> Image.Image:
    """The top of a page."""
    show(browser, page, size[0], height=size[1])
    clip = {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}
    body = {"cmd": "Page.captureScreenshot", "params": {"clip": clip, "captureBeyondViewport": True}}
    content = call("POST", f"{browser}/goog/cdp/execute", body)["data"]
    return Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("food", "train.txt", "test.txt"):  # the commands as they are in README, but what is there stays
            Path(folder, name).symlink_to(ROOT / name)
        for name in ("train.py", "predict.py"):  # which the pages name as they lie in this folder
            shutil.copy(ROOT / name, folder)
        shutil.copytree(ROOT / "transfer", Path(folder, "transfer"))
        for command in (["train.py", "--audit", "audit.html"], ["predict.py", "test.txt", "--report", "report.html"]):
            subprocess.run([sys.executable, *command], cwd=folder, check=True)
        with open_browser(Path(folder, "profile")) as browser:
            for name, size in SIZES.items():
                picture = photograph(browser, Path(folder, f"{name}.html"), size)
                picture.quantize(256, dither=Image.Dither.NONE).save(TESTS / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
