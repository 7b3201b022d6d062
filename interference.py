"""One associative memory without a model around it: what it returns of what was written, in closed form and by simulation.

n values v_1 .. v_n, independent with mean 0 and variance 1 in each of V coordinates, are written with keys k_1 .. k_n:

    S_i = e^g S_{i-1} + beta k_i (v_i - f S_{i-1}^T k_i)^T,      f = e^g (erase="decayed") or 1 ("raw")

Whatever the keys, a read is linear in the values: k_i^T S_n = sum_j C_ij v_j. `coefficients` gives C exactly; the error of
value i, E |read - v_i|^2 / V, is |C_i - e_i|^2, and with independent keys, uniform on the sphere, its mean over them has a
closed form: `expected_read`. Simulations write and read through `core`, as models do.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

import analysis
import core

# ------------------------------------------------------------------------------------------------ keys


def random_keys(trials: int, n: int, K: int, *, generator: torch.Generator) -> Tensor:
    """Independent keys, uniform on the unit sphere: [trials, n, K] float64."""
    return F.normalize(torch.randn(trials, n, K, dtype=torch.float64, generator=generator), dim=-1)


def orthogonal_keys(trials: int, n: int, K: int, *, generator: torch.Generator) -> Tensor:
    """n <= K rows of a random rotation: [trials, n, K] float64. ValueError for more than K."""
    if n > K:
        raise ValueError(f"n = {n}: at most K = {K} keys can be orthogonal")
    draws = torch.randn(trials, K, n, dtype=torch.float64, generator=generator)
    return torch.linalg.qr(draws)[0].transpose(1, 2).contiguous()


def similar_keys(trials: int, n: int, K: int, cosine: float, *, generator: torch.Generator) -> Tensor:
    """Unit keys every two of which have that cosine, 0 to 1: sqrt(c) b + sqrt(1 - c) o_i, all of b, o_1 .. o_n orthogonal.

    [trials, n, K] float64. ValueError for n >= K.
    """
    if not 0 <= cosine <= 1:
        raise ValueError(f"cosine = {cosine!r}: needs a number from 0 to 1")
    if n >= K:
        raise ValueError(f"n = {n}: needs a direction besides those of the n keys, so n < K = {K}")
    rows = orthogonal_keys(trials, n + 1, K, generator=generator)
    return math.sqrt(cosine) * rows[:, :1] + math.sqrt(1 - cosine) * rows[:, 1:]


def positional_keys(trials: int, n: int, K: int, scale: float, *, generator: torch.Generator) -> Tensor:
    """One random key per trial plus `scale` times the sinusoids of positions 0 to n - 1, brought to unit length.

    [trials, n, K] float64. K even. The sinusoids have length sqrt(K / 2). Source: Vaswani et al. (2017).
    """
    if K % 2:
        raise ValueError(f"K = {K}: sinusoids come in pairs, so K is even")
    angles = torch.arange(n, dtype=torch.float64)[:, None] * 10_000.0 ** (-torch.arange(0, K, 2) / K)
    waves = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
    return F.normalize(random_keys(trials, 1, K, generator=generator) + scale * waves, dim=-1)


def hashed_keys(positions: Tensor, K: int, *, seed: int = 0) -> Tensor:
    """A key for every position, the same whenever it is asked for: positions [...], integers >= 0, to keys [..., K] float64."""
    table = random_keys(1, int(positions.max()) + 1, K, generator=torch.Generator().manual_seed(seed))[0]
    return table[positions]


def context_keys(contexts: Tensor, K: int, *, seed: int = 0) -> Tensor:
    """A random projection of the last tokens: contexts [..., w, d] to unit keys [..., K], in their dtype."""
    flat = contexts.flatten(-2)
    weight = torch.randn(flat.shape[-1], K, dtype=flat.dtype, generator=torch.Generator().manual_seed(seed))
    return F.normalize(flat @ weight, dim=-1)


# ------------------------------------------------------------------------------------------------ what is read, exactly


def coefficients(keys: Tensor, *, beta: float = 1.0, g: float = 0.0, erase: str = "decayed") -> Tensor:
    """C [..., n, n] of keys [..., n, K]: a read with key i, after all writes, returns sum_j C_ij v_j.

    C = D (I + L)^-1 beta with L_ij = beta f (k_i . k_j) e^(g (i - 1 - j)) for j < i, and D_ij = (k_i . k_j) e^(g (n - j)).
    """
    n = keys.shape[-2]
    products = keys @ keys.transpose(-1, -2)
    at = torch.arange(n, dtype=keys.dtype, device=keys.device)
    age = (at[:, None] - at).clamp(min=0)
    recall = age if erase == "decayed" else (age - 1).clamp(min=0)
    L = (beta * products * torch.exp(g * recall)).tril(-1)
    eye = torch.eye(n, dtype=keys.dtype, device=keys.device)
    written = torch.linalg.solve_triangular(eye + L, eye.expand_as(L), upper=False, unitriangular=True) * beta
    return products * torch.exp(g * (n - 1 - at)) @ written


class Read(NamedTuple):
    """A read of one value with its own key: `signal` of the value and, in each coordinate, noise of variance `noise`."""

    signal: np.ndarray
    noise: np.ndarray

    @property
    def error(self) -> np.ndarray:
        """E |read - v|^2 / V."""
        return (1 - self.signal) ** 2 + self.noise


def expected_read(later, *, earlier=0, K: int, beta: float = 1.0, g: float = 0.0, erase: str = "decayed") -> Read:
    """Means over independent uniform keys of width K: a value with `later` writes after it and `earlier` ones before it.

    Integers or arrays of them. Exact, by the recursion for X = E[x x^T], x the reading key carried back through the writes,
    x' = (e^g - f beta k k^T) x, with E[k k^T X k k^T] = (2 X + tr(X) I) / (K (K + 2)):

        signal = beta mu^m,  mu = e^g - f beta / K        E C_ii^2 = beta^2 (rho^m + (tau^m - rho^m) / K)
        later values add beta^2 / K sum_{s<m} tau^s, earlier ones as much of what the write of value i leaves of x

    tau and rho are the factors of tr(X) and of X's part along the key. `noise` counts how much C_ii varies.
    """
    m, before = np.asarray(later, dtype=np.float64), np.asarray(earlier, dtype=np.float64)
    decay = math.exp(g)
    gone = beta * (decay if erase == "decayed" else 1.0)
    mu, tau = decay - gone / K, decay**2 - 2 * decay * gone / K + gone**2 / K
    rho = decay**2 - 2 * decay * gone / K + 2 * gone**2 / (K * (K + 2))
    signal = beta * mu**m
    along, across = rho**m, (tau**m - rho**m) / K  # X = along u u^T + across I
    own = beta**2 * (along + across)
    left = along * (decay - gone) ** 2 + across * (K * decay**2 - 2 * decay * gone + gone**2)
    others = beta**2 / K * (_geometric(tau, m) + left * _geometric(tau, before))
    return Read(signal, own - signal**2 + others)


def _geometric(ratio: float, terms: np.ndarray) -> np.ndarray:
    """1 + ratio + ... over so many terms."""
    return terms if ratio == 1 else (1 - ratio**terms) / (1 - ratio)


def notes_error(writes, *, K: int) -> np.ndarray:
    """sqrt((1 - a)(2 - a)), a = (1 - 1/K)^(writes - 1): root mean square error of the first value after so many writes at beta 1
    without decay. An approximation: it takes E C_11^2 for a^2, where `expected_read` has all of it."""
    a = (1 - 1 / K) ** (np.asarray(writes, dtype=np.float64) - 1)
    return np.sqrt((1 - a) * (2 - a))


def mean_error(n: int, *, K: int, beta: float = 1.0, g: float = 0.0, erase: str = "decayed", heads: int = 1) -> float:
    """E |read - v|^2 / V, averaged over n values written one after another and read with their own keys.

    heads: how many memories with keys of their own hold each value and are averaged when it is read. Their signals agree, their
    noise does not.
    """
    later = np.arange(n)
    found = expected_read(later, earlier=n - 1 - later, K=K, beta=beta, g=g, erase=erase)
    return float(((1 - found.signal) ** 2 + found.noise / heads).mean())


def capacity(*, K: int, error: float, beta: float = 1.0, g: float = 0.0, heads: int = 1, most: int = 100_000) -> int:
    """The most values with independent keys whose `mean_error` stays at or below `error`, no more than `most`; 0 where a single
    one is beyond it."""
    if not 0 < error < 1:
        raise ValueError(f"error = {error!r}: needs a share of a value's own size, between 0 and 1")
    fits = lambda n: mean_error(n, K=K, beta=beta, g=g, heads=heads) <= error  # noqa: E731
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# ------------------------------------------------------------------------------------------------ simulation


def random_values(trials: int, n: int, V: int, *, generator: torch.Generator) -> Tensor:
    """Independent normal values [trials, n, V] float64."""
    return torch.randn(trials, n, V, dtype=torch.float64, generator=generator)


def write(
    keys: Tensor,
    values: Tensor,
    *,
    beta: float = 1.0,
    g: float = 0.0,
    erase: str = "decayed",
    passes: int = 1,
    impl: str = "auto",
) -> Tensor:
    """State [trials, K, V] after writing values [trials, n, V] with keys [trials, n, K] in order, `passes` times over.

    Every further pass writes what the state still misses of each value: Kaczmarz's iteration for S^T k_i = v_i, and causal
    where the second pass reads the context again.
    """
    k, v = (x.repeat(1, passes, 1)[:, :, None] for x in (keys, values))
    gates = torch.full(k.shape[:3], beta, dtype=k.dtype, device=k.device)
    return core.delta_write(k, v, gates, torch.full_like(gates, g), erase=erase, impl=impl).state[:, 0]


def hebbian(keys: Tensor, values: Tensor) -> Tensor:
    """State [trials, K, V] of sum_i k_i v_i^T: linear attention, which erases nothing."""
    return keys.transpose(1, 2) @ values


def read(state: Tensor, queries: Tensor) -> Tensor:
    """What queries [trials, m, K] get from states [trials, K, V]: [trials, m, V]."""
    return queries @ state


def squared_errors(state: Tensor, queries: Tensor, values: Tensor) -> Tensor:
    """|read - value|^2 / V of every query: [trials, m]. An unbiased estimate of `Read.error` for values of variance 1."""
    return (read(state, queries) - values).square().mean(-1)


def recalled(state: Tensor, queries: Tensor, candidates: Tensor) -> Tensor:
    """Index of the candidate [trials, c, V] or [c, V] with the largest product with what each query gets: [trials, m]."""
    return (read(state, queries) @ candidates.transpose(-1, -2)).argmax(-1)


def blended(state: Tensor, queries: Tensor, keys: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Reads of all stored keys [trials, n, K], weighed by softmax(query . key / temperature): [trials, m, V]."""
    return (queries @ keys.transpose(1, 2) / temperature).softmax(-1) @ read(state, keys)


