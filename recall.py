"""Run studies of recall, and read what they found.

    arms = studies.STUDIES["gates"](studies.FULL)  # a list of arms
    rows = recall.run(arms, seeds=range(5), out="results/recall.jsonl")
    recall.summary(recall.load("results/recall.jsonl", "gates"))  # mean over seeds with its interval

    python recall.py gates --seeds 0,1,2,3,4 --out results/recall.jsonl      the same from a shell, arm by arm

A row is one test of one trained model; notebooks draw from the file and run an arm again. An arm that is in the file with the
same settings is not trained again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import torch
from scipy import stats

import analysis
import audit
import data
import model
import probes
import runs
import studies
import train

# ------------------------------------------------------------------------------------------------ running


def run(
    arms: Iterable[studies.Arm],
    *,
    seeds: Iterable[int] = range(5),
    out: str | Path | None = None,
    device: str = "auto",
    progress: bool = False,
    study: str = "",
) -> pd.DataFrame:
    """Train every arm from every seed, ask it, and return one row per test; `out` takes them as lines of JSON as they come.

    An arm and seed that `out` already holds with the same settings is taken from there, whatever it was called. Settings, not
    code: after a change of a model or a task its rows have to go.
    """
    seeds, rows = list(seeds), []
    known = {} if out is None else _by_run(_lines(out))
    for arm in arms:
        for seed in seeds:
            found = known.get((arm.key, seed)) or trained(arm, seed, device=device, progress=progress)[1]
            own = [row for row in found if (row["arm"], row.get("study")) == (arm.name, study)]
            if not own:
                # The same settings under other names, each a row per test: one of each.
                own = list({row["test"]: dict(row, arm=arm.name, study=study) for row in found}.values())
                if out is not None:
                    with open(out, "a", encoding="utf-8") as file:
                        file.writelines(json.dumps(row) + "\n" for row in own)
            rows += own
    return pd.DataFrame(rows)


def trained(arm: studies.Arm, seed: int, *, device: str = "auto", progress: bool = False, on_log=None):
    """One arm from one seed: (model, rows of its tests, run of train.fit)."""
    cuda = device != "cpu" and torch.cuda.is_available()
    net = model.build(arm.cfg, seed=seed).to("cuda" if cuda else "cpu")
    training = dataclasses.replace(arm.training, seed=seed, device="auto" if cuda else "cpu")
    fitted = train.fit(net, arm.phases, training, progress=progress, on_log=on_log)
    common = dict(arm=arm.name, key=arm.key, seed=seed, parameters=net.count_params(), lr=training.lr)
    common |= dict(model=repr(arm.cfg), d_model=arm.cfg.d_model, pattern=arm.cfg.layer_pattern)
    common |= dict(steps=fitted.steps, seconds=round(fitted.seconds, 2))
    common |= dict(revision=runs.git_revision(), device=runs.device_name() if cuda else "cpu", **runs.versions())
    common |= dict(date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    common |= dict(last_loss=_last_loss(fitted, arm), text=_text_of(arm))
    inside = memory_of(net, arm.tests[0][1])
    rows = []
    for label, task in arm.tests:
        row = dict(test=label, length=task.seq_len, chance=task.chance, state=arm.cfg.state_size(task.seq_len))
        if isinstance(task, data.LanguageModel):
            mean, low, high, tokens = analysis.loss(net, _windows(task))
            row |= dict(loss=mean, loss_low=low, loss_high=high, tokens=tokens)
        else:
            row |= analysis.accuracy(net, task, trials=arm.trials).row()
        rows.append(common | inside | row)
    return net, rows, fitted


def _windows(task: data.LanguageModel, *, rows: int = 96, at_once: int = 4) -> list[data.Batch]:
    """Rows of a text, in batches."""
    windows = task.windows(limit=rows)
    return [windows.rows(slice(i, i + at_once)) for i in range(0, len(windows.tokens), at_once)]


def _last_loss(fitted: train.Run, arm: studies.Arm) -> float:
    """Mean of the last five logs of the last phase's first part."""
    column = f"loss/{arm.phases[-1].streams[0].label}"
    return float(fitted.history[column].dropna().iloc[-5:].mean())


