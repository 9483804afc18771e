"""Choices: the buttons of a card that say what becomes of its photos, and the bar that saves them as corrections."""

import hashlib
import itertools
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from transfer.audit.findings import Finding
from transfer.inputs.corrections import LEAVE_OUT, ClassLabels
from transfer.inputs.lists import list_entry, why_unlistable
from transfer.pages.html import escape
from transfer.system.console import script_command

SCRIPT = Path(__file__).with_name("corrections.js").read_text(encoding="utf-8")
FILE = "corrections.txt"
SAME = "="  # in the place of a `word`: nothing changes


def word(text: str | bytes) -> str:
    """A path or label in a data attribute, where it is one of several words and never code."""
    return quote(text, safe="/")


def free_name(earlier: Sequence[Path] = ()) -> str:
    """What new corrections are called: unlike earlier ones, and unlike every file where the run was started."""
    names = itertools.chain([FILE], (f"{number}.".join(FILE.split(".")) for number in itertools.count(2)))
    taken = {path.name for path in earlier}
    return next(name for name in names if name not in taken and not Path(name).exists())


@dataclass(frozen=True)
class Choices:
    """What the cards of a page offer. labels: what stands for each class in corrections; flags: of train.py, to run
    then; file: what the corrections are called; model: whose flags belong there too.
    """

    labels: ClassLabels
    flags: Sequence[str] = ()
    file: str = field(default_factory=free_name)
    model: Path | None = None

    @classmethod
    def after(cls, argv: Sequence[str], labels: ClassLabels, earlier: Sequence[Path]) -> "Choices":
        """Of a run of train.py with these arguments, which took earlier corrections: the same again with new ones."""
        return cls(labels, argv, free_name(earlier))

    def to_class(self, label: int, photos: int = 1) -> tuple[str, list[str]]:
        """The choice of a class for all photos of a card: its name, and a word for each; none where no list can name
        the class.
        """
        text = self.labels.text(label)
        return escape(self.labels.classes[label]), [word(text)] * photos if text else []

    def of_finding(self, finding: Finding) -> list[tuple[str, Sequence[str]]]:
        """What may become of a finding's photos, as `buttons` takes it."""
        suggested = [] if finding.suggestion is None else [self.to_class(finding.suggestion)]
        if finding.other is None:
            return [*suggested, ("keep", [SAME]), ("leave out", [LEAVE_OUT])]
        keep, both = ("keep", [SAME] * 2), [LEAVE_OUT] * 2
        if finding.kind == "conflict":
            split, place = finding.other
            labels = [self.to_class(label, photos=2) for label in (int(split.labels[place]), finding.label)]
            return [*((f"both {name}", become) for name, become in labels), keep, ("leave out both", both)]
        if finding.path == finding.other_path:
            return [keep, ("leave out", both)]
        if finding.kind == "leak":
            return [keep, ("leave out of test", [LEAVE_OUT, SAME]), ("leave out of training", [SAME, LEAVE_OUT])]
        return [keep, ("leave out one", [LEAVE_OUT, SAME])]

    def attributes(self, paths: Sequence[bytes]) -> str:
        """Those of a card about these photos; none where a list can't hold one of their names."""
        if any(map(why_unlistable, paths)):
            return ""
        return f' data-paths="{" ".join(word(list_entry(path)) for path in paths)}"'

    def buttons(self, paths: Sequence[bytes], choices: Sequence[tuple[str, Sequence[str]]], name: str) -> str:
        """The choices of a card and the list of all classes, for whoever has scripts; or why there are none.

        choices: of each its name, safe in HTML, and its words, as `to_class` has them; name: of the card, for screen
        readers, safe too.
        """
        reasons = [reason for path in paths if (reason := why_unlistable(path))]
        if reasons:
            return f'<p class="choices" hidden>No choices: a list can’t hold this name ({reasons[0]}).</p>'
        parts = [
            f'<button type="button" aria-pressed="false" data-labels="{" ".join(become)}">'
            f'<kbd aria-hidden="true">{number}</kbd> {words}</button>'
            for number, (words, become) in enumerate((each for each in choices if each[1]), 1)
        ]
        parts.append('<select aria-label="another class"><option value="">another class …</option></select>')
        return f'<div class="choices" role="group" aria-label="{name}" hidden>{"".join(parts)}</div>'

    def dock(self, cards: str) -> str:
        """What follows the cards, where there are any, and stays at the foot of the window: the classes of the lists;
        how many are decided, the button that saves them, and what to run then. cards: their HTML, by which a page knows
        its decisions again.
        """
        if not cards:
            return ""
        texts = [(self.labels.text(label), escape(name)) for label, name in enumerate(self.labels.classes)]
        options = (f'<option value="{word(text)}">{name}</option>' for text, name in texts if text)
        command = shlex.join([*script_command("train.py"), *self.flags, "--corrections", self.file])
        model = f", with the flags that {escape(self.model)} was trained with" if self.model else ""
        digest = hashlib.sha256(cards.encode(errors="surrogatepass")).hexdigest()[:32]
        return (
            f'<template id="classes">{"".join(options)}</template><aside class="dock" aria-label="Corrections" '
            f'data-file="{self.file}" data-page="{digest}" hidden><p><b role="status"></b> <span class="volatile" '
            "hidden>This browser keeps no decisions over a reload: save before you leave.</span></p>"
            '<button type="button" disabled>Save corrections</button>'
            f"<p>Put {self.file} into the folder that you run this in{model}: "
            f'<code class="copy">{escape(command)}</code></p>'
            '<p class="keys">Keys: <kbd>1</kbd> <kbd>2</kbd> … choose, arrows move, <kbd>u</kbd> undoes.</p></aside>'
        )
