"""The benchmark suite's parts that have a right answer."""

import importlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import ROOT

from benchmarks import (
    bench_calls,
    bench_memory,
    bench_passes,
    bench_ratios,
    bench_shapes,
    bench_startup,
    bench_threads,
    history,
    peers_numpy,
    quick,
    site,
    suite,
)
from benchmarks.peers_problem import Problem
from benchmarks.shapes import LAYOUTS, PASSES, REPRESENTATIVE, SHAPE_BY_NAME, SHAPES

SMALL = "1x512x7x7"


def test_shapes_are_named_once():
    assert len(SHAPE_BY_NAME) == len(SHAPES) == 26
    assert {shape.sizes[0] for shape in SHAPES if len(shape.sizes) == 4} == {1, 32}
    assert set(REPRESENTATIVE) < set(SHAPE_BY_NAME)


def test_asv_can_import_what_lies_here_without_numba_cuda():
    # asv imports every module of the folder, in environments with only what asv.conf.json pins.
    script = """
import importlib, pkgutil, sys
sys.modules["numbabn.cuda"] = None
import benchmarks
for module in pkgutil.iter_modules(benchmarks.__path__):
    importlib.import_module(f"benchmarks.{module.name}")
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=120)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_layouts_hold_the_same_values(shape):
    for layout in LAYOUTS:
        sizes, channel_axis = shape.in_layout(layout)
        assert sizes[channel_axis] == shape.sizes[1]
        assert np.prod(sizes) == np.prod(shape.sizes)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pass_name", PASSES)
def test_cells_compute_their_pass(pass_name, layout, dtype, set_threads):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    contestant = suite.cell(pass_name, SMALL, layout, dtype)
    given = suite.problem(SMALL, dtype)
    out = given.out(layout)
    out.fill(np.nan)
    contestant.run(1)
    c = 5
    x, dy = (given.channel(a, layout, c) for a in (given.x(layout), given.dy(layout)))
    train = pass_name.endswith("train")
    mean, var = (x.mean(), x.var()) if train else (given.running_mean[c], given.running_var[c])
    invstd = 1 / np.sqrt(var + 1e-5)
    x_hat = (x - mean) * invstd
    if pass_name.startswith("forward"):
        should = given.weight[c] * x_hat + given.bias[c]
    else:
        rest = dy.mean() + x_hat * (dy * x_hat).mean() if train else 0
        should = given.weight[c] * invstd * (dy - rest)
    tolerance = {"float16": 1e-2, "bfloat16": 5e-2}.get(dtype, 1e-4)
    np.testing.assert_allclose(given.channel(out, layout, c), should, tolerance, tolerance)


def test_cells_do_not_compile_once_they_are_made(set_threads):
    from numbabn.runtime import kernel_counts

    benchmark = bench_passes.BackwardTrain()
    benchmark.setup(SMALL, "nchw")
    before = kernel_counts()
    benchmark.time_pass(SMALL, "nchw")
    assert kernel_counts() == before


def test_dense_shapes_are_measured_once():
    with pytest.raises(NotImplementedError):
        suite.cell("forward_eval", "4096x1024", "nhwc")


def test_commits_without_the_functions_are_skipped(monkeypatch):
    import numbabn

    monkeypatch.delattr(numbabn, "batch_norm_forward")
    for benchmark in (bench_calls.Overhead(), bench_memory.Memory()):
        with pytest.raises(NotImplementedError):
            benchmark.setup()
    with pytest.raises(NotImplementedError):
        suite.cell("forward_eval", SMALL, "nchw")
    assert bench_ratios.Ratios().setup_cache() == {}
    assert bench_threads.Threads().setup_cache() == {}
    with pytest.raises(NotImplementedError):
        bench_startup.FirstCall().setup({})


@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize("sizes", [(3, 8, 5, 5), (9, 8)])
def test_numpy_computes_the_passes(pass_name, sizes):
    problem = Problem(sizes)
    found = list(peers_numpy.contestants(problem, pass_name, 1))
    assert [c.layout for c in found] == list(problem.layouts)
    for contestant in found:
        result = contestant.result()
        assert result.tensors
        assert problem.check(pass_name, result) == ""


def test_ratios_are_of_one_race(monkeypatch, set_threads):
    monkeypatch.setattr(bench_ratios, "BUDGET", 0.02)
    found = bench_ratios._ratios(Problem((4, 32, 14, 14)), "backward_eval")
    assert list(found) == ["backward_eval 4x32x14x14 nchw", "backward_eval 4x32x14x14 nhwc"]
    ratios = bench_ratios.Ratios()
    for cell in ("4x32x14x14 nchw", "4x32x14x14 nhwc"):
        ratios.setup(found, "backward_eval", cell)
        assert 0 < ratios.track_time_over_numpy() < math.inf
        assert 0 < ratios.track_time_over_copyto() < math.inf
    # NaN is asv's word for what was not measured.
    ratios.found = dict.fromkeys(ratios.found)
    assert math.isnan(ratios.track_time_over_torch())
    assert math.isnan(ratios.track_fraction_of_bandwidth())


def test_speedup_is_of_one_thread_over_many():
    threads = bench_threads.Threads()
    found = {"forward_eval": {1: 4.0, 2: 2.5}}
    threads.setup(found, "forward_eval", 2)
    assert threads.track_speedup(found, "forward_eval", 2) == 1.6
    with pytest.raises(NotImplementedError):
        threads.setup(found, "forward_eval", 4)


def test_call_benchmarks_run():
    benchmark = bench_calls.Overhead()
    benchmark.setup()  # which runs each of them
    assert np.isfinite(benchmark.out).all()


def test_history_describes_the_machine():
    fields = history.machine_fields()
    assert "caches: " in fields["cpu"]
    assert int(fields["num_cpu"]) >= 1
    assert re.fullmatch(r"[0-9.]+ GiB", fields["ram"])


def test_history_measures_a_subset_of_what_there_is():
    def chosen(name):
        return bool(re.search(history.SUBSET, name))

    assert chosen("bench_passes.ForwardTrain.time_pass('32x256x14x14', 'nhwc')")
    assert not chosen("bench_passes.ForwardTrain.time_pass('1x2048x7x7', 'nchw')")
    assert not chosen(
        "bench_passes.ForwardTrainDtypes.time_pass('32x256x14x14', 'nchw', 'float64')"
    )
    assert chosen("bench_ratios.Ratios.track_time_over_numpy('forward_eval', '65536x64 nc')")
    assert not chosen("bench_shapes.AllShapes.track_mean_time('forward_eval', 'nchw')")


def test_tracked_results_are_of_what_the_suite_measures():
    # asv shows nothing of another version, and takes the list of benchmarks from this file.
    folder = ROOT / "benchmarks" / "results"
    listed = json.loads((folder / "benchmarks.json").read_text())
    files = list(folder.glob("*/*-virtualenv-*.json"))
    assert len(files) >= 5
    for file in files:
        found = json.loads(file.read_text())
        column = found["result_columns"].index("version")
        for name, values in found["results"].items():
            module, owner, _ = name.split(".")
            version = getattr(importlib.import_module(f"benchmarks.{module}"), owner).version
            assert version == listed[name]["version"] == values[column], (file.name, name)


def page(tmp_path, *more):
    """A page like asv's, that loads every library from some server, and more."""
    addresses = [f"https://cdn.example/x/{library.address}" for library in site.LIBRARIES]
    lines = [
        f'<link rel="stylesheet" href="{a}" integrity="sha256-x" crossorigin="anonymous">'
        if a.endswith(".css")
        else f'<script src="{a}" integrity="sha256-x" crossorigin="anonymous"></script>'
        for a in (*addresses, *more)
    ]
    (tmp_path / "index.html").write_text("\n".join(lines))
    return tmp_path


