"""Tasks in the style of RULER on token ids: retrieval, multi-hop tracing and aggregation at any length.

    tasks_by_name = ruler.suite(4096, 320, haystack=text)               # eight tasks under their short names
    longer = dataclasses.replace(tasks_by_name["S1"], seq_len=65536)    # the same as ruler.suite(65536, ...)["S1"]
    task = ruler.VariableTracking(seq_len=256, n_needles=4, hops=2)     # x = 17 ... y = x ... z = y ... what is z?

Names, numbers and words are single ids here, answers are scored token by token, and every one has its chance line.
Notebooks reach the classes through `data`, as `data.VariableTracking(...)`.

Source: Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?" (2024),
arXiv:2404.06654.
"""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass

import torch
from torch import Tensor

import needles
import tasks


@dataclass(frozen=True, kw_only=True)
class PassKey(needles.SingleNeedle):
    """One value in a sentence that is repeated over and over, the same in every row: the easiest haystack.

        ... s1 s2 s3 marker VALUE s1 s2 s3 s1 s2 s3 ... marker        at the last token, predict VALUE

    A value can be told by what it interrupts, so this shows that something is kept, not that a marker was bound to it.
    """

    period: int = 24  # tokens of the sentence

    def validate(self):
        self.require_positive("period")
        self.require(self.haystack is None, "haystack", "is a repeated sentence here; SingleNeedle takes a text")
        super().validate()

    def background(self, n: int, generator: torch.Generator) -> Tensor:
        lo, hi = self.haystack_range or (0, self.first_special)
        # A generator of its own: the sentence belongs to the task, not to a row.
        sentence = torch.randint(lo, hi, (self.period,), generator=torch.Generator().manual_seed(self.period))
        return sentence[torch.arange(self.seq_len) % self.period].repeat(n, 1)


