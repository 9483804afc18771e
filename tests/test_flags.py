"""Flags: what is wrong with a command line is one line, and --help has a line a flag."""

import re

import pytest
from conftest import run_main, run_script

from transfer.flags import parse_predict_args, parse_train_args


@pytest.mark.parametrize("rate", ["1e37", "1e300", "inf", "nan", "0", "-1", "fast"])
def test_a_rate_that_arithmetic_cannot_hold_is_found_before_training(job, rate):
    status, out, err = job(f"--lr={rate}")
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].endswith(f"argument --lr: '{rate}' is not a number above 0 and below 1e37")


def test_a_command_line_with_augment_ends_in_one_line_that_says_that_it_is_gone():
    status, out, err = run_main(parse_train_args, "--epochs", 1, "--augment", "auto")
    line = "--augment is gone: --views 4, the default, trains on random views too; --views 2 on none"
    assert (status, out) == (2, "") and err.splitlines()[-1].endswith(f": error: {line}"), err


@pytest.mark.parametrize(
    ("script", "args", "status"),
    [("train.py", ["--help"], 0), ("train.py", ["--epoch"], 2), ("predict.py", ["--help"], 0), ("predict.py", [], 2)],
)
def test_help_and_typing_errors_are_answered_before_torch_is_imported(tmp_path, script, args, status):
    (tmp_path / "torch.py").write_text("raise SystemExit('imported')\n")
    done = run_script(script, *args, PYTHONPATH=str(tmp_path))
    assert done.returncode == status and (done.stderr if status else done.stdout).startswith("usage: "), done.stderr
    assert "imported" not in done.stderr


@pytest.mark.parametrize("parse", [parse_train_args, parse_predict_args])
def test_the_help_has_a_line_a_flag_at_80_columns(monkeypatch, parse):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = run_main(parse, "--help")
    flags = [line for line in out.splitlines() if line.startswith("  -")]
    assert status == 0 and len(flags) >= 12 and max(map(len, out.splitlines())) <= 80
    assert all(re.fullmatch(r"  (-h, )?--[\w-]+( [A-Z]+)? +\S.*", line) for line in flags)
    wrapped = [line for line in out.split("options:")[1].splitlines() if line.startswith(" " * 8)]
    assert wrapped == []