# ------------------------------------------------------------------------------------------------ tables: exact beside measured


def simulate(
    keys_for,
    n: int,
    *,
    trials: int,
    V: int = 16,
    heads: int = 1,
    seed: int = 0,
    queries_for=None,
    device="cpu",
    **writing,
) -> Tensor:
    """Squared errors [trials, n] of n values, by position in the order of writing.

    keys_for(trials, n, generator=) draws the keys, of every head anew; queries_for(keys, generator=) what reads them, the keys
    themselves unless given. Reads of the heads are averaged. writing: what `write` takes. float32 on `device`.
    """
    gen, found = torch.Generator().manual_seed(seed), []
    for first in range(0, trials, 2000):
        count = min(2000, trials - first)
        values, got = random_values(count, n, V, generator=gen).to(device, torch.float32), 0.0
        for _ in range(heads):
            keys = keys_for(count, n, generator=gen)
            queries = keys if queries_for is None else queries_for(keys, generator=gen)
            keys, queries = keys.to(device, torch.float32), queries.to(device, torch.float32)
            got = got + read(write(keys, values, **writing), queries) / heads
        found.append((got - values).square().mean(-1).double().cpu())
    return torch.cat(found)


def beside(errors: Tensor, exact: float, *, level: float) -> dict:
    """Root mean square error of independent trials [trials] with its interval, beside the exact one."""
    mean, low, high = (max(x, 0.0) for x in analysis.mean_interval(errors.numpy(), level=level))
    found = dict(exact=exact, measured=mean, low=low, high=high)
    agrees = low <= exact <= high or abs(mean - exact) < 1e-9
    return {name: math.sqrt(x) for name, x in found.items()} | dict(trials=len(errors), agrees=agrees)


