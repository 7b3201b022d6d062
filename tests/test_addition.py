"""Addition: rows against numbers written out and added by Python, carries, the division of pairs, whole answers."""

import collections
import dataclasses
import itertools
import json
import math
import pickle
import types

import pytest
import torch
from scipy import stats
from test_data import accuracy, generator, plausible
from torch import nn

import addition
import answers
import data
import tasks

X = tasks.IGNORE
DEFAULT = addition.Addition()
TASKS = {
    "default": DEFAULT,
    "1 to 3 digits": addition.Addition(digits=(1, 3)),
    "rich": addition.Addition(carry_share=0.8),
    "lowest first": addition.Addition(order="lsd", carry_share=1.0),
    "spaced": addition.Addition(spaced=True),
    "as the contest's smallest": addition.Addition(order="lsd", spaced=True, vocab_size=10, end=False, digits=(10, 10)),
    "digits alone": addition.Addition(vocab_size=10, carry_share=0.3, digits=(2, 7)),
    "three digits": addition.Addition(width=3, digits=(1, 3), vocab_size=20),
    "one digit": addition.Addition(width=1, digits=(1, 1), order="lsd"),
    "twelve digits": addition.Addition(width=12, digits=(12, 12), carry_share=0.5),
    "test": DEFAULT.held_out(),
    "test, rich": dataclasses.replace(DEFAULT.held_out(), carry_share=1.0, spaced=True),
    "validation, 1 to 3 digits": addition.Addition(digits=(1, 3), split="validation"),
}


@pytest.fixture(params=TASKS)
def task(request):
    return TASKS[request.param]


def spell(task, a, b):
    """A row as it is written by hand: the question and the answer, as ids."""
    sign = {"+": 10, "=": 11, "_": 12, ".": 13} if task.vocab_size > 10 else dict.fromkeys("+=_.", 0)
    turn = -1 if task.order == "lsd" else 1
    space = "_" if task.spaced else ""
    asked = f"{space}{str(a).zfill(task.width)[::turn]}+{space}{str(b).zfill(task.width)[::turn]}="
    answer = str(a + b).zfill(task.width + 1)[::-1] + ("." if task.end else "")
    ids = [sign[c] if c in sign else int(c) for c in asked + answer]
    return ids[: len(asked)], ids[len(asked) :]


def read(task, row):
    """The two numbers of a row of ids, by position alone."""
    turn = -1 if task.order == "lsd" else 1
    first = 1 if task.spaced else 0
    second = first + task.width + (2 if task.spaced else 1)
    return tuple(int("".join(map(str, row[i : i + task.width]))[::turn]) for i in (first, second))


def longest_chain(a, b, width):
    """How far the carry that comes furthest has come, by carrying on paper."""
    best = carry = come = 0
    for i in range(width):
        total = a // 10**i % 10 + b // 10**i % 10
        came = come
        carry = total + carry >= 10
        # A carry that needs the one before it is the same carry, one place on.
        come = 0 if not carry else 1 if total >= 10 else came + 1
        best = max(best, come)
    return best


# ------------------------------------------------------------------------------------------------ rows


