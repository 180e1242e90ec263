"""Waiting times of bursty arrivals, in closed form.

FlexPipe's Eq 1 adds a pool term, ``rho^S / (S! (1 - rho)) * (CVa^2 + CVs^2) / 2``, and a tandem term,
``sum_i lambda / (mu_i - lambda)``. Both are numbers of requests (or lack a unit), the pool term is Erlang's without its
normalisation, and the tandem term takes every stage for an M/M/1 queue, although stages pass on a nearly constant work.
What is used here keeps its structure and its meaning:

- the pool: ``slots`` sequences can be in the KV cache at once; who finds none free waits, as in a G/G/c queue. The
  wait is Allen and Cunneen's ``(CVa^2 + CVs^2) / 2`` times that of M/M/c, with Sakasegawa's
  ``rho^(sqrt(2 (c + 1)) - 1)`` for Erlang's C (exact for c = 1), rho being the share of slots taken. Bursts fill the
  pool more often than that says: the chance to wait is at least that of a normal distribution of the sequences inside,
  as wide as an unlimited pool would have (``peakedness``);
- the tandem: prompts queue at the slowest stage only, as a G/G/1 queue (Kingman); behind it they are spaced already.
  Kingman's formula is one of heavy traffic. In light traffic a request of a burst still waits for the others of its
  own burst, ``peakedness - 1`` of them in the mean.

Assumptions: arrivals are independent of each other given their CV; steady state, so a load above capacity waits for
ever; the requests of one replica are a random share of all (``thinned_cv``).

Sources: Allen, Probability, Statistics, and Queueing Theory, 1990; Sakasegawa, Ann. Inst. Stat. Math. 29, 1977;
Kingman, Math. Proc. Camb. Phil. Soc. 57, 1961; Whitt, Heavy-traffic approximations for service systems with
blocking, AT&T Bell Lab. Tech. J. 63, 1984.
"""

from dataclasses import dataclass
from math import erf, exp, inf, log, sqrt


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """A request waits with ``chance``, and then ``mean_if_any_s`` in the mean, exponentially distributed."""

    chance: float
    mean_if_any_s: float

    @property
    def mean_s(self) -> float:
        return self.chance * self.mean_if_any_s if self.chance else 0.0

    def chance_within(self, limit_s: float) -> float:
        """Return the share of requests that wait no longer than ``limit_s``."""
        if limit_s < 0:
            return 0.0
        if not self.chance or not self.mean_if_any_s:  # who never waits long, as where nothing varies
            return 1.0
        return 1.0 - self.chance * (exp(-limit_s / self.mean_if_any_s) if self.mean_if_any_s < inf else 1.0)


def pool_wait(
    *, load: float, inside: float, slots: int, capacity_per_s: float, arrival_cv: float, service_cv: float
) -> Wait:
    """Return the wait for one of ``slots``.

    Args:
        load: Arrivals over ``capacity_per_s``, which is what all slots together serve.
        inside: Slots taken in the mean. Less than ``load`` of them, as each is served faster while there are few.
    """
    if load >= 1 or capacity_per_s <= 0:
        return Wait(chance=1.0, mean_if_any_s=inf)
    spread = sqrt(inside * peakedness(arrival_cv))
    crowded = 1 - _normal_below((slots - inside) / spread) if spread else 0.0
    chance = max((inside / slots) ** (sqrt(2 * (slots + 1)) - 1), crowded) if inside else 0.0
    variability = (arrival_cv**2 + service_cv**2) / 2
    return Wait(chance=chance, mean_if_any_s=variability / (capacity_per_s * (1 - load)))


def tandem_wait(*, rate_per_s: float, slowest_s: float, arrival_cv: float, service_cv: float) -> Wait:
    """Return the wait before a line of stages of which the slowest needs ``slowest_s`` for a request."""
    load = rate_per_s * slowest_s
    if load >= 1:
        return Wait(chance=1.0, mean_if_any_s=inf)
    others = max(0.0, peakedness(arrival_cv) - 1)  # of its own burst
    chance = max(load, others / (1 + others))
    mean_s = load * slowest_s * (arrival_cv**2 + service_cv**2) / 2 / (1 - load) + others * slowest_s
    return Wait(chance=chance, mean_if_any_s=mean_s / chance if chance else 0.0)


def both_within(first: Wait, second: Wait, limit_s: float) -> float:
    """Return the share of requests whose two waits together stay within ``limit_s``, the waits taken as independent.

    Approximated by one wait of the chance to wait at all and the mean of the sum.
    """
    chance = 1 - (1 - first.chance) * (1 - second.chance)
    total = first.mean_s + second.mean_s
    return Wait(chance=chance, mean_if_any_s=total / chance if chance else 0.0).chance_within(limit_s)


def both_percentile_s(first: Wait, second: Wait, share: float) -> float:
    """Return the wait that ``share`` of the requests do not exceed; the two waits drawn together as one."""
    chance = 1 - (1 - first.chance) * (1 - second.chance)
    if chance <= 1 - share:
        return 0.0
    mean = (first.mean_s + second.mean_s) / chance
    return mean * log(chance / (1 - share))


def peakedness(arrival_cv: float) -> float:
    """Return variance over mean of the requests inside an unlimited pool: 1 for Poisson arrivals.

    Exact for exponential service times that are long against the gaps between arrivals.
    """
    return (1 + arrival_cv**2) / 2


def crowd_within(*, mean: float, limit: float, arrival_cv: float) -> float:
    """Return the share of time in which at most ``limit`` requests are inside, of ``mean``; normal approximation."""
    if mean <= 0:
        return 1.0
    return _normal_below((limit + 0.5 - mean) / sqrt(mean * peakedness(arrival_cv)))


def thinned_cv(cv: float, *, replicas: int) -> float:
    """Return the CV at one of ``replicas`` that share arrivals at random: bursts thin out, Poisson stays Poisson."""
    return sqrt(1 + (cv**2 - 1) / replicas)


def _normal_below(z: float) -> float:
    return (1 + erf(z / sqrt(2))) / 2
