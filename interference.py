"""One associative memory without a model around it: what it returns of what was written, in closed form and by simulation.

n values v_1 .. v_n, independent with mean 0 and variance 1 in each of V coordinates, are written with keys k_1 .. k_n:

    S_i = e^g S_{i-1} + beta k_i (v_i - f S_{i-1}^T k_i)^T,      f = e^g (erase="decayed") or 1 ("raw")

Whatever the keys, a read is linear in the values: k_i^T S_n = sum_j C_ij v_j. `coefficients` gives C exactly; the error of
value i, E |read - v_i|^2 / V, is |C_i - e_i|^2, and with independent keys, uniform on the sphere, its mean over them has a
closed form: `expected_read`. Simulations write and read through `core`, as models do, in float64. Draws come from generators on
the CPU, so a `device` changes where they are worked on and not what is drawn.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import optimize, special, stats
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


def positional_keys(trials: int, n: int, K: int, scale: float, *, gap: int = 1, generator: torch.Generator) -> Tensor:
    """One random key per trial plus `scale` times the sinusoids of positions 0, gap, ..., (n - 1) gap, brought to unit length.

    [trials, n, K] float64. K even. The sinusoids have length sqrt(K / 2). Source: Vaswani et al. (2017).
    """
    if K % 2:
        raise ValueError(f"K = {K}: sinusoids come in pairs, so K is even")
    angles = gap * torch.arange(n, dtype=torch.float64)[:, None] * 10_000.0 ** (-torch.arange(0, K, 2) / K)
    waves = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
    return F.normalize(random_keys(trials, 1, K, generator=generator) + scale * waves, dim=-1)


def hashed_keys(positions: Tensor, K: int, *, seed: int = 0) -> Tensor:
    """A key for every position, the same whenever it is asked for: positions [...], integers >= 0, to keys [..., K] float64."""
    table = random_keys(1, int(positions.max()) + 1, K, generator=torch.Generator().manual_seed(seed))[0]
    return table[positions]


def context_keys(contexts: Tensor, K: int, *, orthogonal: bool = False, seed: int = 0) -> Tensor:
    """A fixed random projection of the last tokens: contexts [..., w, d] to unit keys [..., K], in their dtype.

    Keys of independent normal contexts are uniform only where the columns of the projection are `orthogonal` (w d >= K). With
    independent normal entries, as a layer starts out, some directions of the key are longer than others, and keys are as much
    alike as uniform ones of a smaller width: `projected_width`.
    """
    flat = contexts.flatten(-2)
    inputs = flat.shape[-1]
    weight = torch.randn(inputs, K, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if orthogonal:
        if inputs < K:
            raise ValueError(f"orthogonal = True: {inputs} numbers of a context have no {K} orthogonal columns")
        weight = torch.linalg.qr(weight)[0]
    return F.normalize(flat @ weight.to(flat), dim=-1)


def projected_width(K: int, inputs: int) -> float:
    """Width of which uniform keys are as much alike, in mean square cosine, as normal projections of `inputs` numbers to K.

    W [inputs, K] with independent normal entries gives the projections of normal contexts the covariance A = W^T W (Wishart),
    whose eigenvalues, as shares p of their sum, are not equal: E sum p^2 = s_2 = (inputs + K + 1) / (inputs K + 2) in place of
    1 / K, and s_3 = E sum p^3 likewise. Bringing keys to unit length evens them out a little: the mean square cosine is
    s_2 + 4 s_2^2 - 4 s_3 and terms of higher order. About K / (1 + (K + 1) / inputs).
    """
    d = inputs
    second = (d + K + 1) / (d * K + 2)
    third = (d * d + K * K + 3 * (d * K + d + K) + 4) / ((d * K + 2) * (d * K + 4))
    return 1 / (second + 4 * second**2 - 4 * third)


def square_cosines(keys: Tensor) -> Tensor:
    """Mean square cosine of different keys of each set [..., n, K]: [...], 1 / K in the mean for independent uniform keys."""
    n = keys.shape[-2]
    squares = (keys @ keys.mT).square()
    return (squares.sum((-1, -2)) - squares.diagonal(dim1=-1, dim2=-2).sum(-1)) / (n * (n - 1))


def effective_width(keys: Tensor) -> float:
    """The width of which independent uniform keys would be as much alike: 1 / `square_cosines`, over all sets."""
    return float(1 / square_cosines(keys).mean())


def cosine_law(K: int, limits=()) -> dict:
    """Of |cosine| between two independent uniform keys of width K: mean, std, and the share above each limit.

    Its square is Beta(1/2, (K - 1)/2), so the mean is Gamma(K/2) / (sqrt(pi) Gamma((K + 1)/2)).
    """
    mean = analysis.random_similarity(K)
    squares = stats.beta(0.5, (K - 1) / 2)
    return dict(mean=mean, std=math.sqrt(1 / K - mean**2)) | {f"above {x:g}": float(squares.sf(x * x)) for x in limits}


def rope_cosine(gap, K: int, *, base: float = 10_000.0) -> tuple[np.ndarray, np.ndarray]:
    """Cosine between a random key and itself rotated by RoPE at a distance: mean and standard deviation over keys.

    sum_i w_i cos(gap theta_i), the shares w of the K/2 pairs being uniform on the simplex (Dirichlet): the mean of the cosines
    and their variance over K/2 + 1.
    """
    turned = np.cos(np.asarray(gap, dtype=np.float64)[..., None] * base ** (-np.arange(0, K, 2) / K))
    return turned.mean(-1), turned.std(-1) / math.sqrt(K / 2 + 1)


def query_cosine(K: int, noise) -> tuple[np.ndarray, np.ndarray]:
    """(E c, E c^2) of the cosine c between key x / |x| and query (x + noise y) / |x + noise y|, x and y normal in K dimensions.

    c is a sample correlation of K draws about a known mean, the true one being r = 1 / sqrt(1 + noise^2):
    E c = 2/K (Gamma((K + 1)/2) / Gamma(K/2))^2 r 2F1(1/2, 1/2; K/2 + 1; r^2),
    E c^2 = 1 - (K - 1)/K (1 - r^2) 2F1(1, 1; K/2 + 1; r^2).
    Source: Muirhead, "Aspects of Multivariate Statistical Theory" (1982), section 5.1.
    """
    r = 1 / np.sqrt(1 + np.asarray(noise, dtype=np.float64) ** 2)
    scale = 2 / K * math.exp(2 * (math.lgamma((K + 1) / 2) - math.lgamma(K / 2)))
    square = 1 - (K - 1) / K * (1 - r**2) * special.hyp2f1(1, 1, K / 2 + 1, r**2)
    return scale * r * special.hyp2f1(0.5, 0.5, K / 2 + 1, r**2), square


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


def similarity_errors(cosine: float, n: int) -> np.ndarray:
    """Mean square errors [n] of n values, in the order of writing, whose keys all have the same cosine: nothing else matters."""
    keys = similar_keys(1, n, n + 1, cosine, generator=torch.Generator().manual_seed(0))
    return (coefficients(keys)[0] - torch.eye(n, dtype=keys.dtype)).square().sum(-1).numpy()


def cosine_for(error: float, n: int) -> float:
    """The common cosine of n keys at which the root mean square error over their values is `error`."""
    return float(optimize.brentq(lambda c: similarity_errors(c, n).mean() - error**2, 0.0, 1.0))


def after_passes(keys: Tensor, passes: int) -> Tensor:
    """Mean square errors [..., n] after writing everything `passes` times at beta 1 without decay.

    A pass writes to what the reads still miss, R = I - C, what it would write to all of the values: R becomes (I - C) R, so
    R = (I - C)^passes. Kaczmarz's iteration: it ends at no error where the keys are independent.
    """
    C = coefficients(keys)
    return torch.linalg.matrix_power(torch.eye(C.shape[-1], dtype=C.dtype) - C, passes).square().sum(-1)


def after_rounds(keys: Tensor, rounds: int, *, step: float = 0.5) -> Tensor:
    """Mean square errors [..., n] of the notes' correction: write everything, read it, add `step` times what is missing to the
    values that are written, start again with an empty memory; `rounds` times. R = (I - step C)^rounds (I - C). Not causal:
    what is written first depends on what is read in the end."""
    C = coefficients(keys)
    eye = torch.eye(C.shape[-1], dtype=C.dtype)
    return (torch.linalg.matrix_power(eye - step * C, rounds) @ (eye - C)).square().sum(-1)


class Read(NamedTuple):
    """A read of one value with its own key: `signal` of the value and, in each coordinate, noise of variance `noise`."""

    signal: np.ndarray
    noise: np.ndarray

    @property
    def error(self) -> np.ndarray:
        """E |read - v|^2 / V."""
        return (1 - self.signal) ** 2 + self.noise


def expected_read(
    later,
    *,
    earlier=0,
    K: int,
    beta: float = 1.0,
    g: float = 0.0,
    erase: str = "decayed",
    query=(1.0, 1.0),
    approximate: bool = False,
) -> Read:
    """Means over independent uniform keys of width K: a value with `later` writes after it and `earlier` ones before it.

    Integers or arrays of them. Exact, by the recursion for X = E[x x^T], x the query carried back through the writes,
    x' = (e^g - f beta k k^T) x, with E[k k^T X k k^T] = (2 X + tr(X) I) / (K (K + 2)):

        signal = beta c mu^m,  mu = e^g - f beta / K      E C_ii^2 = beta^2 (a rho^m + (tau^m - a rho^m) / K)
        later values add beta^2 / K sum_{s<m} tau^s, earlier ones as much of what the write of value i leaves of x

    tau and rho are the factors of tr(X) and of X's part along the key. `noise` counts how much C_ii varies.

    query: (E c, E c^2) for a query that has the cosine c with the key and lies in a random direction beside it. Of X at the
    start, c^2 u u^T + (1 - c^2) (I - u u^T) / (K - 1), only the part along the key changes: a = (K E c^2 - 1) / (K - 1).
    approximate: the square of the mean for E C_ii^2, which leaves out how much C_ii varies from one set of keys to another.
    """
    m, before = np.asarray(later, dtype=np.float64), np.asarray(earlier, dtype=np.float64)
    decay = math.exp(g)
    gone = beta * (decay if erase == "decayed" else 1.0)
    mu, tau = decay - gone / K, decay**2 - 2 * decay * gone / K + gone**2 / K
    rho = decay**2 - 2 * decay * gone / K + 2 * gone**2 / (K * (K + 2))
    cosine, square = query
    signal = beta * cosine * mu**m
    if approximate:  # along and across that give E C_ii^2 = signal^2 and leave the trace as it is
        along = (K * (cosine * mu**m) ** 2 - tau**m) / (K - 1)
    else:
        along = rho**m if square == 1 else (K * square - 1) / (K - 1) * rho**m
    across = (tau**m - along) / K  # X = along u u^T + across I
    own = beta**2 * (along + across)
    left = along * (decay - gone) ** 2 + across * (K * decay**2 - 2 * decay * gone + gone**2)
    others = beta**2 / K * (_geometric(tau, m) + left * _geometric(tau, before))
    return Read(signal, own - signal**2 + others)


def _geometric(ratio: float, terms: np.ndarray) -> np.ndarray:
    """1 + ratio + ... over so many terms."""
    return terms if ratio == 1 else (1 - ratio**terms) / (1 - ratio)


def notes_error(writes, *, K: int) -> np.ndarray:
    """sqrt((1 - a)(2 - a)), a = (1 - 1/K)^(writes - 1): root mean square error of the first value after so many writes at beta 1
    without decay. An approximation, `expected_read(approximate=True)`: it takes E C_11^2 for a^2."""
    a = (1 - 1 / K) ** (np.asarray(writes, dtype=np.float64) - 1)
    return np.sqrt((1 - a) * (2 - a))


def state_norm(n: int, *, K: int, V: int, beta: float = 1.0, g: float = 0.0, erase: str = "decayed") -> float:
    """Root mean square of the Frobenius norm of the state after n writes with independent keys: sqrt(beta^2 V sum_{s<n} tau^s),
    tau as in `expected_read`. At beta 1 without decay sqrt(K V (1 - (1 - 1/K)^n)): it stops growing."""
    decay = math.exp(g)
    gone = beta * (decay if erase == "decayed" else 1.0)
    tau = decay**2 - 2 * decay * gone / K + gone**2 / K
    return beta * math.sqrt(V * float(_geometric(tau, np.float64(n))))


def mean_error(n: int, *, K: int, heads: int = 1, **setting) -> float:
    """E |read - v|^2 / V, averaged over n values written one after another and read with their own keys.

    heads: how many memories with keys of their own hold each value and are averaged when it is read. Their signals agree, their
    noise does not. setting: beta, g, erase, query and approximate of `expected_read`.
    """
    later = np.arange(n)
    found = expected_read(later, earlier=n - 1 - later, K=K, **setting)
    return float(((1 - found.signal) ** 2 + found.noise / heads).mean())


def capacity(*, K: int, error: float, heads: int = 1, most: int = 100_000, **setting) -> int:
    """The most values with independent keys whose `mean_error` stays at or below `error`, no more than `most`; 0 where a single
    one is beyond it."""
    if not 0 < error < 1:
        raise ValueError(f"error = {error!r}: needs a share of a value's own size, between 0 and 1")
    fits = lambda n: mean_error(n, K=K, heads=heads, **setting) <= error  # noqa: E731
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


CHUNK = 16  # thousands of small memories on a CPU: a fifth of the time that chunks of 64 take


def write(
    keys: Tensor,
    values: Tensor,
    *,
    beta: float = 1.0,
    g: float = 0.0,
    erase: str = "decayed",
    passes: int = 1,
    state: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """State [trials, K, V] after writing values [trials, n, V] with keys [trials, n, K] in order, `passes` times over.

    state: what to start from, nothing unless given. Every further pass writes what the state still misses of each value:
    Kaczmarz's iteration for S^T k_i = v_i, and causal where the second pass reads the context again.
    """
    k, v = (x.repeat(1, passes, 1)[:, :, None] for x in (keys, values))
    gates = torch.full(k.shape[:3], beta, dtype=k.dtype, device=k.device)
    start = None if state is None else state[:, None]
    rule = dict(initial_state=start, erase=erase, chunk_size=CHUNK, impl=impl)
    return core.delta_write(k, v, gates, torch.full_like(gates, g), **rule).state[:, 0]


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


def _draws(keys_for, n: int, *, trials: int, V: int = 16, heads: int = 1, seed: int = 0, device="cpu"):
    """Values [count, n, V] and keys [count, n, K] of each head, up to 2,000 trials at a time, drawn on the CPU."""
    gen = torch.Generator().manual_seed(seed)
    for first in range(0, trials, 2000):
        count = min(2000, trials - first)
        values = random_values(count, n, V, generator=gen).to(device)
        yield values, [keys_for(count, n, generator=gen).to(device) for _ in range(heads)]


def _missed(got: Tensor, values: Tensor) -> Tensor:
    return (got - values).square().mean(-1).cpu()


def simulate_filling(keys_for, counts, *, beta: float = 1.0, g: float = 0.0, erase: str = "decayed", **drawing) -> dict:
    """Squared errors of the values that a memory holds whenever it has taken so many: {n: [trials, n]} for n in `counts`.

    keys_for(trials, n, generator=) draws the keys, of every head anew; reads of the heads are averaged. All counts share the
    draws: one memory that fills. drawing: trials, V, heads, seed, device.
    """
    counts, found = sorted(counts), {}
    for values, heads in _draws(keys_for, counts[-1], **drawing):
        got = dict.fromkeys(counts, 0.0)
        for keys in heads:
            state, held = None, 0
            for n in counts:
                new = slice(held, n)
                state = write(keys[:, new], values[:, new], beta=beta, g=g, erase=erase, state=state)
                got[n], held = got[n] + read(state, keys[:, :n]) / len(heads), n
        for n in counts:
            found.setdefault(n, []).append(_missed(got[n], values[:, :n]))
    return {n: torch.cat(parts) for n, parts in found.items()}


def simulate(keys_for, n: int, **options) -> Tensor:
    """Squared errors [trials, n] of n values, by position in the order of writing. Options are those of `simulate_filling`."""
    return simulate_filling(keys_for, [n], **options)[n]


def beside(errors: Tensor, exact: float, *, level: float) -> dict:
    """Root mean square error of independent trials [trials] with its interval, beside the exact one."""
    mean, low, high = (max(x, 0.0) for x in analysis.mean_interval(errors.numpy(), level=level))
    mean, low, high = (
        x if high > 1e-24 else 0.0 for x in (mean, low, high)
    )  # float64 rounds: what is exact is shown as 0
    found = dict(exact=exact, measured=mean, low=low, high=high)
    agrees = low <= exact <= high or abs(mean - exact) < 1e-9
    return {name: math.sqrt(x) for name, x in found.items()} | dict(trials=len(errors), agrees=agrees)


def by_writes(writes, *, K: int, trials: int, level: float = 0.999, **options) -> pd.DataFrame:
    """Root mean square error of the first value after so many writes with random keys: exact, by the notes' form, measured."""
    found, lines = simulate_filling(functools.partial(random_keys, K=K), writes, trials=trials, **options), []
    for n, errors in found.items():
        exact = float(expected_read(n - 1, K=K).error)
        line = beside(errors[:, 0], exact, level=level)
        lines.append(dict(writes=n, approximate=float(notes_error(n, K=K)), **line))
    return pd.DataFrame(lines)


