"""The page of --label-next: the photos to label, most worthy first, with what the model takes them for."""

from collections.abc import Sequence
from pathlib import Path

from transfer.console import plural
from transfer.files import save_atomically
from transfer.metrics import likeliest
from transfer.pages.html import escape, page, thumbnail
from transfer.rows import Answer

GUESSES = 3  # classes shown for a photo


def next_card(answer: Answer, classes: Sequence[str]) -> str:
    """A photo to label with its rank, its likeliest classes and its path, which a click selects."""
    guesses = "".join(
        f'<div class="guess"><span>{escape(name)}</span><span>{prob:.1%}</span><i style="--share:{prob:.1%}"></i></div>'
        for name, prob in likeliest(answer.found, classes, GUESSES)
    )
    picture = thumbnail(answer.path, f"photo {answer.rank}")
    path = f'<p class="path"><span class="copy">{escape(answer.path)}</span></p>'
    return f'<li class="card">{picture}<div><p class="true"><b>{answer.rank}</b></p>{guesses}</div>{path}</li>'


def save_next(
    path: Path, answers: Sequence[Answer], classes: Sequence[str], *, pile: int, model: Path, sources: Sequence[str]
) -> None:
    """Draw the photos to label next, of a pile of so many. Raises UserError (status 1)."""
    names = " and ".join("standard input" if source == "-" else escape(source) for source in sources)
    title = f"{plural(len(answers), 'photo')} to label next"
    header = (
        f'<p class="eyebrow">{names}</p><h1>{title}</h1><p class="lede">Of {pile:,} photos without labels these would '
        f"help {escape(model)} most: typical of the others, unclear to the model, and different from each other.</p>"
    )
    words = (
        "<p>Look at each photo, move it into its class’s folder or add its path and class to your list, then train "
        "again. The bars are the model’s guesses, which may all be wrong.</p>"
    )
    cards = "".join(next_card(answer, classes) for answer in answers)
    body = f'{words}<ul class="cards">{cards}</ul>'
    save_atomically(path, page(title, header, [("The most useful first", body, "")]).encode())
