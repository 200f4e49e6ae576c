"""The guard against slowdowns: its decision on made-up times, and on two commits for real."""

import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from support import ROOT

from benchmarks import guard, guard_statistics
from benchmarks.guard_statistics import judge, pairs_needed, sign_flip_p
from benchmarks.guard_worker import benchmark_names


class Noise:
    """Stands in for `guard.Bench`: ratios with noise of pairs, and outliers now and then."""

    def __init__(self, seed, true_ratios, spread=0.04):
        self.rng = np.random.default_rng(seed)
        self.true_ratios, self.spread = true_ratios, spread
        self.asked = []

    def compile(self, names):
        assert self.asked == []

    def pair(self, names):
        self.asked.append(list(names))
        noise = self.rng.normal(0, self.spread, len(names))
        # Now and then something else runs while one of the two is timed.
        noise += (self.rng.random(len(names)) < 0.05) * self.rng.normal(0, 0.4, len(names))
        return {n: self.true_ratios[n] * math.exp(e) for n, e in zip(names, noise, strict=True)}


NAMES = [f"benchmark {i}" for i in range(12)]


def slower(verdicts):
    return {v.name for v in verdicts if v.slower}


def test_no_false_alarm_on_equal_commits():
    equal = dict.fromkeys(NAMES, 1.0)
    alarms = sum(bool(slower(guard.compare(Noise(s, equal), NAMES, 0.1))) for s in range(300))
    assert alarms == 0


def test_a_slowdown_by_a_quarter_is_found():
    missed = wrong = 0
    for seed in range(200):
        verdicts = guard.compare(
            Noise(seed, {**dict.fromkeys(NAMES, 1.0), NAMES[3]: 1.25}), NAMES, 0.1
        )
        missed += NAMES[3] not in slower(verdicts)
        wrong += bool(slower(verdicts) - {NAMES[3]})
    assert missed <= 4  # 2 %, of noise that is worse than a quiet machine's
    assert wrong == 0


def test_a_slowdown_of_everything_is_found():
    worse = dict.fromkeys(NAMES, 1.25)
    found = [len(slower(guard.compare(Noise(s, worse), NAMES, 0.1))) for s in range(50)]
    assert min(found) >= 1
    assert np.mean(found) > 0.8 * len(NAMES)


def test_less_than_the_threshold_is_let_pass():
    mild = dict.fromkeys(NAMES, 1.05)
    alarms = sum(bool(slower(guard.compare(Noise(s, mild), NAMES, 0.1))) for s in range(100))
    assert alarms <= 2


def test_only_suspects_are_measured_again_and_only_new_pairs_count():
    bench = Noise(0, {**dict.fromkeys(NAMES, 1.0), NAMES[0]: 2.0}, spread=0.001)
    verdicts = guard.compare(bench, NAMES, 0.1)
    first = guard.FIRST_PAIRS
    assert bench.asked[:first] == [NAMES] * first
    assert all(NAMES[0] in names for names in bench.asked[first:])
    assert len(bench.asked[first]) < len(NAMES)
    (found,) = [v for v in verdicts if v.slower]
    assert found.pairs == len(bench.asked) - first == pairs_needed(len(bench.asked[first]))


def test_sign_flips_are_counted_exactly():
    assert sign_flip_p([0.1] * 7) == 1 / 128
    assert sign_flip_p([-0.1] * 7) == 1
    assert sign_flip_p([0.2, 0.1, -0.1]) == 3 / 8  # +++, ++-, and +-+, which is as high
    assert sign_flip_p([0.0, 0.0]) == 1
    # However far off, one pair counts as one.
    assert sign_flip_p([0.1] * 8 + [-9.0]) == 10 / 512


def test_p_values_are_uniform_or_larger_under_the_null_hypothesis():
    rng = np.random.default_rng(1)
    p = np.array([sign_flip_p(rng.normal(0, 1, 8)) for _ in range(400)])
    for level in (0.05, 0.1, 0.3):
        assert np.mean(p <= level) < level + 3 * math.sqrt(level / 400)


@pytest.mark.parametrize("suspects", [1, 2, 12, 80])
def test_the_test_has_pairs_enough_to_speak(suspects):
    pairs = pairs_needed(suspects)
    assert suspects * sign_flip_p([0.2] * pairs) <= guard_statistics.ALPHA
    assert pairs <= guard_statistics.MOST_PAIRS


def test_holm_multiplies_by_what_is_left():
    assert guard_statistics.holm({"a": 0.01, "b": 0.03, "c": 0.02}) == pytest.approx(
        {"a": 0.03, "c": 0.04, "b": 0.04}
    )


def test_certainty_alone_is_not_enough():
    (verdict,) = judge({"a": [1.06] * 3}, {"a": [1.06] * 10}, 0.1)
    assert verdict.p < 0.01
    assert not verdict.slower


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["HEAD"], "HEAD"),
        (["HEAD", "HEAD", "--bench", "no such thing"], "--bench"),
        (["HEAD", "HEAD", "--bench", "("], "--bench"),
        (["HEAD", "HEAD", "--bench", "."], "--bench"),
        (["HEAD", "HEAD", "--threshold", "0"], "--threshold"),
    ],
)
def test_nonsense_exits_with_2(capsys, arguments, named):
    with pytest.raises(SystemExit) as stopped:
        guard.main(arguments)
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err


def test_default_subset_has_every_pass_at_three_sizes(capsys):
    assert guard.main(["a", "b", "--list"]) == 0
    names = capsys.readouterr().out.split("\n")[:-1]
    assert len(names) == 12
    assert len({name.split()[0] for name in names}) == 4
    assert set(names) < set(benchmark_names())


SLOWED = """

def _slowed(function):
    from time import perf_counter

    def slow(*arguments, **options):
        start = perf_counter()
        result = function(*arguments, **options)
        end = perf_counter()
        while perf_counter() < end + 0.5 * (end - start):
            pass
        return result

    return slow


batch_norm = _slowed(batch_norm)
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A repository with this tree, and a commit after it in which eval takes half as long again."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("numbabn", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)

    def git(*arguments):
        identity = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.invalid")
        subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "base")
    with open(folder / "numbabn" / "functional.py", "a", encoding="utf-8") as file:
        file.write(SLOWED)
    git("commit", "--quiet", "-am", "slower")
    return folder


def run_guard(clone, tmp_path, *arguments):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": ""}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.guard", *arguments],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


EVAL = ("--bench", "^forward_(eval|train) 32x256x14x14 nchw float32")


@pytest.mark.slow
def test_a_planted_slowdown_is_found(clone, tmp_path):
    done = run_guard(clone, tmp_path, "HEAD~1", "HEAD", *EVAL)
    assert done.returncode == 1, done.stdout + done.stderr
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if " nchw " in line}
    assert rows["forward_eval"].endswith("SLOWER")
    assert not rows["forward_train"].endswith("SLOWER")


@pytest.mark.slow
def test_nothing_is_found_where_nothing_was_planted(clone, tmp_path):
    done = run_guard(clone, tmp_path, "HEAD~1", "HEAD~1", *EVAL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SLOWER" not in done.stdout
    assert len(done.stdout.splitlines()) == 4


def test_an_unknown_commit_is_named(clone, tmp_path):
    done = run_guard(clone, tmp_path, "HEAD", "no-such-commit")
    assert done.returncode != 0
    assert "no-such-commit" in done.stderr
    assert "Traceback" not in done.stderr