def by_gates(settings, *, n: int, K: int, trials: int, level: float = 0.999, **drawing) -> pd.DataFrame:
    """Root mean square error over all of n values for each (beta, g, erase), with the same keys and values for all."""
    found = [[] for _ in settings]
    for values, (keys,) in _draws(functools.partial(random_keys, K=K), n, trials=trials, **drawing):
        for (beta, g, erase), parts in zip(settings, found, strict=True):
            state = write(keys, values, beta=beta, g=g, erase=erase)
            parts.append(_missed(read(state, keys), values).mean(1))
    lines = []
    for (beta, g, erase), parts in zip(settings, found, strict=True):
        rule = dict(beta=beta, g=g, erase=erase)
        lines.append(dict(rule, **beside(torch.cat(parts), mean_error(n, K=K, **rule), level=level)))
    return pd.DataFrame(lines)


def by_similarity(cosines, *, n: int, K: int, trials: int, level: float = 0.999, **options) -> pd.DataFrame:
    """Root mean square error over n values whose keys all have the same cosine. The exact one follows from the cosine alone.

    norms: the mean over the values of the root mean square error of each, as the notes averaged.
    """
    lines = []
    for cosine in cosines:
        exact = similarity_errors(cosine, n).clip(min=0)
        errors = simulate(functools.partial(similar_keys, K=K, cosine=cosine), n, trials=trials, **options).mean(1)
        found = beside(errors, float(exact.mean()), level=level)
        lines.append(dict(cosine=cosine, norms=float(np.sqrt(exact).mean()), **found))
    return pd.DataFrame(lines)


