"""Synthetic tasks, each one frozen object that makes its rows, knows its chance line and floor, and can solve itself.

    task = tasks.MQAR(seq_len=128, n_pairs=8)
    batch = task.sample(64, torch.Generator().manual_seed(0))       # Batch(tokens, targets, info)
    longer = dataclasses.replace(task, seq_len=512)                 # the same task, four times as long
    print(task.example(), task.chance, task.floor)

The same object trains and tests, so the two cannot disagree. Needle tasks are in needles.py, language modelling is in
data.py; `data` shows all of them and is the door that notebooks use.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import config

IGNORE = -100  # target where nothing is scored; the default ignore_index of torch's cross-entropy


# ------------------------------------------------------------------------------------------------ foundations


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of a task.

    tokens: int64 [n, T], what the model reads.
    targets: int64 [n, T]; targets[:, t] is what the logits at position t must predict, -100 where nothing is scored.
    info: tensors aligned with targets, -1 where they mean nothing. Recall tasks give `distance` (tokens strictly
        between the value to recall and the position that must recall it) and `index` (which needle, in order of
        position); mixtures give `task` (which component the row came from).
    """

    tokens: Tensor
    targets: Tensor
    info: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name, tensor in {"targets": self.targets, **self.info}.items():
            if tensor.shape != self.tokens.shape:
                raise ValueError(f"Batch.{name} has shape {tuple(tensor.shape)}: needs {tuple(self.tokens.shape)}")

    def to(self, device) -> Batch:
        """The same rows on `device`."""
        return Batch(self.tokens.to(device), self.targets.to(device), {k: v.to(device) for k, v in self.info.items()})

    def rows(self, index) -> Batch:
        """The rows that `index` selects: a slice, an index tensor or a boolean mask over n."""
        return Batch(self.tokens[index], self.targets[index], {k: v[index] for k, v in self.info.items()})

    @property
    def scored(self) -> Tensor:
        """bool [n, T]: where a prediction counts."""
        return self.targets != IGNORE