def by_writes(writes, *, K: int, trials: int, seed: int = 0, level: float = 0.999, **options) -> pd.DataFrame:
    """Root mean square error of the first value after so many writes with random keys: exact, by the notes' form, measured."""
    keys_for = functools.partial(random_keys, K=K)
    lines = []
    for n in writes:
        errors = simulate(keys_for, n, trials=trials, seed=seed, **options)[:, 0]
        exact = float(expected_read(n - 1, K=K).error)
        lines.append(dict(writes=n, notes=float(notes_error(n, K=K)), **beside(errors, exact, level=level)))
    return pd.DataFrame(lines)


def by_gates(settings, *, n: int, K: int, trials: int, seed: int = 0, level: float = 0.999, **options) -> pd.DataFrame:
    """Root mean square error over all of n values for each (beta, g, erase)."""
    keys_for, lines = functools.partial(random_keys, K=K), []
    for beta, g, erase in settings:
        rule = dict(beta=beta, g=g, erase=erase)
        errors = simulate(keys_for, n, trials=trials, seed=seed, **rule, **options).mean(1)
        lines.append(dict(rule, **beside(errors, mean_error(n, K=K, **rule), level=level)))
    return pd.DataFrame(lines)


def by_similarity(
    cosines, *, n: int, K: int, trials: int, seed: int = 0, level: float = 0.999, **options
) -> pd.DataFrame:
    """Root mean square error over n values whose keys all have the same cosine. The exact one follows from the cosine alone."""
    lines = []
    for cosine in cosines:
        keys_for = functools.partial(similar_keys, K=K, cosine=cosine)
        C = coefficients(keys_for(1, n, generator=torch.Generator().manual_seed(seed)))[0]
        exact = float((C - torch.eye(n, dtype=C.dtype)).square().sum(-1).mean())
        errors = simulate(keys_for, n, trials=trials, seed=seed, **options).mean(1)
        lines.append(dict(cosine=cosine, **beside(errors, exact, level=level)))
    return pd.DataFrame(lines)


