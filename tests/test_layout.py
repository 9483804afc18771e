"""The house: rooms stand on rooms below them and on no entry point, and none has grown too large to read."""

import ast
import re
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

ROOMS = {path.stem: path for path in (ROOT / "transfer").glob("*.py")}


def imported(path):
    """The names of the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports would hide here"
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def test_no_room_imports_an_entry_point_and_there_is_no_cycle():
    below = {}
    for room, path in ROOMS.items():
        names = set(imported(path))
        assert not names & {"train", "predict"}, room
        below[room] = {name.split(".")[1] for name in names if name.startswith("transfer.")} & set(ROOMS)
    assert set(TopologicalSorter(below).static_order()) == set(ROOMS)  # raises CycleError where there is one


@pytest.mark.parametrize(
    ("path", "most"),
    [("train.py", 400), ("predict.py", 300), *((f"transfer/{room}.py", 300) for room in ROOMS if room != "report")],
)
def test_every_file_can_be_read_in_one_sitting(path, most):
    assert len((ROOT / path).read_text().splitlines()) <= most


def test_every_room_says_in_its_first_line_what_belongs_there_and_readme_names_it():
    table = dict(re.findall(r"^\| `transfer/(\w+)\.py` \| (.+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert table.keys() == ROOMS.keys() - {"__init__"}
    for room, path in ROOMS.items():
        assert re.fullmatch(r".{30,}[.:]", (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]), room


def test_ci_runs_the_command_that_readme_names_for_the_tests():
    section = (ROOT / "README.md").read_text().split("## Tests\n")[1]
    assert re.search(r"^```\n(.+)\n```$", section, re.MULTILINE)[1] == (ROOT / ".ci/run").read_text().splitlines()[-1]
