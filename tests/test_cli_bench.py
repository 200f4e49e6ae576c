"""``python -m numbabn bench``: what it measures, what it prints, how it refuses."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from support import ROOT, as_dtype

from numbabn import bench, reference
from numbabn.__main__ import main
from numbabn.bench import problem, report, roofline, timing

SMALL = ["bench", "--shape", "4,8,6,6", "--seconds", "0.01"]


def small(dtype="float32", layout="nchw", shape=(4, 8, 6, 6)):
    return problem.Problem(shape, dtype, layout)


def expected(given, pass_name):
    """Output, or gradients, of a pass in float64 with the channels second."""

    def wide(array):
        return np.moveaxis(array.astype(np.float64), given.channel_axis, 1)

    direction, _, mode = pass_name.partition("_")
    statistics = given.running_mean.astype(float), given.running_var.astype(float)
    y, saved = reference.batch_norm_forward(
        wide(given.x), *statistics, given.weight, given.bias, training=mode == "train"
    )
    if direction == "forward":
        return y
    return reference.batch_norm_backward(wide(given.dy), saved)[0]


@pytest.mark.parametrize("who", ["numbabn", "torch", "numpy"])
@pytest.mark.parametrize("pass_name", problem.PASSES)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_everybody_computes_the_pass(who, pass_name, layout, dtype, set_threads):
    as_dtype(dtype)
    given = small(dtype, layout)
    should = expected(given, pass_name)
    if who == "numpy":
        contestant = problem.of_numpy(given, pass_name)
    else:
        if who == "torch":
            pytest.importorskip("torch")
        contestant = getattr(problem, f"of_{who}")(given, pass_name, 1)
    assert (contestant.who, contestant.pass_name, contestant.threads) == (who, pass_name, 1)
    given.out.fill(np.nan)
    contestant.prepare()
    found = contestant.run()
    if who == "torch" and pass_name.startswith("backward"):
        found = found[0].double().numpy()  # the one output that cannot be given
    else:
        found = np.moveaxis(given.out.astype(np.float64), given.channel_axis, 1)
    tolerance = {"float16": 2e-2, "bfloat16": 1e-1}.get(dtype, 1e-4)
    np.testing.assert_allclose(found, should, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("pass_name", problem.PASSES)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_probes_move_the_arrays_of_the_pass(threads, pass_name, dtype, set_threads):
    as_dtype(dtype)
    given = small(dtype, shape=(3, 5, 7, 7))
    kind = np.float64 if dtype == "float64" else np.float32
    first, second, out = (lines.view(kind) for lines in given.lines)
    assert np.shares_memory(first, given.x)
    assert np.shares_memory(second, given.dy)
    assert given.nbytes <= out.nbytes < given.nbytes + 128
    assert all(lines.ctypes.data % 64 == 0 for lines in given.lines)
    should = 0.5 * first
    if pass_name.startswith("backward"):
        should = should + 0.5 * second
    found = list(roofline.probes(given, pass_name, threads))
    assert len(found) == 2  # ordinary and streaming stores
    for probe in found:
        out.fill(np.nan)
        probe.prepare()
        probe.run()
        np.testing.assert_array_equal(out, should)


def test_race_alternates_and_takes_medians():
    order, progress = [], []
    contestants = [
        problem.Contestant(name, "forward_eval", 1, lambda n=name: order.append(n), lambda: None)
        for name in "ab"
    ]
    found = timing.race(contestants, 0.05, progress.append)
    assert [c.who for c, _ in found] == ["a", "b"]
    assert all(0 < seconds < 1e-3 for _, seconds in found)
    assert sum(progress) == pytest.approx(1)
    changes = sum(a != b for a, b in itertools.pairwise(order))
    assert changes >= timing.FEWEST_ROUNDS


def test_rows_compare_like_with_like():
    given = small()

    def timed(who, threads, seconds):
        return problem.Contestant(who, "backward_eval", threads, list, list), seconds

    found = report.rows(
        given,
        "backward_eval",
        [
            *(timed("numbabn", 2, 2.0), timed("numbabn", 1, 4.0), timed("torch", 1, 6.0)),
            *(timed("memory", 1, 3.0), timed("memory", 1, 2.0), timed("memory", 2, 1.5)),
        ],
    )
    assert [(r.who, r.threads, r.roofline, r.speedup) for r in found] == [
        ("numbabn", 1, 0.5, 1.0),
        ("torch", 1, 2 / 6, 1.5),
        ("numbabn", 2, 0.75, 1.0),
    ]
    assert found[0].gigabytes_per_second == 3 * given.x.nbytes / 4.0 / 1e9


@pytest.mark.parametrize("rich", [True, False])
def test_table(capsys, monkeypatch, rich):
    if rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setattr(report, "is_installed", lambda module: module != "rich")
    main([*SMALL, "--threads", "1,2", "--against", "numpy", "--layout", "nhwc"])
    printed = capsys.readouterr()
    hint = ["pip install 'numbabn[cli]' makes this a nicer table."]
    assert printed.err.splitlines() == ([] if rich else hint)
    lines = printed.out.splitlines()
    assert "4 × 8 × 6 × 6, nhwc, float32" in printed.out
    for pass_name in ("forward train", "forward eval", "backward train", "backward eval"):
        own = [line.split() for line in lines if pass_name in line]
        assert [(words[2], words[3]) for words in own] == [
            *(("1", "numbabn"), ("1", "numpy"), ("2", "numbabn")),
        ]
        assert all(words[6].endswith("%") for words in own if words[3] == "numbabn")
        assert own[1][-1].endswith("×")


def test_json_to_stdout_and_to_a_file(capsys, tmp_path):
    main([*SMALL, "--threads", "2", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["shape"] == [4, 8, 6, 6]
    assert printed["machine"]["max_threads"] >= 2
    assert [row["pass_name"] for row in printed["rows"]] == list(problem.PASSES)
    assert all(row["seconds"] > 0 and row["roofline"] > 0 for row in printed["rows"])
    main([*SMALL, "--threads", "2", "--json", str(tmp_path / "found.json")])
    assert "forward train" in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("threads", ["1", "1,2,3"])
def test_plot(tmp_path, capsys, threads):
    image = pytest.importorskip("matplotlib.image")
    path = tmp_path / "found.png"
    main([*SMALL, "--threads", threads, "--against", "numpy", "--plot", str(path)])
    height, width, _ = image.imread(path).shape
    assert height > 300
    assert (width > 1000) == (threads != "1")  # scaling is drawn where there is some


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--shape", "32"], "--shape"),
        (["--shape", "32,x,4"], "--shape"),
        (["--shape", "32,0,4,4"], "--shape"),
        (["--shape", "1,64"], "more than 1 value per channel"),
        (["--shape", "1000000,1000000"], "too large"),
        (["--dtype", "int8"], "int8"),
        (["--layout", "nwhc"], "nwhc"),
        (["--threads", "0"], "--threads"),
        (["--threads", "1,,2"], "--threads"),
        (["--threads", "4096"], "4096"),
        (["--against", "jax"], "jax"),
        (["--seconds", "nan"], "--seconds"),
        (["--json", "no/such/folder/x.json"], "--json"),
        (["--plot", "no/such/folder/x.png"], "--plot"),
        (["--plot", "found.txt"], ".png"),
        (["--json", "x" * 300], "--json"),
        (["--plot", "/proc/x.png"], "--plot"),
        (["--shape", ",".join(["2"] + 40 * ["1"])], "at most 32 sizes"),
        (["nonsense"], "nonsense"),
    ],
)
def test_nonsense_takes_one_line_and_exits_with_2(capsys, arguments, named):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *arguments])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert named in printed.err


@pytest.mark.parametrize(
    ("module", "arguments"),
    [("torch", ["--against", "torch"]), ("matplotlib", ["--plot", "found.png"])],
)
def test_what_is_not_installed_is_named_before_anything_is_measured(
    capsys, monkeypatch, module, arguments
):
    monkeypatch.setattr(problem, "is_installed", lambda name: name != module)
    monkeypatch.setattr(bench, "_measure", lambda *a: pytest.fail("measured"))
    with pytest.raises(SystemExit) as stopped:
        main([*SMALL, *arguments])
    assert stopped.value.code == 2
    assert f"{module} is not installed" in capsys.readouterr().err


def test_command_line_imports_bench_only_when_used():
    code = (
        "import sys, numbabn.__main__ as m; m._parser();"
        "print([n for n in sys.modules if n.startswith(('numbabn.bench', 'rich', 'matplotlib'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
