"""Cyclic words: one or two letters, written over and over until there are eight characters.

    task = cyclic.CyclicWords(left_out=cyclic.MISSING)                  # trains on 16 words; ac, bd, ca and db are kept back
    rest = dataclasses.replace(task, split="left_out")                  # those four
    batch = task.sample(len(task.words), generator)                     # every word once, in random order: an epoch
    task.lacking(batch)                                                 # ('ac', 'bd', 'ca', 'db')
    asked = task.prompts(task.encode(task.universe))                    # all twenty
    task.table(answers.decode(model, asked, task.answer_len))           # expected and produced, word by word

Source: notes of experiments on rotating V as well as Q and K, whose data set lacked the definitions of four words; those
four were its errors. audit.universe(task.asked(batch), task.left_out, task.universe) tells that before any training.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

import answers
import tasks

MISSING = ("ac", "bd", "ca", "db")  # what the source's data set lacked, by an oversight

SPLITS = ("train", "left_out", "all")
ASK, PAD = "=", "_"


@dataclass(frozen=True, kw_only=True)
class CyclicWords(answers.AnswerTask):
    """A word of one or two letters, a mark that asks, and the word repeated up to `length` characters, each one scored.

        a b = a b a b a b a b        _ a = a a a a a a a a

    Ids: the letters in order, then the mark `=`, then the blank `_` that fills the place in front of a single letter, so
    that every question has three tokens and the answer stands at the same positions for every word.

    A batch goes through the words of the split in rounds, each one all of them in a new random order. So a batch of as many
    rows as there are words is an epoch, and no word is ever seen more than once oftener than another.
    letters: the alphabet; with four, the universe is the source's twenty words.
    left_out: words kept from training.
    split: "train" (all but those), "left_out" (those) or "all".
    """

    letters: str = "abcd"
    length: int = 8
    left_out: tuple[str, ...] = ()
    split: str = "train"

    def validate(self):
        self.require_positive("length")
        letters = self.letters
        ok = len(letters) > 1 and len(set(letters)) == len(letters) and not {ASK, PAD} & set(letters)
        self.require(ok, "letters", f"needs two or more different characters, none of them {ASK!r} or {PAD!r}")
        ok = isinstance(self.left_out, tuple) and all(isinstance(word, str) for word in self.left_out)
        ok = ok and len(set(self.left_out)) == len(self.left_out)
        self.require(ok, "left_out", "needs a tuple of different words")
        unknown = [word for word in self.left_out if word not in self.universe]
        why = f"{unknown} are not among the words of one or two of {letters!r}"
        self.require(not unknown, "left_out", why)
        self.require(len(self.left_out) < len(self.universe), "left_out", "leaves no word to train on")
        self.require_choice("split", SPLITS)
        why = "is empty: name the words to keep from training in left_out"
        self.require(self.split != "left_out" or len(self.left_out) > 0, "split", why)

    @property
    def universe(self) -> tuple[str, ...]:
        """Every word: the letters, then all pairs of them, in order."""
        pairs = itertools.product(self.letters, repeat=2)
        return (*self.letters, *map("".join, pairs))

    @property
    def words(self) -> tuple[str, ...]:
        """The words of this split, in the order of the universe."""
        kept = {"train": False, "left_out": True}.get(self.split)
        return tuple(word for word in self.universe if kept is None or (word in self.left_out) == kept)

    @property
    def vocab_size(self) -> int:
        return len(self.letters) + 2

    @property
    def prompt_len(self) -> int:
        return 3

    @property
    def choices(self) -> tuple[int, ...]:
        """Any letter, at every place."""
        return (len(self.letters),) * self.length

    def expected(self, word: str) -> str:
        """`word` repeated up to `length` characters."""
        return (word * self.length)[: self.length]

    def encode(self, words: Iterable[str]) -> tasks.Batch:
        """A row for each of `words`, in that order. ValueError for none, or any that is not of the universe."""
        words = [words] if isinstance(words, str) else list(words)
        unknown = [word for word in words if word not in self.universe]
        if unknown or not words:
            raise ValueError(f"words: {unknown or 'none'}; needs words of one or two of {self.letters!r}")
        prompts = [f"{word.rjust(2, PAD)}{ASK}" for word in words]
        return self.build(self._ids(prompts), self._ids(map(self.expected, words)))

    def _draw(self, n: int, generator: torch.Generator) -> tasks.Batch:
        rows = _once(self)
        rounds = torch.rand(-(-n // len(rows.tokens)), len(rows.tokens), generator=generator)
        return rows.rows(rounds.argsort(dim=1).flatten()[:n])

    def _solve(self, prompts: Tensor) -> Tensor:
        first, second = prompts[:, 0], prompts[:, 1]
        first = torch.where(first == self._signs.index(PAD), second, first)  # a single letter is its own other half
        odd = torch.arange(self.length, device=prompts.device) % 2 == 1
        return torch.where(odd, second[:, None], first[:, None])

    # -------------------------------------------------------------------------------------------- reading

    @property
    def _signs(self) -> str:
        """The character of each id."""
        return self.letters + ASK + PAD

    def _ids(self, texts: Iterable[str]) -> Tensor:
        return torch.tensor([[self._signs.index(sign) for sign in text] for text in texts])

    def spell(self, tokens: Tensor) -> list[str]:
        """Rows of ids [n, T] as text, ? for an id of no character."""
        known = dict(enumerate(self._signs))
        return ["".join(known.get(i, "?") for i in row) for row in tokens.tolist()]

    def asked(self, batch: tasks.Batch) -> list[str]:
        """The word of each row, read from its tokens."""
        return [text[:-1].lstrip(PAD) for text in self.spell(self.prompts(batch))]

    def lacking(self, *batches: tasks.Batch) -> tuple[str, ...]:
        """Words of the universe that no row of `batches` asks for: what a model that saw only those was never told.

        Reads the rows, whatever the settings say; training data that is meant to be whole must give ().
        """
        seen = {word for batch in batches for word in self.asked(batch)}
        return tuple(word for word in self.universe if word not in seen)

    def table(self, written: Tensor | None = None) -> pd.DataFrame:
        """One row per word of the universe: input, expected, trained; with what a model wrote, also produced and right.

        written: int64 [words, length], the answers to `encode(universe)`. ValueError for another shape.
        """
        words = self.universe
        rows = {"input": words, "expected": [self.expected(w) for w in words]}
        table = pd.DataFrame(rows | {"trained": [w not in self.left_out for w in words]})
        if written is None:
            return table
        if written.shape != (len(words), self.length):
            raise ValueError(f"written: shape {list(written.shape)}, needs {[len(words), self.length]}, a word a row")
        table["produced"] = self.spell(written)
        return table.assign(right=table["produced"] == table["expected"])

    def example(self) -> str:
        """Two literal rows as text, and one (seed 0) as position, token, target."""
        shown = self.encode((self.letters[0], self.letters[:2]))
        rows = zip(self.spell(self.prompts(shown)), self.spell(self.answers(shown.targets)), strict=True)
        return "\n".join([*(f"text     {asked} {answer}" for asked, answer in rows), super().example()])


@functools.lru_cache(maxsize=64)
def _once(task: CyclicWords) -> tasks.Batch:
    """Every word of the split, once and in order."""
    return task.encode(task.words)
