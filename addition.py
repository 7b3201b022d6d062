"""Addition of two numbers, digit by digit: rows, carries, curricula, and a division of all pairs that never overlaps.

    task = addition.Addition()                                              # 0000000005+0000000007= -> 21000000000.
    easy = dataclasses.replace(task, digits=(1, 3), carry_share=0.8)        # a phase of a curriculum
    tests = [data.test_set(task.held_out(), 10_000, seed=s) for s in range(10)]
    right = answers.exact(model, task, tests[0])                            # bool [10000]
    task.by_chain(right, tests[0])                                          # {0: (right, rows), 1: ...}
    hard = dataclasses.replace(task.held_out(), carry_share=1.0)            # long carries, as many as are asked

A pair of numbers belongs to training, validation or test by what it is, whatever the seed, the phase and the format. So
no seed can bring a test pair into training, and tasks that train never need to be told of a test set.

Sources: the log of experiments E1 to E21 and its code (M. Frenette, transformer-10-digit-addition, 2026), which took the
format from Y. Havinga's gpt-acc-jax; the public contest for the smallest adder (D. Papailiopoulos, AdderBoard, 2026).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import answers
import tasks

PLUS, EQUALS, SPACE, END = 10, 11, 12, 13  # ids; a digit is its own
SYMBOLS = {PLUS: "+", EQUALS: "=", SPACE: "_", END: "."}

# The contest's ten fixed pairs, which an adder must get all of; it lists one of them twice, and so does this.
EDGES = (
    (0, 0),
    (0, 1),
    (9_999_999_999, 0),
    (9_999_999_999, 1),
    (9_999_999_999, 9_999_999_999),
    (5_000_000_000, 5_000_000_000),
    (1_111_111_111, 8_888_888_889),
    (1_234_567_890, 9_876_543_210),
    (9_999_999_999, 9_999_999_999),
    (1, 9_999_999_999),
)

SPLITS = ("train", "validation", "test")
WIDEST = 12  # digits: one draw of 59 bits is an operand, its last digit then even to 2e-6

# ------------------------------------------------------------------------------------------------ the division
#
# With a = 10 a' + a0 and b = 10 b' + b0, the pair is in bucket (h(a') + h(b') + a0 + b0) mod 32, the same for b + a. Bucket
# 30 is validation, 31 is test, and so are the edge cases. Because last digits enter by their sum, a drawn pair that is held
# out leaves by a step of 2 of its last digit, a0 -> (a0 + 2) mod 10: from 30 and 31 to 0, 1, 22 or 23. One pass, no
# redrawing, the last digit as even as before. That no edge case is led to another, or to a bucket held out, or reached by a
# step from one, is so for these multipliers, and a test goes through all of them. h(0) is 0, so every pair of one-digit
# numbers but the edge cases is there to train on.

BUCKETS = 32
_SALTS = (0x9E3779B97F4A7C15 - 2**64, 0xD1B54A32D192ED03 - 2**64)


def _logical(x: Tensor, bits: int) -> Tensor:
    """x >> bits of int64 as if unsigned."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _bucket(last: Tensor, rest: Tensor) -> Tensor:
    """int64 [...] below 32: last [..., 2] digits of the pair, rest [..., 2] the numbers without them."""
    mixed = rest * _SALTS[0]
    mixed = (mixed ^ _logical(mixed, 32)) * _SALTS[1]
    return (_logical(mixed, 59) + last).sum(dim=-1) & (BUCKETS - 1)


def _code(pairs: Tensor) -> Tensor:
    """int64 [...] of pairs [..., 2]: equal for equal pairs and for b + a, for others practically never."""
    a, b = pairs.unbind(dim=-1)
    return torch.minimum(a, b) * _SALTS[0] + torch.maximum(a, b)


@functools.lru_cache(maxsize=8)
def _edge_codes(device: torch.device) -> Tensor:
    return _code(torch.tensor(EDGES)).unique().to(device)


def _powers(count: int, device) -> Tensor:
    """int64 [count]: 1, 10, 100, ..."""
    return torch.pow(10, torch.arange(count, device=device))


def _numbers(digits: Tensor) -> Tensor:
    """int64 [...]: what digits [..., W], the lowest first, are worth."""
    return (digits * _powers(digits.shape[-1], digits.device)).sum(dim=-1)


def _split(digits: Tensor) -> Tensor:
    """int64 [...]: index into SPLITS of pairs given by digits [..., 2, W]."""
    last, rest = digits[..., 0], _numbers(digits[..., 1:])
    found = (_bucket(last, rest) - (BUCKETS - 3)).clamp_min(0)
    return torch.where(torch.isin(_code(10 * rest + last), _edge_codes(digits.device)), 2, found)


