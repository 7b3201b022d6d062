"""Measure a model: accuracy with intervals, losses, profiles by distance and length, memory diagnostics, statistics.

Everything here reads a model and a task and returns numbers, as a `Rate` or as a pandas table; nothing trains.
A model is anything called as model(tokens, targets) or model(tokens, positions=mask) that returns `model.Output`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

import data
import model as models

# ------------------------------------------------------------------------------------------------ statistics


def _require_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level = {level!r}: needs a probability between 0 and 1, such as 0.95")


@dataclass(frozen=True)
class Rate:
    """A share of successes p = count / total with its Wilson score interval, z the normal quantile of `level`:

        (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n),    n = total / design

    count, total: successes and trials, integers, total >= 1. level: of the interval.
    design: how many times the variance is that of independent trials (Kish's design effect, at least 1). Answers of one
    row share its haystack and may fail together; `Rate.of` measures it.
    Prints as `98.7% [97.8, 99.2] (987/1,000)`. ValueError for counts that are none.
    """

    count: int
    total: int
    level: float = 0.95
    design: float = 1.0

    def __post_init__(self):
        for name, value in (("count", self.count), ("total", self.total)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"Rate.{name} = {value!r}: needs an integer")
        if self.total < 1:
            raise ValueError(f"Rate.total = {self.total}: a rate needs at least one trial")
        if not 0 <= self.count <= self.total:
            raise ValueError(f"Rate.count = {self.count}: needs a number from 0 to total = {self.total}")
        _require_level(self.level)
        if not 1 <= self.design <= self.total:
            raise ValueError(f"Rate.design = {self.design!r}: needs a factor from 1 to total = {self.total}")

    @classmethod
    def of(cls, correct, row, *, level: float = 0.95) -> Rate:
        """The rate of answers `correct` [N] bool that came in rows numbered `row` [N] int.

        With m_r answers in row r, c_r of them right, R rows: the variance between rows is
        R / (R - 1) sum (c_r - p m_r)^2 / N^2, and the design effect its ratio to p (1 - p) / N. Where every answer is right, or
        none, rows show no variance and answers count as independent; answers of a single row count as one trial.
        Source: Kish, "Survey Sampling" (1965); Wilson at the effective size after Korn and Graubard (1998).
        """
        frame = pd.DataFrame({"correct": np.asarray(correct, dtype=np.int64), "row": np.asarray(row)})
        count, total = int(frame["correct"].sum()), len(frame)
        rows = frame.groupby("row")["correct"].agg(["sum", "size"])
        R, p, design = len(rows), count / max(total, 1), 1.0
        if R == 1:
            design = float(total)
        elif R < total and 0 < count < total:
            between = R / (R - 1) * float(((rows["sum"] - p * rows["size"]) ** 2).sum()) / total**2
            design = min(max(1.0, between * total / (p * (1 - p))), float(total))
        return cls(count, total, level, design)

    @property
    def value(self) -> float:
        return self.count / self.total

    @property
    def interval(self) -> tuple[float, float]:
        z, n, p = float(stats.norm.ppf((1 + self.level) / 2)), self.total / self.design, self.value
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        low, high = ((p + z * z / (2 * n) + side) / (1 + z * z / n) for side in (-half, half))
        # With no failure, or no success, one end is the rate itself but for rounding.
        return (0.0 if self.count == 0 else low), (1.0 if self.count == self.total else high)

    @property
    def low(self) -> float:
        return self.interval[0]

    @property
    def high(self) -> float:
        return self.interval[1]

    def __str__(self):
        return f"{self.value:.1%} [{100 * self.low:.1f}, {100 * self.high:.1f}] ({self.count:,}/{self.total:,})"

    def row(self) -> dict:
        """For tables: accuracy, low, high, trials."""
        return {"accuracy": self.value, "low": self.low, "high": self.high, "trials": self.total}


def mean_interval(values, *, level: float = 0.95) -> tuple[float, float, float]:
    """Mean of independent values with its Student t interval: (mean, low, high).

    ValueError for fewer than 2 values or any that is not finite. Equal values give an interval of no width: of successes
    and failures, give a `Rate`.
    """
    values = np.asarray(values, dtype=np.float64)
    _require_level(level)
    if values.ndim != 1 or values.size < 2:
        raise ValueError(f"values: an interval needs at least 2 independent values, was given shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(
            f"values: {int((~np.isfinite(values)).sum())} of {values.size} are not finite; drop or fix them"
        )
    return _weighted_interval(values, np.ones_like(values), level)


def _weighted_interval(values: np.ndarray, weights: np.ndarray, level: float) -> tuple[float, float, float]:
    """Weighted mean m and its t interval, with the variance n / (n - 1) sum (w_i / W)^2 (x_i - m)^2 of a ratio of sums.

    Equal weights give the ordinary t interval.
    """
    n, share = values.size, weights / weights.sum()
    mean = float((share * values).sum())
    error = math.sqrt(n / (n - 1) * float((share**2 * (values - mean) ** 2).sum()))
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * error
    return mean, mean - half, mean + half


# ------------------------------------------------------------------------------------------------ running a model


def device_of(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextlib.contextmanager
def evaluating(model: torch.nn.Module, *, precision: str = "auto"):
    """Evaluation mode, no gradients, and the precision training uses (auto: bf16 autocast on a GPU); then as before."""
    if precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f"precision = {precision!r}: choose one of 'auto', 'fp32', 'bf16'")
    was_training = model.training
    kind = device_of(model).type
    bf16 = precision == "bf16" or (precision == "auto" and kind == "cuda" and torch.cuda.is_bf16_supported())
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(kind, dtype=torch.bfloat16, enabled=bf16):
            yield
    finally:
        model.train(was_training)


def fresh(seed: int) -> torch.Generator:
    """A generator for test data. Training seeds are 32-bit hashes (`train.batch_seed`), which a small seed meets by accident
    once in 2^32 batches; `data.test_set(exclude=...)` rules even that out row by row."""
    return torch.Generator().manual_seed(seed)


BATCH_TOKENS = 2**17  # tokens of one evaluation batch, at most
SEGMENT = 2**16  # tokens of a row that go through the model at once, at most
BATCH_LOGITS = 2**26  # logits of one evaluation batch, at most: 256 MiB in fp32


def draws(task: data.Task, trials: int, seed: int):
    """Fresh batches of `task` until `trials` answers are scored. ValueError where it scores none, or for trials < 1."""
    if not isinstance(trials, int) or trials < 1:
        raise ValueError(f"trials = {trials!r}: needs a number of answers of at least 1")
    total, generator, per_row = 0, fresh(seed), max(1.0, task.scored_per_row)
    most = max(1, min(BATCH_TOKENS // task.seq_len, int(BATCH_LOGITS / (per_row * task.vocab_size))))
    while total < trials:
        batch = task.sample(min(most, math.ceil((trials - total) / per_row)), generator)
        scored = int((batch.targets != -100).sum())
        if scored == 0:
            raise ValueError(
                f"task: {type(task).__name__} scored nothing in {len(batch.tokens)} rows; it has no answers"
            )
        yield batch
        total += scored


def batches(task: data.Task, n: int, *, seed: int, tokens_per_batch: int = BATCH_TOKENS):
    """n fresh rows of `task` in batches of about `tokens_per_batch` tokens."""
    generator, size = fresh(seed), max(1, tokens_per_batch // task.seq_len)
    for start in range(0, n, size):
        yield task.sample(min(size, n - start), generator)


def score(model: torch.nn.Module, batch: data.Batch, *, segment: int = SEGMENT) -> tuple[Tensor, Tensor]:
    """Which scored positions the model answers right. Returns (correct [N] bool, scored [B, T] bool), both on the CPU.

    Rows longer than `segment` tokens go through a model of constant state piece by piece, so that a million tokens need the
    memory of one piece.
    """
    scored = batch.targets != -100
    device, T = device_of(model), scored.shape[1]
    if T <= segment:
        logits = model(batch.tokens.to(device), positions=scored.to(device)).logits
        return logits.argmax(-1).cpu() == batch.targets[scored], scored
    answers, state = torch.full_like(batch.targets, -100), None
    for start in range(0, T, segment):
        part = slice(start, start + segment)
        asked = scored[:, part]
        out = model(batch.tokens[:, part].to(device), positions=asked.to(device), state=state)
        state = out.state
        answers[:, part][asked] = out.logits.argmax(-1).cpu()
    return answers[scored] == batch.targets[scored], scored


def answers(
    model: torch.nn.Module, task: data.Task, *, trials: int = 1000, seed: int = 10_000, precision: str = "auto"
) -> pd.DataFrame:
    """One line per scored answer, at least `trials` of them: row, position, target, correct, and the task's distance
    (tokens strictly between the value and the position that must recall it) and needle index (-1: none)."""
    frames, drawn = [], 0
    with evaluating(model, precision=precision):
        for batch in draws(task, trials, seed):
            correct, scored = score(model, batch)
            row, position = scored.nonzero(as_tuple=True)
            frame = {"row": row + drawn, "position": position, "target": batch.targets[scored], "correct": correct}
            for name in ("distance", "index"):
                frame[name] = batch.info[name][scored] if name in batch.info else torch.full_like(position, -1)
            frames.append(pd.DataFrame({k: v.numpy() for k, v in frame.items()}))
            drawn += len(batch.tokens)
    return pd.concat(frames, ignore_index=True)


def accuracy(
    model: torch.nn.Module, task: data.Task, *, trials: int = 1000, seed: int = 10_000, precision: str = "auto"
) -> Rate:
    """Exact accuracy over at least `trials` scored answers of fresh rows of `task`.

    A row with several answers counts once per answer, so about trials / answers rows are drawn, and the interval allows
    for answers of a row that fail together (`Rate.of`). ValueError for a task that scores nothing.
    """
    frame = answers(model, task, trials=trials, seed=seed, precision=precision)
    return Rate.of(frame["correct"], frame["row"])


def _rates(frame: pd.DataFrame, by, name: str) -> pd.DataFrame:
    parts = frame.groupby(by, observed=True)
    return pd.DataFrame([{name: key, **Rate.of(part["correct"], part["row"]).row()} for key, part in parts])


def _require_known(frame: pd.DataFrame, name: str, task: data.Task) -> None:
    if (frame[name] < 0).any():
        raise ValueError(f"task: {type(task).__name__} gives no {name} for its answers, so none can be grouped by it")


def _changed(task: data.Task, name: str, value) -> data.Task:
    """`task` with one field replaced; ValueError where it has no such field."""
    if name not in {f.name for f in dataclasses.fields(task)}:
        raise ValueError(f"task: {type(task).__name__} has no field {name!r} to set to {value!r}")
    return dataclasses.replace(task, **{name: value})


def accuracy_by_index(model, task: data.Task, *, trials: int = 1000, seed: int = 10_000) -> pd.DataFrame:
    """Accuracy of each needle in order of its position in the text, about `trials` answers in all."""
    frame = answers(model, task, trials=trials, seed=seed)
    _require_known(frame, "index", task)
    return _rates(frame, "index", "index")


def accuracy_by_distance(
    model, task: data.Task, *, trials: int = 1000, bins: int = 6, seed: int = 10_000
) -> pd.DataFrame:
    """Accuracy over the tokens between a needle and its question, in at most `bins` groups of about equal size.

    About `trials` answers in all. Columns: distance (median of the group), nearest, furthest, accuracy, low, high, trials.
    """
    if not isinstance(bins, int) or bins < 1:
        raise ValueError(f"bins = {bins!r}: needs a number of groups of at least 1")
    frame = answers(model, task, trials=trials, seed=seed)
    _require_known(frame, "distance", task)
    edges = np.unique(np.quantile(frame["distance"], np.linspace(0, 1, bins + 1)[1:]))
    # Group i holds the distances in (edge[i - 1], edge[i]]; equal edges, as of a fixed distance, are one group.
    group = np.searchsorted(edges, frame["distance"].to_numpy(), side="left")
    table = _rates(frame, group, "distance")
    spans = frame.groupby(group)["distance"]
    table["distance"] = spans.median().to_numpy()
    table.insert(1, "nearest", spans.min().to_numpy())
    table.insert(2, "furthest", spans.max().to_numpy())
    return table


def accuracy_by_length(model, task: data.Task, lengths, *, trials: int = 1000, seed: int = 10_000) -> pd.DataFrame:
    """Accuracy of the same task at other sequence lengths (the field `seq_len` of the task), one row a length."""
    rows = []
    for length in lengths:
        rate = accuracy(model, _changed(task, "seq_len", length), trials=trials, seed=seed)
        rows.append({"seq_len": length, **rate.row()})
    return pd.DataFrame(rows)


def loss(model: torch.nn.Module, batch_list, *, precision: str = "auto") -> tuple[float, float, float, int]:
    """Mean loss in nats per scored token with its 95% t interval over batches: (mean, low, high, scored tokens).

    Batches count by their scored tokens, in the mean and in its interval. ValueError for fewer than 2 batches that score.
    """
    values, weights = [], []
    device = device_of(model)
    with evaluating(model, precision=precision):
        for batch in batch_list:
            count = int((batch.targets != -100).sum())
            if count:
                values.append(float(model(batch.tokens.to(device), batch.targets.to(device)).loss))
                weights.append(count)
    if len(values) < 2:
        raise ValueError(
            f"batch_list: an interval needs at least 2 batches with scored tokens, was given {len(values)}"
        )
    mean, low, high = _weighted_interval(np.array(values), np.array(weights, dtype=np.float64), 0.95)
    return mean, low, high, sum(weights)


def loss_by_position(
    model: torch.nn.Module, rows: data.Batch, edges: Iterable[int], *, rows_per_batch: int = 4, precision: str = "auto"
) -> pd.DataFrame:
    """Mean loss in nats per scored token by position in the row, with its 95% t interval over rows.

    edges: ascending positions; bucket i holds those from edges[i] to edges[i + 1] - 1. Columns: position (the first of the
    bucket), until (the last), loss, low, high, tokens, rows. ValueError for edges outside the row or out of order, and for
    a bucket that fewer than 2 rows score in.
    """
    edges = _edges(edges, rows)
    nats, table = _nats(model, rows, at_once=rows_per_batch, precision=precision), []
    for a, b in itertools.pairwise(edges):
        part = nats[:, a:b]
        counts = (~part.isnan()).sum(1)
        scored = counts > 0
        if scored.sum() < 2:
            raise ValueError(f"rows: {int(scored.sum())} rows are scored from {a} to {b - 1}; an interval needs 2")
        means, weights = part[scored].nanmean(1).numpy(), counts[scored].double().numpy()
        mean, low, high = _weighted_interval(means, weights, 0.95)
        row = {"position": a, "until": b - 1, "loss": mean, "low": low, "high": high}
        table.append(row | {"tokens": int(weights.sum()), "rows": len(means)})
    return pd.DataFrame(table)


def _nats(model: torch.nn.Module, rows: data.Batch, *, at_once: int = 4, precision: str = "auto") -> Tensor:
    """float64 [n, T]: loss of every scored token, nan elsewhere."""
    device, nats = device_of(model), torch.full(rows.tokens.shape, math.nan, dtype=torch.float64)
    with evaluating(model, precision=precision):
        for start in range(0, len(rows.tokens), at_once):
            part = rows.rows(slice(start, start + at_once))
            logits = model(part.tokens.to(device), positions=part.scored.to(device)).logits.float()
            found = F.cross_entropy(logits, part.targets[part.scored].to(device), reduction="none")
            nats[start : start + at_once][part.scored] = found.double().cpu()
    return nats


def _edges(edges: Iterable[int], rows: data.Batch) -> list[int]:
    edges, T = list(edges), rows.tokens.shape[1]
    if len(edges) < 2 or edges != sorted(set(edges)) or not 0 <= edges[0] < edges[-1] <= T:
        raise ValueError(f"edges = {edges}: needs at least 2 ascending positions from 0 to {T}")
    return edges


# ------------------------------------------------------------------------------------------------ ablations


PATHS = {"memory": ("G", "out"), "read": ("S", "read_out"), "window": ("S", "out")}


@contextlib.contextmanager
def without(model: models.TransparentHybrid, *paths: str):
    """The model with some of its paths adding nothing to the residual stream, and afterwards as it was.

    paths: "memory" (what G layers read), "read" (what S layers read of a memory), "window" (their attention). ValueError for
    another one, or one that the model does not have.
    """
    unknown = [path for path in paths if path not in PATHS]
    if unknown or not paths:
        raise ValueError(f"paths = {paths}: choose of {', '.join(map(repr, PATHS))}")
    weights = []
    for letter, name in (PATHS[path] for path in paths):
        pairs = zip(model.cfg.layer_pattern, model.layers, strict=True)
        found = [getattr(layer, name).weight for x, layer in pairs if x == letter and hasattr(layer, name)]
        if not found:
            raise ValueError(f"paths = {paths}: {model.cfg} has no layer {letter} with {name}")
        weights += found
    kept = [w.detach().clone() for w in weights]
    try:
        with torch.no_grad():
            for w in weights:
                w.zero_()
        yield model
    finally:
        with torch.no_grad():
            for w, old in zip(weights, kept, strict=True):
                w.copy_(old)


# What `ablation` takes away, by names of PATHS.
ABLATIONS = {
    "without the read": ("read",),
    "without the memory": ("memory",),
    "without both": ("memory", "read"),
    "without the window": ("window",),
}


def ablation(net: models.TransparentHybrid, rows: data.Batch, edges: Iterable[int]) -> pd.DataFrame:
    """Loss on rows of text of a trained hybrid, whole and without some of its paths, by position in the row.

    edges: ascending positions, as in `loss_by_position`; every position between the first and the last is scored.
    One line per variant for all of them (position "all"), and one per bucket (until: its last position). loss, low, high: nats
    per token and its 95% t interval over rows; added, added low, added high: the loss beyond that of the whole model, paired
    by row. ValueError for rows that are not scored throughout, and for edges outside of them or out of order.
    """
    edges = _edges(edges, rows)
    if not rows.scored.all():
        raise ValueError("rows: some positions are not scored; needs rows of text, as from LanguageModel.windows")
    spans = [(edges[0], edges[-1]), *zip(edges[:-1], edges[1:], strict=True)]
    whole, table = _nats(net, rows), []
    for name, paths in {"whole": (), **ABLATIONS}.items():
        nats = whole
        if paths:
            with without(net, *paths):
                nats = _nats(net, rows)
        for i, (a, b) in enumerate(spans):
            mine, reference = (x[:, a:b].mean(1).numpy() for x in (nats, whole))
            line = dict(variant=name, position=a if i else "all", until=b - 1)
            line |= dict(zip(("loss", "low", "high"), mean_interval(mine), strict=True))
            added = mean_interval(mine - reference)
            line |= dict(zip(("added", "added low", "added high"), added, strict=True))
            table.append(line | dict(rows=len(mine)))
    return pd.DataFrame(table)


def accuracy_without(net: models.TransparentHybrid, task: data.Task, *, trials: int = 1000) -> pd.DataFrame:
    """Accuracy of a trained hybrid, whole and without some of its paths, on the same fresh rows of `task`."""
    table = [dict(variant="whole", **accuracy(net, task, trials=trials).row())]
    for name, paths in ABLATIONS.items():
        with without(net, *paths):
            table.append(dict(variant=name, **accuracy(net, task, trials=trials).row()))
    return pd.DataFrame(table).assign(chance=task.chance)


def state_versus_window(model, task: data.Task, *, trials: int = 1000, seed: int = 10_000) -> pd.DataFrame:
    """Accuracy with the needle inside the attention window and outside it, where only the memory can hold it.

    Inside: window / 2 tokens lie between the value and its question, so that one window layer sees it; outside: twice what
    all window layers together can see. Needs a needle task (its field `distance`) and a model with `cfg.window_size`.
    ValueError where the row is too short to put the needle outside, or the window sees the current token alone.
    """
    window = model.cfg.window_size
    # A stack of n window layers sees n (window - 1) tokens back, so "outside" starts beyond all of them.
    reach = window * max(1, model.cfg.layer_pattern.count("S"))
    if window < 2:
        raise ValueError(f"model: its window of {window} token sees no earlier one; a needle cannot lie inside it")
    rows = []
    for place, distance in (("inside the window", min(window // 2, window - 2)), ("outside the window", 2 * reach)):
        rate = accuracy(model, _changed(task, "distance", distance), trials=trials, seed=seed)
        rows.append({"needle": place, "distance": distance, **rate.row()})
    return pd.DataFrame(rows)


def needle_removed(model, task: data.Task, *, trials: int = 1000, seed: int = 10_000) -> pd.DataFrame:
    """Accuracy with the needle and with its value overwritten by haystack, beside chance and the oracle's accuracy.

    A model that reads its context falls to chance; one that memorised answers does not.
    """
    rows = []
    for name, t in (("needle present", task), ("needle removed", _changed(task, "remove_needle", True))):
        best = oracle_accuracy(t, trials=trials, seed=seed)
        rate = accuracy(model, t, trials=trials, seed=seed)
        rows.append({"": name, **rate.row(), "oracle": best.value, "chance": task.chance})
    return pd.DataFrame(rows)


def fresh_ids(
    model, task: data.Task, fresh_range: tuple[int, int], *, trials: int = 1000, seed: int = 10_000
) -> pd.DataFrame:
    """Accuracy with values from the ids of training (`task.needle_range`) and from ids that training never asked for.

    fresh_range: ids [lo, hi) that share none with those of the task. A memory hands back whatever was written; a model
    that learned the ids of its training values falls to chance, or below it, on others.
    """
    before = _changed(task, "needle_range", fresh_range).values
    lo, hi = task.values
    if before[0] < hi and lo < before[1]:
        raise ValueError(
            f"fresh_range = {fresh_range}: overlaps the ids [{lo}, {hi}) of the task; set task.needle_range"
        )
    rows = []
    for name, ids in (("ids of training", task.values), ("fresh ids", before)):
        t = _changed(task, "needle_range", ids)
        rate = accuracy(model, t, trials=trials, seed=seed)
        rows.append({"": name, "from": ids[0], "to": ids[1] - 1, **rate.row(), "chance": t.chance})
    return pd.DataFrame(rows)


def oracle_accuracy(task: data.Task, *, trials: int = 1000, seed: int = 10_000) -> Rate:
    """Accuracy of the best possible answer to the task, from the tokens alone. ValueError where it has none."""
    count = total = 0
    for batch in draws(task, trials, seed):
        scored = batch.targets != -100
        count += int((task.oracle(batch)[scored] == batch.targets[scored]).sum())
        total += int(scored.sum())
    return Rate(count, total)


# ------------------------------------------------------------------------------------------------ looking inside


def records(model: models.TransparentHybrid, tokens: Tensor) -> list[dict]:
    """The diagnostics of every layer on tokens [B, T], in fp32, without building logits."""
    tokens = tokens.to(device_of(model))
    with evaluating(model, precision="fp32"):
        nowhere = torch.zeros_like(tokens, dtype=torch.bool)
        return model(tokens, positions=nowhere, diagnostics=True).diagnostics


def _half_life(log_decay: float) -> float:
    return math.log(0.5) / log_decay if log_decay < 0 else math.inf


def random_similarity(K: int) -> float:
    """Mean |cosine| of random directions of width K: Gamma(K / 2) / (sqrt(pi) Gamma((K + 1) / 2)), about sqrt(2 / (pi K))."""
    return math.exp(math.lgamma(K / 2) - math.lgamma((K + 1) / 2)) / math.sqrt(math.pi)


def diagnose(model: models.TransparentHybrid, tokens: Tensor) -> pd.DataFrame:
    """One row per layer: gates, half-life, key similarity, state norm and rank, and what each path adds.

    beta: mean write strength. half_life: tokens after which the mean log-decay has halved the memory (inf: no decay), and
    `best_half_life` that of the head that remembers longest, which the mean can hide.
    key_similarity: mean |cosine| between keys of different positions; `random_keys` is its value for random directions
    (`random_similarity`).
    state_rank: exp of the entropy of the normalised singular values of the final state, 0 for an empty one.
    Norms are means over positions (or heads). Time and memory grow with T^2; a thousand tokens are enough.
    """
    rows = []
    for r in records(model, tokens):
        row = {"layer": f"{r['index']} {r['layer']}"}
        if r["layer"] == "G":
            g = r["log_decay"].double().mean((0, 1))  # [H]
            k = r["keys"].float().transpose(1, 2)  # [B, H, T, K]
            T, K = k.shape[-2:]
            cos = (k @ k.transpose(-1, -2)).abs()
            off = (cos.sum() - cos.diagonal(dim1=-2, dim2=-1).sum()) / (cos[..., 0, 0].numel() * T * max(T - 1, 1))
            s = torch.linalg.svdvals(r["state"].float())
            p = s / s.sum(-1, keepdim=True).clamp_min(1e-12)
            rank = torch.exp(-(p * p.clamp_min(1e-12).log()).sum(-1)) * (s.sum(-1) > 0)
            row |= {
                "beta": float(r["beta"].mean()),
                "half_life": _half_life(float(g.mean())),
                "best_half_life": _half_life(float(g.max())),
                "key_similarity": float(off),
                "random_keys": random_similarity(K),
                "state_norm": float(r["state"].float().norm(dim=(-2, -1)).mean()),
                "state_rank": float(rank.mean()),
                "read_norm": float(r["read"].float().norm(dim=-1).mean()),
            }
        elif r["layer"] != "S":
            row["attended_norm"] = float(r["attended" if "attended" in r else "read"].float().norm(dim=-1).mean())
        else:
            row["window_norm"] = float(r["window"].float().norm(dim=-1).mean())
            if "recalled" in r:
                row["recalled_norm"] = float(r["recalled"].float().norm(dim=-1).mean())
                row["read_gate"] = float(r["read_gate"].mean())
        rows.append(row)
    return pd.DataFrame(rows)


def retention(model: models.TransparentHybrid, tokens: Tensor, distances) -> pd.DataFrame:
    """Share of a write that its layer's decay leaves `distance` tokens later: exp(sum of log-decay), on real activations.

    One row per G layer and distance (integers of at least 0): the mean over heads, positions and sequences, and the best
    head's mean, since one head that remembers is enough. Beyond the length of `tokens` the sum is extended by each
    sequence's mean log-decay. What later writes erase is not in it.
    """
    distances = list(distances)
    wrong = [d for d in distances if not isinstance(d, int) or d < 0]
    if wrong:
        raise ValueError(f"distances: {wrong[0]!r} is no number of tokens; needs integers of at least 0")
    rows = []
    for r in records(model, tokens):
        if r["layer"] != "G":
            continue
        g = r["log_decay"].double()  # [B, T, H]
        total = g.cumsum(1)
        for distance in distances:
            if distance == 0:
                kept = torch.ones_like(g)
            elif distance < g.shape[1]:
                kept = torch.exp(total[:, distance:] - total[:, :-distance])
            else:
                kept = torch.exp(g.mean(1, keepdim=True) * distance)
            per_head = kept.mean((0, 1))
            row = {"layer": r["index"], "distance": distance, "kept": float(per_head.mean())}
            rows.append(row | {"best_head": float(per_head.max())})
    return pd.DataFrame(rows, columns=["layer", "distance", "kept", "best_head"])


def attention_map(record: dict, window: int) -> Tensor:
    """Softmax weights of an S layer from its diagnostics record: [B, H, T, T], for looking at; quadratic in T.

    softmax(q k^T / sqrt(D)) over the last `window` tokens, the current one included; rows sum to 1.
    """
    if "q" not in record:
        raise ValueError(
            f"record: is of layer {record.get('layer')!r}; attention weights need the record of an S layer"
        )
    q, k = record["q"].float(), record["k"].float()
    T = q.shape[2]
    i, j = torch.arange(T)[:, None], torch.arange(T)[None, :]
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    mask = ((j <= i) & (j > i - window)).to(scores.device)
    return torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1)
