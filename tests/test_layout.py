"""The house: rooms stand on rooms below them and on no entry point, and none has grown too large to read."""

import ast
import re
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

SCRIPTS = ("train.py", "predict.py")
ROOMS = {path.relative_to(ROOT).as_posix(): path for path in sorted((ROOT / "transfer").rglob("*.py"))}
SOURCES = {name: ROOT / name for name in SCRIPTS} | ROOMS
LONG_TEMPLATES = ("transfer/pages/report.py",)  # one page, whose HTML is most of its lines
MOST_LINES = {"train.py": 400} | {name: 300 for name in SOURCES if name not in ("train.py", *LONG_TEMPLATES)}
FUNCTION_LINES, MAIN_LINES, POSITIONAL = 40, 50, 4


def imported(path):
    """The names of the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports would hide here"
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def functions(path):
    """Every function and method of a file."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def passed_through(function):
    """All below a function that functools.wraps decorates: it passes on what it gets."""
    wraps = any("functools.wraps" in ast.unparse(decorator) for decorator in function.decorator_list)
    return set(ast.walk(function)) if wraps else set()


def bags(path):
    """Lines where keyword arguments travel as a dict: **kwargs that a function takes, **dict that one gives on."""
    tree = ast.parse(path.read_text())
    exempt = set().union(*(passed_through(node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)))
    nodes = set(ast.walk(tree)) - exempt
    lines = [node.value.lineno for node in nodes if isinstance(node, ast.keyword) and node.arg is None]
    lines += [node.kwarg.lineno for node in nodes if isinstance(node, ast.arguments) and node.kwarg]
    lines += [node.lineno for node in nodes if isinstance(node, ast.Dict) and None in node.keys]
    return sorted(lines)


def module_of(name):
    """A room's module, by its path."""
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def test_no_room_imports_an_entry_point_and_there_is_no_cycle():
    modules = {module_of(name): path for name, path in ROOMS.items()}
    below = {}
    for module, path in modules.items():
        names = set(imported(path))
        assert not {name.split(".")[0] for name in names} & {"train", "predict"}, module
        below[module] = names & set(modules) - {module}
    assert set(TopologicalSorter(below).static_order()) == set(modules)  # raises CycleError where there is one


@pytest.mark.parametrize("name", MOST_LINES)
def test_every_file_can_be_read_in_one_sitting(name):
    assert len(SOURCES[name].read_text().splitlines()) <= MOST_LINES[name]


@pytest.mark.parametrize("name", SOURCES)
def test_no_function_is_longer_than_a_screen_or_takes_more_than_four_arguments_by_place(name):
    for function in functions(SOURCES[name]):
        most = MAIN_LINES if function.name == "main" and name in SCRIPTS else FUNCTION_LINES
        assert function.end_lineno - function.lineno < most, function.name
        positional = [each.arg for each in (*function.args.posonlyargs, *function.args.args)]
        assert len(positional) - (positional[:1] in (["self"], ["cls"])) <= POSITIONAL, function.name


@pytest.mark.parametrize("name", SOURCES)
def test_no_bag_of_keyword_arguments_travels(name):
    assert bags(SOURCES[name]) == []


def test_every_room_says_in_its_first_line_what_belongs_there_and_the_map_of_rooms_names_it():
    table = re.findall(
        r"^\| `(transfer/[\w/]+\.py)` \| .+ \|$", (ROOT / "transfer/README.md").read_text(), re.MULTILINE
    )
    assert sorted(table) == sorted(name for name in ROOMS if not name.endswith("__init__.py"))
    for name, path in ROOMS.items():
        if path.read_text():
            docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
            assert re.fullmatch(r".{30,}[.:]", docstring.split("\n")[0]), name


def test_ci_runs_the_command_that_readme_names_for_the_tests():
    section = (ROOT / "README.md").read_text().split("## Tests\n")[1]
    assert re.search(r"^```\n(.+)\n```$", section, re.MULTILINE)[1] == (ROOT / ".ci/run").read_text().splitlines()[-1]