class Task(config.Settings):
    """What every task offers. A subclass is a frozen dataclass with `seq_len` and `vocab_size` that defines `_draw`.

    chance: accuracy of guessing uniformly over the answers that the task allows, per scored token.
    floor: irreducible loss in nats per scored token; nan where nobody knows it (real text).
    ceiling: expected accuracy of the best possible answer; 1.0 wherever the row determines it.
    scored_per_row: scored tokens in each row.
    An abstract base declares itself with `class Base(Task, abstract=True)`, and is then no name for `from_dict`.
    """

    floor: float = 0.0
    ceiling: float = 1.0
    _registry: dict[str, type[Task]] = {}

    def __init_subclass__(cls, *, abstract: bool = False):
        super().__init_subclass__()
        if not abstract:
            Task._registry[cls.__name__] = cls

    def sample(self, n: int, generator: torch.Generator) -> Batch:
        """`n` fresh rows from a CPU generator; the same generator state gives the same rows. ValueError otherwise."""
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ValueError(f"n = {n!r}: needs a number of rows of at least 1")
        if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
            raise ValueError(
                f"generator = {generator!r}: needs a CPU torch.Generator, so that every device sees the same rows"
            )
        return self._draw(n, generator)

    def _draw(self, n: int, generator: torch.Generator) -> Batch:
        raise NotImplementedError(f"{type(self).__name__} does not define _draw")

    def oracle(self, batch: Batch) -> Tensor:
        """Best possible predictions, int64 [n, T], -100 where nothing is scored.

        Takes a batch on the CPU. Reads its tokens and where it is scored, never the targets' values, so that its
        accuracy proves that the row holds the answer.
        """
        raise ValueError(f"{type(self).__name__} has no oracle: nothing in the row determines the answer")

    def example(self) -> str:
        """One literal row (seed 0) as aligned text: position, token, target. "..." stands for positions left out."""
        batch = self.sample(1, torch.Generator().manual_seed(0))
        scored = batch.scored[0].nonzero().flatten().tolist()
        keep, width = {p for t in scored for p in (t - 1, t)}, getattr(self, "removed_width", 1)
        if "distance" in batch.info:
            sources = [t - 1 - int(batch.info["distance"][0, t]) for t in scored]
            keep |= {p for s in sources for p in range(s - width, s + 2)}
        shown = sorted(p for p in keep if 0 <= p < self.seq_len)
        shown = shown if len(shown) <= 40 else shown[:20] + shown[-20:]
        columns, last = [("position", "token", "target")], -1
        for p in shown:
            if p > last + 1:
                columns.append(("...", "...", "..."))
            target = int(batch.targets[0, p])
            columns.append((str(p), str(int(batch.tokens[0, p])), "." if target == IGNORE else str(target)))
            last = p
        if last < self.seq_len - 1:
            columns.append(("...", "...", "..."))
        return _columns(columns)

    def to_dict(self) -> dict:
        """Plain dictionary, ready for JSON: the task's name under "task", and every setting, nested ones likewise."""
        settings = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"task": type(self).__name__, **settings}

    @classmethod
    def from_dict(cls, values: dict) -> Task:
        """The inverse of `to_dict`. `Task.from_dict` builds the task named; ValueError on unknown names or keys."""
        values = dict(values)
        name = values.pop("task", cls.__name__)
        kind = Task._registry.get(name)
        if kind is None:
            raise ValueError(f"task = {name!r}: choose one of {sorted(Task._registry)}")
        if not issubclass(kind, cls):
            raise ValueError(f"task = {name!r}: {cls.__name__}.from_dict was given another task; use Task.from_dict")
        if kind is not cls:
            return kind.from_dict(values)
        return super().from_dict({k: cls._revive(k, v) for k, v in values.items()})

    @classmethod
    def _revive(cls, field: str, value: Any) -> Any:
        if isinstance(value, dict) and "task" in value:
            return Task.from_dict(value)
        if isinstance(value, list):
            return tuple(cls._revive(field, v) for v in value)
        return value

    def _require_range(self, field: str, limit: int, why: str) -> None:
        """`field` is None or a half-open range of ids (lo, hi) with 0 <= lo < hi <= limit."""
        value = getattr(self, field)
        pair = isinstance(value, tuple) and len(value) == 2 and all(isinstance(v, int) for v in value)
        ok = value is None or (pair and 0 <= value[0] < value[1] <= limit)
        self.require(ok, field, f"needs (lo, hi) with 0 <= lo < hi <= {limit}: {why}")


def _columns(columns: list[tuple[str, str, str]], width: int = 100) -> str:
    """Three lines of right-aligned columns, in blocks of at most `width` characters; each block repeats the first column."""
    head, *rest = columns
    blocks, used = [[head]], len(max(head, key=len))
    for column in rest:
        size = 1 + len(max(column, key=len))
        if used + size > width:
            blocks, used = [*blocks, [head]], len(max(head, key=len))
        blocks[-1].append(column)
        used += size
    lines = []
    for block in blocks:
        widths = [max(map(len, column)) for column in block]
        lines += [" ".join(c[i].rjust(w) for c, w in zip(block, widths, strict=True)) for i in range(3)]
    return "\n".join(lines)