def test_page_loads_libraries_from_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(site, "_fetched", lambda library: ROOT / "LICENSE")
    site.make_self_contained(page(tmp_path))
    text = (tmp_path / "index.html").read_text()
    assert "https:" not in text
    assert "integrity" not in text  # of the server's copy
    for name in re.findall(r'(?:src|href)="([^"]+)"', text):
        assert (tmp_path / name).is_file()


def test_page_that_needs_more_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(site, "_fetched", lambda library: ROOT / "LICENSE")
    with pytest.raises(RuntimeError, match=r"another\.js"):
        site.make_self_contained(page(tmp_path, "https://cdn.example/another.js"))
    (tmp_path / "index.html").write_text("")
    with pytest.raises(RuntimeError, match="does not load jquery"):
        site.make_self_contained(tmp_path)


def test_benchmarks_without_results_are_left_out(tmp_path):
    (tmp_path / "graphs" / "summary").mkdir(parents=True)
    (tmp_path / "graphs" / "summary" / "a.B.time_c.json").write_text("[]")
    (tmp_path / "index.json").write_text('{"benchmarks": {"a.B.time_c": {}, "a.B.time_d": {}}}')
    site.drop_unmeasured(tmp_path)
    assert json.loads((tmp_path / "index.json").read_text()) == {"benchmarks": {"a.B.time_c": {}}}


