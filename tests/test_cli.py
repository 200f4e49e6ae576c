"""The command line: what it prints, and how it refuses."""

import subprocess
import sys

import pytest
from support import ROOT

import numbabn
from numbabn.__main__ import main


def test_info_prints_what_config_returns(capsys):
    main(["info"])
    printed = capsys.readouterr().out
    for name in ("numbabn", "numba", "numpy", "threads", "threading layer", "l2 cache", "gpu"):
        assert any(line.startswith(name) for line in printed.splitlines()), name
    assert numbabn.__version__ in printed
    assert str(numbabn.config.config()["threading_layer"]) in printed


@pytest.mark.parametrize("arguments", [[], ["--batch", "3", "--channels", "1", "--size", "1"]])
def test_demo_tells_the_modes_apart(capsys, arguments):
    main(["demo", *arguments])
    lines = capsys.readouterr().out.splitlines()
    verdicts = {
        line.split("  ")[0]: line.split()[-1]
        for line in lines
        if line.endswith(("same", "DIFFERENT"))
    }
    assert verdicts == {
        "y": "same",
        "dγ": "same",
        "dβ": "same",
        "dx": "DIFFERENT",
        "mean of dx": "DIFFERENT",
        "change of y[0] when x[1:] changes": "DIFFERENT",
    }


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "command"),
        (["nonsense"], "nonsense"),
        (["demo", "--nonsense"], "--nonsense"),
        (["demo", "--batch", "1"], "--batch"),
        (["demo", "--channels", "many"], "--channels"),
        (["demo", "--seed", "-1"], "--seed"),
    ],
)
def test_bad_arguments_take_one_line_and_exit_with_2(capsys, arguments, named):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert named in printed.err


def test_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "numbabn", "nonsense"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "nonsense" in done.stderr
