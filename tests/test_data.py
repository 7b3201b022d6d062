"""Tasks, corpora, tokenizers, test sets: chance lines, floors and oracles are checked against the rows themselves."""

import dataclasses
import gc
import json
import math
import os
import pathlib
import pickle
import subprocess
import sys
import types

import numpy as np
import pytest
import tokenizers
import torch
from scipy import stats

import data
import needles
import tasks


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def accuracy(predictions, batch):
    """(right, scored)"""
    right = (predictions == batch.targets)[batch.scored]
    return int(right.sum()), right.numel()


def plausible(right, total, share):
    """Whether `right` of `total` could come from `share`: two-sided binomial test at 1e-4 (all seeds are fixed)."""
    return stats.binomtest(right, total, share).pvalue > 1e-4


ARTICLES = tuple(f"Article {i}. " + " ".join(f"word{(i * 7 + j * j) % 97}" for j in range(200)) for i in range(40))


@pytest.fixture(scope="module")
def text():
    return data.LanguageModel(data.Corpus("articles", ARTICLES), seq_len=64)


RECALL = {
    "single": data.SingleNeedle(seq_len=64, vocab_size=128),
    "single own cue": data.SingleNeedle(seq_len=256, vocab_size=300, own_cue=True, needle_range=(20, 290)),
    "five": data.MultiNeedle(),
    "five at 4x": data.MultiNeedle(seq_len=512),
    "two of five": data.MultiNeedle(queries=2),
    "five, answers shown": data.MultiNeedle(layout="answers"),
    "distance": data.MultiNeedle(seq_len=96, n_needles=8, distance=30),
    "tight": data.MultiNeedle(seq_len=15, n_needles=5, vocab_size=40),
    "shared": data.SharedMarkerNeedles(),
    "shared, wide context": data.SharedMarkerNeedles(context_width=3, layout="answers", context_range=(10, 60)),
    "shared, distance": data.SharedMarkerNeedles(distance=50, queries=1),
    "slots": data.SlotNeedles(),
    "slots, answers": data.SlotNeedles(n_slots=7, layout="answers", queries=3),
    "slots, distance": data.SlotNeedles(distance=50, queries=1),
    "echo": data.Echo(seq_len=32, vocab_size=20),
    "mqar": data.MQAR(),
    "mqar 256 pairs": data.MQAR(seq_len=1024, n_pairs=256),
    "mqar random filler": data.MQAR(seq_len=128, n_pairs=16, vocab_size=512, filler="random"),
}
NEEDLES = {name: task for name, task in RECALL.items() if isinstance(task, data.NeedleTask)}
EVERY = {**RECALL, "bigrams": data.Bigrams(), "bigrams in a range": data.Bigrams(vocab_size=1000, id_range=(100, 1000))}


@pytest.fixture(params=RECALL)
def recall(request):
    return RECALL[request.param]


@pytest.fixture(params=NEEDLES)
def needle(request):
    return NEEDLES[request.param]


@pytest.fixture(params=EVERY)
def task(request):
    return EVERY[request.param]


# ------------------------------------------------------------------------------------------------ every task


def test_batch_layout(task):
    batch = task.sample(50, generator())
    assert batch.tokens.shape == batch.targets.shape == (50, task.seq_len)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert int(batch.tokens.min()) >= 0 and int(batch.tokens.max()) < task.vocab_size
    assert (batch.scored.sum(dim=1) == task.scored_per_row).all()
    answers = batch.targets[batch.scored]
    assert int(answers.min()) >= 0 and int(answers.max()) < task.vocab_size


def test_same_generator_same_rows(task):
    a, b, c = task.sample(20, generator(3)), task.sample(20, generator(3)), task.sample(20, generator(4))
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets)
    assert all(torch.equal(a.info[k], b.info[k]) for k in a.info)
    assert not torch.equal(a.tokens, c.tokens)
    again = pickle.loads(pickle.dumps(task))
    assert again == task and torch.equal(again.sample(20, generator(3)).tokens, a.tokens)


def test_a_smaller_seed_state_advances(task):
    g = generator(1)
    assert not torch.equal(task.sample(4, g).tokens, task.sample(4, g).tokens)


def test_dictionary_round_trip(task):
    saved = json.loads(json.dumps(task.to_dict()))
    assert data.Task.from_dict(saved) == task == type(task).from_dict(saved)


