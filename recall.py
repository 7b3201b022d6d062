"""Studies of recall: arms that differ in one thing, trained from several seeds each, and what every one gives back.

    study = recall.STUDIES["gates"](recall.FULL)                 # a list of arms
    rows = recall.run(study, seeds=range(5), out="results/recall.jsonl")
    recall.summary(recall.load("results/recall.jsonl", "gates"))  # mean over seeds with its interval

    python recall.py gates --seeds 0,1,2,3,4 --out results/recall.jsonl      the same from a shell, arm by arm

A row is one test of one trained model; notebooks draw from the file and run an arm again. An arm that is in the file with the
same settings is not trained again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

import analysis
import config
import data
import model
import runs
import train

# ------------------------------------------------------------------------------------------------ arms


@dataclass(frozen=True)
class Arm:
    """One setting of a study: a model, how it is trained, and what it is asked afterwards."""

    name: str
    cfg: config.HybridConfig
    phases: tuple[train.Phase, ...]
    training: config.TrainConfig
    tests: tuple[tuple[str, data.Task], ...]  # what a test is called, and its task
    trials: int = 1000  # answers of each test, at least

    @property
    def key(self) -> str:
        """Hash of everything that decides the numbers, the seed apart."""
        return runs.short_hash(
            [
                self.cfg.to_dict(),
                runs.describe(self.phases),
                self.training.to_dict(),
                runs.describe(self.tests),
                self.trials,
            ]
        )


@dataclass(frozen=True)
class Size(config.Settings):
    """How large a study is: the smoke profile and the full one run the same arms."""

    d_model: int = 256
    n_heads: int = 4
    width: int = 64  # K and V
    vocab_size: int = 8192
    lengths: tuple[int, ...] = (128, 256, 512, 1024)  # in training
    needles: tuple[int, ...] = (1, 2, 4, 8, 16)
    tokens: int = 2**14  # of a step
    steps: int = 1200
    lr: float = 3e-3
    far: tuple[int, ...] = (1024, 4096, 16384, 65536)  # lengths of the tests
    asked: int = 64  # needles in a test
    widths: tuple[int, ...] = (64, 128, 256)  # d_model of the comparison of mixers
    mqar: tuple[int, int] = (256, 64)  # tokens and pairs of its training
    mqar_far: tuple[int, int] = (1024, 256)
    trials: int = 1000

    def model(self, pattern: str = "G", **changes) -> config.HybridConfig:
        """A model of this size, by default without anything that forgets."""
        chosen = dict(d_model=self.d_model, n_heads=self.n_heads, head_dim=self.width, value_dim=self.width)
        chosen |= dict(vocab_size=self.vocab_size, layer_pattern=pattern, beta_bias=0.0, g_bias=8.0)
        return config.HybridConfig(**(chosen | changes))

    def training(self, **changes) -> config.TrainConfig:
        every = max(1, min(50, self.steps // 4))
        return config.TrainConfig(
            **(dict(lr=self.lr, warmup_steps=max(1, self.steps // 20), log_every=every) | changes)
        )


FULL = Size()
SMOKE = Size(
    d_model=64, n_heads=2, width=32, vocab_size=256, lengths=(64, 128), needles=(1, 2, 5), tokens=2048, steps=120,
    far=(128, 512), asked=5, widths=(64,), mqar=(64, 8), mqar_far=(128, 16), trials=1000,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ studies


def gates(size: Size, *, patterns: Iterable[str] = ("G",)) -> list[Arm]:
    """What lets a memory last: decay and write gate of its layers, soft ones and those that can be exactly shut.

    Trained on a few needles at short lengths, asked for `size.asked` needles at lengths up to 64 times those.
    """
    needle = data.MultiNeedle(
        seq_len=size.lengths[0], vocab_size=size.vocab_size, n_needles=1, n_markers=max(size.asked, *size.needles)
    )
    options = [
        dataclasses.replace(needle, seq_len=length, n_needles=n)
        for length in size.lengths
        for n in size.needles
        if 4 * n <= length
    ]
    phase = train.Phase("needles", train.Part(tuple(options), tokens=size.tokens, name="needles"), size.steps)
    tests = tuple(
        (f"{length:,} tokens", dataclasses.replace(needle, n_needles=size.asked, seq_len=length)) for length in size.far
    )
    settings = {
        "sigmoid decay, bias 2": (dict(g_bias=2.0), {}),
        "sigmoid decay": ({}, {}),
        "Mamba-style decay": (dict(decay="mamba"), {}),
        "hard decay": (dict(decay="hard"), {}),
        "no decay": (dict(decay="none"), {}),
        "no decay, penalty": (dict(decay="none"), dict(write_penalty=0.02)),
        "no decay, hard write": (dict(decay="none", write_gate="hard"), {}),
        "no decay, hard write, penalty": (dict(decay="none", write_gate="hard"), dict(write_penalty=0.02)),
        "no decay, straight-through write, penalty": (
            dict(decay="none", write_gate="straight"),
            dict(write_penalty=0.02),
        ),
        "hard decay, hard write, penalty": (dict(decay="hard", write_gate="hard"), dict(write_penalty=0.02)),
    }
    return [
        Arm(
            name if pattern == "G" else f"{name}, {pattern}",
            size.model(pattern, **changes),
            (phase,),
            size.training(**more),
            tests,
            size.trials,
        )
        for pattern in patterns
        for name, (changes, more) in settings.items()
    ]


MIXERS = {  # two layers each, at most 2 heads; every recurrent one with the shifted write
    "softmax attention": dict(layer_pattern="AA", use_rope=True),
    "linear attention": dict(layer_pattern="LL"),
    "DeltaNet": dict(layer_pattern="GG", decay="none"),
    "gated delta, Mamba-style decay": dict(layer_pattern="GG", decay="mamba"),
    "hybrid": dict(layer_pattern="GS", decay="none", use_rope=True),
}
RATES = (3e-4, 1e-3, 3e-3, 1e-2)


def mixers(size: Size, *, rates: dict[str, float] | None = None, width: int | None = None) -> list[Arm]:
    """Multi-query associative recall for every mixer: at one width with each of RATES, or at all widths at chosen `rates`."""
    length, pairs = size.mqar
    task = data.MQAR(seq_len=length, vocab_size=size.vocab_size, n_pairs=pairs)
    shorter = [dataclasses.replace(task, seq_len=length // n, n_pairs=max(1, pairs // n)) for n in (4, 2)]
    fewer = dataclasses.replace(task, n_pairs=max(1, pairs // 4))
    part = train.Part((*shorter, fewer, task), tokens=size.tokens, name="mqar")
    phases = (train.Phase("mqar", part, size.steps),)
    far, more = size.mqar_far
    tests = [dataclasses.replace(task, seq_len=n, n_pairs=p) for n, p in ((length, pairs), (far, pairs), (far, more))]
    tests = tuple((f"({t.seq_len:,}, {t.n_pairs})", t) for t in tests)
    arms = []
    for d in size.widths if rates else (width or size.widths[len(size.widths) // 2],):
        for name, changes in MIXERS.items():
            common = dict(d_model=d, n_heads=2, window_size=32)
            cfg = dataclasses.replace(size.model(), **common, **changes)
            for lr in [rates[name]] if rates else RATES:
                label = f"{name}, d {d}" + ("" if rates else f", rate {lr:g}")
                arms.append(Arm(label, cfg, phases, size.training(lr=lr), tests, size.trials))
    return arms


STUDIES: dict[str, Callable[..., list[Arm]]] = {"gates": gates, "mixers": mixers}


# ------------------------------------------------------------------------------------------------ running


def run(
    arms: Iterable[Arm],
    *,
    seeds: Iterable[int] = range(5),
    out: str | Path | None = None,
    device: str = "auto",
    progress: bool = False,
    study: str = "",
) -> pd.DataFrame:
    """Train every arm from every seed, ask it, and return one row per test; `out` takes them as lines of JSON as they come.

    An arm and seed that `out` already holds with the same settings is taken from there.
    """
    seeds, rows = list(seeds), []
    known = {} if out is None else _by_run(_lines(out))
    for arm in arms:
        for seed in seeds:
            found = known.get((arm.key, seed))
            if found is None:
                found = trained(arm, seed, device=device, progress=progress)[1]
                found = [dict(row, study=study) for row in found]
                if out is not None:
                    with open(out, "a", encoding="utf-8") as file:
                        file.writelines(json.dumps(row) + "\n" for row in found)
            rows += found
    return pd.DataFrame(rows)


def trained(arm: Arm, seed: int, *, device: str = "auto", progress: bool = False, on_log=None):
    """One arm from one seed: (model, rows of its tests, run of train.fit)."""
    cuda = device != "cpu" and torch.cuda.is_available()
    net = model.build(arm.cfg, seed=seed).to("cuda" if cuda else "cpu")
    training = dataclasses.replace(arm.training, seed=seed, device="auto" if cuda else "cpu")
    fitted = train.fit(net, arm.phases, training, progress=progress, on_log=on_log)
    common = dict(arm=arm.name, key=arm.key, seed=seed, parameters=net.count_params(), lr=training.lr)
    common |= dict(steps=fitted.steps, seconds=round(fitted.seconds, 2), pattern=arm.cfg.layer_pattern)
    common |= dict(revision=runs.git_revision(), device=runs.device_name() if cuda else "cpu", **runs.versions())
    common |= dict(date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), last_loss=_last_loss(fitted))
    inside = memory_of(net, arm.tests[0][1])
    rows = []
    for label, task in arm.tests:
        rate = analysis.accuracy(net, task, trials=arm.trials)
        row = dict(test=label, length=task.seq_len, **rate.row(), chance=task.chance)
        rows.append(common | inside | row | dict(state=arm.cfg.state_size(task.seq_len)))
    return net, rows, fitted


def _last_loss(fitted: train.Run) -> float:
    column = next(c for c in fitted.history if c.startswith("loss/"))
    return float(fitted.history[column].iloc[-5:].mean())


def memory_of(net: model.TransparentHybrid, task: data.Task) -> dict:
    """Mean write strength and log-decay of the first memory layer on rows of `task`; {} without one.

    `shut`: share of tokens at which its write gate is exactly 0 in every head.
    """
    tokens = task.sample(4, analysis.fresh(2)).tokens[:, :4096]
    record = next((r for r in analysis.records(net, tokens) if r["layer"] == "G"), None)
    if record is None:
        return {}
    beta, g = record["beta"], record["log_decay"]
    return dict(beta=float(beta.mean()), log_decay=float(g.mean()), shut=float((beta == 0).all(-1).float().mean()))


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


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean accuracy of each arm and test over seeds with its 95% interval, and the fewest trials of a seed.

    Two seeds or more: Student's t over them. One: Wilson's interval of its trials, and the table says so by `seeds`.
    """
    table = []
    for (arm, test), part in rows.groupby(["arm", "test"], sort=False):
        if len(part) > 1:
            mean, low, high = analysis.mean_interval(part["accuracy"])
            low, high = max(low, 0.0), min(high, 1.0)
        else:
            mean, low, high = part[["accuracy", "low", "high"]].iloc[0]
        line = dict(arm=arm, test=test, length=int(part["length"].iloc[0]), accuracy=mean, low=low, high=high)
        line |= dict(worst=part["accuracy"].min(), seeds=len(part), trials=int(part["trials"].min()))
        line |= dict(
            chance=part["chance"].iloc[0], parameters=int(part["parameters"].iloc[0]), state=int(part["state"].iloc[0])
        )
        table.append(line)
    return pd.DataFrame(table)


def best_rates(rows: pd.DataFrame, test: str) -> dict[str, float]:
    """Of a sweep of rates by `mixers`: the rate at which each mixer did best in `test`, of equals the lower one."""
    rows = rows[rows["test"] == test].assign(mixer=rows["arm"].str.split(", d ").str[0]).sort_values("lr")
    means = rows.groupby(["mixer", "lr"])["accuracy"].mean()
    return {mixer: float(part.idxmax()[1]) for mixer, part in means.groupby(level=0)}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", default="0,1,2,3,4", help="comma-separated")
    parser.add_argument("--arms", default="", help="only arms whose name holds one of these words, separated by ;")
    parser.add_argument("--out", default="results/recall.jsonl")
    parser.add_argument("--smoke", action="store_true", help="the size of the smoke profile")
    args = parser.parse_args(arguments)
    arms = STUDIES[args.study](SMOKE if args.smoke else FULL)
    if args.arms:
        arms = [arm for arm in arms if any(word in arm.name for word in args.arms.split(";"))]
    for arm in arms:
        rows = run([arm], seeds=map(int, args.seeds.split(",")), out=args.out, study=args.study)
        print(summary(rows)[["arm", "test", "accuracy", "low", "high", "seeds"]].to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