def by_count(
    counts, *, K: int, trials: int, heads: int = 1, g: float = 0.0, seed: int = 0, level: float = 0.999, **options
) -> pd.DataFrame:
    """Root mean square error over all values by how many are held, `heads` memories averaged: what `capacity` is read from."""
    lines = []
    for n in counts:
        errors = simulate(functools.partial(random_keys, K=K), n, trials=trials, heads=heads, seed=seed, g=g, **options)
        exact = mean_error(n, K=K, g=g, heads=heads)
        lines.append(dict(values=n, K=K, heads=heads, g=g, **beside(errors.mean(1), exact, level=level)))
    return pd.DataFrame(lines)


SCENARIOS = {  # what draws the keys, and how often each is written
    "distinct random keys": (random_keys, 1),
    "every key written twice": (random_keys, 2),
    "cosine 0.5 between keys": (functools.partial(similar_keys, cosine=0.5), 1),
}


def by_rule(
    scenario: str, counts, *, K: int, V: int, candidates: int, trials: int, seed: int = 0, device="cpu"
) -> pd.DataFrame:
    """Recall by the largest product among `candidates` values, of which some were written, for rules that add or replace.

    scenario: of SCENARIOS. Where keys are written twice the later value is the right one. trials: reads per line, at least.
    Columns: scenario, writes, rule, chance, and those of `analysis.Rate`.
    """
    if scenario not in SCENARIOS:
        raise ValueError(f"scenario = {scenario!r}: choose from {', '.join(map(repr, SCENARIOS))}")
    keys_for, times = SCENARIOS[scenario]
    gen, lines = torch.Generator().manual_seed(seed), []
    pool = random_values(1, candidates, V, generator=gen)[0].to(device, torch.float32)
    for n in counts:
        held = n // times
        rows, right = max(10, -(-trials // held)), {"Hebbian": [], "delta": [], "delta, two passes": []}
        step = max(1, 2**25 // (held * candidates))  # memories at once: their scores of all candidates fill memory
        for first in range(0, rows, step):
            count = min(step, rows - first)
            keys = keys_for(count, held, K, generator=gen).repeat(1, times, 1)
            order = torch.rand(count, candidates, generator=gen)
            written = order.topk(keys.shape[1]).indices.to(device)  # all different
            keys, values = keys.to(device, torch.float32), pool[written]
            states = {
                "Hebbian": hebbian(keys, values),
                "delta": write(keys, values),
                "delta, two passes": write(keys, values, passes=2),
            }
            for rule, state in states.items():
                right[rule].append((recalled(state, keys[:, -held:], pool) == written[:, -held:]).cpu().numpy())
        for rule, found in right.items():
            correct = np.concatenate(found)
            rate = analysis.Rate.of(correct.ravel(), np.repeat(np.arange(rows), held))
            lines.append(dict(scenario=scenario, writes=n, rule=rule, chance=1 / candidates, **rate.row()))
    return pd.DataFrame(lines)
