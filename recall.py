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
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from scipy import stats

import analysis
import audit
import config
import data
import model
import ruler
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
    furthest: int = 2**20  # and one for the arms that may last so long
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
# The 33M hybrid at the lengths of the notes.
LARGE = Size(d_model=512, n_heads=8, vocab_size=50_257, lengths=(256, 512, 1024, 2048), lr=1e-3)
SIZES = dict(  # steps: several times what the arms needed in trials
    keys=dataclasses.replace(FULL, lengths=(256, 512, 1024, 2048), steps=600),
    mixers=dataclasses.replace(FULL, steps=800),
    penalties=dataclasses.replace(FULL, steps=600),
    ids=dataclasses.replace(FULL, steps=400),
    counts=LARGE,
    # Few answers a seed: a test at 65,536 tokens reads 13 million for them.
    ruler=dataclasses.replace(LARGE, far=(2048, 8192, 65536), tokens=2**15, trials=200),
    language=dataclasses.replace(LARGE, steps=640),  # 10.5 million tokens of text
    order=dataclasses.replace(LARGE, steps=640),
)
SMOKE = Size(
    d_model=64, n_heads=2, width=32, vocab_size=256, lengths=(64, 128), needles=(1, 2, 5), tokens=2048, steps=120,
    far=(128, 512), furthest=2048, asked=5, widths=(64,), mqar=(64, 8), mqar_far=(128, 16), trials=1000,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ studies


def gates(size: Size, *, patterns: Iterable[str] = ("G",)) -> list[Arm]:
    """What lets a memory last: decay and write gate of its layers, soft ones and those that can be exactly shut.

    Trained on a few needles at short lengths, asked for `size.asked` needles at lengths up to 64 times those.
    """
    needle = data.MultiNeedle(
        seq_len=size.lengths[0], vocab_size=size.vocab_size, n_needles=1, n_markers=max(size.asked, *size.needles)
    )
    phase = train.Phase("needles", _needles(size, needle, size.needles), size.steps)
    # 1 at all but a few tokens, and near enough to the edge at 2.4 for a gradient: at a bias of 8 the gate would never move.
    opened = dict(decay="hard", g_bias=2.6)
    tests = tuple(
        (f"{length:,} tokens", dataclasses.replace(needle, n_needles=size.asked, seq_len=length)) for length in size.far
    )
    settings = {
        "sigmoid decay, bias 2": (dict(g_bias=2.0), {}),
        "sigmoid decay": ({}, {}),
        "Mamba-style decay": (dict(decay="mamba"), {}),
        "hard decay": (opened, {}),
        "no decay": (dict(decay="none"), {}),
        "no decay, penalty": (dict(decay="none"), dict(write_penalty=0.02)),
        "no decay, hard write": (dict(decay="none", write_gate="hard"), {}),
        "no decay, hard write, penalty": (dict(decay="none", write_gate="hard"), dict(write_penalty=0.02)),
        "no decay, straight-through write, penalty": (
            dict(decay="none", write_gate="straight"),
            dict(write_penalty=0.02),
        ),
        "hard decay, hard write, penalty": (opened | dict(write_gate="hard"), dict(write_penalty=0.02)),
    }
    furthest = (f"{size.furthest:,} tokens", dataclasses.replace(tests[-1][1], seq_len=size.furthest))
    arms = []
    for pattern in patterns:
        for name, (changes, more) in settings.items():
            asked = (*tests, furthest) if more and "write_gate" in changes else tests
            label = name if pattern == "G" else f"{name}, {pattern}"
            arms.append(Arm(label, size.model(pattern, **changes), (phase,), size.training(**more), asked, size.trials))
    return arms


MIXERS = {  # two layers each, at most 2 heads; every recurrent one with the shifted write
    "softmax attention": dict(layer_pattern="AA", use_rope=True),
    "linear attention": dict(layer_pattern="LL"),
    "DeltaNet": dict(layer_pattern="GG", decay="none", beta_bias=-4.0),
    "gated delta, Mamba-style decay": dict(layer_pattern="GG", decay="mamba", beta_bias=-4.0),
    "hybrid": dict(layer_pattern="GS", decay="none", beta_bias=-4.0, use_rope=True),
    "hybrid, write penalty": dict(layer_pattern="GS", decay="none", beta_bias=-4.0, use_rope=True),
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
                # Weak writes erase little of what lies beside them: pairs far beyond those of training are then kept too.
                more = dict(write_penalty=1.0) if "penalty" in name else {}
                arms.append(Arm(label, cfg, phases, size.training(lr=lr, **more), tests, size.trials))
    return arms


SHUT = dict(decay="none", write_gate="hard")  # gates that can be exactly shut, and nothing that forgets


def text(size: Size) -> data.LanguageModel:
    """The text that WORKBOOK_CORPUS and WORKBOOK_TOKENIZER name; by default Python's documentation, byte by byte, for a small
    size, and WikiText-103 with the GPT-NeoX tokenizer from the hub for others."""
    small = size.vocab_size <= 512
    corpus = data.corpus(
        os.environ.get("WORKBOOK_CORPUS", "offline" if small else "wikitext-103"), max_bytes=12_000_000
    )
    coder = data.tokenizer(os.environ.get("WORKBOOK_TOKENIZER", "bytes" if small else "EleutherAI/gpt-neox-20b"))
    return data.LanguageModel(corpus=corpus, tokenizer=coder)


def _needles(size: Size, task: data.NeedleTask, counts: Iterable[int], *more: data.Task) -> train.Part:
    """A part that draws one of the training lengths and needle counts each step, as far as they fit."""
    room = lambda length, n: length >= 2 * n * (task.needle_width + task.cue_width)  # noqa: E731
    options = [
        dataclasses.replace(t, seq_len=length, n_needles=n)
        for t in (task, *more)
        for length in size.lengths
        for n in counts
        if room(length, n)
    ]
    return train.Part(tuple(options), tokens=size.tokens, name="needles")


def keys(size: Size) -> list[Arm]:
    """What tells one needle from another: markers of their own, slots, or the context of a marker that all share.

    Five needles, by the keys of G layers: learned, rotated, orthonormal by slot, or convolved over the context.
    """
    common = dict(seq_len=size.lengths[-1], vocab_size=size.vocab_size, n_needles=5)
    unique = data.MultiNeedle(**common, n_markers=16)
    shared = data.SharedMarkerNeedles(**common)
    slots = data.SlotNeedles(**common, n_slots=16)
    first = size.vocab_size - 16  # id of the first marker, or slot
    bank = dict(key_bank_slots=16, key_bank_start=first)
    settings = {
        "unique markers": (unique, "GS", {}),
        "unique markers, values not shifted": (unique, "GS", dict(shifted_value=False)),
        "unique markers, RoPE on keys": (unique, "GS", dict(rope_keys=True)),
        "unique markers, context convolution of 8": (unique, "GS", dict(key_context_conv=8)),
        "unique markers, key bank": (unique, "GS", bank),
        "slots, learned keys": (slots, "GS", {}),
        "slots, key bank and write counter": (slots, "GS", bank | dict(key_bank_marker=first - 1)),
        "one marker, keys of one token": (shared, "GS", {}),
        "one marker, key convolution of 2": (shared, "GS", dict(key_conv_width=2)),
        "one marker, key convolution of 4": (shared, "GS", dict(key_conv_width=4)),
        "one marker, window before the memory": (shared, "SG", {}),
    }
    arms = []
    for name, (task, pattern, changes) in settings.items():
        cfg = dataclasses.replace(size.model(pattern, **SHUT), window_size=32, **changes)
        phase = train.Phase("needles", _needles(size, task, (1, 2, 3, 5)), size.steps)
        lengths = size.lengths[-1], 4 * size.lengths[-1]
        tests = tuple((f"{n:,} tokens", dataclasses.replace(task, seq_len=n)) for n in lengths)
        arms.append(Arm(name, cfg, (phase,), size.training(write_penalty=0.02), tests, size.trials))
    return arms


def penalties(size: Size) -> list[Arm]:
    """Do penalties on similar keys and on writing help, as the source notes believed? Soft gates, as there."""
    task = data.MultiNeedle(
        seq_len=size.lengths[-1], vocab_size=size.vocab_size, n_needles=size.needles[-1], n_markers=size.needles[-1]
    )
    part = _needles(size, task, size.needles)
    lengths = size.lengths[-1], 4 * size.lengths[-1], 16 * size.lengths[-1]
    tests = tuple((f"{n:,} tokens", dataclasses.replace(task, seq_len=n)) for n in lengths)
    settings = {
        "no penalty": {},
        "keys .1": dict(key_penalty=0.1),
        "keys .5": dict(key_penalty=0.5),
        "write .1": dict(write_penalty=0.1),
        "write .3": dict(write_penalty=0.3),
        "keys .5, write .3": dict(key_penalty=0.5, write_penalty=0.3),
    }
    phases = {name: (train.Phase("needles", part, size.steps),) for name in settings}
    # Half of the budget each, so that every arm has the same number of steps.
    half = size.steps // 2
    for name, more in {"half, then keys .5, slower": dict(key_penalty=0.5), "half, then nothing, slower": {}}.items():
        slower = train.Phase("slower", part, size.steps - half, lr=size.lr / 3, **more)
        phases[name], settings[name] = (train.Phase("needles", part, half), slower), {}
    cfg = size.model("GS")
    return [Arm(n, cfg, phases[n], size.training(**more), tests, size.trials) for n, more in settings.items()]


def ids(size: Size) -> list[Arm]:
    """Values from a narrow range of ids, which can be learned by heart, or from all: what is left for ids never asked for."""
    task = data.MultiNeedle(seq_len=size.lengths[-1], vocab_size=size.vocab_size, n_needles=5, n_markers=16)
    top = task.values[1]
    seen, fresh = (top - top // 8, top - top // 16), (top - top // 16, top)
    settings = {"50 ids": (top - top // 16 - 50, top - top // 16), "a sixteenth of the ids": seen, "all ids": None}
    arms = []
    for name, span in settings.items():
        part = _needles(size, dataclasses.replace(task, needle_range=span), (1, 2, 3, 5))
        asked = {"ids of training": span, "fresh ids": fresh}
        tests = tuple((test, dataclasses.replace(task, needle_range=chosen)) for test, chosen in asked.items())
        phase = train.Phase("needles", part, size.steps)
        arms.append(
            Arm(name, size.model("GS", **SHUT), (phase,), size.training(write_penalty=0.02), tests, size.trials)
        )
    return arms


def _text(size: Size, text: data.LanguageModel | None, n_special: int) -> tuple[int, list[data.LanguageModel]]:
    """Ids that a model needs beside `n_special` markers, and the training and held-out text with as many."""
    if text is None:
        return size.vocab_size, []
    vocab = config.round_up(text.tokenizer.vocab_size + n_special, 64)
    sides = (dataclasses.replace(text, split=split, vocab_size=vocab) for split in ("train", "validation"))
    return vocab, list(sides)


def counts(size: Size, text: data.LanguageModel | None = None) -> list[Arm]:
    """2 to 64 needles behind markers of their own at the longest length of training, in random ids and in held-out text."""
    asked = [n for n in (2, 3, 5, 16, 64) if n <= size.asked]
    vocab, sides = _text(size, text, asked[-1])
    length = size.lengths[-1]
    plain = data.MultiNeedle(seq_len=length, vocab_size=vocab, n_needles=1, n_markers=asked[-1])
    hidden = [dataclasses.replace(plain, haystack=side) for side in sides]
    phase = train.Phase("needles", _needles(size, plain, (1, *asked), *hidden[:1]), size.steps)
    tests = [(f"{n} in random ids", dataclasses.replace(plain, n_needles=n)) for n in asked]
    tests += [(f"{n} in text", dataclasses.replace(task, n_needles=n)) for task in hidden[1:] for n in asked]
    cfg = dataclasses.replace(size.model("GS", **SHUT), vocab_size=vocab, value_dim=2 * size.width)
    return [Arm("hybrid", cfg, (phase,), size.training(write_penalty=0.02), tuple(tests), size.trials)]


def ruler_tasks(size: Size, text: data.LanguageModel | None = None) -> list[Arm]:
    """The eight tasks of ruler.py at once, trained at short lengths, asked at `size.far`; two layers of memory, for the hops."""
    vocab, sides = _text(size, text, 33)
    sides = sides or [None, None]
    at = lambda length, side: ruler.suite(length, vocab, haystack=side)  # noqa: E731
    names = list(at(size.lengths[-1], None))
    parts = [
        train.Part(tuple(at(length, sides[0])[name] for length in size.lengths), tokens=size.tokens // 8, name=name)
        for name in names
    ]
    phase = train.Phase("ruler", tuple(parts), size.steps)
    tests = tuple((f"{name} at {n:,}", task) for n in size.far for name, task in at(n, sides[1]).items())
    cfg = dataclasses.replace(size.model("GSGS", **SHUT), vocab_size=vocab, value_dim=2 * size.width)
    return [Arm("hybrid, GSGS", cfg, (phase,), size.training(write_penalty=0.02), tests, size.trials)]


def language(
    size: Size, text: data.LanguageModel, *, weights: Iterable[float] = (0.0, 0.05, 0.2, 0.5, 1.0)
) -> list[Arm]:
    """Language modelling with five needles beside it, by the weight of their loss; every arm sees the same text.

    Soft gates that forget over 2,000 tokens beside gates that can be shut: does language keep them open? And two window
    layers without a memory, on language alone: what is a memory worth to it?
    """
    vocab, (seen, held_out) = _text(size, text, 16)
    length = size.lengths[-1]
    seen, held_out = (dataclasses.replace(side, seq_len=length) for side in (seen, held_out))
    plain = data.MultiNeedle(seq_len=length, vocab_size=vocab, n_needles=5, n_markers=16)
    hidden = [dataclasses.replace(plain, haystack=side) for side in (seen, held_out)]
    words = train.Part(seen, tokens=size.tokens, name="language")
    tests = (("language", held_out), ("five in random ids", plain), ("five in text", hidden[1]))
    arms = []
    weights = list(weights)
    gates = ("soft gates", {}, {}, weights), ("gates that can shut", SHUT, dict(write_penalty=0.02), weights[::3])
    for gate, changes, more, chosen in gates:
        cfg = dataclasses.replace(size.model("GS", **changes), vocab_size=vocab, value_dim=2 * size.width)
        half = dataclasses.replace(size, tokens=size.tokens // 2)
        for weight in chosen:
            asked = dataclasses.replace(_needles(half, plain, (1, 2, 3, 5), hidden[0]), weight=weight or 1.0)
            phase = train.Phase("joint", (words, asked) if weight else words, size.steps)
            name = f"{gate}, weight {weight:g}" if weight else f"{gate}, language alone"
            arms.append(Arm(name, cfg, (phase,), size.training(**more), tests, size.trials))
    without = dataclasses.replace(cfg, layer_pattern="SS", use_rope=True)
    alone = train.Phase("joint", words, size.steps)
    return [*arms, Arm("no memory, language alone", without, (alone,), size.training(), tests, size.trials)]


def order(size: Size, text: data.LanguageModel) -> list[Arm]:
    """Needles first, language first, or both at once, for the same number of steps on each; and needles before both."""
    first, *_ = language(size, text, weights=(0.5,))
    both, (joint,) = first, first.phases
    words, asked = joint.streams
    half, slower = max(1, size.steps // 2), size.lr / 3
    phases = {
        "both at once": (joint, dataclasses.replace(joint, name="slower", lr=slower)),
        "needles, then language": (train.Phase("n", asked, size.steps), train.Phase("w", words, size.steps, lr=slower)),
        "language, then needles": (train.Phase("w", words, size.steps), train.Phase("n", asked, size.steps, lr=slower)),
        "needles, then both": (train.Phase("n", asked, half), dataclasses.replace(joint, lr=slower)),
    }
    phases["both at once"] = tuple(dataclasses.replace(p, steps=half) for p in phases["both at once"])
    return [dataclasses.replace(both, name=name, phases=chosen) for name, chosen in phases.items()]


STUDIES: dict[str, Callable[..., list[Arm]]] = dict(gates=gates, mixers=mixers, keys=keys, penalties=penalties, ids=ids)
# These take a text besides: `counts` and `ruler` for a haystack, `language` to learn it.
WITH_TEXT: dict[str, Callable[..., list[Arm]]] = dict(counts=counts, ruler=ruler_tasks, language=language, order=order)


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
    common |= dict(model=repr(arm.cfg), d_model=arm.cfg.d_model, pattern=arm.cfg.layer_pattern)
    common |= dict(steps=fitted.steps, seconds=round(fitted.seconds, 2))
    common |= dict(revision=runs.git_revision(), device=runs.device_name() if cuda else "cpu", **runs.versions())
    common |= dict(date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), last_loss=_last_loss(fitted))
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
    """Consecutive rows of a text, in batches."""
    windows = task.windows(limit=rows)
    return [windows.rows(slice(i, i + at_once)) for i in range(0, len(windows.tokens), at_once)]


def _last_loss(fitted: train.Run) -> float:
    column = next(c for c in fitted.history if c.startswith("loss/"))
    return float(fitted.history[column].dropna().iloc[-5:].mean())  # a phase without it leaves it empty


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


def named(rows: pd.DataFrame, arms: Iterable[Arm]) -> pd.DataFrame:
    """The rows of these arms, under their names: an arm that another study or name has trained already is not trained again."""
    names = {arm.key: arm.name for arm in arms}
    rows = rows[rows["key"].isin(names)].drop_duplicates(["key", "seed", "test"]) if len(rows) else rows
    return rows.assign(arm=rows["key"].map(names)) if len(rows) else rows


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean accuracy of each arm and test over seeds with its 95% interval, and the fewest trials of a seed.

    Two seeds or more: Student's t over them. One: Wilson's interval of its trials, and the table says so by `seeds`. Tests of
    language are left to `losses`.
    """
    table = []
    for (arm, test), part in rows.dropna(subset="accuracy").groupby(["arm", "test"], sort=False):
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


def losses(rows: pd.DataFrame, *, than: str) -> pd.DataFrame:
    """Loss of each arm on held-out text, mean over seeds with its 95% interval, and its excess over that of arm `than` in
    percent, paired by seed. ValueError for fewer than 2 seeds that both have."""
    found = rows.dropna(subset="loss") if "loss" in rows else rows.iloc[:0]
    by_arm = found.pivot(index="seed", columns="arm", values="loss")
    if than not in by_arm:
        raise ValueError(f"than = {than!r}: the rows hold losses of {list(by_arm.columns)}")
    table = []
    for arm in found["arm"].unique():
        both = by_arm[[arm, than]].dropna().to_numpy()
        if len(both) < 2:
            raise ValueError(f"rows: {arm!r} shares {len(both)} seeds with {than!r}; an interval needs 2")
        mean, low, high = analysis.mean_interval(both[:, 0])
        line = dict(arm=arm, loss=mean, low=low, high=high, seeds=len(both))
        excess = analysis.mean_interval(100 * (both[:, 0] / both[:, 1] - 1))
        table.append(line | dict(zip(("excess, %", "excess low", "excess high"), excess, strict=True)))
    return pd.DataFrame(table)


def differences(rows: pd.DataFrame, controls: dict[str, str]) -> pd.DataFrame:
    """Accuracy of each arm less that of its control in every test, paired by seed, in points of per cent.

    controls: arm -> the arm to compare it with. difference, low, high: mean over the seeds that both have and its 95% t interval;
    p: of the t-test that it is 0, 1 where all differences are equal, which such a test cannot judge; holm: p after Holm's
    correction for all lines of the table. Pairs that `rows` does not hold, or with fewer than 2 seeds in common, have no line.
    """
    table, known = [], rows.dropna(subset="accuracy") if "accuracy" in rows else rows.iloc[:0]
    for test, part in known.groupby("test", sort=False) if len(known) else ():
        by_arm = part.pivot_table(index="seed", columns="arm", values="accuracy")
        for arm, than in controls.items():
            if arm not in by_arm or than not in by_arm:
                continue
            points = 100 * (by_arm[arm] - by_arm[than]).dropna()
            if len(points) < 2:
                continue
            mean, low, high = analysis.mean_interval(points)
            p = float(stats.ttest_1samp(points, 0).pvalue) if points.nunique() > 1 else 1.0
            line = dict(arm=arm, than=than, test=test, difference=mean, low=low, high=high, p=p, holm=p)
            table.append(line | dict(seeds=len(points)))
    most = 0.0
    for i, line in enumerate(sorted(table, key=lambda line: line["p"])):
        most = line["holm"] = max(most, min(1.0, line["p"] * (len(table) - i)))
    return pd.DataFrame(table)


def verdict(table: pd.DataFrame, *, level: float = 0.05, least_seeds: int = 5) -> list[str]:
    """A sentence for each arm of `differences`: better or worse in the tests where p after Holm's correction is below `level`,
    else no effect shown, which the intervals bound; no verdict from fewer than `least_seeds` seeds. The numbers follow."""
    said = []
    for (arm, than), part in table.groupby(["arm", "than"], sort=False) if len(table) else ():
        found, numbers = {}, []
        for r in part.itertuples():
            word = "no effect shown" if r.holm >= level else "better" if r.difference > 0 else "worse"
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
    """Arms by tests: mean accuracy over seeds in percent, its 95% interval in brackets."""
    table = summary(rows)
    cell = lambda r: f"{100 * r.accuracy:.1f} [{100 * r.low:.1f}, {100 * r.high:.1f}]"  # noqa: E731
    table["cell"] = [cell(r) for r in table.itertuples()]
    order = dict(index=table["arm"].unique(), columns=table["test"].unique())
    wide = table.pivot(index="arm", columns="test", values="cell").reindex(**order).fillna("")
    first = table.drop_duplicates("arm").set_index("arm")
    return wide.assign(seeds=first["seeds"], parameters=first["parameters"], chance=first["chance"])


def inside(rows: pd.DataFrame) -> pd.DataFrame:
    """What the first memory layer of each arm does on its first test: mean over seeds of the write strength and of the share of
    tokens at which every head writes nothing, and the half-life in tokens of the mean log-decay (inf: nothing decays)."""
    means = rows.drop_duplicates(["arm", "seed"]).groupby("arm", sort=False)[["beta", "shut", "log_decay"]].mean()
    half = [math.log(0.5) / g if g < 0 else math.inf for g in means.pop("log_decay")]
    return means.rename(columns={"beta": "write strength", "shut": "writes nothing"}).assign(**{"half-life": half})


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
    far the first lies beyond the second, accuracy that of `test`, both with the interval of `audit.claim`, whose verdict is the
    last column; worst: the lowest accuracy of a seed; succeeded: seeds that reach `threshold`. An arm that shares no seed with
    language alone is left out.
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
            right = audit.claim(both["accuracy"], least_seeds=least_seeds, threshold=threshold, bounds=(0, 1)).iloc[0]
            line = dict(gate=gate, weight=weight, loss=both["loss"].mean(), alone=both["alone"].mean())
            line |= dict(zip(("excess, %", "excess low", "excess high"), excess[["mean", "low", "high"]], strict=True))
            line |= dict(zip(("accuracy", "low", "high"), right[["mean", "low", "high"]], strict=True))
            line |= dict(worst=both["accuracy"].min(), seeds=len(both), succeeded=right["succeeded"])
            table.append(line | dict(verdict=right["verdict"]))
    return pd.DataFrame(table)


def best_rates(rows: pd.DataFrame, test: str) -> dict[str, float]:
    """Of a sweep of rates by `mixers`: the rate at which each mixer did best in `test`; of equals that with the lower loss at the
    end of training. ValueError without such rows."""
    rows = of_mixers(rows[(rows["test"] == test) & rows["arm"].str.contains("rate")]) if len(rows) else rows
    if not len(rows):
        raise ValueError(f"rows: no sweep of rates with the test {test!r}")
    means = rows.groupby(["mixer", "lr"])[["accuracy", "last_loss"]].mean().reset_index()
    ordered = means.sort_values(["accuracy", "last_loss"], ascending=[False, True])
    return {mixer: float(part["lr"].iloc[0]) for mixer, part in ordered.groupby("mixer")}


def of_mixers(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of `mixers` with the name of the mixer as a column of its own."""
    return rows.assign(mixer=rows["arm"].str.split(", d ").str[0])


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=(*STUDIES, *WITH_TEXT))
    parser.add_argument("--seeds", default="0,1,2,3,4", help="comma-separated")
    parser.add_argument("--arms", default="", help="only arms whose name holds one of these words, separated by ;")
    parser.add_argument("--out", default="results/recall.jsonl")
    parser.add_argument("--smoke", action="store_true", help="the size of the smoke profile")
    why = "mixers: at every width with the best of the rates that this file holds for the middle one"
    parser.add_argument("--rates-of", help=why)
    args = parser.parse_args(arguments)
    size = SMOKE if args.smoke else SIZES.get(args.study, FULL)
    if args.rates_of:
        if args.study != "mixers":
            parser.error(f"--rates-of belongs to mixers, not to {args.study}")
        arms = mixers(size, rates=best_rates(load(args.rates_of, "mixers"), mixers(size)[0].tests[0][0]))
    else:
        arms = STUDIES[args.study](size) if args.study in STUDIES else WITH_TEXT[args.study](size, text(size))
    if args.arms:
        arms = [arm for arm in arms if any(word in arm.name for word in args.arms.split(";"))]
    for arm in arms:
        rows = run([arm], seeds=map(int, args.seeds.split(",")), out=args.out, study=args.study)
        print(summary(rows)[["arm", "test", "accuracy", "low", "high", "seeds"]].to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