def test_uniform_guess_meets_the_chance_line(task):
    batch = task.sample(3000 // task.scored_per_row + 200, generator(5))
    answers = batch.targets[batch.scored].unique()
    choices = round(1 / task.chance)
    assert len(answers) <= choices  # chance counts every answer that occurs
    assert int(answers.max()) - int(answers.min()) < choices
    low = {"MQAR": task.vocab_size // 2}.get(type(task).__name__, 0)
    low = getattr(task, "values", getattr(task, "ids", (low,)))[0]
    guess = torch.randint(low, low + choices, batch.tokens.shape, generator=generator(6))
    assert plausible(*accuracy(guess, batch), task.chance)


def test_oracle_reaches_the_ceiling(task):
    batch = task.sample(400, generator(7))
    predictions = task.oracle(batch)
    assert torch.equal(predictions != -100, batch.scored)
    right, total = accuracy(predictions, batch)
    if task.ceiling == 1.0:
        assert right == total
    else:
        assert plausible(right, total, task.ceiling)


def test_oracle_does_not_read_the_targets(task):
    batch = task.sample(30, generator(8))
    hidden = dataclasses.replace(batch, targets=torch.where(batch.scored, 0, -100))
    assert torch.equal(task.oracle(hidden), task.oracle(batch))


def test_example_shows_a_literal_row(task):
    row = task.sample(1, generator(0))
    text = task.example()
    assert max(map(len, text.splitlines())) <= 100
    lines = [line.split() for line in text.splitlines()]
    for names, *columns in (list(zip(*lines[i : i + 3], strict=True)) for i in range(0, len(lines), 3)):
        assert names == ("position", "token", "target") and columns
        for position, token, target in columns:
            if position != "...":
                expected = int(row.targets[0, int(position)])
                assert int(token) == int(row.tokens[0, int(position)])
                assert target == ("." if expected == -100 else str(expected))


def test_speed_of_sampling():
    import time

    for task in (data.MultiNeedle(), data.MultiNeedle(seq_len=512), data.MQAR(), data.Bigrams(), data.SingleNeedle()):
        task.sample(256, generator())
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            task.sample(256, generator())
            seconds.append(time.perf_counter() - start)
        assert 256 * task.seq_len / min(seconds) > 1e6


@pytest.mark.parametrize("n", [0, -1, 2.0, True, "8"])
def test_bad_row_count(n):
    with pytest.raises(ValueError, match="n = "):
        data.Echo().sample(n, generator())


def test_bad_generator():
    with pytest.raises(ValueError, match="generator"):
        data.Echo().sample(2, 0)


def test_batch_rows_to_and_shape_check():
    batch = data.MultiNeedle().sample(8, generator())
    part = batch.rows(torch.tensor([5, 2])).to("cpu")
    assert torch.equal(part.tokens, batch.tokens[[5, 2]]) and torch.equal(
        part.info["index"], batch.info["index"][[5, 2]]
    )
    with pytest.raises(ValueError, match="targets"):
        data.Batch(batch.tokens, batch.targets[:, 1:])


def test_unknown_names_and_keys():
    with pytest.raises(ValueError, match="Nothing.*choose one of.*MultiNeedle"):
        data.Task.from_dict({"task": "Nothing"})
    with pytest.raises(ValueError, match="choose one of"):  # a base class is not a task
        data.Task.from_dict({"task": "NeedleTask"})
    with pytest.raises(ValueError, match="unknown keys"):
        data.Echo.from_dict({"length": 4})
    with pytest.raises(ValueError, match="another task"):
        data.Echo.from_dict(data.MQAR().to_dict())


def test_the_door_shows_the_live_classes(monkeypatch):
    assert data.MultiNeedle is needles.MultiNeedle and data.Batch is tasks.Batch
    assert {"MultiNeedle", "MQAR", "LanguageModel"} <= set(dir(data))
    monkeypatch.setattr(tasks, "Echo", "reloaded")
    assert data.Echo == "reloaded"
    with pytest.raises(AttributeError, match="Nonsense"):
        _ = data.Nonsense


# ------------------------------------------------------------------------------------------------ recall


def test_distance_and_index_point_at_the_answer(recall):
    batch = recall.sample(60, generator(9))
    row, position = batch.scored.nonzero(as_tuple=True)
    source = position - 1 - batch.info["distance"][row, position]
    assert torch.equal(batch.tokens[row, source], batch.targets[row, position])
    assert (source < position).all()
    for info in batch.info.values():
        assert (info[~batch.scored] == -1).all() and (info[batch.scored] >= 0).all()
    for r in range(60):  # index counts asked sources in order of position
        mine = row == r
        by_place = source[mine].argsort()
        assert (batch.info["index"][r, position[mine]][by_place].diff() > 0).all()


def test_removed_needle_falls_to_chance(recall):
    removed = dataclasses.replace(recall, remove_needle=True)
    n = max(200, 4000 // recall.scored_per_row)
    whole, batch = recall.sample(n, generator(10)), removed.sample(n, generator(10))
    assert torch.equal(whole.targets, batch.targets)
    right, total = accuracy(recall.oracle(batch), batch)
    assert plausible(right, total, recall.chance)
    assert removed.ceiling == recall.chance and math.isclose(removed.floor, -math.log(recall.chance))
    # Nothing else moved: only the values and their markers differ, and cues are as they were.
    changed = (whole.tokens != batch.tokens).sum(dim=1)
    assert (changed <= recall.removed_width * recall.scored_per_row).all() and changed.sum() > 0
    assert torch.equal(whole.tokens[batch.scored], batch.tokens[batch.scored])


def test_markers_stand_in_needles_and_cues_only(needle):
    batch = needle.sample(200, generator(11))
    special = batch.tokens >= needle.first_special
    text = special[:, : needle.seq_len - needle.tail]
    assert (text.sum(dim=1) == needle.n_needles).all()
    assert (special[:, needle.seq_len - needle.tail :].sum(dim=1) == needle.n_queries).all()
    removed = dataclasses.replace(needle, remove_needle=True).sample(200, generator(11))
    left = (removed.tokens >= needle.first_special)[:, : needle.seq_len - needle.tail]
    assert (left.sum(dim=1) == needle.n_needles - needle.n_queries).all()


def test_needles_do_not_overlap_and_keep_to_the_depth(needle):
    task = needle
    if task.distance is None and task.seq_len > 60:
        task = dataclasses.replace(task, depth=(0.25, 0.9))
    text = task.sample(300, generator(12)).tokens[:, : task.seq_len - task.tail]
    markers = (text >= task.first_special).nonzero()[:, 1].view(300, task.n_needles)
    if task.n_needles > 1:
        assert int(markers.diff(dim=1).min()) >= task.needle_width
    first, last = markers[:, 0] - (task.cue_width - 1), markers[:, -1] + 1
    assert int(first.min()) >= task.span[0] and int(last.max()) < task.span[1]


def test_literal_rows():
    task = data.MultiNeedle(seq_len=12, vocab_size=20, n_needles=2, n_markers=3)
    batch = task.sample(1, generator(0))
    assert task.first_special == 17
    text, cues = batch.tokens[0, :10].tolist(), batch.tokens[0, 10:].tolist()
    expected = [text[text.index(cue) + 1] for cue in cues]
    assert batch.targets[0].tolist() == [-100] * 10 + expected

    shown = dataclasses.replace(task, layout="answers").sample(1, generator(0))
    cue, answer, last = shown.tokens[0, 9:].tolist()
    text = shown.tokens[0, :9].tolist()
    assert answer == text[text.index(cue) + 1] == int(shown.targets[0, 9])
    assert int(shown.targets[0, 11]) == text[text.index(last) + 1] and int(shown.targets[0, 10]) == -100

    own = data.SingleNeedle(seq_len=16, vocab_size=20, own_cue=True).sample(1, generator(0))
    row = own.tokens[0].tolist()
    assert row[-1] == 18 and own.targets[0, -1] == row[row.index(19) + 1]

    shared = data.SharedMarkerNeedles(seq_len=20, vocab_size=20, n_needles=2).sample(1, generator(0))
    row = shared.tokens[0].tolist()
    pairs = {(row[i], row[i + 1]): row[i + 2] for i in range(14) if row[i + 1] == 19}
    assert len(pairs) == 2
    assert [int(shared.targets[0, t]) for t in (17, 19)] == [pairs[tuple(row[t - 1 : t + 1])] for t in (17, 19)]

    echo = data.Echo(seq_len=6, vocab_size=9).sample(1, generator(0))
    a, b, c = echo.tokens[0, :3].tolist()
    assert echo.tokens[0].tolist() == [a, b, c, 8, a, b]
    assert echo.targets[0].tolist() == [-100, -100, -100, a, b, c]


def test_smoke_setting_draws_markers_and_order():
    task = data.MultiNeedle(seq_len=128, vocab_size=256, n_needles=5)
    batch = task.sample(2000, generator(13))
    cues = batch.tokens[:, -5:]
    assert set(cues.unique().tolist()) == set(range(240, 256))
    assert all(len(set(row)) == 5 for row in cues.tolist())
    # Each needle is asked first equally often, and each marker names the first needle equally often.
    order = batch.info["index"][:, -5]
    assert stats.chisquare(torch.bincount(order, minlength=5).numpy()).pvalue > 1e-4
    first = batch.tokens[torch.arange(2000), (batch.tokens >= 240).int().argmax(dim=1)] - 240
    assert stats.chisquare(torch.bincount(first, minlength=16).numpy()).pvalue > 1e-4
    values = batch.targets[batch.scored]
    assert stats.chisquare(torch.bincount(values, minlength=240).numpy()).pvalue > 1e-4


def test_placement_is_uniform_over_all_placements():
    starts = needles.place(30_000, 2, 2, 7, generator(0))  # 2 blocks of 2 in 7 places: C(5, 2) = 10 placements
    counts = torch.bincount(starts[:, 0] * 7 + starts[:, 1])
    counts = counts[counts > 0]
    assert len(counts) == 10 and stats.chisquare(counts.numpy()).pvalue > 1e-4


def test_placement_around_a_fixed_needle_is_uniform():
    task = data.MultiNeedle(seq_len=11, vocab_size=30, n_needles=3, distance=4)  # value at 5: 4 places before, 4 after
    assert task._sides() == (4, 4)
    text = task.sample(30_000, generator(1)).tokens[:, :10]
    markers = (text >= task.first_special).nonzero()[:, 1].view(-1, 3)
    assert (markers == 4).any(dim=1).all()
    counts = torch.bincount((markers * torch.tensor([121, 11, 1])).sum(dim=1))
    counts = counts[counts > 0]
    assert len(counts) == 11  # both before: 1, one on each side: 3 * 3, both after: 1
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4


def test_distinct_draws_every_ordered_triple_equally_often():
    draws = tasks.distinct(60_000, 3, 6, generator(3))  # 6 * 5 * 4 = 120 triples, by redrawing repeats
    counts = torch.bincount((draws * torch.tensor([36, 6, 1])).sum(dim=1))
    counts = counts[counts > 0]
    assert len(counts) == 120 and stats.chisquare(counts.numpy()).pvalue > 1e-4
    with pytest.raises(ValueError, match="count = 7"):
        tasks.distinct(1, 7, 6, generator())


@pytest.mark.parametrize("distance", [0, 1, 17, 125])
def test_fixed_distance(distance):
    task = data.SingleNeedle(seq_len=128, distance=distance)
    batch = task.sample(20, generator())
    assert (batch.info["distance"][:, -1] == distance).all()
    assert torch.equal(batch.tokens[:, 126 - distance], batch.targets[:, -1])
    far = dataclasses.replace(task, seq_len=512).sample(20, generator())
    assert (far.info["distance"][:, -1] == distance).all()


@pytest.mark.parametrize("count,size", [(1, 1), (3, 3), (3, 200), (40, 80), (100, 200), (130, 200)])
def test_distinct_is_uniform(count, size):
    draws = tasks.distinct(4000, count, size, generator(2))
    assert all(len(set(row)) == count for row in draws.tolist())
    for column in (draws[:, 0], draws[:, -1]):  # a uniform ordered draw: every column is uniform
        assert size == 1 or stats.chisquare(torch.bincount(column, minlength=size).numpy()).pvalue > 1e-4


def test_chance_unbound_is_what_a_value_of_the_row_gets():
    task = data.MultiNeedle(needle_range=(0, 10))
    batch = task.sample(2000, generator(14))
    shuffled = batch.targets[:, -5:].gather(1, tasks.distinct(2000, 1, 5, generator(1)).expand(-1, 5))
    right = int((shuffled == batch.targets[:, -5:]).sum())
    assert abs(right / 10_000 - task.chance_unbound) < 0.02 and math.isclose(task.chance_unbound, 0.2 + 0.8 * 0.1)


def test_narrow_range_shows_the_shortcut():
    task = data.SingleNeedle(seq_len=64, vocab_size=256, needle_range=(200, 240), haystack_range=(0, 200))
    batch = task.sample(100, generator())
    by_id = torch.where((batch.tokens >= 200) & (batch.tokens < 240), batch.tokens, 0).amax(dim=1)  # ignores the marker
    assert torch.equal(by_id, batch.targets[:, -1]) and math.isclose(task.chance, 1 / 40)


def test_needles_in_text(text):
    task = data.MultiNeedle(seq_len=96, vocab_size=320, haystack=text, needle_range=(256, 304))
    batch = task.sample(100, generator())
    assert accuracy(task.oracle(batch), batch) == (500, 500)
    row = batch.tokens[0, :91]
    stored = text.tokenizer.decode(text.stream)
    pieces = "".join(chr(i) if i < 256 else "\n\n" for i in row.tolist()).split("\n\n\n\n")
    assert all(piece in stored for piece in pieces)  # marker and value cut the text, and nothing else does
    assert data.Task.from_dict({**task.to_dict(), "haystack": None}).haystack is None
    with pytest.raises(ValueError, match=r"vocab_size = 260.*272"):
        dataclasses.replace(task, vocab_size=260, needle_range=None)
    with pytest.raises(ValueError, match="haystack"):
        data.MultiNeedle(haystack=data.Echo())
    with pytest.raises(ValueError, match="haystack_range"):
        dataclasses.replace(task, haystack_range=(0, 10))


@pytest.mark.parametrize(
    "build,field",
    [
        (lambda: data.MultiNeedle(seq_len=14), "seq_len"),
        (lambda: data.MultiNeedle(n_needles=60, n_markers=64), "seq_len"),
        (lambda: data.MultiNeedle(n_needles=17), "n_markers"),
        (lambda: data.MultiNeedle(vocab_size=16), "vocab_size"),
        (lambda: data.MultiNeedle(needle_range=(0, 241)), "needle_range"),
        (lambda: data.MultiNeedle(needle_range=(9, 9)), "needle_range"),
        (lambda: data.MultiNeedle(needle_range=7), "needle_range"),
        (lambda: data.MultiNeedle(haystack_range=(5, 250)), "haystack_range"),
        (lambda: data.MultiNeedle(queries=6), "queries"),
        (lambda: data.MultiNeedle(queries=0), "queries"),
        (lambda: data.MultiNeedle(layout="both"), "layout"),
        (lambda: data.MultiNeedle(depth=(0.5, 0.5)), "depth"),
        (lambda: data.MultiNeedle(depth=(0.5, 0.52)), "seq_len"),
        (lambda: data.MultiNeedle(queries=2, distance=9), "distance"),
        (lambda: data.MultiNeedle(distance=126), "distance"),
        (lambda: data.MultiNeedle(seq_len=11, vocab_size=30, n_needles=5, distance=5), "distance"),
        (lambda: data.SharedMarkerNeedles(distance=0), "distance"),
        (lambda: data.SlotNeedles(n_slots=4), "n_slots"),
        (lambda: data.SlotNeedles(n_needles=0), "n_needles"),
        (lambda: data.SharedMarkerNeedles(context_range=(0, 4)), "context_range"),
        (lambda: data.SharedMarkerNeedles(context_range=(0, 256)), "context_range"),
        (lambda: data.SharedMarkerNeedles(context_width=0), "context_width"),
        (lambda: data.SingleNeedle(n_needles=2), "n_needles"),
        (lambda: data.SingleNeedle(vocab_size=0), "vocab_size"),
        (lambda: data.Echo(seq_len=7), "seq_len"),
        (lambda: data.Echo(vocab_size=2), "vocab_size"),
        (lambda: data.MQAR(n_pairs=17), "seq_len"),
        (lambda: data.MQAR(seq_len=65), "seq_len"),
        (lambda: data.MQAR(vocab_size=8, n_pairs=4), "n_pairs"),
        (lambda: data.MQAR(power_a=0), "power_a"),
        (lambda: data.MQAR(filler="none"), "filler"),
        (lambda: data.Bigrams(follow=1.1), "follow"),
        (lambda: data.Bigrams(id_range=(0, 300)), "id_range"),
        (lambda: data.Mixture(tasks=(data.Echo(), data.MQAR()), shares=(0.5, 0.5)), "tasks"),
        (lambda: data.Mixture(tasks=(data.Echo(), data.Bigrams()), shares=(0.5, 0.6)), "shares"),
        (lambda: data.Mixture(tasks=(), shares=()), "tasks"),
    ],
)
def test_contradictory_settings_name_the_field(build, field):
    with pytest.raises(ValueError, match=rf"\.{field} = "):
        build()


# ------------------------------------------------------------------------------------------------ MQAR as published


@pytest.mark.parametrize("seq_len,n_pairs", [(64, 4), (128, 8), (256, 16), (256, 64), (1024, 256)])
def test_mqar_layout(seq_len, n_pairs):
    task = data.MQAR(seq_len=seq_len, n_pairs=n_pairs)
    assert task.vocab_size == 8192 and task.power_a == 0.01
    batch = task.sample(40, generator())
    context, rest = batch.tokens[:, : 2 * n_pairs], batch.tokens[:, 2 * n_pairs :]
    keys, values = context[:, 0::2], context[:, 1::2]
    assert 1 <= int(keys.min()) and int(keys.max()) < 4096 <= int(values.min()) and int(values.max()) < 8192
    assert all(len(set(row)) == n_pairs for side in (keys, values) for row in side.tolist())
    assert (rest[:, 1::2] == 0).all()  # queries at every second place only
    assert torch.equal(rest.sort(dim=1).values[:, -n_pairs:], keys.sort(dim=1).values)  # each key once, zeros elsewhere
    assert torch.equal(batch.scored[:, 2 * n_pairs :], rest > 0) and not batch.scored[:, : 2 * n_pairs].any()


def test_mqar_gaps_follow_the_power_law():
    task = data.MQAR(seq_len=64, n_pairs=4)
    weights = task.gap_weights().numpy()
    assert len(weights) == 28 and math.isclose(weights[1] / weights[0], 2 ** (0.01 - 1))
    batch = task.sample(20_000, generator(3))
    row, position = batch.scored.nonzero(as_tuple=True)
    index = batch.info["index"][row, position]
    place = (position - 8) // 2
    # The first pair draws its place first, so its law is exact; the second never takes the same one.
    observed = np.bincount(place[index == 0].numpy(), minlength=28)
    assert stats.chisquare(observed, 20_000 * weights).pvalue > 1e-4
    second = (weights[:, None] * weights[None] / (1 - weights[:, None]) * (1 - np.eye(28))).sum(axis=0)
    assert stats.chisquare(np.bincount(place[index == 1].numpy(), minlength=28), 20_000 * second).pvalue > 1e-4


def test_mqar_random_filler_leaves_no_zero_places():
    task = RECALL["mqar random filler"]
    batch = task.sample(50, generator())
    assert float((batch.tokens == 0).double().mean()) < 0.01
    assert int(batch.tokens.max()) < 512


# ------------------------------------------------------------------------------------------------ bigrams, mixtures


@pytest.mark.parametrize("follow", [0.0, 0.3, 0.7, 1.0])
def test_bigram_floor_is_the_entropy(follow):
    task = data.Bigrams(seq_len=500, vocab_size=12, follow=follow)
    batch = task.sample(400, generator(1))
    joint = torch.bincount((batch.tokens * 12 + batch.targets).flatten(), minlength=144).view(12, 12).double()
    conditional = joint / joint.sum(dim=1, keepdim=True)
    entropy = -(joint / joint.sum() * conditional.clamp_min(1e-300).log()).sum()
    assert abs(float(entropy) - task.floor) < 0.01  # 200,000 tokens, 144 cells: the estimate is biased by < 0.001
    # Further context does not lower it: the pair before the last token adds nothing.
    if follow == 0.7:
        triple = batch.tokens[:, :-1] * 144 + batch.targets[:, :-1] * 12 + batch.targets[:, 1:]
        joint = torch.bincount(triple.flatten(), minlength=1728).view(144, 12).double()
        conditional = (joint / joint.sum(dim=1, keepdim=True)).clamp_min(1e-300)
        assert abs(float(-(joint / joint.sum() * conditional.log()).sum()) - task.floor) < 0.02


def test_bigram_figures_of_the_notes():
    task = data.Bigrams(vocab_size=1000, id_range=(100, 1000))
    assert round(math.exp(task.floor), 1) == 14.1  # not the "about 4" once claimed for it
    assert data.Bigrams(vocab_size=7, follow=0.0).floor == pytest.approx(math.log(7))
    assert data.Bigrams(follow=1.0).floor == 0


def test_bigram_targets_are_the_next_tokens():
    batch = data.Bigrams().sample(5, generator())
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1]) and batch.scored.all()


def test_mixture_rows(text):
    wide = dataclasses.replace(text, vocab_size=320)
    task = data.MultiNeedle(seq_len=64, vocab_size=320, haystack=text)
    mix = data.Mixture(tasks=(wide, task), shares=(0.7, 0.3))
    assert mix.counts(10) == [7, 3] and mix.counts(8) == [6, 2] and mix.counts(1) == [1, 0]
    batch = mix.sample(10, generator())
    kind = batch.info["task"][:, 0]
    assert torch.bincount(kind).tolist() == [7, 3] and kind.tolist() != sorted(kind.tolist())
    assert batch.scored[kind == 0].all() and (batch.scored[kind == 1].sum(dim=1) == 5).all()
    assert (batch.info["distance"][kind == 0] == -1).all()
    rows = batch.rows(kind == 1)
    assert accuracy(task.oracle(rows), rows) == (15, 15)
    assert math.isnan(mix.floor) and math.isclose(mix.scored_per_row, 0.7 * 64 + 0.3 * 5)
    with pytest.raises(ValueError, match="oracle"):
        mix.oracle(batch)
    again = pickle.loads(pickle.dumps(mix))
    assert torch.equal(again.sample(10, generator()).tokens, batch.tokens)
    assert "70% LanguageModel" in mix.example()


def test_mixture_of_synthetic_tasks():
    parts = (data.MultiNeedle(seq_len=64), data.Echo(seq_len=64))
    mix = data.Mixture(tasks=parts, shares=(0.5, 0.5))
    batch = mix.sample(40, generator())
    right, total = accuracy(mix.oracle(batch), batch)
    assert right == total == 20 * 5 + 20 * 32
    assert mix.chance == pytest.approx((5 / 240 + 32 / 255) / 37) and mix.ceiling == 1 and mix.floor == 0
    assert data.Task.from_dict(json.loads(json.dumps(mix.to_dict()))) == mix


# ------------------------------------------------------------------------------------------------ language modelling


def test_language_model_rows_are_the_text(text):
    batch = text.sample(50, generator())
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    stored = text.tokenizer.decode(text.stream)
    for row, target in zip(batch.tokens, batch.targets, strict=True):
        assert text.tokenizer.decode(row) + chr(int(target[-1])) in stored
    assert text.vocab_size == 256 and text.chance == 1 / 256 and math.isnan(text.floor) and math.isnan(text.ceiling)
    with pytest.raises(ValueError, match="no oracle"):
        text.oracle(batch)
    assert text.example().startswith("text    '")


def test_every_position_of_the_stream_is_drawn():
    short = data.LanguageModel(data.Corpus("short", ("abcdefgh",)), seq_len=5, split="all")
    rows = {tuple(r) for r in short.sample(500, generator()).tokens.tolist()}
    assert {bytes(r).decode() for r in rows} == {"abcde", "bcdef", "cdefg"}


def test_windows_cover_the_side_once(text):
    side = dataclasses.replace(text, split="validation")
    batch = side.windows()
    covered = batch.targets.flatten()
    assert torch.equal(covered, side.stream[1 : len(covered) + 1].long())
    assert len(side.stream) - 1 - len(covered) < side.seq_len
    assert torch.equal(batch.tokens.flatten(), side.stream[: len(covered)].long())
    assert len(side.windows(3).tokens) == 3
    step = len(batch.tokens) // 3
    assert step > 1 and torch.equal(side.windows(3).tokens, batch.tokens[: 3 * step : step])
    assert torch.equal(side.windows(len(batch.tokens) + 1).tokens, batch.tokens)
    with pytest.raises(ValueError, match="limit"):
        side.windows(0)


def test_split_is_by_document(text):
    train, validation = text.corpus.split(validation_share=0.2, seed=1)
    assert not set(train.documents) & set(validation.documents)
    assert sorted(train.documents + validation.documents) == sorted(ARTICLES)
    assert 0.2 <= validation.n_bytes / text.corpus.n_bytes < 0.2 + 1 / 39
    again = text.corpus.split(validation_share=0.2, seed=1)
    assert again == (train, validation) and text.corpus.split(validation_share=0.2, seed=2)[1] != validation
    # What the tasks read is those sides, in order, joined by a newline.
    model = dataclasses.replace(text, validation_share=0.2, split_seed=1)
    assert model.tokenizer.decode(model.stream) == "\n".join(train.documents)
    held_out = dataclasses.replace(model, split="validation")
    assert held_out.tokenizer.decode(held_out.stream) == "\n".join(validation.documents)
    assert data.overlap(model.windows(), held_out.windows()) == 0


def test_split_errors():
    one = data.Corpus("one", ("a text of one document " * 50,))
    with pytest.raises(ValueError, match="one document cannot be split"):
        one.split()
    with pytest.raises(ValueError, match="validation_share"):
        data.Corpus("two", ("a", "b")).split(validation_share=1.0)
    assert [len(side.documents) for side in data.Corpus("two", ("a", "b")).split(validation_share=0.99)] == [1, 1]


def test_language_model_errors(text):
    with pytest.raises(ValueError, match="seq_len = 100000"):
        dataclasses.replace(text, seq_len=100_000)
    with pytest.raises(ValueError, match="vocab_size = 255"):
        dataclasses.replace(text, vocab_size=255)
    with pytest.raises(ValueError, match="split"):
        dataclasses.replace(text, split="test")
    with pytest.raises(ValueError, match="corpus"):
        data.LanguageModel("offline")
    with pytest.raises(ValueError, match="tokenizer"):
        data.LanguageModel(text.corpus, "bytes")
    with pytest.raises(ValueError, match="length"):
        text.draw_text(2, 10**6, generator())


# ------------------------------------------------------------------------------------------------ corpora


def test_offline_corpus_is_large_english_and_stable(capsys):
    first, second = data.corpus("offline"), data.corpus("offline")
    assert first.sha256 == second.sha256 and first == second
    assert first.n_bytes > 1_000_000 and len(first.documents) > 200
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == printed[1]
    assert "offline" in printed[0] and f"{first.n_bytes:,} bytes" in printed[0] and first.sha256[:12] in printed[0]
    everything = "\n".join(first.documents)
    assert "new subclass of tuple with named fields" in everything  # collections.namedtuple's docstring
    assert everything.lower().count(" the ") > 10_000
    assert len(set(first.documents)) > 0.95 * len(first.documents)


def test_offline_corpus_reads_docstrings_and_runs_nothing(monkeypatch, tmp_path):
    nested = '''"""About deep."""
class C:
    "A class."
    async def m(self):
        "A method."
if C:
    def f():
        "A function."
        def g(): "Inner."
try:
    pass
except ValueError:
    def h(): "Handler."
'''
    sources = {
        "b.py": '"""About b."""\nraise SystemExit("imported")\n',
        "a/deep.py": nested,
        "pydoc_data/topics.py": "topics = {'one': 'First topic.', 'two': 'Second ' 'topic.'}\n",
        "no_docstring.py": "x = 'no docstring'\n\ny = 1\n",
        "broken.py": "def (:\n",
        "test/test_x.py": '"""A test."""\n',
        "site-packages/other.py": '"""Not the library."""\n',
    }
    for name, source in sources.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    monkeypatch.setattr(data.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    deep = "About deep.\n\nC\nA class.\n\nC.m\nA method.\n\nf\nA function.\n\nf.g\nInner.\n\nh\nHandler.\n"
    documents = data.corpus("offline", quiet=True).documents
    assert documents == (deep, "About b.\n", "First topic.", "Second topic.")


def test_offline_without_sources_is_an_oserror(monkeypatch, tmp_path):
    monkeypatch.setattr(data.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(OSError, match="no library sources"):
        data.corpus("offline")


@pytest.fixture
def site_packages(monkeypatch, tmp_path):
    """Writes sources into folders that stand for purelib and platlib; data.corpus("packages") then reads those."""
    folders = {kind: tmp_path / kind for kind in ("purelib", "platlib")}
    monkeypatch.setattr(data.sysconfig, "get_paths", lambda: {kind: str(path) for kind, path in folders.items()})

    def write(kind, sources):
        for name, source in sources.items():
            file = folders[kind] / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(source if isinstance(source, bytes) else source.encode())

    return write


def words(topic, size=2000):
    """`size` characters on a topic."""
    return f"{topic} {'and ' * size}"[: size - 1] + "."


def module(topic, size=2000, code=""):
    return f"'{words(topic, size)}'\n{code}"


def test_packages_are_documents_by_name_and_run_nothing(site_packages):
    fit = "class {}:\n    def fit(self):\n        'Fit, as every model does.'\n"
    kept = {
        "two/__init__.py": module("two", code="raise SystemExit('imported')\n" + fit.format("Two")),
        "two/deep/er/m.py": "class C:\n    'The C.'\n    def fit(self):\n        'Its own.'\n",
        "two/a.py": "'Before deep.'\nx = 1\n",
        "one/__init__.py": module("one", code=fit.format("One") + fit.format("Again")),
        "one/again.py": module("one", code="def f():\n    'The f.'\n"),
        "six.py": module("six"),
    }
    left_out = {
        "one/tests/test_one.py": module("a test"),
        "test/__init__.py": module("a package of tests"),
        "one/_vendor/other.py": module("a copy of another package"),
        "one/__pycache__/old.py": module("a leftover"),
        "one-1.0.dist-info/license.py": module("no package"),
        "~ne/__init__.py": module("the remains of an upgrade"),
        "one/broken.py": module("a syntax error", code="def (:\n"),
        "one/latin.py": module("caf\xe9").encode("latin-1"),
        "one/null.py": module("a null byte", code="x = '\0'\n"),
        "one/notes.txt": module("not Python"),
        "one/folder.py/notes.txt": "a folder that is named like a module",
    }
    site_packages("purelib", left_out | kept)
    documents = data.corpus("packages", quiet=True).documents
    assert documents == (
        f"{words('one')}\n\nOne.fit\nFit, as every model does.\n\nf\nThe f.\n",
        f"{words('six')}\n",
        f"{words('two')}\n\nBefore deep.\n\nC\nThe C.\n\nC.fit\nIts own.\n",
    )
    assert data.corpus("packages", max_bytes=2500, quiet=True).documents == documents[:2]


def test_large_packages_are_divided_and_small_ones_left_out(site_packages):
    site_packages(
        "purelib",
        {
            "big/__init__.py": module("big"),
            "big/nn/__init__.py": module("big.nn", 600_000),
            "big/nn/modules/m.py": module("big.nn.modules", 300_000),
            "big/few/__init__.py": module("big.few", 1000),  # too little for a document of its own
            "big/optim/sgd.py": module("big.optim", 100_000),
            "big/solo.py": module("big.solo", 3000),
            # A newline ends each text: these are a million characters, the most that stays whole, ...
            "edge/a/m.py": module("edge.a", 499_999),
            "edge/b/m.py": module("edge.b", 499_999),
            "least.py": module("least", 1999),  # ... 2,000, the fewest that are kept, ...
            "less.py": module("less", 1998),  # ... and one fewer.
        },
    )
    assert [document.split("and")[0] for document in data.corpus("packages", quiet=True).documents] == [
        "big ", "big.nn ", "big.optim ", "edge.a ", "least "
    ]  # fmt: skip
    big, nn, optim, edge, least = data.corpus("packages", quiet=True).documents
    assert big == f"{words('big')}\n\n{words('big.solo', 3000)}\n"
    assert nn == f"{words('big.nn', 600_000)}\n\n{words('big.nn.modules', 300_000)}\n"
    assert edge == f"{words('edge.a', 499_999)}\n\n{words('edge.b', 499_999)}\n"


def test_packages_in_purelib_and_platlib(site_packages, monkeypatch, tmp_path):
    site_packages("purelib", {"pure.py": module("pure"), "both/a.py": module("a"), "both/c.py": module("c")})
    site_packages("platlib", {"plat.py": module("plat"), "both/b.py": module("b")})
    both = "\n".join(f"{words(letter)}\n" for letter in "abc")
    expected = (both, f"{words('plat')}\n", f"{words('pure')}\n")
    assert data.corpus("packages", quiet=True).documents == expected
    # Two names of one folder, as lib64 is of lib in many environments.
    (tmp_path / "lib64").symlink_to(tmp_path / "purelib")
    paths = {"purelib": str(tmp_path / "purelib"), "platlib": str(tmp_path / "lib64")}
    parsed = []
    monkeypatch.setattr(data.sysconfig, "get_paths", lambda: paths)
    monkeypatch.setattr(data, "_parse", lambda file, parse=data._parse: parsed.append(file.name) or parse(file))
    assert len(data.corpus("packages", quiet=True).documents) == 2 and parsed == ["a.py", "c.py", "pure.py"]


def test_packages_hold_what_utf8_can(site_packages):
    site_packages("purelib", {"half.py": f"'{words('half')} \\ud83d \xe9'"})
    loaded = data.corpus("packages", quiet=True)
    assert loaded.documents == (f"{words('half')} ? \xe9\n",) and loaded.n_bytes == 2006


def test_no_packages_is_an_error(site_packages, tmp_path):
    with pytest.raises(OSError, match=f"no packages in {tmp_path}/purelib or {tmp_path}/platlib"):
        data.corpus("packages")
    site_packages("purelib", {"tiny.py": "'Not much.'", "one-1.0.dist-info/METADATA": "Name: one"})
    with pytest.raises(ValueError, match="no text"):
        data.corpus("packages")


def test_installed_packages_are_english(capsys):
    """The first packages of this environment: all of them take half a minute."""
    loaded = data.corpus("packages", max_bytes=50_000)
    everything = "\n".join(loaded.documents)
    assert capsys.readouterr().out.startswith("corpus packages: ") and loaded.n_bytes >= 50_000
    assert everything.lower().count(" the ") > len(everything) / 1000  # words, not code


def test_parsing_leaves_garbage_collection_as_it_was(tmp_path):
    (tmp_path / "good.py").write_text("x = 1")
    (tmp_path / "bad.py").write_text("def (:")
    for switch, on in ((gc.disable, False), (gc.enable, True)):
        switch()
        try:
            found = [(data._parse(tmp_path / name) is not None, gc.isenabled()) for name in ("good.py", "bad.py")]
        finally:
            gc.enable()
        assert found == [(True, on), (False, on)]


def test_corpus_from_file_and_folder(tmp_path, capsys):
    for name, body in (("b.txt", "second"), ("a.txt", "first é"), ("notes.md", "not text")):
        (tmp_path / name).write_text(body, encoding="utf-8")
    folder = data.corpus(tmp_path)
    assert folder.documents == ("first é", "second") and folder.n_bytes == 14
    assert "2 documents, 14 bytes" in capsys.readouterr().out
    file = data.corpus(tmp_path / "a.txt", quiet=True)
    assert file.documents == ("first é",) and capsys.readouterr().out == ""
    (tmp_path / "many.txt").write_text("one\n\n\ntwo\n\n\n \n\n\nthree")
    many = data.corpus(tmp_path / "many.txt", separator="\n\n\n")
    assert many.documents == ("one", "two", "three")
    assert data.corpus(tmp_path, max_bytes=3, quiet=True).documents == ("first é",)
    assert data.Corpus("other", folder.documents) == folder != file  # equality is the text


def test_corpus_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="'wikitext-103', 'pile', 'offline', 'packages', or the path"):
        data.corpus("wikitext-104")
    with pytest.raises(ValueError, match=r"no \.txt"):
        data.corpus(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="no text"):
        data.corpus(tmp_path / "empty.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        data.corpus(tmp_path / "binary.txt")
    for options in ({"max_bytes": 0}, {"max_bytes": 1.5}, {"separator": ""}):
        with pytest.raises(ValueError, match=next(iter(options))):
            data.corpus(tmp_path / "empty.txt", **options)


def test_saved_corpus_is_loaded_and_verified(tmp_path):
    for i, article in enumerate(ARTICLES):
        (tmp_path / f"{i:02}.txt").write_text(article)
    model = data.LanguageModel(data.corpus(tmp_path, quiet=True), seq_len=32)
    saved = json.loads(json.dumps(model.to_dict()))
    assert len(json.dumps(saved)) < 1000  # the text itself is not in it
    assert data.Task.from_dict(saved) == model
    in_text = data.MultiNeedle(seq_len=64, vocab_size=300, haystack=model)
    assert data.Task.from_dict(json.loads(json.dumps(in_text.to_dict()))) == in_text
    (tmp_path / "00.txt").write_text("changed")
    with pytest.raises(ValueError, match="has changed"):
        data.Task.from_dict(saved)


def fake_hub(monkeypatch, rows, calls):
    def load_dataset(*names, **options):
        calls.append((names, options))
        yield from rows

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


def test_wikitext_lines_become_articles(monkeypatch, capsys):
    lines = ["", " = One = \n", " text of one \n", " = = Section = = \n", " more \n", " = Two = \n", " text of two \n"]
    calls = []
    fake_hub(monkeypatch, [{"text": line} for line in lines], calls)
    loaded = data.corpus("wikitext-103")
    assert [d.split("\n")[0] for d in loaded.documents] == [" = One = ", " = Two = "]
    assert "".join(loaded.documents) == "".join(lines)
    assert calls == [(("Salesforce/wikitext", "wikitext-103-raw-v1"), {"split": "train", "streaming": True})]
    assert "wikitext-103: 2 documents" in capsys.readouterr().out


def test_hub_stream_stops_at_max_bytes(monkeypatch):
    drawn = []

    def rows():
        for i in range(10**9):
            drawn.append(i)
            yield {"text": "x" * 100}

    fake_hub(monkeypatch, rows(), [])
    assert len(data.corpus("pile", max_bytes=450, quiet=True).documents) == 5 and len(drawn) == 5


def test_unreachable_hub_is_an_oserror(tmp_path):
    """The real clients, told to stay offline with an empty cache."""
    code = (
        "import data\n"
        "for load, name in ((data.corpus, 'wikitext-103'), (data.corpus, 'pile'), (data.tokenizer, 'gpt2')):\n"
        "    try:\n        load(name)\n    except OSError as error:\n        print(error)\n"
    )
    root = pathlib.Path(data.__file__).parent
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Salesforce/wikitext" in done.stdout and "EleutherAI/the_pile_deduplicated" in done.stdout
    assert done.stdout.count("'offline', 'packages' or the path") == 2 and "use 'bytes'" in done.stdout


# ------------------------------------------------------------------------------------------------ tokenizers


def train_bpe(path, *, eos="<|endoftext|>"):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[eos] if eos else [],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(ARTICLES, trainer)
    backend.save(str(path))
    return backend


def test_bytes():
    coder = data.tokenizer("bytes")
    assert coder.encode("hé\n") == [104, 195, 169, 10] and coder.decode([104, 195, 169, 10]) == "hé\n"
    assert coder.decode(torch.tensor([104, 255])) == "h\ufffd" and coder.vocab_size == 256
    assert coder.encode_documents(["a", "bc"]).tolist() == [97, 10, 98, 99]
    with pytest.raises(ValueError, match="256 is outside"):
        coder.decode([256])


def test_tokenizer_file(tmp_path):
    backend = train_bpe(tmp_path / "tokenizer.json")
    coder = data.tokenizer(tmp_path / "tokenizer.json")
    sample = "Article 3. word9 and Ünïcode"
    assert coder.decode(coder.encode(sample)) == sample and len(coder.encode("word9")) < 5
    assert coder.vocab_size == 300 and coder.end_of_text == backend.token_to_id("<|endoftext|>")
    joined = coder.encode_documents(["word1", "word2"]).tolist()
    assert joined == [*coder.encode("word1"), coder.end_of_text, *coder.encode("word2")]
    corpus = data.Corpus("articles", ARTICLES)
    model = data.LanguageModel(corpus, coder, seq_len=32)
    assert model.vocab_size == 300 and len(model.stream) < 0.7 * corpus.n_bytes
    batch = model.sample(4, generator())
    assert "word" in coder.decode(batch.tokens[0])
    assert torch.equal(pickle.loads(pickle.dumps(model)).sample(4, generator()).tokens, batch.tokens)
    with pytest.raises(ValueError, match="vocab_size = 299"):
        dataclasses.replace(model, vocab_size=299)
    with pytest.raises(ValueError, match="300 is outside"):
        coder.decode([300])


def test_tokenizer_without_end_of_text_joins_by_newline(tmp_path):
    train_bpe(tmp_path / "tokenizer.json", eos=None)
    coder = data.tokenizer(tmp_path / "tokenizer.json")
    assert coder.end_of_text is None
    assert coder.decode(coder.encode_documents(["word1", "word2"])) == "word1\nword2"


def test_vocabulary_is_the_highest_id_plus_one(tmp_path):
    """Ids with a gap and a token added after training: counting tokens would be too small."""
    train_bpe(tmp_path / "tokenizer.json")
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    last = max(saved["model"]["vocab"], key=saved["model"]["vocab"].get)
    saved["model"]["vocab"][last] = 340
    saved["added_tokens"].append({**saved["added_tokens"][0], "id": 301, "content": "<|late|>"})
    (tmp_path / "gaps.json").write_text(json.dumps(saved))
    coder = data.tokenizer(tmp_path / "gaps.json")
    assert coder.backend.get_vocab_size() < coder.vocab_size == 341


def test_tokenizer_settings_do_not_cut_the_text(tmp_path):
    backend = train_bpe(tmp_path / "tokenizer.json")
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "cutting.json"))
    coder = data.tokenizer(tmp_path / "cutting.json")
    assert coder.decode(coder.encode(ARTICLES[0])) == ARTICLES[0]
    assert coder.decode(coder.encode_documents(ARTICLES[:1])) == ARTICLES[0]


def test_tokenizer_that_loses_text_is_refused(tmp_path):
    one = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"<|endoftext|>": 0}, merges=[]))
    one.save(str(tmp_path / "one.json"))
    with pytest.raises(ValueError, match="with 1 ids it turns.*loses text"):
        data.tokenizer(tmp_path / "one.json")
    unknown = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "The": 1, "quick": 2}, unk_token="[UNK]"))
    unknown.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    unknown.save(str(tmp_path / "unknown.json"))
    with pytest.raises(ValueError, match="loses text"):
        data.tokenizer(tmp_path / "unknown.json")