def test_libraries_are_checked(tmp_path, monkeypatch):
    library = site.LIBRARIES[0]
    file = tmp_path / "npm" / library.package / library.path
    file.parent.mkdir(parents=True)
    file.write_text("something else")
    monkeypatch.setattr(site, "cache_folder", lambda: tmp_path)
    with pytest.raises(RuntimeError, match="is not what it was"):
        site._fetched(library)
    assert not file.exists()
    monkeypatch.setattr(site.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="npm is not installed"):
        site._fetched(library)


STARTED = "import benchmarks.quick as q; print(q.is_quick(), q.leave_out('32x64x56x56'))"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["asv", "run", "--quick"], "True True"),
        (["asv", "run", "-q", "--python=same"], "True True"),
        (["asv", "run"], "False False"),
        (["pytest", "-q"], "False False"),
    ],
)
def test_quick_runs_are_known_by_the_command_that_started_them(tmp_path, arguments, expected):
    if not Path("/proc/self/cmdline").exists():
        pytest.skip("needs /proc")
    command = tmp_path / arguments[0]
    start = f"subprocess.run([sys.executable, '-c', {STARTED!r}])"
    command.write_text(f"import subprocess, sys\n{start}\n")
    done = subprocess.run(
        [sys.executable, str(command), *arguments[1:]],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == expected


def test_quick_runs_keep_something_of_every_benchmark(monkeypatch):
    monkeypatch.setattr(quick, "is_quick", lambda: True)
    kept = [shape for shape in REPRESENTATIVE if not quick.leave_out(shape)]
    assert len(kept) == 2
    assert {cell.split()[0] for cell in bench_ratios.CELLS} >= set(kept)
    assert not quick.leave_out(bench_passes.ForwardEvalDtypes.params[0][0], "float16")
    with pytest.raises(NotImplementedError, match="quick"):
        bench_passes.ForwardEval().setup("32x512x7x7", "nchw")
    found = bench_shapes.AllShapes().setup_cache()
    assert len(found) == len(PASSES) * len(LAYOUTS)


@pytest.mark.slow
def test_kernels_are_compiled_ahead(tmp_path):
    script = """
from benchmarks import bench_passes, compiled
compiled.float32_kernels()
from numbabn.runtime import kernel_counts
for one in (bench_passes.ForwardTrain, bench_passes.BackwardEval):
    for shape, layout in (("32x256x14x14", "nchw"), ("1x2048x7x7", "nhwc"), ("65536x64", "nchw")):
        one().setup(shape, layout)
print(kernel_counts()[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    assert done.stdout.split() == ["0"]
