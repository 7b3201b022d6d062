"""Controls: is this experiment able to show what it claims?

Each control returns a small pandas table whose column `ok` says whether the experiment passes, so that a notebook shows
them and `require` stops on them. They exist because each of the mistakes they catch was made, and believed, before.
"""

from __future__ import annotations

import dataclasses
import math

import pandas as pd
import torch
from scipy import stats

import analysis
import data

# Probability that a sound experiment fails a statistical control by chance. A 95% interval would fail one run in 40.
FALSE_ALARM = 1e-3


def require(table: pd.DataFrame) -> pd.DataFrame:
    """The table itself, or RuntimeError naming the rows that are not ok.

    A missing `ok` is not ok. ValueError for a table without that column or without rows: nothing was checked.
    """
    if "ok" not in table or not len(table):
        raise ValueError(f"table: nothing to require in {len(table)} rows of columns {list(table.columns)}")
    bad = table[[bool(pd.isna(value)) or not value for value in table["ok"]]]
    if len(bad):
        raise RuntimeError("audit failed:\n" + bad.to_string(index=False))
    return table


def _guessing(count: int, total: int, chance: float) -> float:
    """Probability that guesses right at the rate `chance` reach at least `count` of `total` (exact binomial)."""
    return float(stats.binom.sf(count - 1, total, chance))


def causality(model, tokens: torch.Tensor, *, positions=None, seed: int = 0) -> pd.DataFrame:
    """Perturb the future: with every token after t replaced, the logits up to t must be bit-equal.

    tokens [B, T]; positions: the t to try (default: 8 spread over the sequence). A model that reads its final state, or
    any other form of the future, changes earlier logits and fails. Runs in the model's own precision, without autocast.
    """
    tokens, T = tokens.cpu(), tokens.shape[1]
    if T < 2:
        raise ValueError(f"tokens: a future needs at least 2 tokens, was given T = {T}")
    positions = sorted({int(t) for t in torch.linspace(0, T - 2, 8)}) if positions is None else list(positions)
    wrong = [t for t in positions if not 0 <= t <= T - 2]
    if wrong or not positions:
        raise ValueError(f"positions = {positions}: needs positions from 0 to T - 2 = {T - 2}, which have a future")
    generator = torch.Generator().manual_seed(seed)
    device = analysis.device_of(model)
    # The ids that the test already uses are inside any vocabulary; shifting ranks among them changes every later token.
    ids = tokens.unique()
    if len(ids) < 2:
        raise ValueError("tokens: every token is the same; a perturbed future needs at least 2 different ids")
    rows = []
    with analysis.evaluating(model, precision="fp32"):
        whole = model(tokens.to(device)).logits.cpu()
        for t in positions:
            rank = torch.searchsorted(ids, tokens[:, t + 1 :].contiguous())
            shift = torch.randint(1, len(ids), rank.shape, generator=generator)
            changed = torch.cat([tokens[:, : t + 1], ids[(rank + shift) % len(ids)]], dim=1)
            again = model(changed.to(device)).logits.cpu()
            past = (whole[:, : t + 1] - again[:, : t + 1]).abs().max()
            future = (whole[:, t + 1 :] - again[:, t + 1 :]).abs().max()
            equal = torch.equal(whole[:, : t + 1], again[:, : t + 1])
            # `future` guards the control itself: a model that ignores its input would pass any perturbation.
            row = {"t": t, "largest change up to t": float(past), "largest change after t": float(future)}
            rows.append(row | {"ok": equal and float(future) > 0})
    return pd.DataFrame(rows)


def bounds(task: data.Task, *, trials: int = 1000, seed: int = 10_000) -> pd.DataFrame:
    """What the task allows: chance, its ceiling and the oracle's accuracy, the floor of the loss; one row a task.

    ok where the oracle clears chance (an accuracy between the two means something), the oracle reaches the ceiling that
    the task states and no more, and the best constant answer (the commonest one of other rows) is right no oftener than
    chance: where it is, the chance line is drawn too low. A mixture gives one row per component.
    """
    if isinstance(task, data.Mixture):
        return pd.concat([bounds(t, trials=trials, seed=seed) for t in task.tasks], ignore_index=True)
    oracle = analysis.oracle_accuracy(task, trials=trials, seed=seed)
    first, second = (
        torch.cat([b.targets[b.targets != -100] for b in analysis.draws(task, trials, seed + i)]) for i in (1, 2)
    )
    constant = analysis.Rate(int((second == first.mode().values).sum()), second.numel())
    low = _guessing(oracle.total - oracle.count, oracle.total, 1 - task.ceiling)  # so few right, if the ceiling is true
    high = _guessing(oracle.count, oracle.total, task.ceiling)
    verdicts = {
        "oracle at chance": _guessing(oracle.count, oracle.total, task.chance) >= FALSE_ALARM,
        "oracle below the ceiling": low < FALSE_ALARM,
        "oracle above the ceiling": high < FALSE_ALARM,
        "a constant answer beats chance": _guessing(constant.count, constant.total, task.chance) < FALSE_ALARM,
    }
    wrong = "; ".join(name for name, is_so in verdicts.items() if is_so)
    row = {"task": type(task).__name__, "chance": task.chance, "constant": constant.value, "oracle": oracle.value}
    row |= {"oracle_low": oracle.low, "ceiling": task.ceiling, "floor (nats)": task.floor, "trials": oracle.total}
    return pd.DataFrame([row | {"verdict": wrong or "sound", "ok": not wrong}])


