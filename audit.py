"""Controls: is this experiment able to show what it claims?

Each control returns a small pandas table whose column `ok` says whether the experiment passes, so that a notebook shows
them and `require` stops on them. They exist because each of the mistakes they catch was made, and believed, before.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable

import pandas as pd
import torch
from scipy import stats
from torch import nn

import analysis
import config
import data
import train

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


def accuracy_bounds(rate: analysis.Rate, task: data.Task) -> pd.DataFrame:
    """A measured accuracy (what `analysis.accuracy` returns) beside the task's chance and ceiling.

    p: probability that guessing gives as many right answers, counted as independent ones (`Rate.design`). ok where it is
    not guessing, and not above the ceiling, which no model can pass without seeing the answers. `bounds` proves by the
    oracle that the two lines are drawn right.
    """
    total = max(1, round(rate.total / rate.design))
    count = min(total, round(rate.count / rate.design))
    p, high = (_guessing(count, total, line) for line in (task.chance, task.ceiling))
    verdict = "above the ceiling" if high < FALSE_ALARM else "guessing" if p >= FALSE_ALARM else "above chance"
    row = {"task": type(task).__name__, **rate.row(), "chance": task.chance, "ceiling": task.ceiling, "p": p}
    return pd.DataFrame([row | {"verdict": verdict, "ok": verdict == "above chance"}])


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


def learning_rate(run: train.Run, phases: train.Phase | Iterable[train.Phase], cfg: config.TrainConfig) -> pd.DataFrame:
    """The rate that the optimizer had (column `lr` of a run's history) beside what `train.lr_factor` asks of its phases.

    One row for the warm-up of each phase, as far as it is below the full rate, and one for what follows. deviation: the
    largest difference, as a share of the phase's full rate. ok where some step of the stretch was logged, all logged rates
    are as asked, and a warm-up is below the full rate whatever the schedule says: a warm-up that never reached the
    optimizer shows in no loss curve. ValueError for an ensemble, which logs the rate it was given and not an optimizer's,
    and for phases that are not those of the run.
    """
    phases = (phases,) if isinstance(phases, train.Phase) else tuple(phases)
    if not hasattr(run, "phases"):
        raise ValueError(f"run: {type(run).__name__} logs no rate of its optimizer; needs the Run of train.fit")
    names = [passed["name"] for passed in run.phases], [phase.name for phase in phases]
    if names[0] != names[1]:
        raise ValueError(f"phases: the run passed {names[0]}, was given {names[1]}")
    history, start, rows = run.history.reindex(columns=["step", "lr"]), 0, []
    for phase, passed in zip(phases, run.phases, strict=True):
        full, taken = phase.lr or cfg.lr, passed["steps"]
        # The last step of a warm-up has the full rate: it tells no warm-up from none.
        warm = min(max(0, cfg.warmup_steps - 1), taken)
        for stretch, first, end in (("warm-up", 0, warm), ("after it", warm, taken)):
            seen = history[(history["step"] >= start + first) & (history["step"] < start + end)]
            asked = [full * train.lr_factor(int(step) - start, phase.steps, cfg) for step in seen["step"]]
            deviation = float((seen["lr"] - asked).abs().max(skipna=False)) / full
            verdict = "as asked" if deviation <= 1e-6 else "not as asked"
            if stretch == "warm-up" and not (seen["lr"] < full).all():
                verdict = "no warm-up"
            if not len(seen):
                verdict = f"unseen: log_every = {cfg.log_every}"
            row = {"phase": phase.name, "stretch": stretch, "steps": end - first, "logged": len(seen)}
            row |= {"lowest": seen["lr"].min(), "highest": seen["lr"].max(), "full rate": full, "deviation": deviation}
            if end > first:
                rows.append(row | {"verdict": verdict, "ok": verdict == "as asked"})
        start += taken
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
    """(field, value in a, value in b) of every difference between two tasks, configurations or tuples of them."""
    if isinstance(a, config.Settings) and type(a) is type(b):
        for f in dataclasses.fields(a):
            path = f"{name}.{f.name}" if name else f.name
            if f.compare and path not in free and f.name not in FREE:
                yield from _differences(getattr(a, f.name), getattr(b, f.name), path, free)
    elif isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _differences(x, y, f"{name}[{i}]", free)
    elif a != b:
        yield (name or "type", *(type(x).__name__ if isinstance(x, config.Settings) else repr(x) for x in (a, b)))


SHOWN = 20  # items that a table names before it only counts them


def universe(training, held_out, everything) -> pd.DataFrame:
    """Training and held-out items must make up everything that there is, and share nothing; the items that do not are named.

    Each argument: the items themselves, anything that can be compared and hashed, or a tensor or array with one item a
    row. How often an item occurs does not matter. ok: training and held-out are not empty; the other rows are.
    """
    parts = {"training": _items(training), "held out": _items(held_out), "universe": _items(everything)}
    if not parts["universe"]:
        raise ValueError("everything: needs at least one item")
    train_items, held, every = parts.values()
    rows = [{"items": name, "count": len(part), "which": "", "ok": len(part) > 0} for name, part in parts.items()]
    wrong = {
        "missing: in neither": [x for x in every if x not in train_items and x not in held],
        "overlap: in both": [x for x in train_items if x in held],
        "unknown: outside the universe": [x for x in {**train_items, **held} if x not in every],
    }
    for name, part in wrong.items():
        which = ", ".join(map(str, part[:SHOWN])) + (f" and {len(part) - SHOWN} more" if len(part) > SHOWN else "")
        rows.append({"items": name, "count": len(part), "which": which, "ok": not part})
    return pd.DataFrame(rows)


def _items(values) -> dict:
    """The different items, in their order; those of a set, which has none, by how they print."""
    hashable = lambda x: tuple(map(hashable, x)) if isinstance(x, list) else x  # noqa: E731
    values = values.tolist() if hasattr(values, "tolist") else values
    return dict.fromkeys(map(hashable, sorted(values, key=repr) if isinstance(values, (set, frozenset)) else values))


# ------------------------------------------------------------------------------------------------ arms of a sweep


def distinct_arms(
    arms: dict[str, nn.Module | Callable[[int], nn.Module]], tokens: torch.Tensor, *, seed: int = 0
) -> pd.DataFrame:
    """No two arms may be one model: a knob that never reached the constructor, or a flag without effect, is named.

    arms: models as they are, or builders (seed -> model), all called with the same `seed`, so that the knob alone can set
    them apart. Outputs are logits on tokens [B, T], compared bit by bit, in fp32. An inert pair has
      equal outputs, with equal parameters or with others; or
      parameters that only one of the two has, or of other shapes, and equal outputs once those they share are equal, since
      parameters that nothing reads still shift the random numbers of the ones drawn after them.
    differ in: the fields of `model.cfg` that are not equal. Arms of other seeds have other parameters and pass.
    tokens must let the knob matter: a window shows in rows that are longer. A knob of training, such as dropout, or a part
    that starts at exactly zero, shows in trained models alone: give those.
    """
    if len(arms) < 2:
        raise ValueError(f"arms: a sweep needs at least 2, was given {list(arms)}")
    models = {name: arm if isinstance(arm, nn.Module) else arm(seed) for name, arm in arms.items()}
    outputs = {name: _logits(net, tokens) for name, net in models.items()}
    rows = []
    for name, out in outputs.items():
        if not out.isfinite().all():
            rows.append({"arms": name, "differ in": "", "verdict": "outputs are not finite", "ok": False})
    for a, b in itertools.combinations(models, 2):
        mine, other = (dict(models[name].named_parameters()) for name in (a, b))
        kind = lambda p: (p.shape, p.dtype)  # noqa: E731
        shared = {n: p for n, p in mine.items() if n in other and kind(p) == kind(other[n])}
        alone = sorted({*mine, *other} - set(shared))
        if _same(outputs[a], outputs[b]):
            equal = not alone and all(_same(p.cpu(), other[n].cpu()) for n, p in shared.items())
            verdict = "inert: equal parameters, equal outputs" if equal else "inert: equal outputs"
        elif alone and shared and _same(outputs[a], _logits(models[b], tokens, shared)):
            verdict = f"inert: nothing reads {', '.join(alone[:3])}"
        else:
            continue
        cfgs = (getattr(models[name], "cfg", None) for name in (a, b))
        fields = "; ".join(f"{name}: {x} against {y}" for name, x, y in _differences(*cfgs, "", set()))
        rows.append({"arms": f"{a} = {b}", "differ in": fields or "nothing", "verdict": verdict, "ok": False})
    sound = {"arms": f"all {len(arms)}", "differ in": "outputs", "verdict": "distinct", "ok": True}
    return pd.DataFrame(rows or [sound])


def _logits(model, tokens: torch.Tensor, parameters: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """Logits on tokens [B, T], on the CPU; with `parameters` in place of the model's own of those names."""
    device = analysis.device_of(model)
    swapped = {n: p.detach().to(device) for n, p in (parameters or {}).items()}
    with analysis.evaluating(model, precision="fp32"):
        return torch.func.functional_call(model, swapped, (tokens.to(device),)).logits.cpu()


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype) and torch.equal(a, b)