def split_of(pairs) -> Tensor:
    """int64 [n]: to which of SPLITS pairs [n, 2] of numbers from 0 up belong. The edge cases are of the test."""
    pairs = torch.as_tensor(pairs, dtype=torch.int64)
    if pairs.dim() != 2 or pairs.shape[1] != 2 or bool((pairs < 0).any()):
        raise ValueError(f"pairs: shape {list(pairs.shape)}, needs [n, 2] numbers of at least 0")
    return _split(_digits(pairs, 19))


def _digits(numbers: Tensor, width: int) -> Tensor:
    """int64 [..., width] of numbers [...]: digits, the lowest first."""
    return numbers[..., None] // _powers(width, numbers.device) % 10


# ------------------------------------------------------------------------------------------------ the task


def _carry(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of digits [..., W], the lowest first -> digits of the sum and travel of the carries, both int64 [..., W + 1].

    A place whose digits sum to 10 or more sends a carry, one that sums to 9 hands on what it got, any other sends none. So
    a carry leaves place i when the last place up to i that does not sum to 9 sends one, and it has travelled from there.
    travel: places that the carry into this one has come, 1 from where it arose next door; 0 where none comes.
    """
    W = sums.shape[-1]
    place = torch.arange(1, W + 1, device=sums.device)
    # Place and whether it sends in one number, so that a running maximum finds both; 0 while all places hand on.
    last = torch.where(sums == 9, 0, 2 * place + (sums > 9)).cummax(dim=-1).values
    none = torch.zeros_like(sums[..., :1])
    travel = torch.cat([none, (last & 1) * (place + 1 - (last >> 1))], dim=-1)
    total = torch.cat([sums, none], dim=-1) + (travel > 0)
    return torch.where(total > 9, total - 10, total), travel


def _streams(keys: Tensor, count: int) -> Tensor:
    """int64 [..., count] of keys [...]: 59 random bits each, by the finalizer of SplitMix64 (Steele, Lea, Flood 2014)."""
    x = keys[..., None] + _SALTS[0] * torch.arange(1, count + 1, device=keys.device)
    x = (x ^ _logical(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _logical(x, 27)) * (0x94D049BB133111EB - 2**64)
    return _logical(x ^ _logical(x, 31), 5)


def _below(bits: Tensor, count) -> Tensor:
    """int64: a number below `count` (at most 2^31) from 32 random bits."""
    return (bits * count) >> 32


@dataclass(frozen=True, kw_only=True)
class Addition(answers.AnswerTask):
    """Two numbers of `width` digits, padded with zeros; then their sum, the lowest digit first, and an end token.

        0000000005+0000000007= 21000000000.        5 + 7 = 12; 22 tokens of question, 12 of answer, 33 read

    Ids: a digit is its own, + 10, = 11, space 12, end 13. Only the answer is scored. One size per row is drawn from
    `digits`, and both numbers are uniform below 10^size.

    carry_share: so many rows, on average, are rich in carries: a stretch of places, uniform in length (2 to size) and then
        in place, whose digits sum to 9 in all but its lowest, so that whatever arises there is handed on to its end, a
        carry or, as often, none: a model must not learn that nines mean a carry. Rows that are not chosen are the same
        for every share, so a share that fades takes rows away one by one and changes no other.
    vocab_size: 14 or more; or 10, where every symbol is written as 0, as the smallest adders of the contest have it.
    spaced: a space before each number, which makes the question 24 tokens long: _ 5 + _ 7 =
    order: of the digits of the numbers: "msd" the highest first, "lsd" the lowest first. The sum is never turned round.
    split: which pairs: "train", "validation" (1/32 of all pairs) or "test" (1/32, and the edge cases). See the module.
    """

    width: int = 10
    digits: tuple[int, int] = (1, 10)  # sizes of the numbers, both ends included
    carry_share: float = 0.0
    order: str = "msd"
    spaced: bool = False
    end: bool = True  # an end token after the sum
    vocab_size: int = 14
    split: str = "train"

    def validate(self):
        self.require_positive("width", "vocab_size")
        self.require(self.width <= WIDEST, "width", f"needs at most {WIDEST} digits")
        why = "digits take ids 0 to 9 and symbols 10 to 13: needs 14 or more, or 10 to write every symbol as 0"
        self.require(self.vocab_size == 10 or self.vocab_size > END, "vocab_size", why)
        ok = 1 <= self.digits[0] <= self.digits[1] <= self.width
        self.require(ok, "digits", f"needs sizes (from, to) with 1 <= from <= to <= width = {self.width}")
        self.require(0 <= self.carry_share <= 1, "carry_share", "needs a share from 0 to 1")
        self.require_choice("order", ("msd", "lsd"))
        self.require_choice("split", SPLITS)
        why = "is empty for numbers of one digit, which all train: needs digits up to 2 or more"
        self.require(self.split != "validation" or self.digits[1] > 1, "split", why)

    @property
    def prompt_len(self) -> int:
        return 2 * (self.width + 1 + self.spaced)

    @property
    def choices(self) -> tuple[int, ...]:
        """10 below the largest size, 2 at the place after it, 1 above that and at the end."""
        most = self.digits[1]
        return (10,) * most + (2,) + (1,) * (self.width - most + self.end)

    def held_out(self, split: str = "test") -> Addition:
        """The task that measures this one: the same format, uniform numbers of all digits, pairs of `split`.

        ValueError when this task draws pairs of that split itself, so that nothing would be held out.
        """
        if split == self.split or split == "train":
            others = [name for name in SPLITS[1:] if name != self.split]
            why = f"{type(self).__name__}.split = {self.split!r} overlaps with it; choose one of {others}"
            raise ValueError(f"split = {split!r}: {why}")
        return replace(self, split=split, digits=(self.width, self.width), carry_share=0.0)

    # -------------------------------------------------------------------------------------------- drawing

    def _draw(self, n: int, generator: torch.Generator) -> tasks.Batch:
        if self.split == "train":
            return self.rows(_keys(n, generator))
        kept, missing = [], n
        while missing:  # one pair in 32 is found; batches of bounded size, whatever n is
            digits = self._operands(_keys(min(40 * missing, 2**17), generator))
            kept.append(digits[_split(digits) == SPLITS.index(self.split)][:missing])
            missing -= len(kept[-1])
        return self._encode(torch.cat(kept))

    def rows(self, keys: Tensor) -> tasks.Batch:
        """The rows that int64 keys [..., n] name, on the keys' device: a key gives the same row on every device.

        For training without a generator: any 64 bits that tell seed, step and row apart do as a key, and no step here depends
        on a value, so that none waits for the device. `sample` draws its keys from the generator.
        Held-out pairs are found by search: ValueError unless split is "train".
        """
        self.require(self.split == "train", "split", "a key names a pair to train on; held-out ones come from sample")
        digits = self._operands(keys)
        last = digits[..., 0, 0]
        last.copy_(torch.where(_split(digits) == 0, last, (last + 2) % 10))
        return self._encode(digits)

    def _operands(self, keys: Tensor) -> Tensor:
        """int64 [..., 2, W] of keys [...]: digits of two numbers, the lowest first, of whatever split."""
        W, (least, most) = self.width, self.digits
        bits = _streams(keys, 4)
        place = torch.arange(W, device=keys.device)
        # 59 bits as a fraction: its decimals are the digits. Products wrap modulo 2^64, which leaves the low 59 bits right.
        decimals = (bits[..., :2, None] * _powers(W, keys.device)) & (2**59 - 1)
        size = least + _below(bits[..., 2] & 0xFFFFFFFF, most - least + 1)
        digits = torch.where(place < size[..., None, None], (decimals * 10) >> 59, 0)
        if self.carry_share == 0:
            return digits
        rich = (bits[..., 2] >> 32) < round(self.carry_share * 2**27)
        length = 2 + _below(bits[..., 3] & 0xFFFFFFFF, size - 1)
        # A number of one digit has no stretch; its row stays as it is.
        start = ((bits[..., 3] >> 32) * (size - length + 1)) >> 27
        start, stop = start[..., None], torch.minimum(start + length, size)[..., None]
        nine = rich[..., None] & (place > start) & (place < stop)
        first, second = digits.unbind(dim=-2)
        return torch.stack([first, torch.where(nine, 9 - first, second)], dim=-2)

    # -------------------------------------------------------------------------------------------- writing and reading

    def _id(self, symbol: int) -> int:
        return symbol if self.vocab_size > END else 0

    def _encode(self, digits: Tensor) -> tasks.Batch:
        """Rows of digits [..., 2, W], the lowest first."""
        column = lambda symbol: torch.full_like(digits[..., 0, :1], self._id(symbol))  # noqa: E731
        first, second = (digits.flip(-1) if self.order == "msd" else digits).unbind(dim=-2)
        space = [column(SPACE)] if self.spaced else []
        prompt = torch.cat([*space, first, column(PLUS), *space, second, column(EQUALS)], dim=-1)
        return self.build(prompt, self._solution(digits))

    def _solution(self, digits: Tensor) -> Tensor:
        total, _ = _carry(digits.sum(dim=-2))
        return torch.cat([total, torch.full_like(total[..., :1], self._id(END))], dim=-1) if self.end else total

    def _solve(self, prompts: Tensor) -> Tensor:
        return self._solution(self._read(prompts))

    def _read(self, prompts: Tensor) -> Tensor:
        """int64 [..., 2, W] of prompts [..., P]: digits, the lowest first."""
        digits = prompts.unflatten(-1, (2, -1))[..., self.spaced : self.spaced + self.width]
        return digits.flip(-1) if self.order == "msd" else digits

    def encode(self, pairs: Tensor | Sequence[tuple[int, int]]) -> tasks.Batch:
        """Rows of given pairs of numbers [n, 2], of whatever split, from 0 to 10^width - 1. ValueError otherwise."""
        pairs = torch.as_tensor(pairs, dtype=torch.int64)
        if pairs.dim() != 2 or pairs.shape[1] != 2 or len(pairs) == 0:
            raise ValueError(f"pairs: shape {list(pairs.shape)}, needs [n, 2] with n at least 1")
        if int(pairs.min()) < 0 or int(pairs.max()) >= 10**self.width:
            why = f"needs numbers from 0 to {10**self.width - 1}, width = {self.width}"
            raise ValueError(f"pairs: from {int(pairs.min())} to {int(pairs.max())}, {why}")
        return self._encode(_digits(pairs, self.width))

    def edges(self) -> tasks.Batch:
        """The contest's ten fixed pairs in its order, no task's to train on. ValueError where width is below 10."""
        return self.encode(EDGES)

    def pairs(self, batch: tasks.Batch) -> Tensor:
        """int64 [..., n, 2]: the numbers that the rows add."""
        return _numbers(self._read(self.prompts(batch)))

    def numbers(self, written: Tensor) -> Tensor:
        """int64 [...]: the number that answers [..., A] spell; -1 where a symbol stands for a digit or no end follows."""
        digits = written[..., : self.width + 1]
        spelt = (digits < 10).all(dim=-1) & (digits >= 0).all(dim=-1)
        if self.end:
            spelt &= written[..., -1] == self._id(END)
        return torch.where(spelt, _numbers(digits), -1)

    def text(self, tokens: Tensor) -> str:
        """One row of ids [T] as characters: digits, + and =, _ a space, . the end, ? an id of none of them."""
        known = {**{i: str(i) for i in range(10)}, **SYMBOLS}
        return "".join(known.get(i, "?") for i in tokens.tolist())

    def example(self) -> str:
        """One literal row (seed 0): as text, and as position, token, target."""
        row = self.sample(1, torch.Generator().manual_seed(0))
        asked, answer = self.text(self.prompts(row)[0]), self.text(self.answers(row.targets)[0])
        (a, b), longest = self.pairs(row)[0].tolist(), int(self.chains(row)[0])
        note = f"{a} + {b} = {a + b}, lowest digit first; longest carry chain {longest}"
        return f"text     {asked} {answer}\nmeaning  {note}\n{super().example()}"

    # -------------------------------------------------------------------------------------------- carries

    def travel(self, batch: tasks.Batch) -> Tensor:
        """int64 [..., n, W + 1]: places that the carry into each place of the sum has come, 0 where none comes.

        A carry arises where two digits sum to 10 or more and is handed on by every place that sums to 9. Places in a row
        that each send their own, as in 99 + 99, are chains of length 1: none of them waits for another (Burks, Goldstine
        and von Neumann 1946, on the time that an adder takes).
        """
        return _carry(self._read(self.prompts(batch)).sum(dim=-2))[1]

    def chains(self, batch: tasks.Batch) -> Tensor:
        """int64 [..., n]: the longest carry chain of each row, 0 (no carry) to width."""
        return self.travel(batch).amax(dim=-1)

    def by_chain(self, right: Tensor, batch: tasks.Batch) -> dict[int, tuple[int, int]]:
        """Longest carry chain -> (whole answers right, rows), for the lengths that occur, ascending.

        right: bool [n], as from `whole` or answers.exact. `analysis.Rate(*pair)` gives the interval. Of uniform pairs one
        in 44,000 has a chain of 6 places or more; a test task with carry_share 1 has enough of every length.
        """
        chains = self.chains(batch)
        if right.shape != chains.shape or right.dim() != 1 or right.dtype != torch.bool:
            raise ValueError(f"right: {right.dtype} {list(right.shape)}, needs bool [{len(batch.tokens)}]")
        rows = torch.bincount(chains.cpu())
        hits = torch.bincount(chains.cpu()[right.cpu()], minlength=len(rows))
        return {k: (int(hits[k]), int(rows[k])) for k in range(len(rows)) if rows[k]}


def _keys(n: int, generator: torch.Generator) -> Tensor:
    """int64 [n]: any 64 bits."""
    return torch.randint(-(2**63), 2**63 - 1, (n,), generator=generator)
