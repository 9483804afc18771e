"""The page of --label-next: the photos to label, most worthy first, with what the model takes them for."""

from collections.abc import Sequence
from pathlib import Path

from transfer.inputs.corrections import ClassLabels
from transfer.inputs.images import GREY_BITS
from transfer.metrics import likeliest
from transfer.pages.choices import SAME, SCRIPT, Choices
from transfer.pages.html import Thumbnails, escape, page, shelves
from transfer.rows import Answer
from transfer.system.console import plural
from transfer.system.files import path_digest, save_atomically

GUESSES = 3  # classes shown for a photo


def next_card(answer: Answer, choices: Choices, thumbnails: Thumbnails) -> str:
    """A photo to label with its rank, its likeliest classes, to choose from, and its path, which a click selects."""
    tops = likeliest(answer.found, range(len(choices.labels.classes)), GUESSES)
    guesses = "".join(
        f'<div class="guess"><span>{escape(choices.labels.classes[label])}</span><span>{prob:.1%}</span>'
        f'<i style="--share:{prob:.1%}"></i></div>'
        for label, prob in tops
    )
    picture = thumbnails.draw(answer.path, f"photo {answer.rank}")
    buttons = [*(choices.to_class(label) for label, _ in tops), ("skip", [SAME])]
    buttons = choices.buttons([answer.path], buttons, f"photo {answer.rank}, {escape(answer.path)}")
    path = f'<p class="path"><span class="copy">{escape(answer.path)}</span></p>'
    text = f'<div><p class="true"><b>{answer.rank}</b></p>{guesses}</div>{path}{buttons}'
    return f'<li class="card"{choices.attributes([answer.path])}>{picture}{text}</li>'


def save_next(
    path: Path, answers: Sequence[Answer], metadata: dict, *, pile: int, model: Path, sources: Sequence[str]
) -> None:
    """Draw the photos to label next, of a pile of so many. metadata: of the model. Raises UserError (status 1)."""
    # A checkpoint does not tell where its photos lie, but whether they are those that train.py takes by itself.
    flags = [] if path_digest("train.txt") in metadata.get("trained_lists", []) else ["--train", "PATH"]
    choices = Choices(ClassLabels.of_model(metadata), flags, model=model)
    thumbnails = Thumbnails(metadata.get("grey_bits", GREY_BITS))
    cards = shelves([next_card(answer, choices, thumbnails) for answer in answers])
    names = " and ".join("standard input" if source == "-" else escape(source) for source in sources)
    title = f"{plural(len(answers), 'photo')} to label next"
    header = (
        f'<p class="eyebrow">Photos without labels</p><h1>{title}</h1><p class="lede">Of {pile:,} photos in {names} '
        f"these would help {escape(model)} most: typical of the others, unclear to the model, and different from each "
        f"other.{thumbnails.describe_cut()}</p>"
    )
    words = (
        "<p>Look at each photo and choose its class. Without buttons: move it into its class’s folder or add its path "
        "and class to your list, then train again. The bars are the model’s guesses, which may all be wrong.</p>"
    )
    sections = [("The most useful first", f"{words}{cards}", "")]
    save_atomically(path, page(title, header, sections, foot=choices.dock(cards), script=SCRIPT).encode())
