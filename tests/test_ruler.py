"""RULER-style tasks: a second, plain reading of every row says what the answers are; chance, oracle and controls."""

import collections
import dataclasses
import json
import math
import pickle

import pytest
import torch
from scipy import stats
from test_data import ARTICLES, accuracy, generator, plausible

import data
import needles
import ruler
import tasks


def even(counts):
    return stats.chisquare(torch.as_tensor(counts).double().numpy()).pvalue > 1e-4


TEXT = data.LanguageModel(data.Corpus("articles", ARTICLES), seq_len=64)
NAMES = ["S1", "S2", "S3", "multi-key", "multi-value", "multi-query", "variable tracking", "common words"]

PLAIN = {
    **ruler.suite(256, 128),
    "passkey, odd": ruler.PassKey(seq_len=101, vocab_size=50, period=7, own_cue=True, depth=(0.2, 0.7)),
    "wide, cues": data.MultiNeedle(seq_len=97, n_needles=4, value_width=3, vocab_size=60),
    "wide, answers": data.MultiNeedle(seq_len=97, n_needles=4, value_width=3, layout="answers", vocab_size=60),
    "wide, tight": data.MultiNeedle(seq_len=33, n_needles=5, queries=2, value_width=4, vocab_size=60, n_markers=5),
    "wide, distance": data.MultiNeedle(seq_len=97, n_needles=4, value_width=3, distance=31),
    "wide, shared": data.SharedMarkerNeedles(value_width=2, context_width=2, layout="answers", vocab_size=80),
    "values, cues": ruler.MultiValue(seq_len=83, n_needles=3, layout="cues", value_width=2),
    "values, two of five": ruler.MultiValue(seq_len=64, n_needles=5, queries=2, needle_range=(20, 30)),
    "slots": data.SlotNeedles(seq_len=77, n_needles=6, n_slots=9, vocab_size=60),
    "slots, shown": data.SlotNeedles(
        seq_len=77, n_needles=6, queries=4, layout="answers", value_width=2, vocab_size=60
    ),
    "chains, no hop": ruler.VariableTracking(seq_len=65, n_needles=5, hops=0, layout="answers"),
    "chains, tight": ruler.VariableTracking(seq_len=41, n_needles=3, hops=3, n_names=12, layout="answers", queries=2),
    "one chain": ruler.VariableTracking(seq_len=90, n_needles=1, hops=6, depth=(0.1, 0.9), needle_range=(3, 13)),
    "words everywhere": ruler.CommonWords(seq_len=75, vocab_size=40, n_words=9, n_common=2, share=1.0),
    "two words": ruler.CommonWords(seq_len=33, n_words=2, n_common=1, depth=(0.25, 0.75)),
}
IN_TEXT = {f"{name}, text": task for name, task in ruler.suite(301, 320, TEXT).items() if name != "S1"}
EVERY = {**PLAIN, **IN_TEXT}
NEEDLES = {name: task for name, task in EVERY.items() if isinstance(task, data.NeedleTask)}
WORDS = {name: task for name, task in EVERY.items() if isinstance(task, data.CommonWords)}


@pytest.fixture(params=EVERY)
def task(request):
    return EVERY[request.param]


@pytest.fixture(params=NEEDLES)
def needle(request):
    return NEEDLES[request.param]


@pytest.fixture(params=WORDS)
def words(request):
    return WORDS[request.param]


# A plain reading of one row, position by position, that shares no code with the oracles.


def blocks(task, row):
    """(start, prefix, value) of every needle, or assignment, that stands before the tail."""
    w, end = task.value_width, task.seq_len - task.tail
    prefix = 1 if not isinstance(task, (data.SharedMarkerNeedles, data.VariableTracking)) else task.cue_width
    mark = {task.vocab_size - 1} if prefix > 1 else set(range(task.first_special, task.vocab_size))
    found = []
    for t in range(end):
        if row[t] in mark:
            found.append((t - prefix + 1, tuple(row[t - prefix + 1 : t + 1]), tuple(row[t + 1 : t + 1 + w])))
    return found