def parameter_counts(
    arms: dict[str, nn.Module | int], *, tolerance: float = 0.1, allowed: tuple[str, ...] = ()
) -> pd.DataFrame:
    """Parameters of every arm beside those of the first: a baseline at 28% of the size loses for its size.

    arms: models, or counts known from elsewhere. parameters: numbers stored, shared ones once; frozen: those of them that
    training leaves as they are. ok where the share is within 1 +- tolerance, or the arm is among `allowed`, which are
    meant to be of other sizes.
    """
    if len(arms) < 2:
        raise ValueError(f"arms: a comparison needs at least 2, was given {list(arms)}")
    if not set(allowed) <= set(arms):
        raise ValueError(f"allowed = {allowed}: the arms are {list(arms)}")
    rows = []
    for name, arm in arms.items():
        sizes = [(arm, True)]
        if isinstance(arm, nn.Module):
            sizes = [(p.numel(), p.requires_grad) for p in arm.parameters()]
        count, frozen = sum(n for n, _ in sizes), sum(n for n, trained in sizes if not trained)
        if count < 1:
            raise ValueError(f"arms: {name!r} has {count} parameters; nothing can be compared with it")
        first = rows[0]["parameters"] if rows else count
        row = {"arm": name, "parameters": count, "frozen": frozen, "share of the first": count / first}
        fits = abs(count / first - 1) <= tolerance
        verdict = "comparable" if fits else "allowed" if name in allowed else "larger" if count > first else "smaller"
        rows.append(row | {"verdict": verdict, "ok": fits or name in allowed})
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------------------------------ rotary bands