def test_rows_written_by_hand():
    row = DEFAULT.encode([(5, 7)])
    question = [0, 0, 0, 0, 0, 0, 0, 0, 0, 5, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 11]
    assert row.tokens.tolist() == [[*question, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]]
    assert row.targets.tolist() == [[*[X] * 21, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 13]]
    assert (DEFAULT.prompt_len, DEFAULT.answer_len, DEFAULT.seq_len, DEFAULT.vocab_size) == (22, 12, 33, 14)

    lowest_first = dataclasses.replace(DEFAULT, order="lsd").encode([(1234567890, 9876543219)])
    question = [0, 9, 8, 7, 6, 5, 4, 3, 2, 1, 10, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11]
    assert lowest_first.tokens.tolist() == [[*question, 9, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]]
    assert lowest_first.targets[0, 21:].tolist() == [9, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 13]

    spaced = addition.Addition(width=3, digits=(1, 3), spaced=True).encode([(40, 987)])
    assert spaced.tokens.tolist() == [[12, 0, 4, 0, 10, 12, 9, 8, 7, 11, 7, 2, 0, 1]]
    assert spaced.targets.tolist() == [[*[X] * 9, 7, 2, 0, 1, 13]]

    contest = TASKS["as the contest's smallest"].encode([(1234567890, 9876543210)])
    question = [0, 0, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert contest.tokens.tolist() == [[*question, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]]
    assert contest.targets.tolist() == [[*[X] * 23, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]]


def test_rows_hold_the_sum(task):
    batch = task.sample(200, generator(1))
    assert batch.tokens.shape == (200, task.seq_len) and batch.tokens.dtype == torch.int64
    assert (batch.scored.sum(dim=1) == task.scored_per_row).all()
    assert len(set(map(tuple, batch.tokens.tolist()))) > (150 if task.digits[1] > 2 else 20)
    for tokens, targets, pair in zip(
        batch.tokens.tolist(), batch.targets.tolist(), task.pairs(batch).tolist(), strict=True
    ):
        a, b = read(task, tokens)
        assert [a, b] == pair
        question, answer = spell(task, a, b)
        assert tokens == question + answer[:-1]
        assert targets == [X] * (len(question) - 1) + answer
        assert max(a, b) < 10 ** task.digits[1]


def test_oracle_is_right_every_time(task):
    batch = task.sample(500, generator(2))
    predictions = task.oracle(batch)
    assert torch.equal(predictions, batch.targets) and task.whole(predictions, batch).all()
    blind = tasks.Batch(batch.tokens.clone(), torch.where(batch.scored, 0, X))
    blind.tokens[:, task.prompt_len :] = 0  # nor does it copy what is given of the answer
    assert torch.equal(task.oracle(blind), predictions)
    assert task.ceiling == 1.0 and task.floor == 0.0


def test_uniform_guess_meets_the_chance_lines(task):
    batch = task.sample(4000, generator(3))
    expected = task.answers(batch.targets)
    found = [expected[:, i].unique() for i in range(task.answer_len)]
    # A validation pair of small numbers may be rare: ids that occur are then a part of those that could.
    assert [len(ids) for ids in found] == list(task.choices)
    guess = torch.stack(
        [ids[torch.randint(len(ids), (4000,), generator=generator(4 + i))] for i, ids in enumerate(found)]
    )
    aligned = torch.full_like(batch.targets, X)
    aligned[:, task.prompt_len - 1 :] = guess.T
    right, total = accuracy(aligned, batch)
    varied = sum(n > 1 for n in task.choices)
    certain = 4000 * (task.answer_len - varied)  # places with one id only are no trials
    assert plausible(
        right - certain, total - certain, (task.chance * task.answer_len - task.answer_len + varied) / varied
    )
    if task.width == 1:
        assert plausible(int(task.whole(aligned, batch).sum()), 4000, task.chance_whole)


def test_chance_lines_of_the_default():
    assert math.isclose(DEFAULT.chance, (10 * 0.1 + 0.5 + 1) / 12)
    assert math.isclose(DEFAULT.chance_whole, 0.5e-10)


def test_same_generator_same_rows(task):
    a, b, c = task.sample(50, generator(5)), task.sample(50, generator(5)), task.sample(50, generator(6))
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets)
    assert not torch.equal(a.tokens, c.tokens)
    assert torch.equal(pickle.loads(pickle.dumps(task)).sample(50, generator(5)).tokens, a.tokens)


def test_dictionary_round_trip(task):
    saved = json.loads(json.dumps(task.to_dict()))
    assert data.Task.from_dict(saved) == task
    with pytest.raises(ValueError, match="unknown keys"):
        data.Task.from_dict({**saved, "carries": 3})


def test_example_shows_the_row(task):
    row = task.sample(1, generator(0))
    a, b = read(task, row.tokens[0].tolist())
    question, answer = spell(task, a, b)
    text, meaning, *columns = task.example().splitlines()
    sign = (lambda i: "0123456789+=_."[i]) if task.vocab_size > 10 else str
    assert text.split() == ["text", "".join(map(sign, question)), "".join(map(sign, answer))]
    chain = longest_chain(a, b, task.width)
    assert f"{a} + {b} = {a + b}," in meaning and meaning.endswith(f"longest carry chain {chain}")
    assert [int(t) for t in columns[2].split()[1:] if t not in (".", "...")] == answer
    assert max(map(len, [text, meaning, *columns])) <= 100