def loss_floor(loss: tuple[float, float, float, int], task: data.Task) -> pd.DataFrame:
    """A measured loss (what `analysis.loss` returns) beside the task's floor and the loss of guessing at `chance`.

    ok where its interval does not lie below the floor, which no model can reach without seeing the answers. A task
    whose floor nobody knows (nan, real text) passes.
    """
    mean, low, high, count = loss
    row = {"task": type(task).__name__, "loss (nats)": mean, "low": low, "high": high, "floor (nats)": task.floor}
    row |= {"guessing (nats)": -math.log(task.chance), "scored tokens": count}
    return pd.DataFrame([row | {"ok": math.isfinite(mean) and not high < task.floor}])


def needle_removed(model, task: data.Task, *, trials: int = 1000, seed: int = 10_000) -> pd.DataFrame:
    """Remove the needle: accuracy must fall to chance, or the answer was not read from the context.

    p: probability that guessing gives as many right answers. ok: with the needle it is not guessing, which guards the
    control itself (nothing falls that was at chance already), and without the needle it may be.
    """
    table = analysis.needle_removed(model, task, trials=trials, seed=seed)
    p = [_guessing(round(a * n), n, c) for a, n, c in zip(table.accuracy, table.trials, table.chance, strict=True)]
    table["p"] = p
    table["ok"] = (table["p"] >= FALSE_ALARM) == (table[""] == "needle removed")
    return table


def fresh_ids(task: data.Task, *, rows: int = 256, least: float = 0.5, seed: int = 10_000) -> pd.DataFrame:
    """Are answers fresh? Number of distinct answers over rows, beside what uniform draws from the vocabulary would give.

    A fixed or narrow needle id can be memorised, and accuracy then says nothing about memory. ok where the number of
    distinct answers is at least `least` of the expected one. (`analysis.fresh_ids` measures what a model does with ids
    that training never asked for.)
    """
    batch = task.sample(rows, analysis.fresh(seed))
    answers = batch.targets[batch.targets != -100]
    n, values = answers.numel(), task.vocab_size
    if n < 2:
        raise ValueError(f"rows = {rows}: {type(task).__name__} gave {n} answers; it takes several to be distinct")
    expected = values * (1 - (1 - 1 / values) ** n)
    distinct = answers.unique().numel()
    row = {"task": type(task).__name__, "answers": n, "distinct": distinct, "expected if uniform": round(expected, 1)}
    return pd.DataFrame([row | {"ok": distinct >= least * expected}])


def snapshot(model) -> dict[str, torch.Tensor]:
    """Copies of all parameters, to compare against after training with `moved`."""
    return {n: p.detach().cpu().clone() for n, p in model.named_parameters()}


def moved(model, before: dict[str, torch.Tensor]) -> pd.DataFrame:
    """Which parameters moved since `snapshot`: one row each, with the share of elements that changed and the relative size.

    Pure bf16 weights are the classic case: steps below half a unit in the last place round away, and biases never move.
    ok where any element changed, all are finite, and the change is more than a common shrinking (`only decayed`), which
    weight decay does to parameters that no gradient ever reaches; it shows in those of at least 16 elements that did not
    all start equal. ValueError for a snapshot of another model.
    """
    now = snapshot(model)
    other = sorted(set(now) ^ set(before)) or [n for n in now if now[n].shape != before[n].shape]
    if other:
        raise ValueError(f"before: is the snapshot of another model; parameters that do not match: {other[:5]}")
    rows = []
    for name, p in now.items():
        new, old = p.double(), before[name].double()
        change = new - old
        share = float((p != before[name]).float().mean())
        size = float(change.norm() / old.norm()) if old.any() else math.inf if share else 0.0
        # Decay leaves c * old, up to rounding. A gradient has no reason to point along the parameter, unless it has few
        # elements or all alike, such as gate biases, which a step of Adam may well move together.
        telling = p.numel() >= 16 and bool((old != old.flatten()[0]).any())
        along = float((new * old).sum() / (old * old).sum()) if old.any() else 1.0
        decayed = telling and along < 1 and bool((new - along * old).norm() <= 0.05 * change.norm())
        row = {"parameter": name, "share moved": share, "relative change": size, "only decayed": decayed}
        rows.append(row | {"ok": share > 0 and not decayed and bool(p.isfinite().all())})
    return pd.DataFrame(rows)


