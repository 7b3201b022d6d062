"""Cyclic words: the twenty definitions written out, epochs, what is left out and who notices."""

import collections
import dataclasses
import json
import pickle
import types

import pytest
import torch
from test_addition import X
from test_data import accuracy, generator, plausible
from torch import nn

import answers
import audit
import cyclic
import data
import tasks

DEFAULT = cyclic.CyclicWords()
SOURCE = cyclic.CyclicWords(left_out=cyclic.MISSING)
TASKS = {
    "twenty": DEFAULT,
    "source": SOURCE,
    "source, the others": dataclasses.replace(SOURCE, split="left_out"),
    "source, all": dataclasses.replace(SOURCE, split="all"),
    "one letter left out": cyclic.CyclicWords(left_out=("c",)),
    "seven letters": cyclic.CyclicWords(letters="abcdefg", length=11, left_out=("ga", "b", "ff")),
}
EXPECTED = {
    "a": "aaaaaaaa", "b": "bbbbbbbb", "c": "cccccccc", "d": "dddddddd",
    "aa": "aaaaaaaa", "ab": "abababab", "ac": "acacacac", "ad": "adadadad",
    "ba": "babababa", "bb": "bbbbbbbb", "bc": "bcbcbcbc", "bd": "bdbdbdbd",
    "ca": "cacacaca", "cb": "cbcbcbcb", "cc": "cccccccc", "cd": "cdcdcdcd",
    "da": "dadadada", "db": "dbdbdbdb", "dc": "dcdcdcdc", "dd": "dddddddd",
}  # fmt: skip


@pytest.fixture(params=TASKS)
def task(request):
    return TASKS[request.param]


def read(task, tokens, targets):
    """(word, answer) of a row of ids, by position."""
    signs = {**dict(enumerate(task.letters)), len(task.letters): "=", len(task.letters) + 1: "_"}
    text = [signs[i] for i in tokens[:3]]
    assert text[2] == "=" and "_" not in text[1:]
    return "".join(text[:2]).replace("_", ""), "".join(signs[i] for i in targets[2:])


def test_rows_written_by_hand():
    batch = DEFAULT.encode(["ab", "c"])
    assert batch.tokens.tolist() == [[0, 1, 4, 0, 1, 0, 1, 0, 1, 0], [5, 2, 4, 2, 2, 2, 2, 2, 2, 2]]
    assert batch.targets.tolist() == [[X, X, 0, 1, 0, 1, 0, 1, 0, 1], [X, X, 2, 2, 2, 2, 2, 2, 2, 2]]
    assert (DEFAULT.vocab_size, DEFAULT.seq_len, DEFAULT.answer_len) == (6, 10, 8)


def test_the_twenty_words_and_what_is_expected():
    table = DEFAULT.table()
    assert dict(zip(table["input"], table["expected"], strict=True)) == EXPECTED
    assert tuple(table["input"]) == tuple(EXPECTED) == DEFAULT.universe == DEFAULT.words
    assert table["trained"].all() and list(SOURCE.table().query("not trained")["input"]) == ["ac", "bd", "ca", "db"]


def test_rows_hold_a_word_and_its_answer(task):
    batch = task.sample(300, generator(1))
    assert batch.tokens.shape == (300, task.seq_len) and batch.tokens.dtype == torch.int64
    assert (batch.scored.sum(dim=1) == task.scored_per_row).all() and task.scored_per_row == task.length
    seen = []
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        word, answer = read(task, tokens, targets)
        assert answer == "".join(word[i % len(word)] for i in range(task.length))
        assert tokens[3:] == targets[2:-1]  # the true characters before each are given
        seen.append(word)
    assert seen == task.asked(batch) and set(seen) == set(task.words)


def test_splits_make_up_the_universe(task):
    parts = {split: dataclasses.replace(task, split=split) for split in ("train", "all")}
    left = dataclasses.replace(task, split="left_out").words if task.left_out else ()
    assert set(left) == set(task.left_out) and not set(left) & set(parts["train"].words)
    assert sorted([*left, *parts["train"].words]) == sorted(parts["all"].words) == sorted(task.universe)
    assert len(task.universe) == len(task.letters) * (1 + len(task.letters))