def _text_of(arm: studies.Arm) -> str:
    """Fingerprint of the text that the tests of an arm read; empty without one."""
    for _, task in arm.tests:
        text = task if isinstance(task, data.LanguageModel) else getattr(task, "haystack", None)
        if text is not None:
            return text.corpus.sha256[:12]
    return ""


def memory_of(net: model.TransparentHybrid, task: data.Task) -> dict:
    """Mean write strength and log-decay of the first memory layer on rows of `task`; {} without one.

    shut: share of tokens at which its write gate is exactly 0 in every head. For needles also `written`, the mean strength at
    their markers, `leak`, that in the haystack, and `erased`, the share of a needle that one token of haystack takes away: the
    mean of its strength times the squared cosine of its key and the marker's; `similarity`: mean |cosine| of two keys there.
    """
    batch, record = _first_memory(net, task)
    if record is None:
        return {}
    beta, g = record["beta"], record["log_decay"]
    found = dict(beta=float(beta.mean()), log_decay=float(g.mean()), shut=float((beta == 0).all(-1).float().mean()))
    if isinstance(task, data.NeedleTask):
        marked, hay = _marked(task, batch, record)
        found |= dict(written=float(beta[marked].mean()), leak=float(beta[hay].mean()))
        of_markers = record["keys"][marked].double()
        taken = torch.einsum("nhk,hkl,nhl->nh", of_markers, _taken(record, hay), of_markers)
        found["erased"] = float(taken.mean())
        found["similarity"] = float(model.mean_cosine(record["keys"][hay][None].double()))
    return found


def retention(net: model.TransparentHybrid, task: data.NeedleTask, distances: Iterable[float]) -> list[float]:
    """Amplitude that the first memory layer should leave of a needle after so many tokens of haystack, mean over its heads.

    k^T (I - E beta h h^T)^n k (E e^g)^n, with marker keys k, haystack keys h, strengths beta and log-decays g of four rows: exact
    in the mean where these are drawn independently. What is answered depends on the noise beside it too. ValueError for a model
    without a memory layer.
    """
    batch, record = _first_memory(net, task)
    if record is None:
        raise ValueError(f"net: {net.cfg} has no memory layer")
    marked, hay = _marked(task, batch, record)
    taken, vectors = torch.linalg.eigh(_taken(record, hay))  # [H, K], [H, K, K]
    share = torch.einsum("nhk,hkl->nhl", record["keys"][marked].double(), vectors).square().mean(0)
    decay = record["log_decay"][hay].double().exp().mean(0)
    left = [(share * (1 - taken) ** n).sum(-1) * decay**n for n in distances]
    return [float(of_heads.mean()) for of_heads in left]


def _first_memory(net: model.TransparentHybrid, task: data.Task):
    """Four rows of `task`, and the record of the first memory layer on up to 4,096 tokens of them, or None."""
    batch = task.sample(4, analysis.fresh(2))
    records = analysis.records(net, batch.tokens[:, :4096])
    return batch, next((r for r in records if r["layer"] == "G"), None)


def _marked(task: data.NeedleTask, batch: data.Batch, record: dict):
    """bool [B, T] each: markers, and haystack, of the T tokens that the record is of."""
    beta = record["beta"]
    roles = probes.roles(task, batch)[:, : beta.shape[1]].to(beta.device)
    return tuple(roles == probes.ROLES.index(role) for role in ("marker", "haystack"))


def _taken(record: dict, hay: torch.Tensor) -> torch.Tensor:
    """float64 [H, K, K]: E beta h h^T over the haystack, what one of its tokens takes away in the mean."""
    keys, beta = record["keys"][hay].double(), record["beta"][hay].double()
    return torch.einsum("nh,nhk,nhl->hkl", beta, keys, keys) / hay.sum()


# ------------------------------------------------------------------------------------------------ results