def retention(model, task: data.Task, *, least: float = 0.1, rows: int = 8, seed: int = 10_000) -> pd.DataFrame:
    """What the decay of each memory layer leaves at the task's own distances (median and longest of a few rows).

    distance: tokens from the write of a value to the read that must recall it. ok where the best head of some layer keeps
    at least `least` of a write at that distance; with a half-life of 5.5 tokens and needles 2,000 tokens back nothing
    is left to read, whatever the training does.
    """
    batch = task.sample(rows, analysis.fresh(seed))
    if "distance" not in batch.info:
        raise ValueError(f"task: {type(task).__name__} gives no distances")
    distance = batch.info["distance"][batch.targets != -100] + 1  # info counts the tokens between the two
    table = analysis.retention(model, batch.tokens, sorted({int(distance.median()), int(distance.max())}))
    if not len(table):
        raise ValueError("model: has no memory layer, so there is no retention to measure")
    table["ok"] = table.groupby("distance")["best_head"].transform("max") >= least
    return table


def claim(
    successes_by_seed,
    *,
    least_seeds: int = 5,
    level: float = 0.95,
    threshold: float | None = None,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> pd.DataFrame:
    """A claim over seeds: the mean of one number per seed and its t interval. One from too few seeds is refused.

    successes_by_seed: one finite number per independent seed, for example its accuracy.
    threshold: a seed succeeds where its number is at least this; adds the rate of success with its Wilson interval, which
    says how robust 3 of 3 is (from 44%).
    bounds: the range that the numbers can take, (0, 1) for accuracies; the interval ends there.
    """
    values = [float(v) for v in successes_by_seed]
    if not values:
        raise ValueError("successes_by_seed: needs one number per seed, was given none")
    if not all(map(math.isfinite, values)):
        raise ValueError(
            f"successes_by_seed = {values}: needs finite numbers; a seed that diverged is a failure, not a gap"
        )
    if not all(bounds[0] <= v <= bounds[1] for v in values):
        raise ValueError(f"bounds = {bounds}: the numbers {values} do not lie inside")
    row = {"seeds": len(values), "mean": sum(values) / len(values), "low": math.nan, "high": math.nan}
    if len(values) >= 2:
        _, low, high = analysis.mean_interval(values, level=level)
        row |= {"low": max(low, bounds[0]), "high": min(high, bounds[1])}
    if threshold is not None:
        rate = analysis.Rate(sum(v >= threshold for v in values), len(values), level)
        row |= {"succeeded": rate.count, "success rate": rate.value, "rate low": rate.low, "rate high": rate.high}
    row["verdict"] = "stands" if len(values) >= least_seeds else f"refused: {len(values)} of {least_seeds} seeds"
    return pd.DataFrame([row | {"ok": len(values) >= least_seeds}])


def enough_trials(
    table: pd.DataFrame, *, least: int = 1000, pooled: bool = False, least_each: int = 100
) -> pd.DataFrame:
    """Do the accuracies of `table` (column `trials`, one row each) rest on enough trials?

    Each row is a number that somebody will quote, so each needs `least` trials. pooled: the rows are groups of one
    sample, as by distance or by needle, read as one curve: the sample then needs `least` in all, and every group
    `least_each` (an interval of at most +-10 points). A table without rows fails; ValueError without that column.
    """
    if "trials" not in table:
        raise ValueError(f"table: needs a column 'trials', has {list(table.columns)}")
    trials = [0 if t != t else int(t) for t in table["trials"]] or [0]
    fewest, total, each = min(trials), sum(trials), least_each if pooled else least
    row = {"rows": len(table), "fewest trials": fewest, "needed in each": each, "in all": total, "needed in all": least}
    return pd.DataFrame([row | {"ok": fewest >= each and total >= least}])


FREE = ("seq_len", "distance", "remove_needle", "n_needles", "queries")  # what a test may vary


def same_task(train_task: data.Task, test_task: data.Task, *, allowed: tuple[str, ...] = ()) -> pd.DataFrame:
    """Training and test must be one task up to its length, distance and number of needles; other differences are named.

    allowed: further fields that the experiment means to differ, such as `haystack` for held-out text. Tasks inside a
    task are compared field by field and named with a dot, as `haystack.split`.
    """
    rows = [
        {"field": name, "train and test": f"{a} against {b}", "ok": False}
        for name, a, b in _differences(train_task, test_task, "", {*FREE, *allowed})
    ]
    return pd.DataFrame(rows or [{"field": "all", "train and test": "equal", "ok": True}])


def _differences(a, b, name: str, free: set[str]):
    """(field, value in a, value in b) of every difference between two tasks or tuples of them."""
    if isinstance(a, data.Task) and type(a) is type(b):
        for f in dataclasses.fields(a):
            path = f"{name}.{f.name}" if name else f.name
            if f.compare and path not in free and f.name not in FREE:
                yield from _differences(getattr(a, f.name), getattr(b, f.name), path, free)
    elif isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _differences(x, y, f"{name}[{i}]", free)
    elif a != b:
        yield (name or "type", *(type(x).__name__ if isinstance(x, data.Task) else repr(x) for x in (a, b)))