def solve(task, row):
    """(answers, sources, index) in the order of the scored positions; sources and index None for common words."""
    if isinstance(task, data.CommonWords):
        counts = collections.Counter(t for t in row[: task.seq_len - task.tail] if t >= task.first_special)
        return [word for word, _ in counts.most_common(task.n_common)], None, None
    found, tail, w = blocks(task, row), row[task.seq_len - task.tail :], task.value_width
    step = task.cue_width + (w if task.layout == "answers" else w - 1)
    answers, sources, index = [], [], []
    for i in range(task.n_queries):
        cue = tuple(tail[i * step : i * step + task.cue_width])
        if isinstance(task, data.MultiValue):
            assert cue == (task.first_special,)
            which = i
        elif isinstance(task, data.VariableTracking):
            name = cue[0]
            for _ in range(task.hops + 1):
                (which,) = [k for k, f in enumerate(found) if f[1][0] == name]  # exactly one assignment of each name
                name = found[which][2][0]
            assert name < task.first_special
        elif isinstance(task, data.SlotNeedles):
            assert {f[1] for f in found} == {(task.marker,)}
            which = cue[0] - (task.vocab_size - task.n_slots)
        elif getattr(task, "own_cue", False):
            assert cue == (task.cue,)
            which = 0
        else:
            (which,) = [k for k, f in enumerate(found) if f[1] == cue]
        start, prefix, value = found[which]
        if isinstance(task, data.VariableTracking):  # chains are numbered by where their values stand
            which = sum(f[2][0] < task.first_special for f in found[:which])
        answers += value
        sources += [start + len(prefix) + j for j in range(w)]
        index += [which] * w
        shown = tail[i * step + task.cue_width : (i + 1) * step]
        assert shown == list(value[: len(shown)])  # what is given as input is the truth
    return answers, sources, index


# ------------------------------------------------------------------------------------------------ every task


def test_rows_hold_what_they_ask(task):
    batch = task.sample(120, generator(1))
    assert batch.tokens.shape == batch.targets.shape == (120, task.seq_len)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert int(batch.tokens.min()) >= 0 and int(batch.tokens.max()) < task.vocab_size
    scored = [i for i, on in enumerate(batch.scored[0].tolist()) if on]
    assert len(scored) == task.scored_per_row and scored[-1] == task.seq_len - 1
    assert scored[0] >= task.seq_len - task.tail
    for r in range(120):
        assert batch.scored[r].nonzero().flatten().tolist() == scored
        answers, sources, index = solve(task, batch.tokens[r].tolist())
        assert batch.targets[r, scored].tolist() == answers
        if sources is not None:
            assert batch.info["distance"][r, scored].tolist() == [
                t - s - 1 for t, s in zip(scored, sources, strict=True)
            ]
            assert batch.info["index"][r, scored].tolist() == index
    for info in batch.info.values():
        assert (info[~batch.scored] == -1).all() and (info[batch.scored] >= 0).all()


def test_oracle_is_right_every_time(task):
    batch = task.sample(500, generator(2))
    predictions = task.oracle(batch)
    assert torch.equal(predictions != tasks.IGNORE, batch.scored)
    assert accuracy(predictions, batch) == (500 * task.scored_per_row,) * 2
    assert task.ceiling == 1.0 and task.floor == 0.0
    hidden = dataclasses.replace(batch, targets=torch.where(batch.scored, 0, tasks.IGNORE))
    assert torch.equal(task.oracle(hidden), predictions)


