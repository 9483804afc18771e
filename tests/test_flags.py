"""Flags: what is wrong with a command line is one line, and --help has a line a flag."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT, run_main
from processes import run_code

from transfer.system.flags import parse_predict_args, parse_train_args


@pytest.mark.parametrize("rate", ["1e37", "1e300", "inf", "nan", "0", "-1", "fast"])
def test_a_rate_that_arithmetic_cannot_hold_is_found_before_training(job, rate):
    status, out, err = job(f"--lr={rate}")
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].endswith(f"argument --lr: '{rate}' is not a number above 0 and below 1e37")


@pytest.mark.parametrize("script", ["train.py", "predict.py"])
def test_where_the_environment_was_forgotten_one_line_says_how_to_activate_it(tmp_path, script):
    for name in (
        "train.py",
        "predict.py",
        "transfer/__init__.py",
        "transfer/system/flags.py",
        "transfer/system/signals.py",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    for venv, fix in (
        (True, "activate the environment: . .venv/bin/activate"),
        (False, "pip install -r requirements.txt"),
    ):
        (tmp_path / ".venv").mkdir() if venv else (tmp_path / ".venv").rmdir()
        command = [sys.executable, "-S", script, *(["photo.jpg"] if script == "predict.py" else [])]  # no packages
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"error: torch is not installed here; {fix}\n"


def test_a_command_line_with_augment_ends_in_one_line_that_says_that_it_is_gone():
    status, out, err = run_main(parse_train_args, "--epochs", 1, "--augment", "auto")
    line = "--augment is gone: --views 4, the default, trains on random views too; --views 2 on none"
    assert (status, out, err) == (2, "", f"error: {line}\n")


@pytest.mark.parametrize(
    ("parse", "argv", "line"),
    [
        (parse_train_args, ["--trian", "photos"], "there is no flag --trian; did you mean --train?"),
        (parse_train_args, ["--epoch=3"], "there is no flag --epoch; did you mean --epochs?"),
        (parse_train_args, ["--xyzzy"], "there is no flag --xyzzy"),
        (parse_train_args, ["--train", "my", "pics"], "a path with spaces needs quotes: --train 'my pics'"),
        (parse_train_args, ["my pics"], "did you mean --train 'my pics'?"),
        (parse_train_args, ["none"], "'none' belongs to no flag; a path with spaces needs quotes"),
        (
            parse_train_args,
            ["--train", "my pics/cat", "my pics/dog"],
            "name the folder that the class folders are in: --train 'my pics'",
        ),
        (parse_train_args, ["--audit"], "--audit needs a value: --audit FILE"),
        (
            parse_train_args,
            ["--train", "-p"],
            "--train needs a value: --train PATH; a path that begins with - is written ./-...",
        ),
        (
            parse_predict_args,
            [],
            "name photos, folders or lists; examples: python predict.py photo.jpg; "
            "python predict.py test.txt --report report.html",
        ),
        (parse_predict_args, ["red.png", "--fromat", "json"], "there is no flag --fromat; did you mean --format?"),
    ],
)
def test_a_slip_of_the_pen_is_one_line_that_says_what_was_meant(tmp_path, monkeypatch, parse, argv, line):
    monkeypatch.chdir(tmp_path)
    for name in ("cat", "dog"):
        (tmp_path / "my pics" / name).mkdir(parents=True)
    assert run_main(parse, *argv) == (2, "", f"error: {line}\n")


def test_labelled_is_spelled_either_way():
    for flag in ("--labelled", "--labeled"):
        assert parse_predict_args(["photos", flag]).labelled


@pytest.mark.parametrize("script", ["train.py", "predict.py"])
def test_help_and_slips_are_answered_before_torch_is_imported(tmp_path, script):
    (tmp_path / "torch.py").write_text("raise SystemExit('imported torch')")
    for argv, status in (["--help"], 0), (["--xyzzy"], 2):
        code = f"import runpy, sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv[1:] = {argv!r}; "
        code += f"runpy.run_path('{script}', run_name='__main__')"
        done = run_code(code)
        assert done.returncode == status and "imported torch" not in done.stderr


@pytest.mark.parametrize("parse", [parse_train_args, parse_predict_args])
def test_the_help_has_a_line_a_flag_at_80_columns(monkeypatch, parse):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = run_main(parse, "--help")
    flags = [line for line in out.splitlines() if line.startswith("  -")]
    assert status == 0 and len(flags) >= 12 and max(map(len, out.splitlines())) <= 80
    assert all(re.fullmatch(r"  (-h, )?--[\w-]+( [A-Z]+)? +\S.*", line) for line in flags)
    wrapped = [line for line in out.split("options:")[1].splitlines() if line.startswith(" " * 8)]
    assert wrapped == []