def frequency_bands(
    bands: Callable[[torch.Tensor], torch.Tensor],
    head_dim: int,
    *,
    layout: str = "half",
    rotary_dim: int | None = None,
    owner: Iterable[int] | None = None,
    shape: tuple[int, ...] = (2, 16, 4),
    seed: int = 0,
) -> pd.DataFrame:
    """A spike planted in one rotary dimension must be found in the band of its frequency, and in no other.

    bands: statistic of queries or keys [*shape, head_dim] -> [..., n_bands], larger for larger values. Frequency i of R/2,
    the highest first, turns the dimensions (i, i + R/2) in layout "half" (rotate_half, as `mixers.rope` does) and
    (2i, 2i + 1) in "interleaved"; grouping dimensions by their number, as the sources did for "half", puts all frequencies
    in every band. rotary_dim: R, the leading dimensions that are rotated (default: all); the others belong to no band.
    owner: band of each frequency; default: equal shares in order.
    A band finds a spike where its mean rises by more than 1%. One row a band; ok where all its spikes are found there alone.
    """
    R = head_dim if rotary_dim is None else rotary_dim
    if layout not in ("half", "interleaved"):
        raise ValueError(f"layout = {layout!r}: choose one of 'half', 'interleaved'")
    if not 2 <= R <= head_dim or R % 2:
        raise ValueError(f"rotary_dim = {R}: needs an even number from 2 to head_dim = {head_dim}")
    q = torch.randn(*shape, head_dim, generator=torch.Generator().manual_seed(seed))

    def level(x):  # [n_bands]
        found = bands(x).double()
        return found.reshape(-1, found.shape[-1]).mean(0)

    before = level(q)
    n, pairs = len(before), R // 2
    if owner is None and pairs % n:
        raise ValueError(f"owner: {pairs} frequencies do not split evenly over {n} bands; say which band has which")
    owner = [i * n // pairs for i in range(pairs)] if owner is None else list(owner)
    if len(owner) != pairs or set(owner) != set(range(n)):
        raise ValueError(f"owner = {owner}: needs a band below {n} for each of {pairs} frequencies, and no empty band")
    empty = {"spikes": 0, "found there alone": 0, "first stray": ""}
    rows = {band: {"band": band} | empty for band in (*range(n), "none")}
    for dim in range(head_dim):
        pair = dim % pairs if layout == "half" else dim // 2
        band, where = (owner[pair], f" of frequency {pair}") if dim < R else ("none", "")
        spiked = q.clone()
        spiked[..., dim] += 1000.0  # beside values of size 1
        found = (level(spiked) - before > 0.01 * before.abs()).nonzero().flatten().tolist()
        alone = found == ([] if band == "none" else [band])
        rows[band]["spikes"] += 1
        rows[band]["found there alone"] += alone
        if not alone:
            rows[band]["first stray"] = rows[band]["first stray"] or f"dimension {dim}{where} in bands {found}"
    table = pd.DataFrame([row for row in rows.values() if row["spikes"]])
    table["ok"] = table["spikes"] == table["found there alone"]
    return table