def test_same_generator_same_rows(task):
    a, b, c = task.sample(20, generator(3)), task.sample(20, generator(3)), task.sample(20, generator(4))
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets)
    assert a.info.keys() == b.info.keys() and all(torch.equal(a.info[k], b.info[k]) for k in a.info)
    assert not torch.equal(a.tokens, c.tokens) and not torch.equal(a.targets, c.targets)
    assert torch.equal(pickle.loads(pickle.dumps(task)).sample(20, generator(3)).tokens, a.tokens)


def test_uniform_guess_meets_the_chance_line(task):
    batch = task.sample(6000 // task.scored_per_row + 200, generator(5))
    if isinstance(task, data.CommonWords):  # a guess among the words that the tail has not shown
        lots = torch.rand(len(batch.tokens), task.n_common, task.n_words, generator=generator(6))
        for i in range(1, task.n_common):
            shown = batch.tokens[:, task.seq_len - task.n_common + 1 :][:, :i] - task.first_special
            lots[:, i].scatter_(1, shown, -1.0)
        guess = torch.zeros_like(batch.tokens)
        guess[:, -task.n_common :] = task.first_special + lots.argmax(dim=2)
    else:
        lo, hi = task.values
        answers = batch.targets[batch.scored]
        assert lo <= int(answers.min()) and int(answers.max()) < hi and math.isclose(task.chance, 1 / (hi - lo))
        guess = torch.randint(lo, hi, batch.tokens.shape, generator=generator(6))
    assert plausible(*accuracy(guess, batch), task.chance)


def test_removed_needle_falls_to_chance(task):
    removed = dataclasses.replace(task, remove_needle=True)
    n = max(300, 4000 // task.scored_per_row)
    whole, batch = task.sample(n, generator(7)), removed.sample(n, generator(7))
    assert torch.equal(whole.targets, batch.targets)
    predictions = task.oracle(batch)
    assert plausible(*accuracy(predictions, batch), task.chance)
    assert removed.ceiling == task.chance
    tail = slice(task.seq_len - task.tail, None)
    assert torch.equal(whole.tokens[:, tail], batch.tokens[:, tail])  # cues and what is shown stay
    if isinstance(task, data.NeedleTask):
        assert math.isclose(removed.floor, -math.log(task.chance))
        if not isinstance(task, data.MultiValue) or task.n_queries == task.n_needles:  # else the unasked ones are there
            assert (predictions[batch.scored] == task.values[0]).all()
        for r in range(50):  # what changed are the asked needles, marker and all
            mine = whole.scored[r].nonzero().flatten()
            sources = (mine - 1 - whole.info["distance"][r, mine]).tolist()
            asked = {p for s in sources[:: task.value_width] for p in range(s - task.cue_width, s + task.value_width)}
            differ = (whole.tokens[r] != batch.tokens[r]).nonzero().flatten().tolist()
            assert set(differ) <= asked
            gone = batch.tokens[r, torch.tensor(sorted(asked))]
            assert int(gone.max()) < task.first_special


@pytest.mark.parametrize("name", PLAIN)
def test_dictionary_round_trip(name):
    task = PLAIN[name]
    saved = json.loads(json.dumps(task.to_dict()))
    assert data.Task.from_dict(saved) == task == type(task).from_dict(saved)
    with pytest.raises(ValueError, match="unknown keys"):
        type(task).from_dict({**saved, "needles": 3})


def test_dictionaries_from_before_wide_values_still_load():
    saved = data.MultiNeedle(n_needles=3).to_dict()
    assert saved.pop("value_width") == 1
    assert data.Task.from_dict(saved) == data.MultiNeedle(n_needles=3)


def test_example_shows_the_row(task):
    shown, row = task.example(), task.sample(1, generator(0))
    assert max(map(len, shown.splitlines())) <= 100
    answers, _, _ = solve(task, row.tokens[0].tolist())
    lines = shown.splitlines()
    columns = [zip(*(line.split()[1:] for line in lines[i : i + 3]), strict=True) for i in _heads(lines)]
    read = {int(p): (int(token), target) for part in columns for p, token, target in part if p != "..."}
    assert all(int(row.tokens[0, p]) == token for p, (token, _) in read.items())
    assert [int(t) for _, t in read.values() if t != "."] == answers


def _heads(lines):
    return [i for i, line in enumerate(lines) if line.startswith("position")]


def test_the_door_shows_the_live_classes(monkeypatch):
    assert {"PassKey", "MultiValue", "VariableTracking", "CommonWords"} <= set(dir(data))
    assert data.VariableTracking is ruler.VariableTracking
    monkeypatch.setattr(ruler, "PassKey", "reloaded")
    assert data.PassKey == "reloaded"


# ------------------------------------------------------------------------------------------------ the haystack


def test_needles_do_not_overlap_and_fill_the_depth(needle):
    task = needle
    if task.distance is None and task.seq_len > 200:
        task = dataclasses.replace(task, depth=(0.25, 0.9))
    first, last = [], []
    for row in task.sample(150, generator(8)).tokens.tolist():
        found = blocks(task, row)
        assert len(found) == task.n_blocks
        starts = [start for start, _, _ in found]
        assert all(b - a >= task.needle_width for a, b in zip(starts, starts[1:], strict=False))
        first.append(starts[0])
        last.append(starts[-1] + task.needle_width)
    assert min(first) >= task.span[0] and max(last) <= task.span[1]
    if task.distance is None:  # and they come near both ends of where they may lie
        room = task.span[1] - task.span[0]
        assert min(first) - task.span[0] <= 0.1 * room and task.span[1] - max(last) <= 0.1 * room


@pytest.mark.parametrize("name", IN_TEXT)
def test_text_is_intact_around_what_is_written(name):
    task = IN_TEXT[name]
    stored, written = TEXT.tokenizer.decode(TEXT.stream), []
    for row in task.sample(40, generator(9)).tokens[:, : task.seq_len - task.tail].tolist():
        if isinstance(task, data.CommonWords):
            hidden = {t for t, token in enumerate(row) if token >= task.first_special}
        else:
            hidden = {t for start, _, _ in blocks(task, row) for t in range(start, start + task.needle_width)}
        pieces, piece = [], ""
        for t, token in enumerate([*row, None]):
            if token is None or t in hidden:
                pieces, piece = [*pieces, piece], ""
            else:
                piece += chr(token)
        assert all(piece in stored for piece in pieces)
        written.append(len(hidden))
    total = sum(task.counts) if isinstance(task, data.CommonWords) else task.n_blocks * task.needle_width
    assert set(written) == {total}


def test_random_haystack_keeps_to_its_range(task):
    if task.haystack is not None or isinstance(task, ruler.PassKey):
        return
    part = dataclasses.replace(task, haystack_range=(2, 5))
    found = set()
    for row in part.sample(40, generator(10)).tokens[:, : part.seq_len - part.tail].tolist():
        if isinstance(part, data.NeedleTask):
            for start, _, _ in blocks(part, row):
                row[start : start + part.needle_width] = [part.first_special] * part.needle_width
        found |= {token for token in row if token < part.first_special}
    assert found <= {2, 3, 4} and (found or part.needle_width * part.n_blocks + part.tail == part.seq_len)


# ------------------------------------------------------------------------------------------------ the suite


@pytest.mark.parametrize("haystack,vocab_size", [(None, 64), (None, 8192), (TEXT, 289)])
def test_suite(haystack, vocab_size):
    short = ruler.suite(256, vocab_size, haystack)
    assert list(short) == NAMES
    assert {name for name, t in short.items() if t.haystack is not None} == (set(NAMES[1:]) if haystack else set())
    for length in (257, 1003, 65_536):
        longer = ruler.suite(length, vocab_size, haystack)
        assert longer == {name: dataclasses.replace(t, seq_len=length) for name, t in short.items()}
    for name, t in longer.items():
        if haystack is None or name == "S1":  # the text is shorter than that
            batch = t.sample(2, generator(11))
            assert batch.tokens.shape == (2, 65_536)
            assert accuracy(t.oracle(batch), batch) == (2 * t.scored_per_row,) * 2
    scored = {name: t.scored_per_row for name, t in short.items()}
    assert list(scored.values()) == [1, 1, 8, 1, 4, 4, 1, 3]
    assert [t.tail for t in short.values()] == [1, 1, 8, 1, 7, 7, 2, 3]  # several answers: the true ones are shown
    assert all(t.chance < 0.07 for t in short.values())


def test_suite_says_what_does_not_fit():
    with pytest.raises(ValueError, match=r"VariableTracking\.vocab_size = 33"):
        ruler.suite(256, 33)
    with pytest.raises(ValueError, match=r"VariableTracking\.vocab_size = 288.*289"):
        ruler.suite(256, 288, TEXT)
    with pytest.raises(ValueError, match=r"\.seq_len = 40"):
        ruler.suite(40, 320)
    with pytest.raises(ValueError, match=r"SingleNeedle\.haystack"):
        ruler.suite(256, 320, data.Echo())


def test_suite_tasks_mix():
    parts = tuple(ruler.suite(256, 320).values())
    mix = data.Mixture(tasks=parts, shares=(1 / 8,) * 8)
    batch = mix.sample(64, generator(12))
    assert accuracy(mix.oracle(batch), batch) == (8 * 23, 8 * 23)
    assert mix.chance == pytest.approx(sum(t.chance * t.scored_per_row for t in parts) / 23)


# ------------------------------------------------------------------------------------------------ values of several tokens


def test_wide_value_row():
    task = data.SingleNeedle(seq_len=20, vocab_size=30, value_width=3)
    batch = task.sample(50, generator(13))
    for row, target in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        at = row.index(29)
        value = row[at + 1 : at + 4]
        assert row[17:] == [29, *value[:2]] and target == [tasks.IGNORE] * 17 + value


@pytest.mark.parametrize("distance", [2, 3, 40, 92])
def test_wide_value_at_a_distance(distance):
    task = data.SingleNeedle(seq_len=99, value_width=3, distance=distance)
    batch = task.sample(30, generator(14))
    assert (batch.info["distance"][:, -3:] == distance).all()
    assert torch.equal(batch.tokens[:, 95 - distance : 98 - distance], batch.targets[:, -3:])
    assert accuracy(task.oracle(batch), batch) == (90, 90)
    for wrong in (1, 95):  # inside the cue; before the row
        with pytest.raises(ValueError, match="distance = "):
            dataclasses.replace(task, distance=wrong)


def test_wide_values_are_fresh_at_every_token():
    task = data.SingleNeedle(seq_len=32, vocab_size=32, value_width=3, needle_range=(4, 8))
    values = task.sample(20_000, generator(15)).targets[:, -3:] - 4
    assert even(torch.bincount((values * torch.tensor([16, 4, 1])).sum(dim=1), minlength=64))


def test_chance_unbound_with_answers_shown():
    """A guess among those values of the row that are not shown yet."""
    task = data.MultiNeedle(needle_range=(0, 10), layout="answers", queries=4)
    batch = task.sample(6000, generator(16))
    scored = tasks.scored_positions(batch)
    answers = batch.targets.gather(1, scored)
    values = torch.tensor([[value[0] for _, _, value in blocks(task, row)] for row in batch.tokens.tolist()])
    left = values.clone()
    lots, right = torch.rand(6000, 4, 5, generator=generator(17)), 0
    for i in range(4):
        guess = left.gather(1, (lots[:, i] * (left >= 0)).argmax(dim=1, keepdim=True))
        right += int((guess[:, 0] == answers[:, i]).sum())
        # One value that equals the answer is shown by now.
        left.scatter_(1, (left == answers[:, i : i + 1]).int().argmax(dim=1, keepdim=True), -1)
    assert abs(right / 24_000 - task.chance_unbound) < 0.015
    assert task.chance_unbound > dataclasses.replace(task, layout="cues").chance_unbound + 0.1


# ------------------------------------------------------------------------------------------------ passkey, values


def test_passkey_sentence():
    task = ruler.PassKey(seq_len=100, period=7, vocab_size=64)
    rows = dataclasses.replace(task, remove_needle=True).sample(30, generator(18)).tokens[:, :99]
    assert (rows[:, 7:] == rows[:, :-7]).all() and (rows == rows[0]).all() and int(rows.max()) < 63
    assert len(rows[0, :7].unique()) > 1
    whole = task.sample(30, generator(18)).tokens[:, :99]
    assert ((whole != rows).sum(dim=1) <= 2).all() and (whole != rows).any(dim=1).all()
    longer = dataclasses.replace(task, seq_len=300, remove_needle=True).sample(1, generator(19)).tokens
    assert torch.equal(longer[0, :99], rows[0])  # the same sentence at any length


def test_values_are_asked_in_order_of_position():
    for layout, tail in (("answers", 7), ("cues", 4)):
        task = ruler.MultiValue(seq_len=50, vocab_size=40, n_needles=4, layout=layout)
        assert task.tail == tail
        batch = task.sample(40, generator(20))
        for row, target in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
            values = [row[t + 1] for t in range(50 - tail) if row[t] == 39]
            if layout == "answers":
                assert row[-7:] == [39, values[0], 39, values[1], 39, values[2], 39]
            else:
                assert row[-4:] == [39] * 4
            assert [t for t in target if t >= 0] == values


# ------------------------------------------------------------------------------------------------ variable tracking


def test_chain_row():
    """hops = 2, one chain: x = v, y = x, z = y, in order, then z = at the end."""
    task = ruler.VariableTracking(seq_len=14, vocab_size=20, n_needles=1, hops=2, n_names=3)
    assert (task.first_special, task.assign, task.tail) == (16, 19, 2)
    seen = set()
    for row, target in _rows(task.sample(60, generator(21))):
        (a, x, v), (b, y, x2), (c, z, y2) = ((t, row[t - 1], row[t + 1]) for t in range(12) if row[t] == 19)
        assert a < b < c and x2 == x and y2 == y and sorted((x, y, z)) == [16, 17, 18] and v < 16
        assert row[-2:] == [z, 19] and target[-1] == v
        seen.add((x, y, z))
    assert len(seen) == 6  # names come in any order


def _rows(batch):
    return zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True)


def test_chains_mix_in_every_way():
    task = ruler.VariableTracking(seq_len=30, vocab_size=64, n_needles=2, hops=1)
    ways = collections.Counter()
    for row in task.sample(3000, generator(22)).tokens.tolist():
        owner, way = {}, []
        for _, (name, _), (right,) in blocks(task, row):
            # A hop belongs to the chain of the name before, which must have been assigned by now.
            owner[name] = len(set(owner.values())) if right < task.first_special else owner[right]
            way.append(owner[name])
        ways[tuple(way)] += 1
    assert set(ways) == {(0, 0, 1, 1), (0, 1, 0, 1), (0, 1, 1, 0)} and even(list(ways.values()))


def test_chains_are_asked_equally_often_and_names_hold_no_hint():
    task = ruler.VariableTracking(seq_len=80, n_needles=4, hops=2, queries=1, n_names=16)
    batch = task.sample(4000, generator(23))
    assert even(torch.bincount(batch.info["index"][:, -1], minlength=4))
    assert even(torch.bincount(batch.tokens[:, -2] - task.first_special, minlength=16))
    assert even(torch.bincount(batch.targets[:, -1], minlength=task.first_special))


@pytest.mark.parametrize("n_needles,hops,share", [(4, 4, 0.28), (2, 1, 2 / 3)])
def test_matching_ranks_finds_as_many_as_the_docstring_says(n_needles, hops, share):
    task = ruler.VariableTracking(seq_len=150, n_needles=n_needles, hops=hops)
    right = total = 0
    for row in task.sample(1500, generator(24)).tokens.tolist():
        assignments = {name: after for _, (name, _), (after,) in blocks(task, row)}  # in order of position
        values = [after for after in assignments.values() if after < task.first_special]
        ends = [name for name in assignments if name not in assignments.values()]
        for value, end in zip(values, ends, strict=True):
            for _ in range(hops + 1):
                end = assignments[end]
            right += end == value
            total += 1
    assert abs(right / total - share) < 0.02


def test_a_chain_without_its_value_keeps_its_hops():
    task = ruler.VariableTracking(seq_len=120, n_needles=3, hops=3, queries=1)
    removed = dataclasses.replace(task, remove_needle=True)
    for row in removed.sample(50, generator(25)).tokens.tolist():
        found = blocks(removed, row)
        assert len(found) == task.n_blocks - 1
        assert sum(right < task.first_special for _, _, (right,) in found) == 2


def test_example_lists_the_assignments():
    task = ruler.VariableTracking(seq_len=60, n_needles=2, hops=1)
    row = task.sample(1, generator(0)).tokens[0].tolist()
    expected = " ".join(f"{name}={right}" for _, (name, _), (right,) in blocks(task, row))
    assert task.example().splitlines()[-1] == f"assignments {expected}"


# ------------------------------------------------------------------------------------------------ common words


def test_words_are_counted_out(words):
    k, r = words.n_common, words.rare_count
    assert words.counts == (*(r * (k + 1 - i) for i in range(k)), *[r] * (words.n_words - k)) and r >= 1
    lo, hi = words.span
    room = math.floor(words.share * (hi - lo))
    assert room - sum(words.counts) < sum(words.counts) / r  # no further r fits
    batch = words.sample(80, generator(26))
    for row in batch.tokens.tolist():
        at = [t for t in range(words.seq_len - k) if row[t] >= words.first_special]
        counts = collections.Counter(row[t] for t in at)
        assert sorted(counts.values(), reverse=True) == list(words.counts) and words.cue not in counts
        assert lo <= min(at) and max(at) < hi
        ranked = [word for word, _ in counts.most_common(k)]
        assert row[-k:] == [words.cue, *ranked[:-1]]
    assert (batch.info["index"][:, -k:] == torch.arange(k)).all() and "distance" not in batch.info


def test_every_word_is_common_equally_often_and_anywhere():
    task = ruler.CommonWords(seq_len=64, vocab_size=64, n_words=6, n_common=2)
    batch = task.sample(6000, generator(27))
    pairs = (batch.targets[:, -2:] - task.first_special) @ torch.tensor([6, 1])
    counts = torch.bincount(pairs, minlength=36)
    assert even(counts[counts > 0]) and int((counts > 0).sum()) == 30  # ordered pairs of different words
    common = (batch.tokens == batch.targets[:, -2:-1])[:, :62]
    # The words of a row take their places without replacement, which makes counts evener than independent ones.
    assert even(common.sum(dim=0))


def test_levelled_words_leave_no_trace_of_the_answer():
    task = ruler.CommonWords(seq_len=101, vocab_size=64, n_words=8, n_common=3, remove_needle=True)
    batch = task.sample(3000, generator(28))
    text = batch.tokens[:, :98]
    for word in range(task.first_special, task.cue):
        assert ((text == word).sum(dim=1) == task.rare_count).all()
    for i in range(-3, 0):  # those that stayed lie anywhere, as those of the other words do
        assert even((text == batch.targets[:, i, None]).sum(dim=0))
    assert task.ceiling == task.chance == pytest.approx((1 / 8 + 1 / 7 + 1 / 6) / 3)
    assert task.floor == pytest.approx((math.log(8) + math.log(7) + math.log(6)) / 3)
    # A uniform guess among the words not shown has exactly that loss, and less is impossible: all are equally likely.
    assert task.floor > -math.log(task.chance)


def test_example_lists_the_counts():
    task = ruler.CommonWords(seq_len=40, vocab_size=64, n_words=3, n_common=1)
    row = task.sample(1, generator(0)).tokens[0, :39].tolist()
    listed = dict(map(int, entry.split(":")) for entry in task.example().splitlines()[-1].split()[1:])
    assert listed == {word: row.count(word) for word in (60, 61, 62)} and sorted(listed.values()) == [4, 4, 8]


# ------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    "build,field",
    [
        (lambda: ruler.PassKey(period=0), "period"),
        (lambda: ruler.PassKey(haystack=TEXT, vocab_size=300), "haystack"),
        (lambda: ruler.PassKey(n_needles=2), "n_needles"),
        (lambda: data.SingleNeedle(value_width=0), "value_width"),
        (lambda: data.SingleNeedle(value_width=2.0), "value_width"),
        (lambda: data.SingleNeedle(seq_len=12, value_width=6), "seq_len"),
        (lambda: data.MultiNeedle(seq_len=60, value_width=8), "seq_len"),
        (lambda: ruler.MultiValue(queries=5), "queries"),
        (lambda: ruler.MultiValue(queries=1, distance=40), "distance"),
        (lambda: ruler.MultiValue(seq_len=14), "seq_len"),
        (lambda: ruler.MultiValue(needle_range=(0, 256)), "needle_range"),
        (lambda: ruler.VariableTracking(hops=-1), "hops"),
        (lambda: ruler.VariableTracking(hops=True), "hops"),
        (lambda: ruler.VariableTracking(n_names=19), "n_names"),
        (lambda: ruler.VariableTracking(value_width=2), "value_width"),
        (lambda: ruler.VariableTracking(queries=1, distance=40), "distance"),
        (lambda: ruler.VariableTracking(queries=5), "queries"),
        (lambda: ruler.VariableTracking(seq_len=67), "seq_len"),
        (lambda: ruler.VariableTracking(vocab_size=33), "vocab_size"),
        (lambda: ruler.VariableTracking(haystack_range=(0, 224)), "haystack_range"),
        (lambda: ruler.CommonWords(n_common=16), "n_common"),
        (lambda: ruler.CommonWords(n_common=0), "n_common"),
        (lambda: ruler.CommonWords(share=0.0), "share"),
        (lambda: ruler.CommonWords(share=1.5), "share"),
        (lambda: ruler.CommonWords(seq_len=46), "seq_len"),
        (lambda: ruler.CommonWords(vocab_size=17), "vocab_size"),
        (lambda: ruler.CommonWords(depth=(0.5, 0.4)), "depth"),
        (lambda: ruler.CommonWords(haystack=TEXT, vocab_size=272), "vocab_size"),
    ],
)
def test_contradictory_settings_name_the_field(build, field):
    with pytest.raises(ValueError, match=rf"\.{field} = "):
        build()


@pytest.mark.parametrize(
    "task",
    [
        ruler.VariableTracking(seq_len=68),
        ruler.MultiValue(seq_len=15),
        ruler.CommonWords(seq_len=47),
        ruler.VariableTracking(vocab_size=34),
        data.MultiNeedle(seq_len=85, value_width=8, queries=5),
    ],
)
def test_the_smallest_that_fits_works(task):
    batch = task.sample(100, generator(29))
    assert accuracy(task.oracle(batch), batch) == (100 * task.scored_per_row,) * 2


def test_the_base_is_no_task():
    for name in ("HaystackTask", "NeedleTask"):
        assert hasattr(needles, name)
        with pytest.raises(ValueError, match="choose one of"):
            data.Task.from_dict({"task": name})
