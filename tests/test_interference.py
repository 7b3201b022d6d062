"""Interference of writes: closed forms against the rule itself, keys that are what they say, Hebbian and repeated writes."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch

import core
import interference
import mixers


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
        interference.by_passes(functools.partial(interference.random_keys, K=8), 4, (1, 3), trials=300),
        interference.by_noise([0.0, 1.0], [2, 5], K=8, trials=300),
    ]
    assert [len(table) for table in tables] == [2, 2, 3, 1, 2, 4]
    for table in tables:
        assert table["agrees"].all() and (table["trials"] == 300).all()
        assert ((table["low"] <= table["measured"]) & (table["measured"] <= table["high"])).all()
    same = lambda trials, n, generator: interference.similar_keys(trials, n, 8, 1.0, generator=generator)  # noqa: E731
    errors = interference.simulate(same, 4, trials=300).mean(1)
    wrong = interference.beside(errors, interference.mean_error(4, K=8), level=0.999)
    assert not wrong["agrees"]  # one key for all values is no draw of independent keys


def test_a_memory_that_fills_is_the_same_as_memories_of_each_size():
    keys_for = functools.partial(interference.random_keys, K=8)
    found = interference.simulate_filling(keys_for, [5, 2, 9], trials=2100, heads=2, g=-0.1)  # in two parts
    assert list(found) == [2, 5, 9] and all(errors.shape == (2100, n) for n, errors in found.items())
    whole = interference.simulate(keys_for, 9, trials=2100, heads=2, g=-0.1)
    torch.testing.assert_close(found[9], whole, rtol=1e-10, atol=1e-12)
    assert found[5].dtype == torch.float64
    for n, errors in found.items():
        exact = interference.mean_error(n, K=8, heads=2, g=-0.1)
        assert interference.beside(errors.mean(1), exact, level=0.999)["agrees"]


def test_averaged_heads():
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


def test_a_query_beside_the_key():
    """Exact coefficients of 20,000 draws of keys, and of queries with a fixed cosine in a random direction beside the key."""
    K, n, trials, cosine = 6, 8, 20_000, 0.8
    for rule in (dict(), dict(beta=0.7, g=-0.1), dict(beta=0.9, g=-0.2, erase="raw")):
        gen = generator()
        keys = interference.random_keys(trials, n, K, generator=gen)
        beside = torch.randn(keys.shape, dtype=keys.dtype, generator=gen)
        beside -= (beside * keys).sum(-1, keepdim=True) * keys
        queries = cosine * keys + math.sqrt(1 - cosine**2) * torch.nn.functional.normalize(beside, dim=-1)
        eye = torch.eye(n, dtype=keys.dtype).expand(trials, n, n).contiguous()
        reads = interference.read(interference.write(keys, eye, **rule), queries)  # unit values: reads are coefficients
        errors = (reads - eye).square().sum(-1).numpy()
        later = np.arange(n)[::-1]
        found = interference.expected_read(later, earlier=np.arange(n), K=K, query=(cosine, cosine**2), **rule)
        assert (np.abs(errors.mean(0) - found.error) <= 4.5 * errors.std(0) / math.sqrt(trials) + 1e-12).all()
        own = reads.diagonal(dim1=1, dim2=2).numpy()
        assert (np.abs(own.mean(0) - found.signal) <= 4.5 * own.std(0) / math.sqrt(trials) + 1e-12).all()


def test_a_query_beside_the_key_by_hand():
    """The last of n values: 1 - c^2 of what a random direction meets of n - 1 writes. A random query meets all n."""
    K, n, c = 64, 5, 0.9
    kept = (1 - 1 / K) ** (n - 1)
    last = interference.expected_read(0, earlier=n - 1, K=K, query=(c, c**2))
    assert last.signal == pytest.approx(c) and last.noise == pytest.approx((1 - c**2) * (1 - kept))
    any_query = interference.expected_read(2, earlier=n - 3, K=K, query=(0.0, 1 / K))
    assert any_query.error == pytest.approx(1 + 1 - (1 - 1 / K) ** n)


def test_a_query_beside_one_of_orthogonal_keys():
    """(1 - c)^2 + (1 - c^2) (n - 1) / (K - 1)."""
    K, n, cosine, trials = 8, 4, 0.8, 20_000
    gen = generator()
    keys = interference.orthogonal_keys(trials, n, K, generator=gen)
    beside = torch.randn(keys.shape, dtype=keys.dtype, generator=gen)
    beside -= (beside * keys).sum(-1, keepdim=True) * keys
    queries = cosine * keys + math.sqrt(1 - cosine**2) * torch.nn.functional.normalize(beside, dim=-1)
    errors = (queries @ keys.mT - torch.eye(n, dtype=keys.dtype)).square().sum(-1).numpy()
    expected = (1 - cosine) ** 2 + (1 - cosine**2) * (n - 1) / (K - 1)
    assert (np.abs(errors.mean(0) - expected) <= 4.5 * errors.std(0) / math.sqrt(trials)).all()


def test_the_cosine_of_a_noisy_query():
    x, y = (torch.randn(50_000, 5, dtype=torch.float64, generator=generator(s)) for s in (0, 1))
    for noise in (0.0, 0.3, 1.0):
        c = torch.cosine_similarity(x, x + noise * y).numpy()
        for found, exact in zip((c, c**2), interference.query_cosine(5, noise), strict=True):
            assert abs(found.mean() - exact) <= 4.5 * found.std() / math.sqrt(len(c)) + 1e-12


def test_the_approximation_is_that_of_the_notes():
    for n in (1, 7, 60):
        near = interference.expected_read(n - 1, K=16, approximate=True).error
        assert math.sqrt(near) == pytest.approx(float(interference.notes_error(n, K=16)), abs=1e-12)
    exact, near = (interference.mean_error(12, K=16, approximate=rough) for rough in (False, True))
    assert near < exact < near + 0.02


def test_norm_of_the_state():
    for rule in (dict(), dict(beta=0.5, g=-0.1), dict(g=-0.1, erase="raw")):
        keys = interference.random_keys(2000, 20, 8, generator=generator())
        values = interference.random_values(2000, 20, 16, generator=generator(1))
        squares = interference.write(keys, values, **rule).square().sum((1, 2))
        exact = interference.state_norm(20, K=8, V=16, **rule) ** 2
        assert abs(float(squares.mean()) - exact) <= 4.5 * float(squares.std()) / math.sqrt(2000)
    # What the notes printed for one hundred writes, 44.82, is that of K 32, V 64 and not of the model's K 64, V 128.
    assert interference.state_norm(100, K=32, V=64) == pytest.approx(44.3, abs=0.1)
    assert interference.state_norm(100, K=64, V=128) == pytest.approx(80.6, abs=0.1)


def test_cosines_of_random_keys():
    """The notes: mean .1002, deviation .0748, 1.51% above .3 of a thousand keys."""
    law = interference.cosine_law(64, limits=(0.3, 0.5))
    assert law["mean"] == pytest.approx(0.10013, abs=1e-5) and law["std"] == pytest.approx(0.0748, abs=1e-4)
    assert law["above 0.3"] == pytest.approx(0.0152, abs=1e-4) and 0 < law["above 0.5"] < 1e-4
    keys = interference.random_keys(20, 200, 6, generator=generator())
    cosines = (keys @ keys.mT)[:, *torch.triu_indices(200, 200, 1)].abs()
    law = interference.cosine_law(6, limits=(0.3,))
    assert float(cosines.mean()) == pytest.approx(law["mean"], abs=0.005)
    assert float((cosines > 0.3).double().mean()) == pytest.approx(law["above 0.3"], abs=0.01)
    assert interference.effective_width(keys) == pytest.approx(6, rel=0.02)


def test_rotated_keys():
    mean, deviation = interference.rope_cosine(16, 64)
    assert float(mean) == pytest.approx(0.605, abs=0.001)
    keys = interference.random_keys(4000, 1, 64, generator=generator())
    both = torch.cat([keys, torch.zeros(4000, 15, 64, dtype=keys.dtype), keys], 1)[:, :, None]
    turned = mixers.rope(both, 7, 10_000.0)[:, :, 0]
    found = (turned[:, 0] * turned[:, 16]).sum(-1)
    assert abs(float(found.mean()) - mean) <= 4.5 * deviation / math.sqrt(4000)
    assert float(found.std()) == pytest.approx(float(deviation), rel=0.05)


def test_width_of_projected_keys():
    """Independent normal weights leave keys of 4 x 64 numbers as alike as uniform ones of width 52; orthogonal columns do not."""
    contexts = torch.randn(20, 200, 4, 64, dtype=torch.float64, generator=generator())
    drawn = torch.stack([interference.context_keys(part, 64, seed=seed) for seed, part in enumerate(contexts)])
    assert interference.projected_width(64, 256) == pytest.approx(51.7, abs=0.01)
    assert interference.effective_width(drawn) == pytest.approx(51.7, rel=0.01)
    narrow = torch.stack([interference.context_keys(part[:, :, :6], 12, seed=s) for s, part in enumerate(contexts)])
    assert interference.effective_width(narrow) == pytest.approx(interference.projected_width(12, 24), rel=0.05)
    right = interference.context_keys(contexts, 64, orthogonal=True)
    assert interference.effective_width(right) == pytest.approx(64, rel=0.03)
    with pytest.raises(ValueError, match="orthogonal columns"):
        interference.context_keys(contexts[..., :1, :], 65, orthogonal=True)


def test_similar_keys_and_the_cosine_for_an_error():
    assert interference.similarity_errors(1.0, 5) == pytest.approx([2, 2, 2, 2, 0], abs=1e-12)
    assert interference.cosine_for(0.1, 5) == pytest.approx(0.075, abs=0.001)
    assert interference.cosine_for(0.3, 5) == pytest.approx(0.24, abs=0.005)


def test_passes_and_rounds_are_powers_of_the_coefficients():
    keys = interference.random_keys(3, 6, 8, generator=generator())
    eye = torch.eye(6, dtype=keys.dtype).expand(3, 6, 6).contiguous()
    for passes in (1, 2, 5):
        got = interference.read(interference.write(keys, eye, passes=passes), keys)
        expected = interference.after_passes(keys, passes)
        torch.testing.assert_close((got - eye).square().sum(-1), expected, rtol=1e-9, atol=1e-12)
    given = eye  # the notes' procedure as they describe it
    for _ in range(3):
        given = given + 0.5 * (eye - interference.read(interference.write(keys, given), keys))
    got = interference.read(interference.write(keys, given), keys)
    torch.testing.assert_close((got - eye).square().sum(-1), interference.after_rounds(keys, 3), rtol=1e-9, atol=1e-12)


def test_capacity_measured():
    table = interference.by_capacity([(8, 1, 0.0), (16, 4, 0.0), (16, 1, -0.05)], error=0.25, trials=1500)
    assert table["agrees"].all() and ((table["low"] <= table["exact"]) & (table["exact"] <= table["high"])).all()
    for line, whole in zip(table.itertuples(), (8, 16, 16), strict=True):
        n = interference.capacity(K=whole, heads=line.heads, g=line.g, error=0.25)
        assert n <= line.exact < n + 1 and line.low <= line.measured <= line.high


def test_the_largest_of_many_normal_numbers():
    drawn = interference.largest_normal(50, (20_000,), generator=generator())
    direct = torch.randn(20_000, 50, dtype=torch.float64, generator=generator(1)).max(-1).values
    for q in (0.05, 0.5, 0.95):
        assert float(drawn.quantile(q)) == pytest.approx(float(direct.quantile(q)), abs=0.03)
    assert torch.isinf(interference.largest_normal(0, (2,), generator=generator())).all()


def test_recall_is_that_of_a_search_through_all_candidates():
    """A pool of candidates, each compared with each read, gives the same accuracy as the largest of the unwritten ones drawn."""
    K, V, n, pool, rows = 8, 16, 6, 200, 2000
    keys = interference.random_keys(rows, n, K, generator=generator())
    candidates = interference.random_values(rows, pool, V, generator=generator(1))
    state = interference.write(keys, candidates[:, :n])
    searched = (interference.recalled(state, keys, candidates) == torch.arange(n)).double().mean()
    table = interference.by_rule("distinct random keys", [n], K=K, V=V, candidates=pool, trials=rows * n)
    assert float(searched) == pytest.approx(table.set_index("rule").loc["delta", "accuracy"], abs=0.02)
    with pytest.raises(ValueError, match="fewer than the 6"):
        interference.by_rule("distinct random keys", [6], K=8, V=4, candidates=5, trials=10)


def test_recall_by_write_strength():
    """Few orthogonal-like keys are all kept; many are kept by weak writes and lost by full ones; two heads keep more than one."""
    run = dict(K=16, V=16, candidates=256, trials=2000)
    few = interference.by_strength((0.0, 0.03, 1.0), 2, heads=2, **run)
    assert (few["accuracy"] > 0.97).all() and (few["chance"] == 1 / 256).all() and (few["trials"] >= 2000).all()
    many = interference.by_strength((0.0, 0.03, 1.0), 32, heads=2, **run)["accuracy"]
    assert many[0] == pytest.approx(many[1], abs=0.03) and many[2] < many[0] - 0.3
    assert interference.by_strength((0.03,), 32, heads=1, **run)["accuracy"][0] < many[1] - 0.1
    # One head, one pair: nothing interferes, whatever the strength.
    assert interference.by_strength((0.0, 0.2, 1.0), 1, heads=1, **run)["accuracy"].eq(1).all()
    with pytest.raises(ValueError, match="fewer than the 300"):
        interference.by_strength((0.0,), 300, heads=1, **run)


def test_recall_by_write_strength_is_that_of_the_token_loop():
    """The same keys and values through `core.delta_rule`'s reference, one step at a time, answer the same."""
    found = interference.by_strength((0.3,), 12, K=8, V=8, heads=2, candidates=64, trials=600, seed=3)
    gen, rows = generator(3), 50
    pool = torch.nn.functional.normalize(interference.random_values(1, 64, 16, generator=gen)[0], dim=-1)
    answers = torch.rand(rows, 64, generator=gen).argsort(-1)[:, :12]
    values = pool[answers].view(rows, 12, 2, 8)
    keys = torch.stack([interference.random_keys(rows, 12, 8, generator=gen) for _ in range(2)], dim=2)
    gates = torch.full(keys.shape[:3], 0.3, dtype=keys.dtype)
    state = core.delta_rule(keys, keys, values, gates, torch.zeros_like(gates), impl="reference").state
    got = torch.einsum("rnhk,rhkv->rnhv", keys, state).flatten(2)
    right = ((got @ pool.mT).argmax(-1) == answers).double().mean()
    assert found["accuracy"][0] == pytest.approx(float(right)) and found["trials"][0] == 600
