"""Interference of writes: closed forms against the rule itself, keys that are what they say, Hebbian and repeated writes."""

import itertools
import math

import numpy as np
import pytest
import torch

import interference


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


SETTINGS = [
    dict(),
    dict(beta=0.6),
    dict(g=-0.1),
    dict(beta=0.7, g=-0.05, erase="raw"),
    dict(beta=1.0, g=-0.3, erase="raw"),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_coefficients_are_what_the_rule_reads(setting):
    keys = interference.similar_keys(3, 9, 12, 0.3, generator=generator())
    values = interference.random_values(3, 9, 5, generator=generator(1))
    state = interference.write(keys, values, impl="reference", **setting)
    expected = interference.coefficients(keys, **setting) @ values
    torch.testing.assert_close(interference.read(state, keys), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_closed_form_is_the_mean_over_keys(setting):
    """Every value's error, and its mean coefficient, within 4.5 standard errors over 20,000 draws of keys."""
    K, n, trials = 6, 10, 20_000
    C = interference.coefficients(interference.random_keys(trials, n, K, generator=generator()), **setting).numpy()
    later = np.arange(n)[::-1]
    expected = interference.expected_read(later, earlier=np.arange(n), K=K, **setting)
    errors = ((C - np.eye(n)) ** 2).sum(-1)
    own = C[:, np.arange(n), np.arange(n)]
    for found, mean in ((errors, expected.error), (own, expected.signal)):
        spread = found.std(0) / math.sqrt(trials)
        assert (np.abs(found.mean(0) - mean) <= 4.5 * spread + 1e-12).all()
    assert interference.mean_error(n, K=K, **setting) == pytest.approx(expected.error.mean())


def test_the_closed_form_by_hand():
    """Two writes: C = [[1 - c^2, c], [0, 1]] with c the cosine, of which E c^2 = 1 / K and E c^4 = 3 / (K (K + 2))."""
    K = 5
    first, last = interference.expected_read([1, 0], earlier=[0, 1], K=K).error
    assert first == pytest.approx(3 / (K * (K + 2)) + 1 / K) and last == pytest.approx(0.0, abs=1e-15)
    at_strength = interference.expected_read(0, K=K, beta=0.3)
    assert at_strength.error == pytest.approx(0.49) and at_strength.noise == pytest.approx(0.0, abs=1e-15)
    decayed = interference.expected_read(3, K=10**9, g=-0.2)  # keys as good as orthogonal: decay alone
    assert decayed.signal == pytest.approx(math.exp(-0.6)) and decayed.noise == pytest.approx(0.0, abs=1e-8)


def test_the_form_of_the_notes_is_close_and_not_exact():
    writes = np.array([1, 5, 10, 25, 50, 100, 200])
    measured = [0, 0.2621, 0.3899, 0.6457, 0.9160, 1.1921, 1.3709]  # the notes: means of 20 trials
    exact = np.sqrt(interference.expected_read(writes - 1, K=64).error)
    assert np.abs(exact - measured).max() < 0.006
    assert np.abs(interference.notes_error(writes, K=64) - exact).max() < 0.005
    assert interference.notes_error(5, K=64) < exact[1] - 0.002


def test_errors_of_a_simulation():
    """Through core: the estimate of the error is unbiased, and shrinks with trials to the closed form."""
    K, n, trials = 8, 6, 4000
    keys = interference.random_keys(trials, n, K, generator=generator())
    values = interference.random_values(trials, n, 3, generator=generator(1))
    errors = interference.squared_errors(interference.write(keys, values), keys, values)
    expected = interference.expected_read(np.arange(n)[::-1], earlier=np.arange(n), K=K).error
    spread = errors.std(0).numpy() / math.sqrt(trials)
    assert (np.abs(errors.mean(0).numpy() - expected) <= 4.5 * spread + 1e-12).all()


def test_capacity_is_the_last_count_that_fits():
    for K, g in itertools.product((4, 64), (0.0, -0.01)):
        n = interference.capacity(K=K, error=0.25, g=g)
        assert interference.mean_error(n, K=K, g=g) <= 0.25 < interference.mean_error(n + 1, K=K, g=g)
    assert interference.capacity(K=4, error=0.01, beta=0.5) == 0  # a single write leaves a quarter
    assert interference.capacity(K=64, error=0.25, most=20) == 20
    with pytest.raises(ValueError, match="between 0 and 1"):
        interference.capacity(K=4, error=1.0)


def test_keys_are_what_they_say():
    rows = interference.orthogonal_keys(3, 7, 8, generator=generator())
    torch.testing.assert_close(rows @ rows.transpose(1, 2), torch.eye(7, dtype=torch.float64).expand(3, 7, 7))
    for cosine in (0.0, 0.4, 1.0):
        keys = interference.similar_keys(2, 5, 8, cosine, generator=generator())
        expected = torch.full((5, 5), cosine, dtype=torch.float64).fill_diagonal_(1.0)
        torch.testing.assert_close(keys @ keys.transpose(1, 2), expected.expand(2, 5, 5))
    same = interference.positional_keys(2, 4, 8, 0.0, generator=generator())
    torch.testing.assert_close(same, same[:, :1].expand_as(same))
    apart = interference.positional_keys(2, 4, 8, 1.0, generator=generator())
    assert (apart[:, 0] * apart[:, 3]).sum(-1).max() < 0.999
    positions = torch.tensor([5, 2, 5])
    hashed = interference.hashed_keys(positions, 16)
    assert torch.equal(hashed[0], hashed[2]) and not torch.equal(hashed[0], hashed[1])
    assert torch.equal(
        hashed, interference.hashed_keys(torch.tensor([5, 2, 5, 9]), 16)[:3]
    )  # whatever else is asked for
    contexts = torch.randn(2, 3, 4, 6, dtype=torch.float64, generator=generator())
    found = interference.context_keys(contexts, 16)
    assert found.shape == (2, 3, 16) and torch.allclose(found.norm(dim=-1), torch.ones(2, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: interference.orthogonal_keys(1, 5, 4, generator=generator()), "at most K = 4"),
        (lambda: interference.similar_keys(1, 4, 4, 0.5, generator=generator()), "n < K = 4"),
        (lambda: interference.similar_keys(1, 2, 4, 1.5, generator=generator()), "cosine"),
        (lambda: interference.positional_keys(1, 2, 5, 1.0, generator=generator()), "even"),
    ],
)
def test_impossible_keys_say_so(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_passes_close_in_on_least_squares():
    """With independent keys every pass leaves less, down to nothing; with one key for all values the last one stays."""
    keys = interference.random_keys(20, 6, 8, generator=generator())
    values = interference.random_values(20, 6, 3, generator=generator(1))
    errors = [
        interference.squared_errors(interference.write(keys, values, passes=n), keys, values).mean()
        for n in (1, 2, 5, 400)
    ]
    assert errors[0] > errors[1] > errors[2] > errors[3] and errors[3] < 0.02 * errors[0]
    same = keys[:, :1].expand(-1, 6, -1).contiguous()
    for passes in (1, 5):
        got = interference.read(interference.write(same, values, passes=passes), same)
        torch.testing.assert_close(got, values[:, -1:].expand_as(got))


def test_hebbian_adds_and_delta_replaces():
    keys = interference.orthogonal_keys(4, 3, 8, generator=generator())
    old, new = (interference.random_values(4, 3, 50, generator=generator(s)) for s in (1, 2))
    twice, both = torch.cat([keys, keys], 1), torch.cat([old, new], 1)
    torch.testing.assert_close(interference.read(interference.hebbian(twice, both), keys), old + new)
    state = interference.write(twice, both)
    torch.testing.assert_close(interference.read(state, keys), new)
    assert torch.equal(interference.recalled(state, keys, new), torch.arange(3).expand(4, 3))


def test_blending_dilutes_with_temperature():
    keys = interference.orthogonal_keys(1, 5, 8, generator=generator())
    values = interference.random_values(1, 5, 4, generator=generator(1))
    state = interference.write(keys, values)
    torch.testing.assert_close(interference.blended(state, keys, keys, temperature=1e-3), values)
    share = math.e / (math.e + 4)  # at temperature 1 every other key keeps a weight of 1 / (e + 4)
    others = values.sum(1, keepdim=True) - values
    torch.testing.assert_close(interference.blended(state, keys, keys), share * values + (1 - share) / 4 * others)


def test_tables_put_the_exact_beside_the_measured():
    tables = [
        interference.by_writes([1, 4], K=8, trials=300),
        interference.by_gates([(1.0, 0.0, "decayed"), (0.5, -0.1, "raw")], n=5, K=8, trials=300),
        interference.by_similarity([0.0, 0.5, 1.0], n=4, K=8, trials=300),
        interference.by_count([3], K=8, trials=300, heads=2, g=-0.05),
    ]
    assert [len(table) for table in tables] == [2, 2, 3, 1]
    for table in tables:
        assert table["agrees"].all() and (table["trials"] == 300).all()
        assert ((table["low"] <= table["measured"]) & (table["measured"] <= table["high"])).all()
    same = lambda trials, n, generator: interference.similar_keys(trials, n, 8, 1.0, generator=generator)  # noqa: E731
    errors = interference.simulate(same, 4, trials=300).mean(1)
    wrong = interference.beside(errors, interference.mean_error(4, K=8), level=0.999)
    assert not wrong["agrees"]  # one key for all values is no draw of independent keys


def test_reads_with_other_queries_and_averaged_heads():
    keys_for = lambda trials, n, generator: interference.orthogonal_keys(trials, n, 8, generator=generator)  # noqa: E731
    half = lambda keys, generator: 0.5 * keys  # noqa: E731
    errors = interference.simulate(keys_for, 3, trials=2100, queries_for=half)  # in two parts
    assert errors.shape == (2100, 3) and float(errors.mean()) == pytest.approx(0.25, rel=0.05)
    one, many = (interference.mean_error(20, K=16, heads=heads) for heads in (1, 10**9))
    assert many < one and interference.capacity(K=16, error=0.25, heads=8) > interference.capacity(K=16, error=0.25)


def test_rules_by_argmax_where_each_wins():
    found = {
        scenario: interference.by_rule(scenario, [12], K=16, V=32, candidates=100, trials=240).set_index("rule")[
            "accuracy"
        ]
        for scenario in interference.SCENARIOS
    }
    distinct, twice, similar = found.values()
    assert distinct["Hebbian"] > distinct["delta"] + 0.05
    assert twice["delta"] > 0.9 and 0.2 < twice["Hebbian"] < 0.8  # which of two values is larger is chance
    assert similar["delta, two passes"] > max(similar["Hebbian"], similar["delta"])
    with pytest.raises(ValueError, match="choose from"):
        interference.by_rule("none", [2], K=4, V=4, candidates=4, trials=10)