def test_a_batch_of_all_words_is_an_epoch(task):
    k = len(task.words)
    first, second = (task.asked(task.sample(k, generator(seed))) for seed in (2, 3))
    assert sorted(first) == sorted(second) == sorted(task.words)
    assert k < 10 or (first != second and first != list(task.words))
    counts = collections.Counter(task.asked(task.sample(3 * k + k // 2, generator(4))))
    assert {counts[word] for word in task.words} == ({3, 4} if k > 1 else {3})
    part = task.asked(task.sample(max(1, k - 1), generator(5)))
    assert len(set(part)) == len(part)


def test_every_word_may_come_first():
    firsts = [SOURCE.asked(SOURCE.sample(1, generator(seed)))[0] for seed in range(800)]
    counts = collections.Counter(firsts)
    assert set(counts) == set(SOURCE.words) and max(counts.values()) < 3 * min(counts.values())


def test_oracle_is_right_every_time(task):
    batch = task.sample(200, generator(6))
    predictions = task.oracle(batch)
    assert torch.equal(predictions, batch.targets) and task.whole(predictions, batch).all()
    blind = tasks.Batch(batch.tokens.clone(), torch.where(batch.scored, 0, X))
    blind.tokens[:, 3:] = 0
    assert torch.equal(task.oracle(blind), predictions)
    assert task.ceiling == 1.0 and task.floor == 0.0


def test_uniform_guess_meets_the_chance_lines():
    batch = DEFAULT.sample(4000, generator(7))
    guess = torch.randint(4, batch.tokens.shape, generator=generator(8))
    assert plausible(*accuracy(guess, batch), DEFAULT.chance) and DEFAULT.chance == 0.25
    assert DEFAULT.chance_whole == 4.0**-8
    short = cyclic.CyclicWords(length=2)
    batch = short.sample(4000, generator(9))
    assert plausible(int(short.whole(guess[:, :4], batch).sum()), 4000, short.chance_whole)


def test_same_generator_same_rows_and_dictionary_round_trip(task):
    a, b = task.sample(50, generator(10)), pickle.loads(pickle.dumps(task)).sample(50, generator(10))
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets)
    saved = json.loads(json.dumps(task.to_dict()))
    assert data.Task.from_dict(saved) == task
    with pytest.raises(ValueError, match="unknown keys"):
        data.Task.from_dict({**saved, "words": 3})


def test_a_caller_that_writes_into_a_batch_changes_no_later_one():
    before = DEFAULT.sample(20, generator(11))
    kept = before.tokens.clone()
    before.tokens.zero_()
    assert torch.equal(DEFAULT.sample(20, generator(11)).tokens, kept)


# ------------------------------------------------------------------------------------------------ coverage


def test_the_words_that_training_lacks_are_named():
    """The control that would have told the source's author before the first epoch."""
    batches = [SOURCE.sample(16, generator(seed)) for seed in range(3)]
    assert SOURCE.lacking(*batches) == ("ac", "bd", "ca", "db")
    # It reads the rows: a task that says it has every word does not hide what its rows lack.
    assert DEFAULT.lacking(*batches) == ("ac", "bd", "ca", "db")
    assert DEFAULT.lacking(DEFAULT.sample(20, generator())) == ()
    assert DEFAULT.lacking(DEFAULT.encode(["a", "db"])) == tuple(w for w in EXPECTED if w not in ("a", "db"))


def test_audit_fires_on_the_sources_data_set_and_on_no_whole_one():
    batch = SOURCE.sample(16, generator(12))
    told = audit.universe(SOURCE.asked(batch), SOURCE.left_out, SOURCE.universe)
    assert told["ok"].all()
    silent = audit.universe(SOURCE.asked(batch)[:14], SOURCE.asked(batch)[14:], SOURCE.universe).set_index("items")
    assert silent["which"]["missing: in neither"] == "ac, bd, ca, db" and not silent["ok"]["missing: in neither"]


# ------------------------------------------------------------------------------------------------ what a model writes


class Speller(nn.Module):
    """Repeats the word, but for some that it takes for others: word -> the word whose answer it writes."""

    def __init__(self, task, taken=()):
        super().__init__()
        self.task, self.taken = task, dict(taken)

    def forward(self, tokens):
        words = self.task.asked(tasks.Batch(tokens, tokens))
        known = self.task.encode([self.taken.get(word, word) for word in words])
        following = known.targets[:, : tokens.shape[1]].clamp_min(0)
        return types.SimpleNamespace(logits=nn.functional.one_hot(following, self.task.vocab_size).float())


def test_table_of_expected_and_produced_words():
    taken = {"ac": "bc", "bd": "ba", "a": "d"}
    every = SOURCE.encode(SOURCE.universe)
    model = Speller(SOURCE, taken)
    table = SOURCE.table(answers.decode(model, SOURCE.prompts(every), SOURCE.answer_len)).set_index("input")
    assert list(table.index) == list(EXPECTED) and list(table.columns) == ["expected", "trained", "produced", "right"]
    assert table["produced"].to_dict() == {word: EXPECTED[taken.get(word, word)] for word in EXPECTED}
    assert list(table.query("not right").index) == ["a", "ac", "bd"]
    assert answers.exact(model, SOURCE, every).tolist() == table["right"].tolist()
    assert table.query("not trained")["right"].tolist() == [False, False, True, True]


def test_ids_of_no_letter_are_shown():
    written = torch.zeros(20, 8, dtype=torch.int64)
    written[0, :3] = torch.tensor([4, 5, 6])
    table = DEFAULT.table(written)
    assert table["produced"][0] == "=_?aaaaa" and not table["right"][0] and table["right"].sum() == 1


def test_example_shows_both_kinds_of_word(task):
    first, second, *columns = task.example().splitlines()
    assert first.split() == ["text", "_a=", "a" * task.length]
    assert second.split() == ["text", "ab=", ("ab" * task.length)[: task.length]]
    row = task.sample(1, generator(0))
    shown = [int(t) for t in columns[2].split()[1:] if t not in (".", "...")]
    assert shown == task.answers(row.targets)[0].tolist()


def test_the_door_shows_the_live_class(monkeypatch):
    assert "CyclicWords" in dir(data) and data.CyclicWords is cyclic.CyclicWords
    monkeypatch.setattr(cyclic, "CyclicWords", "reloaded")
    assert data.CyclicWords == "reloaded"


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "settings,field,why",
    [
        (dict(letters="a"), "letters", "two or more"),
        (dict(letters="aba"), "letters", "different"),
        (dict(letters="ab="), "letters", "none of them"),
        (dict(letters=4), "letters", "a string"),
        (dict(length=0), "length", "at least 1"),
        (dict(left_out=("ac", "xy", "abc")), "left_out", r"\['xy', 'abc'\] are not among the words"),
        (dict(left_out=["ac"]), "left_out", "a tuple"),
        (dict(left_out=(["ac"],)), "left_out", "a tuple"),
        (dict(left_out=("ac", "ac")), "left_out", "different words"),
        (dict(left_out=DEFAULT.universe), "left_out", "no word to train on"),
        (dict(left_out=("e",)), "left_out", "not among"),
        (dict(split="test"), "split", "choose one of"),
        (dict(split="left_out"), "split", "is empty"),
    ],
)
def test_contradictory_settings_name_the_field(settings, field, why):
    with pytest.raises(ValueError, match=rf"CyclicWords\.{field} = .*{why}"):
        cyclic.CyclicWords(**settings)


def test_bad_input_says_what_would_do():
    for words, named in ((["ab", "xy"], "xy"), ([], "none"), ("abc", "abc"), ([""], "''")):
        with pytest.raises(ValueError, match=f"words: .*{named}.*needs words of one or two of 'abcd'"):
            DEFAULT.encode(words)
    assert torch.equal(DEFAULT.encode("ab").tokens, DEFAULT.encode(["ab"]).tokens)
    with pytest.raises(ValueError, match=r"written: shape \[3, 8\], needs \[20, 8\]"):
        DEFAULT.table(torch.zeros(3, 8, dtype=torch.int64))