def test_the_door_shows_the_live_classes(monkeypatch):
    assert "Addition" in dir(data) and data.Addition is addition.Addition
    monkeypatch.setattr(addition, "Addition", "reloaded")
    assert data.Addition == "reloaded"


# ------------------------------------------------------------------------------------------------ sizes and digits


def test_sizes_are_uniform_and_numbers_uniform_below_them():
    pairs = addition.Addition(digits=(1, 3)).pairs(
        addition.Addition(digits=(1, 3)).sample(30_000, generator(7))
    )  # fmt: skip
    for k in (1, 2):
        # Below 10^k: both of k digits or fewer by their size, or by luck.
        share = sum(min(1, 10.0 ** (2 * (k - size))) for size in (1, 2, 3)) / 3
        assert plausible(int((pairs < 10**k).all(dim=1).sum()), 30_000, share)
    assert int(pairs.max()) > 990


@pytest.mark.parametrize("order,width", [("msd", 10), ("lsd", 9), ("msd", 12)])
def test_every_digit_is_even_and_independent_of_the_others(order, width):
    task = addition.Addition(width=width, digits=(width, width), order=order)
    pairs = task.pairs(task.sample(40_000, generator(8)))
    digits = torch.cat(
        [pairs[:, :1] // 10**i % 10 for i in range(width)] + [pairs[:, 1:] // 10**i % 10 for i in range(width)], 1
    )
    for i, column in enumerate(digits.unbind(dim=1)):
        assert stats.chisquare(torch.bincount(column, minlength=10)).pvalue > 1e-4
        after = digits[:, (i + 1) % (2 * width)]
        assert stats.chisquare(torch.bincount(10 * column + after, minlength=100)).pvalue > 1e-4


def test_sizes_shift_with_the_curriculum():
    sizes = {}
    for digits in ((1, 3), (1, 6), (1, 10), (4, 4)):
        task = addition.Addition(digits=digits)
        pairs = task.pairs(task.sample(2000, generator(9)))
        assert int(pairs.max()) < 10 ** digits[1]
        sizes[digits] = float(pairs.double().clamp_min(1).log10().mean())
    assert sizes[1, 3] < sizes[1, 6] < sizes[1, 10] and abs(sizes[4, 4] - 3.56) < 0.05


# ------------------------------------------------------------------------------------------------ carries


def test_chains_are_those_of_a_paper_adder(task):
    batch = task.sample(800, generator(10))
    expected = [longest_chain(*read(task, row), task.width) for row in batch.tokens.tolist()]
    assert task.chains(batch).tolist() == expected


def test_chains_of_every_pair_of_two_digits():
    task = addition.Addition(width=2, digits=(1, 2))
    pairs = list(itertools.product(range(100), repeat=2))
    batch = task.encode(pairs)
    assert task.chains(batch).tolist() == [longest_chain(a, b, 2) for a, b in pairs]
    assert task.numbers(task.answers(batch.targets)).tolist() == [a + b for a, b in pairs]


def test_travel_of_known_sums():
    task = addition.Addition(width=4, digits=(1, 4))
    batch = task.encode([(1, 9999), (95, 7), (99, 99), (5050, 5050), (4321, 5678), (190, 815)])
    assert task.travel(batch).tolist() == [
        [0, 1, 2, 3, 4],  # arises at the lowest place and runs through all
        [0, 1, 2, 0, 0],
        [0, 1, 1, 0, 0],  # 9 + 9 sends a carry of its own, with or without one coming
        [0, 0, 1, 0, 1],
        [0, 0, 0, 0, 0],  # nines alone, and nothing to hand on
        [0, 0, 1, 2, 0],
    ]


def test_edge_cases_have_these_chains():
    assert DEFAULT.chains(DEFAULT.edges()).tolist() == [0, 0, 0, 10, 1, 1, 10, 1, 1, 10]


def chain_odds(width):
    """Exact share of uniform pairs with each longest chain, place by place."""
    state = collections.Counter({(0, 0): 1.0})  # (travel of the carry that arrives, longest so far) -> probability
    for _ in range(width):
        following = collections.Counter()
        for (come, best), p in state.items():
            for odds, after in ((0.45, 1), (0.45, 0), (0.10, come + 1 if come else 0)):
                following[after, max(best, after)] += p * odds
        state = following
    odds = collections.Counter()
    for (_, best), p in state.items():
        odds[best] += p
    return odds


def test_plain_chains_have_the_exact_distribution():
    odds = chain_odds(10)
    assert abs(1 / sum(p for k, p in odds.items() if k >= 6) - 44_000) < 1000  # as by_chain's docstring says
    task = addition.Addition(digits=(10, 10), carry_share=0.0)
    counts = torch.bincount(task.chains(task.sample(40_000, generator(11))), minlength=11).tolist()
    merged = [*counts[:4], sum(counts[4:])]
    expected = [*(40_000 * odds[k] for k in range(4)), 40_000 * sum(odds[k] for k in range(4, 11))]
    assert stats.chisquare(merged, expected, sum_check=False).pvalue > 1e-4


def test_a_share_of_rows_is_rich_and_the_others_stay_as_they_were():
    keys = torch.randint(2**62, (20_000,), generator=generator(12))
    plain = addition.Addition(digits=(10, 10)).rows(keys).tokens
    changed, means = {}, []
    for share in (0.0, 0.2, 0.8, 1.0):
        task = addition.Addition(digits=(10, 10), carry_share=share)
        batch = task.rows(keys)
        changed[share] = (batch.tokens != plain).any(dim=1)
        means.append(float(task.chains(batch).double().mean()))
    assert not changed[0.0].any()
    # A chosen row is changed unless its stretch summed to nines by luck, which short ones do.
    assert 0.96 < float(changed[1.0].double().mean()) < 1
    for few, many in ((0.2, 0.8), (0.8, 1.0)):
        assert (changed[few] <= changed[many]).all()  # fading takes rows away and touches no other
        assert plausible(int(changed[few].sum()), int(changed[1.0].sum()), few)
    assert abs(means[0] - sum(k * p for k, p in chain_odds(10).items())) < 0.02
    assert means == sorted(means) and means[3] > means[0] + 1
    steps = [(means[i] - means[0]) / (means[3] - means[0]) for i in (1, 2)]
    assert abs(steps[0] - 0.2) < 0.02 and abs(steps[1] - 0.8) < 0.02  # in proportion to the share


def test_rich_rows_have_chains_of_every_length_and_nines_that_carry_nothing():
    task = addition.Addition(digits=(10, 10), carry_share=1.0)
    batch = task.sample(40_000, generator(13))
    counts = torch.bincount(task.chains(batch), minlength=11)
    assert len(counts) == 11 and int(counts[1:].min()) > 500
    pairs = task.pairs(batch)
    nines = torch.stack([(pairs // 10**i % 10).sum(dim=1) == 9 for i in range(10)], dim=1)
    travel = task.travel(batch)[:, 1:]  # out of each place
    # Seven places of nines from the second on: a carry comes out of the last of them about as often as none.
    stretch = nines[:, 1:8].all(dim=1)
    came = int((travel[stretch, 7] > 0).sum())
    assert int(stretch.sum()) > 1000 and 0.4 < came / int(stretch.sum()) < 0.6


def test_rich_rows_keep_to_their_size():
    for digits in ((1, 1), (1, 2), (3, 3)):
        task = addition.Addition(digits=digits, carry_share=1.0)
        pairs = task.pairs(task.sample(4000, generator(14)))
        assert int(pairs.max()) == 10 ** digits[1] - 1
    one = addition.Addition(digits=(1, 1))
    rich = dataclasses.replace(one, carry_share=1.0)
    assert torch.equal(rich.sample(500, generator(15)).tokens, one.sample(500, generator(15)).tokens)


# ------------------------------------------------------------------------------------------------ the division


def test_every_pair_of_two_digits_is_where_it_belongs_and_nowhere_else():
    """All 10,000 pairs, and what each split draws: nothing missing, nothing shared."""
    universe = list(itertools.product(range(100), repeat=2))
    where = addition.split_of(universe).tolist()
    belongs = [{pair for pair, w in zip(universe, where, strict=True) if w == i} for i in range(3)]
    for i, split in enumerate(addition.SPLITS):
        task = addition.Addition(width=2, digits=(2, 2), split=split)
        rows = 200_000 if i == 0 else 6000
        assert set(map(tuple, task.pairs(task.sample(rows, generator(16))).tolist())) == belongs[i]
        rich = dataclasses.replace(task, digits=(1, 2), carry_share=0.8)
        assert set(map(tuple, rich.pairs(rich.sample(rows, generator(17))).tolist())) <= belongs[i]
    assert all(200 < len(b) < 420 for b in belongs[1:])
    assert {(0, 0), (0, 1), (1, 0)} <= belongs[2]
    assert all((b, a) in belongs[i] for i in range(3) for a, b in belongs[i])


def test_no_training_row_is_held_out_at_full_width():
    for task in (DEFAULT, addition.Addition(digits=(1, 4), carry_share=0.7), TASKS["as the contest's smallest"]):
        pairs = task.pairs(task.sample(200_000, generator(17)))
        assert (addition.split_of(pairs) == 0).all()
    for i in (1, 2):
        task = DEFAULT.held_out(addition.SPLITS[i])
        assert (addition.split_of(task.pairs(task.sample(2000, generator(18)))) == i).all()


def test_one_pair_in_32_is_of_each_held_out_split():
    pairs = torch.randint(10**10, (100_000, 2), generator=generator(19))
    counts = torch.bincount(addition.split_of(pairs), minlength=3).tolist()
    assert stats.chisquare(counts, [100_000 * 30 / 32, 3125, 3125]).pvalue > 1e-4
    last = (pairs % 10).sum(dim=1)[addition.split_of(pairs) > 0]  # nor can the last digits tell
    assert (
        stats.chisquare(
            torch.bincount(last, minlength=19), [len(last) * (10 - abs(9 - s)) / 100 for s in range(19)]
        ).pvalue
        > 1e-4
    )


def test_a_step_leads_out_of_what_is_held_out_from_everywhere():
    """The argument of the module, for all buckets and digits, and for each edge case in both orders."""
    held = set(range(addition.BUCKETS - 2, addition.BUCKETS))
    for bucket, digit in itertools.product(held, range(10)):
        assert (bucket + (digit + 2) % 10 - digit) % addition.BUCKETS not in held
    edges = {pair for edge in addition.EDGES for pair in (edge, edge[::-1])}
    assert (addition.split_of(sorted(edges)) == 2).all()

    def step(pair, by):
        return pair[0] // 10 * 10 + (pair[0] + by) % 10, pair[1]

    assert (addition.split_of([step(pair, 2) for pair in edges]) == 0).all()
    assert (addition.split_of([step(pair, -2) for pair in edges]) == 0).all()  # so that no step leads onto one


def test_a_drawn_edge_case_is_not_trained_on(monkeypatch):
    task = addition.Addition(digits=(10, 10))
    digits = torch.stack([task._read(task.prompts(task.encode([pair])))[0] for pair in addition.EDGES])
    monkeypatch.setattr(addition.Addition, "_operands", lambda self, keys: digits.clone())
    pairs = task.pairs(task.rows(torch.zeros(10, dtype=torch.int64)))
    assert (addition.split_of(pairs) == 0).all() and pairs[3].tolist() == [9_999_999_991, 1]


def test_ten_test_sets_share_no_pair_with_each_other_or_with_training():
    test = DEFAULT.held_out()
    sets = [data.test_set(test, 1000, seed=s) for s in range(10)]
    pairs = torch.cat([test.pairs(batch) for batch in sets])
    assert len(set(map(tuple, pairs.sort(dim=1).values.tolist()))) == 10_000
    assert (addition.split_of(pairs) == 2).all()
    assert torch.equal(data.test_set(test, 1000, seed=7).tokens, sets[7].tokens)
    # Uniform over numbers of ten digits, as the public record is measured.
    for column in pairs.unbind(dim=1):
        assert stats.kstest(column.double() / 1e10, "uniform").pvalue > 1e-4


def test_held_out_keeps_the_format_and_refuses_its_own_split():
    task = addition.Addition(order="lsd", spaced=True, digits=(1, 3), carry_share=0.8, end=False)
    test = task.held_out()
    assert (test.split, test.digits, test.carry_share) == ("test", (10, 10), 0.0)
    assert (test.order, test.spaced, test.end, test.seq_len) == ("lsd", True, False, task.seq_len)
    assert task.held_out("validation").split == "validation"
    for split, source in (("train", task), ("test", test), ("validation", task.held_out("validation"))):
        with pytest.raises(ValueError, match="Addition.split = .* overlaps"):
            source.held_out(split)
    assert test.held_out("validation").split == "validation"
    with pytest.raises(ValueError, match="too few different rows"):
        data.test_set(addition.Addition(width=2, digits=(1, 2)).held_out(), 500)


def test_edge_cases_are_the_contests():
    top = 10**10 - 1
    expected = [
        (0, 0), (0, 1), (top, 0), (top, 1), (top, top), (5 * 10**9, 5 * 10**9),
        (1111111111, 8888888889), (1234567890, 9876543210), (top, top), (1, top),
    ]  # fmt: skip
    batch = DEFAULT.edges()
    assert list(map(tuple, DEFAULT.pairs(batch).tolist())) == expected
    assert DEFAULT.numbers(DEFAULT.answers(batch.targets)).tolist() == [a + b for a, b in expected]
    for task in (TASKS["spaced"], TASKS["as the contest's smallest"], TASKS["twelve digits"]):
        assert task.pairs(task.edges()).tolist() == list(map(list, expected))
    with pytest.raises(ValueError, match="width = 3"):
        TASKS["three digits"].edges()


# ------------------------------------------------------------------------------------------------ keys


def test_keys_name_rows_whatever_their_shape():
    task = addition.Addition(carry_share=0.5)
    keys = torch.randint(-(2**62), 2**62, (3, 7), generator=generator(20))
    stacked = task.rows(keys)
    assert stacked.tokens.shape == (3, 7, 33)
    for i in range(3):
        alone = task.rows(keys[i])
        assert torch.equal(stacked.tokens[i], alone.tokens) and torch.equal(stacked.targets[i], alone.targets)
    assert torch.equal(task.chains(stacked)[2], task.chains(task.rows(keys[2])))
    with pytest.raises(ValueError, match="Addition.split = 'test'"):
        DEFAULT.held_out().rows(keys)


def test_a_key_names_the_same_row_for_ever():
    """By arithmetic on Python's numbers: a run that is resumed after an update must meet the rows it would have met."""

    def stream(key, i):
        x = (key + i * 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return (x ^ x >> 31) >> 5

    keys = torch.randint(-(2**63), 2**63 - 1, (400,), generator=generator(27))
    expected = []
    for key in keys.tolist():
        size = 1 + (stream(key, 3) % 2**32 * 10 >> 32)
        pair = tuple(stream(key, i) * 10**10 // 2**59 for i in (1, 2))
        # Decimals come in from the left, so the lowest place has the first of them.
        a, b = (int(f"{number:010d}"[::-1]) % 10**size for number in pair)
        if addition.split_of([(a, b)]) > 0:
            a += 2 if a % 10 < 8 else -8
        expected.append([a, b])
    assert DEFAULT.pairs(DEFAULT.rows(keys)).tolist() == expected


def test_keys_that_count_give_rows_as_good_as_random_ones():
    task = addition.Addition(digits=(10, 10))
    pairs = task.pairs(task.rows(torch.arange(40_000)))
    for column in pairs.unbind(dim=1):
        assert stats.kstest(column.double() / 1e10, "uniform").pvalue > 1e-4
    assert abs(float(torch.corrcoef(pairs.double().T)[0, 1])) < 0.02
    assert abs(float(torch.corrcoef(torch.stack([pairs[:-1, 0], pairs[1:, 0]]).double())[0, 1])) < 0.02


def test_no_step_depends_on_a_value():
    """On the device `meta`, which has shapes and no values, whatever reads a value raises."""
    for task in (DEFAULT, addition.Addition(carry_share=0.5, spaced=True)):
        batch = task.rows(torch.empty(4, 6, dtype=torch.int64, device="meta"))
        assert batch.tokens.shape == (4, 6, task.seq_len) and batch.tokens.is_meta
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.empty(3, device="meta").sum().item()


@pytest.mark.gpu
def test_a_gpu_makes_the_same_rows_and_a_graph_holds_them():
    task = addition.Addition(carry_share=0.5)
    keys = torch.randint(2**62, (64, 512), generator=generator(21))
    expected = task.rows(keys)
    held = keys.cuda()
    assert torch.equal(task.rows(held).tokens.cpu(), expected.tokens)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        batch = task.rows(held)
    held.copy_(keys.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(batch.tokens.cpu(), expected.tokens.flip(0))
    assert torch.equal(batch.targets.cpu(), expected.targets.flip(0))


# ------------------------------------------------------------------------------------------------ whole answers


class Adder(nn.Module):
    """Adds like the oracle, reading only what is before each position, but for the rows that `wrong` spoils.

    wrong: (task, batch) -> bool [n, A], the places at which to write one more than is right.
    """

    def __init__(self, task, wrong=None):
        super().__init__()
        self.task, self.wrong, self.modes = task, wrong, []
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, tokens):
        self.modes.append(self.training or torch.is_grad_enabled())
        P, n = self.task.prompt_len, len(tokens)
        batch = self.task.build(tokens[:, :P], torch.zeros(n, self.task.answer_len, dtype=torch.int64))
        answer = self.task.answers(self.task.oracle(batch))
        if self.wrong is not None:
            answer = torch.where(self.wrong(self.task, batch), (answer + 1) % self.task.vocab_size, answer)
        following = torch.cat([torch.zeros(n, P - 1, dtype=torch.int64), answer], dim=1)[:, : tokens.shape[1]]
        return types.SimpleNamespace(
            logits=nn.functional.one_hot(following, self.task.vocab_size).float() + self.weight
        )


class Counter(nn.Module):
    """Writes the last token plus one, so that what it writes is what it was fed back."""

    def forward(self, tokens):
        return types.SimpleNamespace(logits=nn.functional.one_hot((tokens + 1) % 10, 14).float())


def long_chains(task, batch):
    """Spoils the places that a carry of two or more places comes into: what a model does that only looks next door."""
    travel = task.travel(batch) >= 2
    return torch.cat([travel, torch.zeros_like(travel[:, : task.end])], dim=1)


def test_decoding_feeds_back_what_was_written():
    prompts = torch.tensor([[3, 7], [1, 1]])
    assert answers.decode(Counter(), prompts, 5).tolist() == [[8, 9, 0, 1, 2], [2, 3, 4, 5, 6]]
    assert torch.equal(answers.decode(Counter(), prompts, 5, batch_size=1), answers.decode(Counter(), prompts, 5))


def test_a_right_adder_is_exact(task):
    batch = task.sample(60, generator(22))
    model = Adder(task)
    model.train()
    written = answers.decode(model, task.prompts(batch), task.answer_len, batch_size=25)
    assert torch.equal(written, task.answers(batch.targets))
    assert model.training and not any(model.modes) and len(model.modes) == 3 * task.answer_len
    assert answers.exact(model, task, batch).all()
    a_plus_b = task.pairs(batch).sum(dim=1)
    assert torch.equal(task.numbers(written), a_plus_b)


def test_mistakes_are_counted_where_they_are():
    task = dataclasses.replace(DEFAULT.held_out(), carry_share=1.0)
    batch = task.sample(600, generator(23))
    model = Adder(task, long_chains)
    right = answers.exact(model, task, batch)
    chains = [longest_chain(*read(task, row), 10) for row in batch.tokens.tolist()]
    assert right.tolist() == [k < 2 for k in chains]
    # Each answer decoded whole, and each token with the true ones before it: the same rows are right.
    assert torch.equal(task.whole(model(batch.tokens).logits.argmax(dim=-1), batch), right)
    found, total = task.by_chain(right, batch), collections.Counter(chains)
    assert found == {k: (total[k] if k < 2 else 0, total[k]) for k in sorted(total)}
    assert list(found) == sorted(found) and len(found) >= 9


def test_one_wrong_token_anywhere_makes_an_answer_wrong(task):
    batch = task.sample(task.answer_len, generator(24))
    predictions = batch.targets.clone()
    assert task.whole(predictions, batch).all()
    for i in range(task.answer_len):
        broken = predictions.clone()
        broken[i, task.prompt_len - 1 + i] = (broken[i, task.prompt_len - 1 + i] + 1) % task.vocab_size
        assert task.whole(broken, batch).tolist() == [j != i for j in range(task.answer_len)]
        assert torch.equal(task.whole(task.answers(broken), batch), task.whole(broken, batch))
    elsewhere = predictions.clone()
    elsewhere[:, : task.prompt_len - 1] = 1  # what a model predicts inside the question does not count
    assert task.whole(elsewhere, batch).all()
    members = torch.stack([predictions, broken])
    assert task.whole(members, batch).sum(dim=1).tolist() == [task.answer_len, task.answer_len - 1]


def test_numbers_that_are_none():
    task = addition.Addition(width=2, digits=(1, 2))
    rows = [[4, 3, 1, 13], [4, 3, 1, 0], [4, 11, 1, 13], [0, 0, 0, 13], [13, 0, 0, 13], [4, 3, -100, 13]]
    assert task.numbers(torch.tensor(rows)).tolist() == [134, -1, -1, 0, -1, -1]
    assert dataclasses.replace(task, end=False).numbers(torch.tensor([[4, 3, 1], [12, 0, 0]])).tolist() == [134, -1]
    assert task.text(torch.tensor([1, 10, 11, 12, 13, 14])) == "1+=_.?"


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "settings,field",
    [
        (dict(width=0), "width"),
        (dict(width=13), "width"),
        (dict(vocab_size=9), "vocab_size"),
        (dict(vocab_size=13), "vocab_size"),
        (dict(digits=(0, 3)), "digits"),
        (dict(digits=(4, 3)), "digits"),
        (dict(digits=(1, 11)), "digits"),
        (dict(digits=3), "digits"),
        (dict(width=5), "digits"),
        (dict(carry_share=-0.1), "carry_share"),
        (dict(carry_share=1.1), "carry_share"),
        (dict(carry_share=math.nan), "carry_share"),
        (dict(order="big"), "order"),
        (dict(split="all"), "split"),
        (dict(split="validation", digits=(1, 1)), "split"),
    ],
)
def test_contradictory_settings_name_the_field(settings, field):
    with pytest.raises(ValueError, match=rf"Addition\.{field} = "):
        addition.Addition(**settings)


def test_bad_input_says_what_would_do():
    for pairs in ([(1, 2, 3)], [], [1, 2]):
        with pytest.raises(ValueError, match="pairs: shape"):
            DEFAULT.encode(pairs)
    for pairs in ([(10**10, 0)], [(0, -1)]):
        with pytest.raises(ValueError, match=f"numbers from 0 to {10**10 - 1}"):
            DEFAULT.encode(pairs)
        if pairs[0][1] < 0:
            with pytest.raises(ValueError, match="at least 0"):
                addition.split_of(pairs)
    batch = DEFAULT.sample(4, generator())
    with pytest.raises(ValueError, match=r"predictions: shape \[4, 20\], needs \[..., 4, 33\] or \[..., 4, 12\]"):
        DEFAULT.whole(torch.zeros(4, 20), batch)
    for right in (torch.ones(3, dtype=torch.bool), torch.ones(4), torch.ones(1, 4, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"right: .* needs bool \[4\]"):
            DEFAULT.by_chain(right, batch)
    for prompts in (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.int64)):
        with pytest.raises(ValueError, match="prompts"):
            answers.decode(Counter(), prompts, 2)
    for options in (dict(length=0), dict(length=1.0), dict(length=2, batch_size=0)):
        with pytest.raises(ValueError, match="needs an integer of at least 1"):
            answers.decode(Counter(), torch.zeros(2, 3, dtype=torch.int64), **options)


def test_the_base_is_no_task():
    with pytest.raises(ValueError, match="choose one of"):
        data.Task.from_dict({"task": "AnswerTask"})