def _plain(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def distinct(n: int, count: int, size: int, generator: torch.Generator) -> Tensor:
    """int64 [n, count]: in each row `count` different numbers below `size`, uniform over ordered draws."""
    if count > size:
        raise ValueError(f"count = {count}: no more than size = {size} different numbers exist")
    if 2 * count > size:  # dense: the top of a random ranking of all numbers
        return torch.rand(n, size, generator=generator).topk(count, dim=1).indices
    # Sparse: redraw every number that repeats an earlier one of its row until none does. Nothing here depends on what
    # the numbers are, only on which are equal, so all rows without repeats come out equally likely.
    draws = torch.randint(size, (n, count), generator=generator)
    rows = torch.arange(n)
    while len(rows):
        ordered, order = draws[rows].sort(dim=1, stable=True)
        again = torch.zeros_like(ordered, dtype=torch.bool)
        again.scatter_(1, order[:, 1:], ordered[:, 1:] == ordered[:, :-1])
        rows, again = rows[again.any(dim=1)], again[again.any(dim=1)]
        fresh = torch.randint(size, again.shape, generator=generator)
        draws[rows] = torch.where(again, fresh, draws[rows])
    return draws


def lookup(cues: Tensor, keys: Tensor, values: Tensor, fallback: int) -> Tensor:
    """int64 [n, q]: the value whose key equals each cue, `fallback` where none does.

    cues int64 [n, q, c], keys int64 [n, N, c], values int64 [n, N].
    """
    match = (cues[:, :, None] == keys[:, None]).all(dim=-1)  # [n, q, N]
    found = values.gather(1, match.int().argmax(dim=-1))
    return torch.where(match.any(dim=-1), found, fallback)


@dataclass(frozen=True, kw_only=True)
class RecallTask(Task, abstract=True):
    """A task whose every target is the copy of an earlier token, `info["distance"]` tokens back.

    remove_needle: the control that must fail. Rows, cues and targets stay what the seed gives, but every asked value is
        overwritten by fresh background, its marker with it. `ceiling` is then `chance` and `floor` its logarithm:
        whatever accuracy above that a model keeps on such rows is not memory.
    """

    remove_needle: bool = False

    removed_width = 1  # tokens that removal overwrites, ending at the value

    def background(self, n: int, generator: torch.Generator) -> Tensor:
        """int64 [n, T]: rows with nothing in them to remember."""
        raise NotImplementedError(f"{type(self).__name__} does not define background")

    @property
    def floor(self) -> float:
        """0: the row determines every answer; ln(1 / chance) nats once the needle is removed."""
        return math.log(1 / self.chance) if self.remove_needle else 0.0

    @property
    def ceiling(self) -> float:
        """1, or `chance` once the needle is removed."""
        return self.chance if self.remove_needle else 1.0

    def sample(self, n: int, generator: torch.Generator) -> Batch:
        batch = super().sample(n, generator)
        return self._without_needle(batch, generator) if self.remove_needle else batch

    def _without_needle(self, batch: Batch, generator: torch.Generator) -> Batch:
        n, T = batch.tokens.shape
        row, position = batch.scored.nonzero(as_tuple=True)
        value = position - 1 - batch.info["distance"][row, position]
        gone = torch.zeros(n, T, dtype=torch.bool)
        for back in range(self.removed_width):
            gone[row, value - back] = True
        tokens = torch.where(gone, self.background(n, generator), batch.tokens)
        return Batch(tokens, batch.targets, batch.info)

    def _score(self, tokens: Tensor, scored: Tensor, answers: Tensor, sources: Tensor, index: Tensor) -> Batch:
        """Batch from positions: `answers` [n, q] due at `scored`, found at `sources`, belonging to needle `index`."""
        targets = torch.full_like(tokens, IGNORE).scatter_(1, scored, answers)
        distance = torch.full_like(tokens, -1).scatter_(1, scored, scored - sources - 1)
        which = torch.full_like(tokens, -1).scatter_(1, scored, index)
        return Batch(tokens, targets, {"distance": distance, "index": which})


def scored_positions(batch: Batch) -> Tensor:
    """int64 [n, q], ascending: where each row is scored; every row of a recall task has the same number."""
    return batch.scored.nonzero()[:, 1].view(len(batch.tokens), -1)


# ------------------------------------------------------------------------------------------------ other recall


@dataclass(frozen=True, kw_only=True)
class Echo(RecallTask):
    """Repeat a random string after a delimiter, token by token, the true string given as input meanwhile.

    a b c d | a b c        at | predict a, then b, c, d
    """

    seq_len: int = 128  # even: seq_len / 2 tokens to repeat
    vocab_size: int = 256  # the last id is the delimiter

    def validate(self):
        self.require_positive("seq_len", "vocab_size")
        why = "needs an even length: the string, the delimiter, the string but its last"
        self.require(self.seq_len % 2 == 0, "seq_len", why)
        self.require(self.vocab_size >= 3, "vocab_size", "needs at least 2 ids besides the delimiter")

    @property
    def length(self) -> int:
        return self.seq_len // 2

    scored_per_row = length

    @property
    def chance(self) -> float:
        """1 / number of ids in the string's alphabet."""
        return 1 / (self.vocab_size - 1)

    def background(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.vocab_size - 1, (n, self.seq_len), generator=generator)

    def _draw(self, n: int, generator: torch.Generator) -> Batch:
        m = self.length
        string = torch.randint(self.vocab_size - 1, (n, m), generator=generator)
        delimiter = torch.full((n, 1), self.vocab_size - 1)
        index = torch.arange(m).expand(n, m)
        return self._score(torch.cat([string, delimiter, string[:, :-1]], dim=1), m + index, string, index, index)

    def oracle(self, batch: Batch) -> Tensor:
        """The token as far into the string as this position is past the delimiter."""
        predictions = torch.full_like(batch.tokens, IGNORE)
        predictions[:, self.length :] = batch.tokens[:, : self.length]
        return predictions


@dataclass(frozen=True, kw_only=True)
class MQAR(RecallTask):
    """Multi-query associative recall with the published settings: pairs first, then each key again at a power-law gap.

        k1 v1 k2 v2 0 0 k2 0 0 0 k1 0        at the later k2 predict v2, at the later k1 predict v1

    Keys are ids 1 .. vocab_size/2 - 1 and values the upper half, all different within a row. After the pairs, queries
    may sit at every second position, the places; place s = 1, 2, ... has weight s^(power_a - 1), and the pairs draw
    their places in turn without replacement, so that most queries follow early. Only queries are scored.
    Source: Arora, Eyuboglu et al., "Zoology: Measuring and Improving Recall in Efficient Language Models" (2023),
    arXiv:2312.04927.
    """

    seq_len: int = 64
    vocab_size: int = 8192
    n_pairs: int = 4
    power_a: float = 0.01  # 1.0: every place equally likely
    filler: str = "zero"  # zero: id 0 wherever nothing is asked | random: any id there

    removed_width = 2

    def validate(self):
        self.require_positive("seq_len", "vocab_size", "n_pairs")
        self.require(self.seq_len % 2 == 0, "seq_len", "needs an even length: queries sit at every second place")
        self.require(self.vocab_size % 2 == 0, "vocab_size", "needs an even size: half keys, half values")
        room = self.vocab_size // 2 - 1
        self.require(
            self.n_pairs <= room, "n_pairs", f"the vocabulary has {room} keys; use fewer pairs or a larger vocab_size"
        )
        why = f"{self.n_pairs} pairs and their queries need at least {4 * self.n_pairs} tokens"
        self.require(self.seq_len >= 4 * self.n_pairs, "seq_len", why)
        self.require(0 < self.power_a <= 1, "power_a", "needs a number above 0 and up to 1")
        self.require_choice("filler", ("zero", "random"))

    @property
    def scored_per_row(self) -> int:
        return self.n_pairs

    @property
    def chance(self) -> float:
        """1 / number of value ids (half the vocabulary)."""
        return 2 / self.vocab_size

    def gap_weights(self) -> Tensor:
        """float64 [places]: probability that the first pair's query takes each place after the pairs; sums to 1."""
        place_number = torch.arange(1, (self.seq_len - 2 * self.n_pairs) // 2 + 1, dtype=torch.float64)
        weights = place_number ** (self.power_a - 1)
        return weights / weights.sum()

    def background(self, n: int, generator: torch.Generator) -> Tensor:
        if self.filler == "zero":
            return torch.zeros(n, self.seq_len, dtype=torch.int64)
        return torch.randint(self.vocab_size, (n, self.seq_len), generator=generator)

    def _draw(self, n: int, generator: torch.Generator) -> Batch:
        half, pairs = self.vocab_size // 2, self.n_pairs
        keys = 1 + distinct(n, pairs, half - 1, generator)
        values = half + distinct(n, pairs, half, generator)
        # Exponential clocks of rate w ring in the order of draws without replacement with weights w.
        weights = self.gap_weights()
        clocks = torch.empty(n, len(weights), dtype=torch.float64).exponential_(generator=generator) / weights
        places = clocks.topk(pairs, dim=1, largest=False).indices
        scored = 2 * pairs + 2 * places
        tokens = self.background(n, generator)
        tokens[:, : 2 * pairs] = torch.stack([keys, values], dim=2).flatten(1)
        tokens.scatter_(1, scored, keys)
        index = torch.arange(pairs).expand(n, pairs)
        return self._score(tokens, scored, values, 2 * index + 1, index)

    def oracle(self, batch: Batch) -> Tensor:
        """Looks each query up among the pairs; where the pair is gone, the lowest value."""
        scored, pairs = scored_positions(batch), self.n_pairs
        keys, values = batch.tokens[:, 0 : 2 * pairs : 2], batch.tokens[:, 1 : 2 * pairs : 2]
        answers = lookup(batch.tokens.gather(1, scored)[:, :, None], keys[:, :, None], values, self.vocab_size // 2)
        return torch.full_like(batch.tokens, IGNORE).scatter_(1, scored, answers)


# ------------------------------------------------------------------------------------------------ language-like


@dataclass(frozen=True, kw_only=True)
class Bigrams(Task):
    """Text of repeated bigrams: each id is followed by the next one with probability `follow`, else by any at random.

        41 42 43 44 9 10 200 201 ...        every position predicts the next token

    With M ids the successor has probability p = follow + (1 - follow)/M and each other id r = (1 - follow)/M, so the
    entropy is exactly -p ln p - (M - 1) r ln r nats per token (M = 900, follow = .7: 2.65, a perplexity of 14.1).
    """

    seq_len: int = 128
    vocab_size: int = 256
    id_range: tuple[int, int] | None = None  # ids [lo, hi) of the text; None: the whole vocabulary
    follow: float = 0.7

    def validate(self):
        self.require_positive("seq_len", "vocab_size")
        self._require_range("id_range", self.vocab_size, "ids lie inside the vocabulary")
        self.require(0 <= self.follow <= 1, "follow", "needs a probability from 0 to 1")

    @property
    def ids(self) -> tuple[int, int]:
        """Half-open range of ids that occur."""
        return (0, self.vocab_size) if self.id_range is None else self.id_range

    @property
    def scored_per_row(self) -> int:
        return self.seq_len

    @property
    def chance(self) -> float:
        """1 / number of ids that occur."""
        return 1 / (self.ids[1] - self.ids[0])

    @property
    def ceiling(self) -> float:
        """Accuracy of always naming the successor: follow + (1 - follow)/M."""
        return self.follow + (1 - self.follow) * self.chance

    @property
    def floor(self) -> float:
        """Entropy of the next token given the last, in nats: exact, and no longer context lowers it."""
        others = 1 / self.chance - 1
        each = (1 - self.follow) * self.chance
        return -sum(count * p * math.log(p) for count, p in ((1, self.ceiling), (others, each)) if p > 0)

    def _draw(self, n: int, generator: torch.Generator) -> Batch:
        (lo, hi), L = self.ids, self.seq_len + 1
        jump = torch.rand(n, L, generator=generator) >= self.follow
        jump[:, 0] = True
        landing = torch.randint(hi - lo, (n, L), generator=generator)
        position = torch.arange(L)
        last_jump = torch.where(jump, position, 0).cummax(dim=1).values
        text = lo + (landing.gather(1, last_jump) + position - last_jump) % (hi - lo)
        return Batch(text[:, :-1].contiguous(), text[:, 1:].contiguous())

    def oracle(self, batch: Batch) -> Tensor:
        """The successor of the current token; right at the rate `ceiling`."""
        lo, hi = self.ids
        successor = lo + (batch.tokens - lo + 1) % (hi - lo)
        return torch.where(batch.scored, successor, IGNORE)


@dataclass(frozen=True, kw_only=True)
class Mixture(Task):
    """Rows of several tasks in fixed shares, shuffled; `info["task"]` says which one each row came from.

    Shares are of rows: n rows split by largest remainder, the same in every batch of a size. chance, floor and ceiling
    are averages over scored tokens, in which a task that scores a whole row weighs more than one that scores five.
    """

    tasks: tuple[Task, ...]
    shares: tuple[float, ...]

    def validate(self):
        self.require(len(self.tasks) > 0, "tasks", "needs at least one task")
        ok = len(self.shares) == len(self.tasks) and all(s > 0 for s in self.shares)
        self.require(ok and abs(sum(self.shares) - 1) < 1e-6, "shares", "needs a positive share per task, summing to 1")
        for name in ("seq_len", "vocab_size"):
            sizes = sorted({getattr(task, name) for task in self.tasks})
            self.require(len(sizes) == 1, "tasks", f"every task needs the same {name}; they have {sizes}")

    @property
    def seq_len(self) -> int:
        return self.tasks[0].seq_len

    @property
    def vocab_size(self) -> int:
        return self.tasks[0].vocab_size

    def _average(self, name: str) -> float:
        weights = [s * task.scored_per_row for s, task in zip(self.shares, self.tasks, strict=True)]
        return sum(w * getattr(task, name) for w, task in zip(weights, self.tasks, strict=True)) / sum(weights)

    @property
    def scored_per_row(self) -> float:
        return sum(s * task.scored_per_row for s, task in zip(self.shares, self.tasks, strict=True))

    @property
    def chance(self) -> float:
        return self._average("chance")

    @property
    def ceiling(self) -> float:
        return self._average("ceiling")

    @property
    def floor(self) -> float:
        return self._average("floor")

    def counts(self, n: int) -> list[int]:
        """How many of `n` rows each task gives."""
        exact = [s * n for s in self.shares]
        whole = [math.floor(x + 1e-9) for x in exact]
        by_remainder = sorted(range(len(exact)), key=lambda i: whole[i] - exact[i])
        for i in by_remainder[: n - sum(whole)]:
            whole[i] += 1
        return whole

    def _draw(self, n: int, generator: torch.Generator) -> Batch:
        parts = [
            (i, task.sample(c, generator))
            for i, (task, c) in enumerate(zip(self.tasks, self.counts(n), strict=True))
            if c
        ]
        names = sorted({name for _, part in parts for name in part.info})

        def column(part, name):
            return part.info.get(name, torch.full_like(part.tokens, -1))

        info = {name: torch.cat([column(part, name) for _, part in parts]) for name in names}
        info["task"] = torch.cat([torch.full_like(part.tokens, i) for i, part in parts])
        tokens, targets = (torch.cat([getattr(part, f) for _, part in parts]) for f in ("tokens", "targets"))
        return Batch(tokens, targets, info).rows(torch.randperm(n, generator=generator))

    def oracle(self, batch: Batch) -> Tensor:
        """Each component's oracle on its own rows; ValueError when one of them has none."""
        predictions = torch.empty_like(batch.tokens)
        for i, task in enumerate(self.tasks):
            mine = batch.info["task"][:, 0] == i
            if mine.any():
                predictions[mine] = task.oracle(batch.rows(mine))
        return predictions

    def example(self) -> str:
        """One row of each component."""
        parts = zip(self.shares, self.tasks, strict=True)
        return "\n".join(f"{share:.0%} {type(task).__name__}\n{task.example()}" for share, task in parts)