def by_count(
    counts, *, K: int, trials: int, heads: int = 1, g: float = 0.0, level: float = 0.999, **options
) -> pd.DataFrame:
    """Root mean square error over all values by how many are held, `heads` memories averaged: what `capacity` is read from.

    approximate: by E C_ii^2 = (E C_ii)^2, see `expected_read`.
    """
    keys_for, lines = functools.partial(random_keys, K=K), []
    for n, errors in simulate_filling(keys_for, counts, trials=trials, heads=heads, g=g, **options).items():
        exact, near = (mean_error(n, K=K, g=g, heads=heads, approximate=rough) for rough in (False, True))
        line = beside(errors.mean(1), exact, level=level)
        lines.append(dict(values=n, K=K, heads=heads, g=g, approximate=math.sqrt(near), **line))
    return pd.DataFrame(lines)


def by_capacity(settings, *, error: float, trials: int, level: float = 0.999, **options) -> pd.DataFrame:
    """How many values fit below a mean square error, for each (K, heads, g): exact, approximate and measured.

    Memories are filled with the exact capacity n and one more. Numbers of values are where the straight line between the two
    errors crosses `error`; `low` and `high` where it does from the ends of the interval at n. agrees: both exact errors are
    inside their intervals.
    """
    lines = []
    for K, heads, g in settings:
        n = capacity(K=K, heads=heads, g=g, error=error)
        pair = (n, n + 1)
        exact, near = (
            [mean_error(i, K=K, heads=heads, g=g, approximate=rough) for i in pair] for rough in (False, True)
        )
        keys_for = functools.partial(random_keys, K=K)
        found = simulate_filling(keys_for, pair, trials=trials, heads=heads, g=g, **options)
        ends = np.array([analysis.mean_interval(found[i].mean(1).numpy(), level=level) for i in pair])
        agrees = all(low <= e <= high for e, (_, low, high) in zip(exact, ends, strict=True))
        slope = exact[1] - exact[0]
        crossing = lambda e, slope=slope, n=n: n + (error - e) / slope  # noqa: E731
        measured, high, low = (crossing(e) for e in ends[0])  # a larger error is a smaller capacity
        line = dict(K=K, heads=heads, g=g, exact=crossing(exact[0]), approximate=crossing(near[0]), measured=measured)
        lines.append(line | dict(low=low, high=high, trials=trials, agrees=agrees))
    return pd.DataFrame(lines)