def test_tokenizer_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such"):
        data.tokenizer(tmp_path / "none.json")
    (tmp_path / "corrupt.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match="corrupt.json"):
        data.tokenizer(tmp_path / "corrupt.json")


def test_saved_tokenizer_is_verified(tmp_path):
    train_bpe(tmp_path / "tokenizer.json")
    (tmp_path / "text").mkdir()
    for i, article in enumerate(ARTICLES):
        (tmp_path / "text" / f"{i:02}.txt").write_text(article)
    coder = data.tokenizer(tmp_path / "tokenizer.json")
    saved = data.LanguageModel(data.corpus(tmp_path / "text", quiet=True), coder, seq_len=32).to_dict()
    assert data.Task.from_dict(saved).tokenizer == coder
    train_bpe(tmp_path / "tokenizer.json", eos="</s>")
    with pytest.raises(ValueError, match="files have changed"):
        data.Task.from_dict(saved)


# ------------------------------------------------------------------------------------------------ test sets


def test_row_hashes_tell_rows_apart():
    rows = torch.randint(256, (2000, 16), generator=generator())
    hashes = data.row_hashes(rows)
    assert len(hashes.unique()) == 2000 and torch.equal(hashes, data.row_hashes(rows.clone()))
    every = torch.cartesian_prod(*[torch.arange(8)] * 5)  # all 32,768 rows, many alike but for two tokens
    assert len(data.row_hashes(every).unique()) == len(every)
    assert not torch.equal(data.row_hashes(rows), data.row_hashes(rows.flip(1)))


def test_test_set_excludes_training_rows_and_repeats():
    task = data.Echo(seq_len=6, vocab_size=7)  # 216 different rows
    train = task.sample(100, generator(0))
    seen = len(data.row_hashes(train).unique())
    test = data.test_set(task, 216 - seen, exclude=train)
    assert len(test.tokens) == len(data.row_hashes(test).unique()) == 216 - seen
    assert data.overlap(test, train) == 0
    assert len(data.row_hashes(torch.cat([test.tokens, train.tokens])).unique()) == 216
    assert accuracy(task.oracle(test), test) == (3 * (216 - seen), 3 * (216 - seen))
    with pytest.raises(ValueError, match="too few different rows"):
        data.test_set(task, 217 - seen, exclude=data.row_hashes(train))


def test_test_set_seed_is_not_a_training_seed():
    task = data.MultiNeedle()
    test = data.test_set(task, 500, seed=0)
    assert torch.equal(test.tokens, data.test_set(task, 500, seed=0).tokens)
    assert data.overlap(test, task.sample(500, generator(0))) == 0
    assert data.overlap(test, test) == 500 and data.overlap(test, data.test_set(task, 500, seed=1)) == 0
