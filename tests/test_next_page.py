"""The page of the photos to label next: ranks, guesses and paths, names as text, shown well by a browser."""

import re

import pytest
import torch
from browsing import HOSTILE, Page, ask, complaints, fetched, show
from PIL import Image

from transfer.pages.next_page import save_next
from transfer.rows import Answer
from transfer.system.files import path_digest


def written(folder, count=3, name="class", path="photo", trained_lists=()):
    """The page of so many photos, of which the first can be read, and of four classes; and their probabilities."""
    Image.new("RGB", (64, 48), (200, 30, 30)).save(folder / "red.png")
    probs = torch.rand(count, 4, generator=torch.Generator().manual_seed(0)).softmax(1)
    paths = [bytes(folder / "red.png"), *(f"{path} {number}".encode() + b"\xff" for number in range(1, count))]
    answers = [Answer(paths[n], probs[n], rank=n + 1, worth=0.5 - n / 100) for n in range(count)]
    classes = [f"{name} {number}" for number in range(4)]
    metadata = {"classes": classes, "trained_lists": [*trained_lists]}
    save_next(folder / "next.html", answers, metadata, pile=1234, model=folder / "best.pth", sources=["pile", name])
    return (folder / "next.html").read_text(encoding="utf-8"), probs


def test_a_card_has_its_photo_rank_path_and_the_three_likeliest_classes(tmp_path):
    page, probs = written(tmp_path)
    cards = re.findall(r'<li class="card"[^>]*>(.*?)</li>', page, re.S)
    assert len(cards) == 3 and "data:image/jpeg" in cards[0] and "can’t be read" in cards[1]
    for number, card in enumerate(cards):
        tops = probs[number].topk(3)
        guesses = re.findall(r"<span>class (\d)</span><span>([\d.]+%)</span>", card)
        expected = [f"{value:.1%}" for value in tops.values.tolist()]
        assert guesses == [(str(label), share) for label, share in zip(tops.indices.tolist(), expected, strict=True)]
        assert f"<b>{number + 1}</b>" in card
    assert '<span class="copy">photo 2\\udcff</span>' in cards[2]
    assert "run this in, with the flags that " in page
    assert "train.py --train PATH --corrections corrections.txt</code>" in page
    assert "<h1>3 photos to label next</h1>" in page and "Of 1,234 photos in pile and class these" in page
    assert "choose its class. Without buttons: move it into its class’s folder or add its path" in page


def test_a_model_of_the_lists_that_training_takes_by_itself_needs_no_train_flag(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page, _ = written(tmp_path, trained_lists=[path_digest("train.txt")])
    assert "train.py --corrections corrections.txt</code>" in page


def test_hostile_names_are_text(tmp_path):
    page, _ = written(tmp_path, name=HOSTILE, path=HOSTILE)
    assert page.count("<script") == 1 and "<img src=x" not in page and "\x1b" not in page and "\u202e" not in page
    assert all(attrs.get("alt") for tag, attrs in Page(page).tags if tag == "img")


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1440, "dark")])
def test_a_browser_shows_it_without_errors_requests_or_sideways_scrolling(tmp_path, browser, width, scheme):
    written(tmp_path, count=40, name="a_very_long_name_without_any_space" * 2, path="x" * 200)
    show(browser, tmp_path / "next.html", width, scheme)
    wide, window = ask(browser, "return [document.documentElement.scrollWidth, innerWidth]")
    assert window == width and wide <= window
    look = """const boxes = [...document.querySelectorAll('.card')].map(card => card.getBoundingClientRect())
        return boxes.filter((a, i) => boxes.slice(i + 1, i + 9).some(b =>
            a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1)).length"""
    assert ask(browser, look) == 0
    # Only the first name is UTF-8: the others have no buttons.
    choices = "return [...document.querySelectorAll('[data-paths] :is(button, select)')].map(each => each.textContent)"
    first, *_, skip, listed = ask(browser, choices)
    assert first.startswith("1 a_very_long") and skip == "4 skip" and listed.startswith("another class")
    assert ask(browser, "return document.querySelector('[role=status]').textContent") == "0 decided, 1 to go"
    assert complaints(browser) == [] and fetched(browser) == [(tmp_path / "next.html").as_uri()]