def by_passes(keys_for, n: int, passes, *, trials: int, level: float = 0.999, **drawing) -> pd.DataFrame:
    """Root mean square error over n values after writing all of them so many times; `exact` is that of these very keys
    (`after_passes`), so only the values are drawn twice over."""
    found, exact, passes = {p: [] for p in passes}, {p: [] for p in passes}, sorted(passes)
    for values, (keys,) in _draws(keys_for, n, trials=trials, **drawing):
        state, done = None, 0
        for p in passes:
            state, done = write(keys, values, passes=p - done, state=state), p
            found[p].append(_missed(read(state, keys), values).mean(1))
            exact[p].append(after_passes(keys.cpu(), p).mean(1))
    lines = []
    for p in passes:
        line = beside(torch.cat(found[p]), float(torch.cat(exact[p]).mean()), level=level)
        lines.append(dict(passes=p, **line))
    return pd.DataFrame(lines)


def by_noise(
    levels, counts, *, K: int, trials: int, tokens: int = 4, seed: int = 0, level: float = 0.999, **drawing
) -> pd.DataFrame:
    """Root mean square error over n values, n in `counts`, read with keys of contexts that noise was added to.

    Keys are orthogonal projections of `tokens` normal tokens; noise is in standard deviations of a token's numbers. exact:
    `expected_read` with `query_cosine`. orthogonal: (1 - c)^2 + (1 - c^2) (n - 1) / (K - 1), were the keys orthogonal.
    """
    gen, counts = torch.Generator().manual_seed(seed + 1), sorted(counts)
    found = {(n, noise): [] for n in counts for noise in levels}
    draw = lambda trials, n, generator: torch.randn(  # noqa: E731
        trials, n, tokens, K // tokens, dtype=torch.float64, generator=generator
    )
    for values, (contexts,) in _draws(draw, counts[-1], trials=trials, seed=seed, **drawing):
        changes = draw(*contexts.shape[:2], gen).to(contexts)
        keys = context_keys(contexts, K, orthogonal=True)
        queries = {noise: context_keys(contexts + noise * changes, K, orthogonal=True) for noise in levels}
        state, held = None, 0
        for n in counts:
            state, held = write(keys[:, held:n], values[:, held:n], state=state), n
            for noise, query in queries.items():
                found[n, noise].append(_missed(read(state, query[:, :n]), values[:, :n]).mean(1))
    lines = []
    for (n, noise), parts in found.items():
        query = tuple(float(x) for x in query_cosine(K, noise))
        line = beside(torch.cat(parts), mean_error(n, K=K, query=query), level=level)
        bank = 1 - 2 * query[0] + query[1] + (1 - query[1]) * (n - 1) / (K - 1)
        lines.append(dict(values=n, noise=noise, cosine=query[0], orthogonal=math.sqrt(max(bank, 0.0)), **line))
    return pd.DataFrame(lines)