@dataclass(frozen=True, kw_only=True)
class MultiValue(needles.NeedleTask):
    """Several values behind one and the same marker, asked for in the order in which they lie.

        ... m VALUE_a ... m VALUE_b ... m VALUE_c ... hay m VALUE_a m VALUE_b m      at the last three m predict a, b, c

    With layout "answers" the value just shown says which one comes next; with "cues" only counting the cues does.
    """

    n_needles: int = 4
    layout: str = "answers"
    queries: int | None = None  # how many are asked, from the first on; None: all

    def validate(self):
        self.require(self.distance is None, "distance", "would change the order of the values: leave it None")
        super().validate()

    @property
    def n_special(self) -> int:
        return 1

    def prefixes(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.full((n, self.n_needles, 1), self.first_special)

    def _positions(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        starts, asked = super()._positions(n, generator)
        return starts, torch.arange(self.n_queries).expand_as(asked)

    def _answer(self, cues: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The i-th value that is there, at the i-th cue."""
        return values[:, : cues.shape[1]]


@dataclass(frozen=True, kw_only=True)
class VariableTracking(needles.NeedleTask):
    """Chains of assignments, and the last name of a chain asks for the value that its first name was given.

        ... x = VALUE ... y = x ... z = y ... hay z =        at the last token, predict VALUE (hops = 2)

    A needle is a chain of hops + 1 assignments of three tokens: name, `=`, and the value or the name before. Those of a
    chain lie in order, and chains mix in every such way equally often. The `n_names` ids below the last are names, all
    different within a row, and the last is `=`. A haystack holds neither. RULER asks for the names that hold a value;
    this asks for the value, which is one token. `index` counts chains by where they begin, `distance` is that of VALUE.

    remove_needle overwrites the assignment of the value and leaves the hops. hops = 0 asks for the value directly, so
    accuracy by hops tells tracing from retrieval. `chance_unbound` knows nothing of order: chains that begin late tend to
    end late, so matching ranks finds 28% of the values of 4 chains of 4 hops, and 67% of 2 chains of one.
    """

    n_needles: int = 4  # chains
    hops: int = 4
    n_names: int = 32

    cue_width = 2

    def validate(self):
        self.require_positive("n_needles", "n_names")
        self.require_whole("hops", least=0)
        why = f"{self.n_needles} chains of {self.hops} hops need {self.n_blocks} names"
        self.require(self.n_names >= self.n_blocks, "n_names", why)
        self.require(self.value_width == 1, "value_width", "is 1 here: a name and a value take the same place")
        self.require(self.distance is None, "distance", "would change the order of the assignments: leave it None")
        super().validate()

    @property
    def n_special(self) -> int:
        return self.n_names + 1

    @property
    def assign(self) -> int:
        """The id of `=`."""
        return self.vocab_size - 1

    @property
    def first_marker(self) -> int:
        return self.assign

    @property
    def n_blocks(self) -> int:
        return self.n_needles * (self.hops + 1)

    def _draw(self, n: int, generator: torch.Generator) -> tasks.Batch:
        N, S, M = self.n_needles, self.hops + 1, self.n_blocks
        tokens = self.background(n, generator)
        starts, asked = self._positions(n, generator)  # [n, M], [n, q]
        # A shuffle of all places, each chain's share of them in order, chains numbered by their first.
        turns = tasks.distinct(n, M, M, generator).view(n, N, S).sort(dim=2).values
        turns = turns.gather(1, turns[:, :, :1].argsort(dim=1).expand(n, N, S))
        starts = starts.gather(1, turns.flatten(1))
        names = self.first_special + tasks.distinct(n, M, self.n_names, generator).view(n, N, S)
        values = torch.randint(*self.values, (n, N, 1), generator=generator)
        right = torch.cat([values, names[:, :, :-1]], dim=2)
        chains = torch.stack([names, torch.full_like(names, self.assign), right], dim=3)  # [n, N, S, 3]
        self._write(tokens, starts, chains.flatten(1, 2))
        cues = needles.pick(chains[:, :, -1, :2], asked)
        return self._ask(tokens, cues, needles.pick(values, asked), starts[:, ::S].gather(1, asked) + 2, asked)

    def _answer(self, cues: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """What each cue's name leads to, from assignment to assignment."""
        found = cues[:, :, 0]
        for _ in range(self.hops + 1):  # a name that no assignment has is -1, and stays so
            found = tasks.lookup(found[:, :, None], keys[:, :, :1], values[:, :, 0], -1)
        return found[:, :, None]

    def example(self) -> str:
        """One literal row (seed 0), and all its assignments in order."""
        row = self.sample(1, torch.Generator().manual_seed(0)).tokens[:, : self.seq_len - self.tail]
        names, right = (side[0, :, 0].tolist() for side in self._find(row))
        pairs = zip(names, right, strict=True)
        return f"{super().example()}\n{_line('assignments', (f'{a}={b}' for a, b in pairs if a >= 0))}"


@dataclass(frozen=True, kw_only=True)
class CommonWords(needles.HaystackTask):
    """Words scattered over a haystack, a few of them oftener than the rest; asked: those few, the commonest first.

        ... b a hay a c a hay b d a ... cue a        at the last two tokens predict a, b (n_common = 2)

    The `n_words` ids below the last are words, the last is the cue. With k = n_common, the commonest word stands
    (k + 1) r times in a row, the next k r times, and so on down to 2 r, and each other word r times: exact counts, no
    ties among the answers. `share` of the haystack is words, so r grows with the length and the ratios stay.
    Which word is how common is drawn afresh in every row. RULER gives its common words one count and takes them in any
    order; different counts make one order right.

    `index` is the answer's rank, 0 for the commonest. An answer has no one place, so there is no `distance`.
    remove_needle overwrites occurrences of the common words at random until every word stands r times.
    """

    n_words: int = 16
    n_common: int = 3
    share: float = 0.5  # of the haystack (its part at `depth`), rounded down to whole r

    def validate(self):
        self.require_positive("n_words", "n_common")
        why = f"needs less than n_words = {self.n_words}, so that a word is left to be rare"
        self.require(self.n_common < self.n_words, "n_common", why)
        self.require(0 < self.share <= 1, "share", "needs a share above 0 and up to 1")
        super().validate()
        lo, hi = self.span
        why = f"its share of words is {math.floor(self.share * max(hi - lo, 0))}, of which {sum(self._weights)} are needed"
        self.require(self.rare_count > 0, "seq_len", why)

    @property
    def _weights(self) -> tuple[int, ...]:
        """Counts of the words by rank in units of the rare ones'."""
        return (*range(self.n_common + 1, 1, -1), *[1] * (self.n_words - self.n_common))

    @property
    def rare_count(self) -> int:
        """r: how often a word stands in a row that is not asked for."""
        lo, hi = self.span
        return math.floor(self.share * max(hi - lo, 0)) // sum(self._weights)

    @property
    def counts(self) -> tuple[int, ...]:
        """How often each of the n_words stands in a row, the commonest first."""
        return tuple(weight * self.rare_count for weight in self._weights)

    @property
    def n_special(self) -> int:
        return self.n_words + 1

    @property
    def cue(self) -> int:
        return self.vocab_size - 1

    @property
    def tail(self) -> int:
        return self.n_common

    @property
    def scored_per_row(self) -> int:
        return self.n_common

    @property
    def _choices(self) -> range:
        """Words left to choose from at each answer: those that the tail has not shown."""
        return range(self.n_words, self.n_words - self.n_common, -1)

    @property
    def chance(self) -> float:
        """Mean over the answers of 1 / words that the tail has not shown yet."""
        return sum(1 / left for left in self._choices) / self.n_common

    @property
    def floor(self) -> float:
        """0: counts determine every answer; once they are level, the mean of ln(words not shown yet) nats."""
        return sum(map(math.log, self._choices)) / self.n_common if self.remove_needle else 0.0

    def _draw(self, n: int, generator: torch.Generator) -> tasks.Batch:
        k, (lo, hi), counts = self.n_common, self.span, torch.tensor(self.counts)
        tokens = self.background(n, generator)
        words = self.first_special + tasks.distinct(n, self.n_words, self.n_words, generator)  # by rank
        places = lo + tasks.distinct(n, hi - lo, hi - lo, generator)[:, : int(counts.sum())]
        tokens.scatter_(1, places, words.repeat_interleave(counts, dim=1))
        tokens[:, -k:] = torch.cat([torch.full((n, 1), self.cue), words[:, : k - 1]], dim=1)
        targets, index = torch.full_like(tokens, tasks.IGNORE), torch.full_like(tokens, -1)
        targets[:, -k:], index[:, -k:] = words[:, :k], torch.arange(k)
        return tasks.Batch(tokens, targets, {"index": index})

    def _without_needle(self, batch: tasks.Batch, generator: torch.Generator) -> tasks.Batch:
        n, T = batch.tokens.shape
        gone = torch.zeros(n, T, dtype=torch.bool)
        for word in batch.targets[:, -self.n_common :].split(1, dim=1):  # over answers, never over rows
            here = batch.tokens == word
            here[:, -self.n_common :] = False
            lots = torch.rand(n, T, generator=generator).masked_fill(~here, 2.0)
            gone |= here.scatter(1, lots.topk(self.rare_count, dim=1, largest=False).indices, False)
        tokens = torch.where(gone, self.background(n, generator), batch.tokens)
        return tasks.Batch(tokens, batch.targets, batch.info)

    def oracle(self, batch: tasks.Batch) -> Tensor:
        """The word that stands most often, among those that the tail has not shown; among equals, any."""
        k, predictions = self.n_common, torch.full_like(batch.tokens, tasks.IGNORE)
        counts = self._count(batch.tokens)
        for t in range(self.seq_len - k, self.seq_len):
            predictions[:, t] = self.first_special + counts.argmax(dim=1)
            if t + 1 < self.seq_len:
                counts.scatter_(1, batch.tokens[:, t + 1, None] - self.first_special, -1)
        return predictions

    def _count(self, tokens: Tensor) -> Tensor:
        """int64 [n, n_words]: how often each word stands in rows [n, T], before their tail."""
        text = tokens[:, : -self.n_common] - self.first_special
        counts = torch.zeros(len(text), self.n_words, dtype=torch.int64)
        return counts.scatter_add_(1, text.clamp_min(0), (text >= 0).long())

    def example(self) -> str:
        """One literal row (seed 0), and how often each word stands in it."""
        counts = self._count(self.sample(1, torch.Generator().manual_seed(0)).tokens)[0].tolist()
        words = sorted(enumerate(counts, start=self.first_special), key=lambda pair: -pair[1])
        return f"{super().example()}\n{_line('counts', (f'{word}:{count}' for word, count in words))}"


def _line(name: str, entries) -> str:
    """A line of an example, folded at 100 characters."""
    return textwrap.fill(f"{name} {' '.join(entries)}", 100, subsequent_indent=" " * (len(name) + 1))


def suite(seq_len: int, vocab_size: int, haystack: tasks.Task | None = None) -> dict[str, tasks.Task]:
    """The eight tasks by their short names, at one length; no other setting depends on it, so lengths can be compared.

        S1                   one value in a repeated sentence
        S2                   one value in the haystack
        S3                   one value of 8 tokens in the haystack
        multi-key            16 values behind markers of their own, one asked
        multi-value          4 values behind one marker, all asked in order
        multi-query          16 values behind markers of their own, 4 asked
        variable tracking    4 chains of 4 hops, one asked
        common words         the 3 commonest of 16 words, which fill half of the haystack

    haystack: a data.LanguageModel whose text surrounds all but S1; None: uniformly random ids.
    vocab_size: 33 ids at its top are markers, names and words at most; the ids of the haystack come from below them.
    RULER's own settings: 4 keys, 4 values, 4 queries, one chain of 4 hops, ten words of 30 occurrences against 3. More
    keys and chains than are asked keep a guess among the row's values low (`chance_unbound`).
    Least: 62 tokens, and 33 ids more than the haystack has. ValueError naming the class and the setting otherwise.
    """
    where = dict(seq_len=seq_len, vocab_size=vocab_size)
    text = dict(where, haystack=haystack)
    keys = dict(text, n_needles=16, n_markers=32)
    return {
        "S1": PassKey(**where),
        "S2": needles.SingleNeedle(**text),
        "S3": needles.SingleNeedle(**text, value_width=8),
        "multi-key": needles.MultiNeedle(**keys, queries=1),
        "multi-value": MultiValue(**text),
        "multi-query": needles.MultiNeedle(**keys, queries=4, layout="answers"),
        "variable tracking": VariableTracking(**text, queries=1),
        "common words": CommonWords(**text),
    }
