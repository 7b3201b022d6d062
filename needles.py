"""Needles in a haystack: values to remember behind markers, and cues at the end of the row that ask for them.

    task = needles.MultiNeedle(seq_len=128, vocab_size=256, n_needles=5)
    longer = dataclasses.replace(task, seq_len=512)                     # the same needles, four times as far
    near = dataclasses.replace(task, queries=1, distance=8)             # one needle asked 8 tokens after its value
    wide = dataclasses.replace(task, value_width=4)                     # values of four tokens, each of them scored
    other_ids = dataclasses.replace(task, needle_range=(100, 200))      # values that another setting never drew

Notebooks reach these through `data`, as `data.MultiNeedle(...)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import tasks


def place(n: int, count: int, width: int, length: int, generator: torch.Generator) -> Tensor:
    """int64 [n, count], ascending: starts of blocks of `width` tokens in `length`, uniform over all without overlap.

    Shrinking every block to one token maps such placements one to one to subsets of length - count (width - 1) places.
    """
    if count == 0:
        return torch.empty(n, 0, dtype=torch.int64)
    starts = tasks.distinct(n, count, length - count * (width - 1), generator).sort(dim=1).values
    return starts + (width - 1) * torch.arange(count)


@dataclass(frozen=True, kw_only=True)
class HaystackTask(tasks.RecallTask, abstract=True):
    """Rows of haystack, random ids or real text, that hold something to find, and end in a tail of tokens that ask for it.

    Ids from the top of the vocabulary, `first_special` and above, are the task's own; the haystack never holds them.
    """

    seq_len: int = 128
    vocab_size: int = 256
    haystack: tasks.Task | None = None  # a data.LanguageModel whose text is the haystack; None: uniformly random ids
    haystack_range: tuple[int, int] | None = None  # ids [lo, hi) of a random haystack; None: every id below the markers
    depth: tuple[float, float] = (0.0, 1.0)  # the part of the haystack that holds what is to find

    def validate(self):
        self.require_positive("seq_len", "vocab_size")
        why = f"the {self.n_special} marker ids at its top leave no id for haystack and values"
        self.require(self.vocab_size > self.n_special, "vocab_size", why)
        self._require_range("haystack_range", self.first_special, "the haystack must not hold markers")
        if self.haystack is not None:
            text = hasattr(self.haystack, "draw_text")
            self.require(text, "haystack", "needs a data.LanguageModel (its corpus is the haystack) or None")
            why = "a text haystack has its own ids: leave it None"
            self.require(self.haystack_range is None, "haystack_range", why)
            ids = self.haystack.tokenizer.vocab_size
            least = ids + self.n_special
            why = f"text has ids below {ids}, and {self.n_special} more are markers: needs at least {least}"
            self.require(self.vocab_size >= least, "vocab_size", why)
        ok = isinstance(self.depth, tuple) and len(self.depth) == 2 and 0 <= self.depth[0] < self.depth[1] <= 1
        self.require(ok, "depth", "needs (from, to) with 0 <= from < to <= 1")

    @property
    def n_special(self) -> int:
        """Ids at the top of the vocabulary kept for markers and cues."""
        raise NotImplementedError(f"{type(self).__name__} does not define n_special")

    @property
    def tail(self) -> int:
        """Tokens at the end of the row that ask."""
        raise NotImplementedError(f"{type(self).__name__} does not define tail")

    @property
    def first_special(self) -> int:
        return self.vocab_size - self.n_special

    @property
    def span(self) -> tuple[int, int]:
        """Half-open range of positions in which there is something to find."""
        room = max(self.seq_len - self.tail, 0)
        return round(self.depth[0] * room), round(self.depth[1] * room)

    def background(self, n: int, generator: torch.Generator) -> Tensor:
        if self.haystack is not None:
            return self.haystack.draw_text(n, self.seq_len, generator)
        lo, hi = self.haystack_range or (0, self.first_special)
        return torch.randint(lo, hi, (n, self.seq_len), generator=generator)


@dataclass(frozen=True, kw_only=True)
class NeedleTask(HaystackTask, abstract=True):
    """Needles in a haystack: values behind markers, and cues at the end that ask for them.

    Ids from the top of the vocabulary are markers; they occur in needles and cues and nowhere else. Haystack and values
    come from below them. Needles lie at uniformly random places that do not overlap. Subclasses say what a needle is.

    Every token of a value is scored, each with the true ones before it given as input. A value of several tokens is
    found through its marker only at the first; the others can also be read on from the token before.
    """

    n_needles: int = 1
    queries: int | None = None  # needles asked at the end, in random order; None: all, or one when `distance` is set
    layout: str = "cues"  # cues: only cues at the end | answers: the true value follows each cue but the last
    needle_range: tuple[int, int] | None = None  # ids [lo, hi) of the values; None: every id below the markers
    value_width: int = 1  # tokens of a value
    distance: int | None = None  # tokens strictly between the asked value's first and its cue; None: wherever it fell

    cue_width = 1  # tokens of a cue; the last one is where the value is due

    def validate(self):
        self.require_positive("n_needles", "value_width")
        if self.queries is not None:
            self.require_positive("queries")
            self.require(self.queries <= self.n_needles, "queries", f"only {self.n_needles} needles can be asked")
        self.require_choice("layout", ("cues", "answers"))
        super().validate()
        self._require_range("needle_range", self.first_special, "values must not be markers")
        lo, hi = self.span
        need, room = self.n_blocks * self.needle_width, max(hi - lo, 0)
        why = f"{self.n_blocks} needles of {self.needle_width} tokens need {need} positions, of which there are {room}"
        self.require(room >= need, "seq_len", f"{why} before the {self.tail} tokens of cues, at depth {self.depth}")
        if self.distance is not None:
            self.require(self.n_queries == 1, "distance", "fixes one needle: set queries to 1 or None")
            least, most = self.tail - 1, self.seq_len - 1 - self.needle_width
            ok = isinstance(self.distance, int) and least <= self.distance <= most
            self.require(ok, "distance", f"needs {least} to {most} tokens at this seq_len")
            self.require(bool(self._left_odds().any()), "distance", "leaves no room for the other needles")

    def prefixes(self, n: int, generator: torch.Generator) -> Tensor:
        """int64 [n, n_needles, needle_width - value_width]: what stands before each value."""
        raise NotImplementedError(f"{type(self).__name__} does not define prefixes")

    def cues(self, prefixes: Tensor) -> Tensor:
        """int64 [n, q, cue_width]: what asks for the values behind `prefixes`; by default the prefix again."""
        return prefixes

    @property
    def first_marker(self) -> int:
        """Lowest id of those that end a prefix."""
        return self.first_special

    @property
    def n_blocks(self) -> int:
        """Blocks of `needle_width` tokens that lie in the haystack."""
        return self.n_needles

    @property
    def needle_width(self) -> int:
        return self.cue_width + self.value_width

    @property
    def removed_width(self) -> int:
        # Ending at each token of the value in turn, such pieces cover the needle and nothing else.
        return self.needle_width - self.value_width + 1

    @property
    def n_queries(self) -> int:
        """How many needles are asked at the end of a row."""
        if self.queries is None:
            return self.n_needles if self.distance is None else 1
        return self.queries

    @property
    def scored_per_row(self) -> int:
        return self.n_queries * self.value_width

    @property
    def tail(self) -> int:
        if self.layout == "cues":
            return self.n_queries * (self.cue_width + self.value_width - 1)
        return self.n_queries * (self.cue_width + self.value_width) - 1

    @property
    def values(self) -> tuple[int, int]:
        """Half-open range of ids that a value may take."""
        return (0, self.first_special) if self.needle_range is None else self.needle_range

    @property
    def chance(self) -> float:
        """1 / number of ids that a value may take."""
        return 1 / (self.values[1] - self.values[0])

    @property
    def chance_unbound(self) -> float:
        """Accuracy, at a value's first token, of knowing the row's values but not which marker goes with which.

        1/N + (1 - 1/N) chance, with N the values left to choose from: all, or those that the tail has not shown yet.
        """
        shown = range(self.n_queries) if self.layout == "answers" else (0,)
        odds = [1 / (self.n_needles - i) for i in shown]
        return sum(p + (1 - p) * self.chance for p in odds) / len(odds)

    def _draw(self, n: int, generator: torch.Generator) -> tasks.Batch:
        tokens = self.background(n, generator)
        starts, asked = self._positions(n, generator)  # [n, N], [n, q]
        prefixes = self.prefixes(n, generator)
        values = torch.randint(*self.values, (n, self.n_needles, self.value_width), generator=generator)
        self._write(tokens, starts, torch.cat([prefixes, values], dim=2))
        cues = self._cues(prefixes, asked)
        return self._ask(tokens, cues, pick(values, asked), starts.gather(1, asked) + prefixes.shape[2], asked)

    def _cues(self, prefixes: Tensor, asked: Tensor) -> Tensor:
        """int64 [n, q, cue_width]: what asks for the needles that asked [n, q] names, in order of position."""
        return self.cues(pick(prefixes, asked))

    def _write(self, tokens: Tensor, starts: Tensor, blocks: Tensor) -> None:
        """Put blocks [n, M, needle_width] into tokens [n, T], each from its start [n, M] on."""
        tokens.scatter_(1, (starts[:, :, None] + torch.arange(self.needle_width)).flatten(1), blocks.flatten(1))

    def _ask(self, tokens: Tensor, cues: Tensor, answers: Tensor, sources: Tensor, asked: Tensor) -> tasks.Batch:
        """The tail into `tokens`, and the batch: cues [n, q, c], answers [n, q, w] that begin at `sources` [n, q]."""
        n, q, w = answers.shape
        ask = torch.cat([cues, answers if self.layout == "answers" else answers[:, :, :-1]], dim=2)
        first = self.seq_len - self.tail
        tokens[:, first:] = ask.flatten(1)[:, : self.tail]
        within = torch.arange(w)
        scored = first + self.cue_width - 1 + ask.shape[2] * torch.arange(q)[:, None] + within  # [q, w]
        sources, index = sources[:, :, None] + within, asked[:, :, None].expand(n, q, w)
        return self._score(
            tokens, scored.flatten().expand(n, q * w), answers.flatten(1), sources.flatten(1), index.flatten(1)
        )

    def _positions(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Ascending starts of the blocks [n, n_blocks], and which needles are asked, in order [n, q]."""
        N, w, (lo, hi) = self.n_needles, self.needle_width, self.span
        if self.distance is None:
            return lo + place(n, self.n_blocks, w, hi - lo, generator), tasks.distinct(n, self.n_queries, N, generator)
        # The asked needle stands still; how many of the others lie before it follows the number of ways to place them.
        left, right = self._sides()
        fixed = self._fixed_start()
        before = torch.multinomial(self._left_odds(), n, replacement=True, generator=generator)
        starts = torch.full((n, N), fixed)
        for k in range(N):  # over counts of needles, never over rows
            rows = (before == k).nonzero().flatten()
            if len(rows):
                starts[rows, :k] = lo + place(len(rows), k, w, left, generator)
                starts[rows, k + 1 :] = hi - right + place(len(rows), N - 1 - k, w, right, generator)
        return starts, before[:, None]

    def _fixed_start(self) -> int:
        return self.seq_len - 1 - self.distance - self.needle_width

    def _sides(self) -> tuple[int, int]:
        """Places for other needles before and after the one that `distance` fixes."""
        (lo, hi), fixed = self.span, self._fixed_start()
        return max(min(fixed, hi) - lo, 0), max(hi - max(fixed + self.needle_width, lo), 0)

    def _left_odds(self) -> Tensor:
        """float64 [N]: probability that k of the other needles lie before the fixed one; all 0 where none fits."""
        left, right = self._sides()
        others = self.n_needles - 1

        def log_ways(count, length):
            slots = length - count * (self.needle_width - 1)
            if slots < count:
                return -math.inf
            return math.lgamma(slots + 1) - math.lgamma(count + 1) - math.lgamma(slots - count + 1)

        ways = torch.tensor(
            [log_ways(k, left) + log_ways(others - k, right) for k in range(others + 1)], dtype=torch.float64
        )
        return torch.softmax(ways, dim=0) if ways.isfinite().any() else torch.zeros_like(ways)

    def oracle(self, batch: tasks.Batch) -> Tensor:
        """Finds each cue's needle by its prefix; where it is gone, the lowest value, which is right by chance."""
        scored = tasks.scored_positions(batch)
        due = scored[:, :: self.value_width]  # [n, q]: the last token of each cue
        cues = batch.tokens.gather(1, (due[:, :, None] - torch.arange(self.cue_width).flip(0)).flatten(1))
        keys, values = self._find(batch.tokens[:, : self.seq_len - self.tail])
        answers = self._answer(cues.view(*due.shape, self.cue_width), keys, values).flatten(1)
        answers = torch.where(answers < 0, self.values[0], answers)
        return torch.full_like(batch.tokens, tasks.IGNORE).scatter_(1, scored, answers)

    def _answer(self, cues: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """int64 [n, q, value_width]: the values that cues [n, q, c] ask for, from what `_find` returns; -1 for none."""
        every = torch.arange(values.shape[1]).expand(len(values), -1)
        which = tasks.lookup(cues, self.cues(keys), every, -1)
        return torch.where(which[:, :, None] < 0, -1, pick(values, which.clamp_min(0)))

    def _find(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Prefixes [n, n_blocks, p] and values [n, n_blocks, w] of `text`, in order and then -1 for those not there."""
        n, w = len(text), self.value_width
        p = self.needle_width - w
        marked = text >= self.first_marker
        row, at = marked.nonzero(as_tuple=True)
        rank = (marked.cumsum(dim=1) - 1)[row, at]
        keys = torch.full((n, self.n_blocks, p), -1)
        values = torch.full((n, self.n_blocks, w), -1)
        keys[row, rank] = text[row[:, None], at[:, None] + torch.arange(1 - p, 1)]
        values[row, rank] = text[row[:, None], at[:, None] + torch.arange(1, w + 1)]
        return keys, values


def pick(x: Tensor, index: Tensor) -> Tensor:
    """[n, q, d]: of x [n, N, d] the rows that index [n, q] names."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


@dataclass(frozen=True, kw_only=True)
class SingleNeedle(NeedleTask):
    """One value behind one marker; the last token asks for it.

        ... hay marker VALUE hay hay ... hay cue        at the cue, predict VALUE

    `needle_range` narrower than the vocabulary, with a `haystack_range` that leaves it out, shows the shortcut of the
    source notes: the value can then be told by its id alone, whatever the marker.
    """

    own_cue: bool = False  # True: the cue is an id of its own; False: the marker again

    def validate(self):
        self.require(self.n_needles == 1, "n_needles", "is 1 here; MultiNeedle takes several")
        super().validate()

    @property
    def n_special(self) -> int:
        return 2 if self.own_cue else 1

    @property
    def marker(self) -> int:
        return self.vocab_size - 1

    @property
    def cue(self) -> int:
        return self.vocab_size - 2 if self.own_cue else self.marker

    def prefixes(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.full((n, 1, 1), self.marker)

    def cues(self, prefixes: Tensor) -> Tensor:
        # A prefix of -1 marks a needle that was not found: no cue asks for it.
        return torch.where(prefixes == self.marker, self.cue, prefixes)


@dataclass(frozen=True, kw_only=True)
class MultiNeedle(NeedleTask):
    """Several values, each behind a marker of its own, all asked for at the end in random order.

        ... m3 VALUE_a ... m1 VALUE_b ... m7 VALUE_c ... hay m1 m7 m3        predict VALUE_b VALUE_c VALUE_a

    Every row draws its markers from the `n_markers` ids at the top of the vocabulary, and gives them out in any order.
    """

    n_needles: int = 5
    n_markers: int = 16

    def validate(self):
        self.require_positive("n_markers", "n_needles")
        self.require(self.n_markers >= self.n_needles, "n_markers", f"{self.n_needles} needles need a marker each")
        super().validate()

    @property
    def n_special(self) -> int:
        return self.n_markers

    def prefixes(self, n: int, generator: torch.Generator) -> Tensor:
        return self.first_special + tasks.distinct(n, self.n_needles, self.n_markers, generator)[:, :, None]


@dataclass(frozen=True, kw_only=True)
class SharedMarkerNeedles(NeedleTask):
    """Several values behind one and the same marker, told apart by the context before it.

        ... c1 marker VALUE_a ... c2 marker VALUE_b ... hay c2 marker c1 marker      at the cues' markers predict b, a

    Contexts are `context_width` ordinary ids each, all different within a row; the haystack may hold them too, but
    never the marker. A memory whose key is the marker alone keeps one of the values: `chance_unbound` is its ceiling.
    """

    n_needles: int = 5
    context_width: int = 1
    context_range: tuple[int, int] | None = None  # ids [lo, hi) of the contexts; None: every id below the marker

    def validate(self):
        self.require_positive("context_width")
        super().validate()
        self._require_range("context_range", self.first_special, "contexts must not be the marker")
        count, (lo, hi) = self.n_needles * self.context_width, self.contexts
        why = f"{count} different context ids are needed, [{lo}, {hi}) has {hi - lo}"
        self.require(hi - lo >= count, "context_range", why)

    @property
    def n_special(self) -> int:
        return 1

    @property
    def cue_width(self) -> int:
        return self.context_width + 1

    @property
    def contexts(self) -> tuple[int, int]:
        """Half-open range of ids that contexts are drawn from."""
        return (0, self.first_special) if self.context_range is None else self.context_range

    def prefixes(self, n: int, generator: torch.Generator) -> Tensor:
        lo, hi = self.contexts
        contexts = lo + tasks.distinct(n, self.n_needles * self.context_width, hi - lo, generator)
        contexts = contexts.view(n, self.n_needles, self.context_width)
        return torch.nn.functional.pad(contexts, (0, 1), value=self.vocab_size - 1)


@dataclass(frozen=True, kw_only=True)
class SlotNeedles(NeedleTask):
    """Several values behind one and the same marker, asked for by number: cue i asks for the i-th of the row.

        ... marker VALUE_a ... marker VALUE_b ... marker VALUE_c ... hay s1 s0        at the last two tokens predict b, a

    The `n_slots` ids at the top of the vocabulary are the cues, the one below them the marker. Who answers has counted.
    """

    n_needles: int = 5
    n_slots: int = 16

    def validate(self):
        self.require_positive("n_slots", "n_needles")
        self.require(self.n_slots >= self.n_needles, "n_slots", f"{self.n_needles} needles need a slot each")
        super().validate()

    @property
    def n_special(self) -> int:
        return self.n_slots + 1

    @property
    def marker(self) -> int:
        return self.first_special

    def prefixes(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.full((n, self.n_needles, 1), self.marker)

    def _cues(self, prefixes: Tensor, asked: Tensor) -> Tensor:
        return self.marker + 1 + asked[:, :, None]

    def _answer(self, cues: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The value behind the marker whose number the cue is; where one is gone, numbers tell nothing."""
        whole = (keys >= 0).all(dim=1)[:, :, None]  # [n, 1, 1]
        return torch.where(whole, pick(values, cues[:, :, 0] - self.marker - 1), -1)