def _half_alike(trials: int, n: int, K: int, *, generator: torch.Generator) -> Tensor:
    """`similar_keys` of cosine 0.5, the same for all trials: only their cosines matter, and rotations take long to draw."""
    return similar_keys(1, n, K, 0.5, generator=generator).expand(trials, -1, -1)


SCENARIOS = {  # what draws the keys, and how often each is written
    "distinct random keys": (random_keys, 1),
    "every key written twice": (random_keys, 2),
    "cosine 0.5 between keys": (_half_alike, 1),
}


def largest_normal(of: int, shape, *, generator: torch.Generator) -> Tensor:
    """The largest of so many independent standard normal numbers, float64: -Phi^-1(1 - u^(1/of)), u uniform. -inf of none."""
    u = torch.rand(shape, dtype=torch.float64, generator=generator).clamp(min=1e-300)
    return -torch.special.ndtri(-torch.expm1(u.log() / of)) if of else torch.full(shape, -math.inf, dtype=u.dtype)


def by_rule(
    scenario: str, counts, *, K: int, V: int, candidates: int, trials: int, seed: int = 0, device="cpu"
) -> pd.DataFrame:
    """Recall by the largest product among `candidates` normal values, of which some were written, for rules that add or replace.

    scenario: of SCENARIOS. Where keys are written twice the later value is the right one. trials: reads per line, at least.
    Products of a read with candidates that were never written are independent normal numbers times its length; the largest of
    them is drawn, at once, by `largest_normal`. Columns: scenario, writes, rule, chance, and those of `analysis.Rate`.
    """
    if scenario not in SCENARIOS:
        raise ValueError(f"scenario = {scenario!r}: choose from {', '.join(map(repr, SCENARIOS))}")
    keys_for, times = SCENARIOS[scenario]
    gen, lines = torch.Generator().manual_seed(seed), []
    for n in counts:
        held = n // times
        if held * times > candidates:
            raise ValueError(f"candidates = {candidates}: fewer than the {held * times} values that are written")
        rows, right = max(10, -(-trials // held)), {}
        step = max(1, 2**22 // (K * V))  # memories at once
        for first in range(0, rows, step):
            count = min(step, rows - first)
            keys = keys_for(count, held, K, generator=gen).repeat(1, times, 1).to(device)
            values = random_values(count, held * times, V, generator=gen).to(device)
            rest = largest_normal(candidates - held * times, (count, held), generator=gen).to(device)
            once = write(keys, values)
            twice = write(keys, values, state=once)
            target = torch.arange(held * (times - 1), held * times, device=device)
            for rule, state in {"Hebbian": hebbian(keys, values), "delta": once, "delta, two passes": twice}.items():
                got = read(state, keys[:, -held:])
                best = (got @ values.mT).max(-1)
                correct = (best.indices == target) & (best.values > rest * got.norm(dim=-1))
                right.setdefault(rule, []).append(correct.cpu().numpy())
        for rule, found in right.items():
            rate = analysis.Rate.of(np.concatenate(found).ravel(), np.repeat(np.arange(rows), held))
            lines.append(dict(scenario=scenario, writes=n, rule=rule, chance=1 / candidates, **rate.row()))
    return pd.DataFrame(lines)


def by_strength(
    strengths, n: int, *, K: int, V: int, heads: int, candidates: int, trials: int, seed: int = 0, device="cpu"
) -> pd.DataFrame:
    """Recall of n values after one pass, by write strength: what random keys allow a layer of `heads` memories of K x V.

    Every head has keys of its own and holds V numbers of each value; the answer is the candidate, of values of one length in
    random directions, with the largest product with what all heads return. strengths: from 0 to 1, 0 being the limit in which
    nothing is erased, the Hebbian sum. trials: reads per line, at least. Columns: strength, writes, chance, and those of
    `analysis.Rate`.
    """
    if n > candidates:
        raise ValueError(f"candidates = {candidates}: fewer than the {n} values that are written")
    gen, lines = torch.Generator().manual_seed(seed), []
    rows = max(10, -(-trials // n))
    pool = F.normalize(random_values(1, candidates, heads * V, generator=gen)[0], dim=-1)
    answers = torch.rand(rows, candidates, generator=gen).argsort(-1)[:, :n]
    values = pool[answers].split(V, dim=-1)
    keys = [random_keys(rows, n, K, generator=gen) for _ in range(heads)]
    pool, answers, *inputs = (x.to(device) for x in (pool, answers, *values, *keys))
    values, keys = inputs[:heads], inputs[heads:]
    for strength in strengths:
        states = [write(k, v, beta=strength) if strength else hebbian(k, v) for k, v in zip(keys, values, strict=True)]
        got = torch.cat([read(state, k) for state, k in zip(states, keys, strict=True)], dim=-1)
        correct = ((got @ pool.mT).argmax(-1) == answers).cpu().numpy()
        rate = analysis.Rate.of(correct.ravel(), np.repeat(np.arange(rows), n))
        lines.append(dict(strength=strength, writes=n, chance=1 / candidates, **rate.row()))
    return pd.DataFrame(lines)
