"""Fits the terms of a profile to measured stages.

The factors are fitted to stages of several layouts at once, never negative, by the least mean relative error, once for
each number of threads, and apart for stages that compute alone and beside others.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from planner.errors import InvalidProfile
from planner.profile import Fit
from planner.profile_terms import TOKEN_SPANS, Observation, Term

_REWEIGHTED: Final = 12
_SMALL_ERROR: Final = 0.01
_Matrix = npt.NDArray[np.float64]


def fit_observations(observations: Sequence[Observation]) -> tuple[Fit, ...]:
    """Return a fit for each number of threads, alone and beside others where both were observed.

    Raises:
        InvalidProfile: There are too few observations to tell the terms apart.
    """
    groups: dict[tuple[int, bool], list[Observation]] = {}
    for each in observations:
        groups.setdefault((each.threads, each.beside_others), []).append(each)
    if not groups:
        raise InvalidProfile("nothing was measured")
    return tuple(_fit(group, threads, beside) for (threads, beside), group in sorted(groups.items()))


def _fit(group: Sequence[Observation], threads: int, beside_others: bool) -> Fit:
    measured = [each.amounts() for each in group]
    priced = _priced_together({each.batch.tokens for each in group}, measured)
    if len(group) < len(priced):
        raise InvalidProfile(f"{len(group)} measurements with {threads} threads cannot tell {len(priced)} terms apart")
    amounts = np.array([[sum(each.get(term, 0.0) for term in terms) for terms in priced] for each in measured])
    times = np.array([each.busy_s for each in group])
    prices = _least_absolute(amounts / times[:, None])
    residuals = amounts @ prices / times - 1
    found = {term: price for terms, price in zip(priced, prices.tolist(), strict=True) for term in terms}
    return Fit(
        threads=threads,
        beside_others=beside_others,
        seconds={term: found.get(term, 0.0) for term in Term},
        residuals=tuple(residuals.tolist()),
    )


def _priced_together(sizes: Collection[int], measured: Sequence[Mapping[Term, float]]) -> list[tuple[Term, ...]]:
    """Return the terms that were measured, those together that have to have one price.

    Spans of tokens in which no batch ends (``sizes``: tokens of the batches) cannot be told from the next one that has
    some; beyond the largest batch the last price goes on.
    """
    spans = [term for term, _, _ in TOKEN_SPANS]
    found = [(term,) for term in Term if term not in spans and any(each.get(term) for each in measured)]
    together: list[tuple[Term, ...]] = []
    waiting: tuple[Term, ...] = ()
    for term, beyond, last in TOKEN_SPANS:
        waiting += (term,)
        if any(beyond < tokens <= last for tokens in sizes):
            together.append(waiting)
            waiting = ()
    if waiting and together:
        together[-1] += waiting
    return [*found, *together]


def _least_absolute(relative: _Matrix) -> npt.NDArray[np.float64]:
    """Return the non-negative factors with the smallest mean relative error: few disturbed measurements count little.

    Least squares again and again, each row weighed by the inverse of its last error.
    """
    weights = np.ones(len(relative))
    for _ in range(_REWEIGHTED):
        found = non_negative_least_squares(relative * weights[:, None], weights)
        weights = 1 / np.sqrt(np.maximum(np.abs(relative @ found - 1), _SMALL_ERROR))
    return found


def non_negative_least_squares(matrix: _Matrix, target: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the non-negative ``x`` that minimises ``|matrix x - target|``.

    Source: Lawson and Hanson, Solving Least Squares Problems, 1974, chapter 23.
    """
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1.0
    scaled = matrix / scale
    count = scaled.shape[1]
    solution, active = np.zeros(count), np.zeros(count, dtype=bool)
    for _ in range(10 * count):
        gradient = scaled.T @ (target - scaled @ solution)
        gradient[active] = -np.inf
        if active.all() or gradient.max() <= 1e-10 * max(1.0, float(np.linalg.norm(target))):
            break
        active[int(gradient.argmax())] = True
        while True:
            trial = np.zeros(count)
            trial[active] = np.linalg.lstsq(scaled[:, active], target, rcond=None)[0]
            negative = active & (trial <= 0)
            if not negative.any():
                solution = trial
                break
            steps = solution[negative] / np.maximum(solution[negative] - trial[negative], 1e-300)
            solution = solution + steps.min() * (trial - solution)
            active &= solution > 1e-15
            solution[~active] = 0.0
            if not active.any():
                break
    return np.asarray(solution / scale)
