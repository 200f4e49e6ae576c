"""When is a benchmark slower? The decision of `guard`, from ratios of times, head over base.

The unit is a pair of fresh processes: two processes of the same commit differ for good, by where
their memory and code happen to lie, so more timings within a pair would only make a coincidence
look certain. Stage one picks suspects. Stage two measures those in new pairs and tests, with the
new pairs only, so that having been picked counts for nothing:

- the median ratio must exceed 1 + threshold, and
- the ratios must be above 1 by more than chance explains: a sign-flip permutation test of the mean
  log ratio (exact; under the null hypothesis base and head are exchangeable within a pair), with
  Holm's correction for the number of suspects. Logs are cut off at a multiple of their median size
  first, so that one pair that something else got in the way of does not decide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median

__all__ = ["ALPHA", "Verdict", "is_suspect", "judge", "pairs_needed", "sign_flip_p"]

# Chance of any false alarm among the suspects, before the threshold is asked for as well.
ALPHA = 0.05
FEWEST_PAIRS, MOST_PAIRS = 10, 13
# Of the median of the logs' sizes, see above. Flipping signs leaves it as it is: the test is exact.
CUT = 1.5


@dataclass(frozen=True)
class Verdict:
    """One benchmark: its median ratio over so many pairs; p, after correction, if it was tested."""

    name: str
    ratio: float
    pairs: int
    p: float | None
    slower: bool


def is_suspect(ratios: Sequence[float], threshold: float) -> bool:
    """Whether to look again: most pairs, or all together, are at least half way to the threshold.

    A slowdown of the threshold's size is missed only if noise takes half of it away in most pairs.
    """
    limit = 1 + threshold / 2
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return max(median(ratios), mean) > limit


def pairs_needed(suspects: int) -> int:
    """Pairs that the test needs: 2**-pairs must get below ALPHA / suspects, and one to spare.

    With none to spare a single pair on the other side, however close to 1, would settle it.
    """
    needed = math.ceil(math.log2(suspects / ALPHA)) + 1
    return min(MOST_PAIRS, max(FEWEST_PAIRS, needed))


def sign_flip_p(logs: Sequence[float]) -> float:
    """One-sided p-value of the mean being above 0: the share of sign patterns at least as high."""
    limit = CUT * median(map(abs, logs))
    cut = [math.copysign(min(abs(v), limit), v) for v in logs]
    # Rounding must not make a pattern that equals the observed one seem less.
    least = sum(cut) - 1e-12 * sum(map(abs, cut))
    count = sum(
        sum(s * v for s, v in zip(signs, cut, strict=True)) >= least
        for signs in product((1, -1), repeat=len(cut))
    )
    return float(count) / float(2 ** len(logs))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values after Holm's step-down correction."""
    adjusted: dict[str, float] = {}
    highest = 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = highest
    return adjusted


def judge(
    first: Mapping[str, Sequence[float]], again: Mapping[str, Sequence[float]], threshold: float
) -> list[Verdict]:
    """Verdicts on all benchmarks.

    Parameters
    ----------
    first : mapping
        Each benchmark's ratios in the pairs that looked for suspects.
    again : mapping
        The suspects' ratios in the pairs after that.
    threshold : float
        What counts as slower: 0.1 for 10 %.
    """
    adjusted = holm({name: sign_flip_p([*map(math.log, r)]) for name, r in again.items()})
    verdicts = []
    for name, ratios in first.items():
        if name not in again:
            verdicts.append(Verdict(name, median(ratios), len(ratios), None, False))
            continue
        ratio, p = median(again[name]), adjusted[name]
        slower = ratio > 1 + threshold and p <= ALPHA
        verdicts.append(Verdict(name, ratio, len(again[name]), p, slower))
    return verdicts