def _lines(path: str | Path) -> list[dict]:
    path = Path(path)
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _by_run(rows: list[dict]) -> dict[tuple[str, int], list[dict]]:
    found = {}
    for row in rows:
        found.setdefault((row["key"], row["seed"]), []).append(row)
    return found


def load(path: str | Path, study: str) -> pd.DataFrame:
    """Rows of one study, in the order of the file; empty where there are none."""
    rows = [row for row in _lines(path) if row["study"] == study]
    return pd.DataFrame(rows)


def named(rows: pd.DataFrame, arms: Iterable[studies.Arm]) -> pd.DataFrame:
    """The rows of these arms, under their names: an arm that another study or name has trained already is not trained again."""
    names = {arm.key: arm.name for arm in arms}
    rows = rows[rows["key"].isin(names)].drop_duplicates(["key", "seed", "test"]) if len(rows) else rows
    return rows.assign(arm=rows["key"].map(names)) if len(rows) else rows


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean accuracy of each arm and test over seeds with its 95% interval, and the fewest trials of a seed.

    Two seeds or more: Student's t over them, widened to Wilson's interval of all their trials where that reaches further, since
    five seeds that are all at 100% do not make it certain. One: Wilson's interval of its trials, and the table says so by
    `seeds`. Tests of language are left to `losses`. ValueError for an arm whose rows are of more than one setting, as where the
    file holds some of before a change: `named` takes those of today's arms.
    """
    table = []
    for (arm, test), part in rows.dropna(subset="accuracy").groupby(["arm", "test"], sort=False):
        if "key" in part and part["key"].nunique() > 1:
            raise ValueError(f"rows: {arm!r} has rows of {part['key'].nunique()} settings; take those of one (`named`)")
        if len(part) > 1:
            mean, low, high = analysis.mean_interval(part["accuracy"])
            right = (part["accuracy"] * part["trials"]).round().sum()
            pooled = analysis.Rate(int(right), int(part["trials"].sum()))
            low, high = max(min(low, pooled.low), 0.0), min(max(high, pooled.high), 1.0)
        else:
            mean, low, high = part[["accuracy", "low", "high"]].iloc[0]
        line = dict(arm=arm, test=test, length=int(part["length"].iloc[0]), accuracy=mean, low=low, high=high)
        line |= dict(worst=part["accuracy"].min(), seeds=len(part), trials=int(part["trials"].min()))
        line |= dict(
            chance=part["chance"].iloc[0], parameters=int(part["parameters"].iloc[0]), state=int(part["state"].iloc[0])
        )
        table.append(line)
    return pd.DataFrame(table)


def losses(rows: pd.DataFrame, *, than: str) -> pd.DataFrame:
    """Loss of each arm on held-out text, mean over seeds with its 95% interval, and its excess over that of arm `than` in
    percent, paired by seed; training: the mean loss at the end of training. An arm that shares fewer than 2 seeds with `than`
    has no line."""
    found = rows.dropna(subset="loss") if "loss" in rows else rows.iloc[:0]
    by_arm = found.pivot(index="seed", columns="arm", values="loss") if len(found) else found
    table = []
    for arm, part in found.groupby("arm", sort=False) if than in by_arm else ():
        both = by_arm[[arm, than]].dropna().to_numpy()
        if len(both) < 2:
            continue
        mean, low, high = analysis.mean_interval(both[:, 0])
        line = dict(arm=arm, loss=mean, low=low, high=high, seeds=len(both))
        excess = analysis.mean_interval(100 * (both[:, 0] / both[:, 1] - 1))
        line |= dict(zip(("excess, %", "excess low", "excess high"), excess, strict=True))
        table.append(line | dict(training=part["last_loss"].mean(), parameters=part["parameters"].iloc[0]))
    return pd.DataFrame(table)


def lost(rows: pd.DataFrame, test: str, *, near: str) -> pd.DataFrame:
    """Each arm in `test` (`summary`), and how many points of what it answers in test `near` are lost there: mean over seeds with
    its 95% interval, nan for one seed. Empty without such rows."""
    found = rows[rows["test"].isin([test, near])] if len(rows) else rows
    if not len(found) or test not in set(found["test"]):
        return pd.DataFrame()
    table, ends = summary(found[found["test"] == test]), []
    for arm in table["arm"]:
        by_test = found[found["arm"] == arm].pivot(index="seed", columns="test", values="accuracy")
        points = 100 * (by_test[near] - by_test[test]).dropna()
        ends.append(analysis.mean_interval(points) if len(points) > 1 else (points.mean(), math.nan, math.nan))
    table[["lost", "lost low", "lost high"]] = ends
    return table


def differences(rows: pd.DataFrame, controls: dict[str, str]) -> pd.DataFrame:
    """Accuracy of each arm less that of its control in every test, paired by seed, in points of per cent.

    controls: arm -> the arm to compare it with. difference, low, high: mean over the seeds that both have and its 95% t interval;
    p: of the t-test that it is 0; holm: p after Holm's correction for all lines of the table. The standard error is that of the
    seeds, but never less than what so many answers leave open (at (x + 1) / (n + 2) for x of n right, so that 0 and 100% do too):
    five seeds at 0 against five at 100% differ, and agree with each other by a ceiling, not by precision. Pairs that `rows` does
    not hold, or with fewer than 2 seeds in common, have no line.
    """
    table, known = [], rows.dropna(subset="accuracy") if "accuracy" in rows else rows.iloc[:0]
    for test, part in known.groupby("test", sort=False) if len(known) else ():
        by_arm = part.pivot_table(index="seed", columns="arm", values=["accuracy", "trials"])
        for arm, than in controls.items():
            if arm not in by_arm["accuracy"] or than not in by_arm["accuracy"]:
                continue
            both = by_arm.loc[:, [(value, name) for value in ("accuracy", "trials") for name in (arm, than)]].dropna()
            if len(both) < 2:
                continue
            share, trials = both["accuracy"].to_numpy(), both["trials"].to_numpy()
            points = 100 * (share[:, 0] - share[:, 1])
            p = (share * trials + 1) / (trials + 2)
            least = 100 * math.sqrt((p * (1 - p) / trials).sum()) / len(points)
            error = max(float(points.std(ddof=1)) / math.sqrt(len(points)), least)
            mean, freedom = float(points.mean()), len(points) - 1
            reach = error * float(stats.t.ppf(0.975, freedom))
            p = 2 * float(stats.t.sf(abs(mean) / error, freedom))
            line = dict(
                arm=arm, than=than, test=test, difference=mean, low=mean - reach, high=mean + reach, p=p, holm=p
            )
            table.append(line | dict(seeds=len(points)))
    most = 0.0
    for i, line in enumerate(sorted(table, key=lambda line: line["p"])):
        most = line["holm"] = max(most, min(1.0, line["p"] * (len(table) - i)))
    return pd.DataFrame(table)


def verdict(table: pd.DataFrame, *, level: float = 0.05, least_seeds: int = 5) -> list[str]:
    """A sentence for each arm of `differences`: better or worse in the tests where p after Holm's correction is below `level`,
    undecided where only its own interval leaves out 0, else no effect shown, which the intervals bound; no verdict from fewer
    than `least_seeds` seeds. The numbers follow."""
    said = []
    for (arm, than), part in table.groupby(["arm", "than"], sort=False) if len(table) else ():
        found, numbers = {}, []
        for r in part.itertuples():
            clear = r.low > 0 or r.high < 0
            word = "better" if r.difference > 0 else "worse"
            word = word if r.holm < level else "undecided" if clear else "no effect shown"
            word = word if r.seeds >= least_seeds else f"no verdict from {r.seeds} of {least_seeds} seeds"
            found.setdefault(word, []).append(r.test)
            numbers.append(
                f"{r.test} {r.difference:+.2f} [{r.low:+.2f}, {r.high:+.2f}], p = {r.p:.2g}, after Holm {r.holm:.2g}"
            )
        words = list(found) if len(found) == 1 else [f"{word} in {', '.join(tests)}" for word, tests in found.items()]
        said.append(f"{arm} against {than}: **{'; '.join(words)}** (points: {'; '.join(numbers)})")
    return said


def source(study: str, rows: pd.DataFrame) -> dict:
    """One line on where the rows of a study come from."""
    line = dict(study=study, models=0, seeds=0, revision="", device="", day="")
    if len(rows):
        line |= dict(
            models=len(rows.drop_duplicates(["key", "seed"])), seeds=rows["seed"].nunique(), day=rows["date"].max()[:10]
        )
        line |= {name: ", ".join(sorted(set(rows[name]))) for name in ("revision", "device")}
    return line


def shown(rows: pd.DataFrame, study: str) -> pd.DataFrame | None:
    """The rows, or None and a line that says how they come about."""
    if len(rows):
        return rows
    print(f"not in the results file; on a GPU, in minutes: python recall.py {study} --out results/recall.jsonl")
    return None


def by_test(rows: pd.DataFrame) -> pd.DataFrame:
    """Arms by tests: mean accuracy over seeds in percent, its 95% interval in brackets. training loss: mean at the end, in nats;
    an arm that stands at guessing there has not learned its task, whatever the reason."""
    table = summary(rows)
    cell = lambda r: f"{100 * r.accuracy:.1f} [{100 * r.low:.1f}, {100 * r.high:.1f}]"  # noqa: E731
    table["cell"] = [cell(r) for r in table.itertuples()]
    order = dict(index=table["arm"].unique(), columns=table["test"].unique())
    wide = table.pivot(index="arm", columns="test", values="cell").reindex(**order).fillna("")
    first = table.drop_duplicates("arm").set_index("arm")
    last = rows.drop_duplicates(["arm", "seed"]).groupby("arm")["last_loss"].mean()
    wide = wide.assign(seeds=first["seeds"], parameters=first["parameters"], chance=first["chance"])
    return wide.assign(**{"training loss": last.reindex(wide.index)})


def inside(rows: pd.DataFrame) -> pd.DataFrame:
    """What the first memory layer of each arm does on its first test: means over seeds of the write strength, at markers and in
    the haystack where that is known, of the share of tokens at which every head writes nothing, and the median over seeds of the
    half-life in tokens of the mean log-decay (inf: nothing decays). Arms without a memory layer have no line."""
    names = {
        "beta": "write strength", "written": "at markers", "leak": "in the haystack", "shut": "writes nothing",
        "erased": "erased by a token", "similarity": "|cosine| of keys",
    }  # fmt: skip
    names = {column: name for column, name in names.items() if column in rows}
    first = rows.dropna(subset="beta").drop_duplicates(["arm", "seed"])
    by_arm = first.groupby("arm", sort=False)
    half = [math.log(0.5) / g if g < 0 else math.inf for g in by_arm["log_decay"].median()]
    return by_arm[[*names]].mean().rename(columns=names).assign(**{"half-life": half})


def beside(live: pd.DataFrame, rows: pd.DataFrame, value: str = "accuracy") -> pd.DataFrame:
    """Accuracies just measured (or another column, as "loss"), beside the range over seeds of the same arm in the file; empty
    where it has none."""
    same = rows[rows["key"].isin(live["key"])] if len(rows) else rows
    if not len(same):
        return pd.DataFrame()
    ends = ["low", "high"] if value == "accuracy" else [f"{value}_low", f"{value}_high"]
    spread = same.dropna(subset=value).groupby("test")[value].agg(["min", "mean", "max", "size"])
    table = live.set_index("test")[[value, *ends]].join(spread, how="inner")
    return table.rename(columns={value: "now", "size": "models in the file"})


def trade_off(rows: pd.DataFrame, test: str, *, least_seeds: int = 3, threshold: float = 0.99) -> pd.DataFrame:
    """What needles cost a language model: one line per gate and weight of `language`, from the seeds that both arms have.

    loss, alone: mean loss on held-out text of the arm and of the same gates without needles. excess, %: mean over seeds of how
    far the first lies beyond the second, with its 95% interval; accuracy, low, high: those of `test` by `summary`; worst: the
    lowest accuracy of a seed; succeeded: seeds that reach `threshold`; enough: whether there are `least_seeds`. An arm that
    shares no seed with language alone is left out.
    """
    parts, table = rows["arm"].str.split(", "), []
    weight = parts.str[1].str.removeprefix("weight ").replace("language alone", "0").astype(float)
    found = rows.assign(gate=parts.str[0], weight=weight)
    by_seed = lambda part, name: part.dropna(subset=name).set_index("seed")[name]  # noqa: E731
    for (gate, weight), part in found.groupby(["gate", "weight"], sort=False):
        losses = by_seed(part, "loss"), by_seed(found[(found["gate"] == gate) & (found["weight"] == 0)], "loss")
        both = pd.concat([*losses, by_seed(part[part["test"] == test], "accuracy")], axis=1, join="inner")
        both.columns = ["loss", "alone", "accuracy"]
        if len(both):
            excess = audit.claim(100 * (both["loss"] / both["alone"] - 1), least_seeds=least_seeds).iloc[0]
            asked = part[(part["test"] == test) & part["seed"].isin(both.index)]
            right = summary(asked).iloc[0]
            line = dict(gate=gate, weight=weight, loss=both["loss"].mean(), alone=both["alone"].mean())
            line |= dict(zip(("excess, %", "excess low", "excess high"), excess[["mean", "low", "high"]], strict=True))
            line |= right[["accuracy", "low", "high", "worst"]].to_dict()
            line |= dict(seeds=len(both), succeeded=int((both["accuracy"] >= threshold).sum()))
            table.append(line | dict(enough=len(both) >= least_seeds))
    return pd.DataFrame(table)


def best_rates(rows: pd.DataFrame) -> dict[str, float]:
    """Of a sweep of rates by `mixers`: the rate at which each mixer did best, by the mean of its tests, since most are at their
    ceiling in the easy ones; of equals that with the lower loss at the end of training. ValueError without such rows."""
    rows = of_mixers(rows[rows["arm"].str.contains("rate")]) if len(rows) else rows
    if not len(rows):
        raise ValueError("rows: no sweep of rates")
    means = rows.groupby(["mixer", "lr"])[["accuracy", "last_loss"]].mean().reset_index()
    ordered = means.sort_values(["accuracy", "last_loss"], ascending=[False, True])
    return {mixer: float(part["lr"].iloc[0]) for mixer, part in ordered.groupby("mixer")}


def of_mixers(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of `mixers` with the name of the mixer as a column of its own."""
    return rows.assign(mixer=rows["arm"].str.split(", d ").str[0])


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=(*studies.STUDIES, *studies.WITH_TEXT))
    parser.add_argument("--seeds", default="0,1,2,3,4", help="comma-separated")
    parser.add_argument("--arms", default="", help="only arms whose name holds one of these words, separated by ;")
    parser.add_argument("--out", default="results/recall.jsonl")
    parser.add_argument("--smoke", action="store_true", help="the size of the smoke profile")
    why = "mixers: at every width with the best of the rates that this file holds for the middle one"
    parser.add_argument("--rates-of", help=why)
    args = parser.parse_args(arguments)
    size = studies.SMOKE if args.smoke else studies.SIZES.get(args.study, studies.FULL)
    if args.rates_of:
        if args.study != "mixers":
            parser.error(f"--rates-of belongs to mixers, not to {args.study}")
        sweep = named(load(args.rates_of, "mixers"), studies.mixers(size))
        arms = studies.mixers(size, rates=best_rates(sweep))
    else:
        arms = (
            studies.STUDIES[args.study](size)
            if args.study in studies.STUDIES
            else studies.WITH_TEXT[args.study](size, studies.text(size))
        )
    if args.arms:
        arms = [arm for arm in arms if any(word in arm.name for word in args.arms.split(";"))]
    for arm in arms:
        rows = run([arm], seeds=map(int, args.seeds.split(",")), out=args.out, study=args.study)
        print(summary(rows)[["arm", "test", "accuracy", "low", "high", "seeds"]].to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
