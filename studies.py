"""The studies of recall: what is trained, how, and what it is asked afterwards, as arms that differ in what they are named for.

    arms = studies.STUDIES["gates"](studies.FULL)  # `recall.run` trains them
    arms = studies.WITH_TEXT["language"](studies.SIZES["language"], studies.text(studies.LARGE))

Sizes are settings, so that the smoke profile runs the same arms.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import config
import data
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
        """Hash of all settings that decide the numbers, the seed apart. Code is no setting: rows have a revision for that."""
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
    ruler=dataclasses.replace(LARGE, far=(2048, 8192, 65536), steps=2400, trials=200),
    # Up to as many needles as are asked for: ids out of 50,000 have to be met as values before they can be told apart.
    layers=dataclasses.replace(FULL, far=(1024, 16384, 65536), needles=(1, 4, 16, 64), steps=1600),
    language=dataclasses.replace(LARGE, steps=640),  # 10.5 million tokens of text
    order=dataclasses.replace(LARGE, steps=640),
)
SMOKE = Size(
    d_model=64, n_heads=2, width=32, vocab_size=256, lengths=(64, 128), needles=(1, 2, 5), tokens=2048, steps=120,
    far=(128, 512), furthest=2048, asked=5, widths=(64,), mqar=(64, 8), mqar_far=(128, 16), trials=1000,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ studies


# Gates that can be exactly shut, and nothing that forgets: by a clamp, and by one whose gradient is a sigmoid's.
SHUT = dict(decay="none", write_gate="hard")
STRAIGHT = dict(decay="none", write_gate="straight")
PRESSED = dict(write_penalty=0.02)  # what tells such a gate where to shut


def _by_length(task: data.Task, lengths: Iterable[int]) -> tuple[tuple[str, data.Task], ...]:
    """The same task at several lengths, as tests."""
    return tuple((f"{n:,} tokens", dataclasses.replace(task, seq_len=n)) for n in lengths)


def gates(size: Size, *, patterns: Iterable[str] = ("G",)) -> list[Arm]:
    """What lets a memory last: decay, write gate and penalty of its layers, soft gates and those that can be exactly shut.

    Trained on a few needles at short lengths, asked for `size.asked` needles at lengths up to 64 times those.
    """
    needle = data.MultiNeedle(
        seq_len=size.lengths[0], vocab_size=size.vocab_size, n_needles=1, n_markers=max(size.asked, *size.needles)
    )
    phase = train.Phase("needles", _needles(size, needle, size.needles), size.steps)
    brief = dataclasses.replace(size, lengths=size.lengths[: len(size.lengths) // 2])  # the source notes' were of 256
    short = dataclasses.replace(phase, parts=(_needles(brief, needle, size.needles),))
    # 1 at all but a few tokens, and near enough to the edge at 2.4 for a gradient: at a bias of 8 the gate would never move.
    opened = dict(decay="hard", g_bias=2.6)
    many = dataclasses.replace(needle, n_needles=size.asked, seq_len=size.far[0])
    settings = {
        "sigmoid decay, bias 2": (dict(g_bias=2.0), {}),
        "sigmoid decay": ({}, {}),
        "Mamba-style decay": (dict(decay="mamba"), {}),
        "hard decay": (opened, {}),
        "no decay": (dict(decay="none"), {}),
        "no decay, penalty": (dict(decay="none"), PRESSED),
        "no decay, hard write": (SHUT, {}),
        "no decay, hard write, penalty": (SHUT, PRESSED),
        "no decay, hard write, penalty .2": (SHUT, dict(write_penalty=0.2)),
        "no decay, straight-through write": (STRAIGHT, {}),
        "no decay, straight-through write, penalty .002": (STRAIGHT, dict(write_penalty=0.002)),
        "no decay, straight-through write, penalty": (STRAIGHT, PRESSED),
        "hard decay, hard write, penalty": (opened | dict(write_gate="hard"), PRESSED),
        f"sigmoid decay, bias 2, rows of {brief.lengths[-1]}": (dict(g_bias=2.0), {}),
    }
    arms = []
    for pattern in patterns:
        for name, (changes, more) in settings.items():
            # Soft gates without a penalty have lost much at the length before the furthest.
            lasting = more or changes == STRAIGHT
            tests = _by_length(many, (*size.far, size.furthest) if lasting else size.far)
            label = name if pattern == "G" else f"{name}, {pattern}"
            taught = short if "rows of" in name else phase
            arms.append(
                Arm(label, size.model(pattern, **changes), (taught,), size.training(**more), tests, size.trials)
            )
    return arms


MIXERS = {  # two layers each, at most 2 heads; all but one with the key of the token before beside each value
    "softmax attention": dict(layer_pattern="AA"),
    # Has to learn to look at the token before, with RoPE to tell it: in so few steps it does not.
    "softmax attention, not shifted": dict(layer_pattern="AA", shifted_value=False, use_rope=True),
    "linear attention": dict(layer_pattern="LL"),
    "DeltaNet": dict(layer_pattern="GG", decay="none", beta_bias=-4.0),
    "gated delta, Mamba-style decay": dict(layer_pattern="GG", decay="mamba", beta_bias=-4.0),
    "hybrid": dict(layer_pattern="GS", decay="none", beta_bias=-4.0, use_rope=True),
    # Begins with writes of clamp(1.2 sigmoid(-2) - .1) = .04: weak ones erase little of what lies beside them.
    "hybrid, hard write, penalty": dict(
        layer_pattern="GS", decay="none", write_gate="hard", beta_bias=-2.0, use_rope=True
    ),
}
RATES = (1e-3, 3e-3, 1e-2, 3e-2)


def mixers(size: Size, *, rates: dict[str, float] | None = None, width: int | None = None) -> list[Arm]:
    """Multi-query associative recall for every mixer: at one width with each of RATES; or for those that `rates` names at all
    widths, each at its own.

    Trained with both fillers of the published task, zeros and random ids, asked with zeros.
    """
    length, pairs = size.mqar
    task = data.MQAR(seq_len=length, vocab_size=size.vocab_size, n_pairs=pairs)
    shorter = [dataclasses.replace(task, seq_len=length // n, n_pairs=max(1, pairs // n)) for n in (4, 2)]
    fewer = dataclasses.replace(task, n_pairs=max(1, pairs // 4))
    every = [dataclasses.replace(t, filler=f) for t in (*shorter, fewer, task) for f in ("zero", "random")]
    part = train.Part(tuple(every), tokens=size.tokens, name="mqar")
    phases = (train.Phase("mqar", part, size.steps),)
    far, more = size.mqar_far
    tests = [dataclasses.replace(task, seq_len=n, n_pairs=p) for n, p in ((length, pairs), (far, pairs), (far, more))]
    tests = tuple((f"({t.seq_len:,}, {t.n_pairs})", t) for t in tests)
    arms = []
    for d in size.widths if rates else (width or size.widths[len(size.widths) // 2],):
        for name, changes in MIXERS.items():
            if rates and name not in rates:
                continue
            common = dict(d_model=d, n_heads=2, window_size=32)
            cfg = dataclasses.replace(size.model(), **common, **changes)
            for lr in [rates[name]] if rates else RATES:
                label = f"{name}, d {d}" + ("" if rates else f", rate {lr:g}")
                # Weak writes erase little of what lies beside them: pairs far beyond those of training are then kept too.
                more = dict(write_penalty=1.0) if "penalty" in name else {}
                # Once 64 pairs are sure, more steps fit them ever closer, at the price of 256; weight decay holds that up.
                training = size.training(lr=lr, weight_decay=1.0, **more)
                arms.append(Arm(label, cfg, phases, training, tests, size.trials))
    return arms


def text(size: Size) -> data.LanguageModel:
    """The text that WORKBOOK_CORPUS and WORKBOOK_TOKENIZER name; by default Python's documentation, byte by byte, for a small
    size, and WikiText-103 with the GPT-NeoX tokenizer from the hub for others."""
    small = size.vocab_size <= 512
    corpus = data.corpus(
        os.environ.get("WORKBOOK_CORPUS", "offline" if small else "wikitext-103"), max_bytes=60_000_000
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
        "unique markers, values not shifted, key convolution of 2": (
            unique,
            "GS",
            dict(shifted_value=False, key_conv_width=2),
        ),
        "unique markers, RoPE on keys": (unique, "GS", dict(rope_keys=True)),
        "unique markers, RoPE in the window": (unique, "GS", dict(use_rope=True)),
        "unique markers, context convolution of 8": (unique, "GS", dict(key_context_conv=8)),
        "unique markers, key bank": (unique, "GS", bank),
        "slots, learned keys": (slots, "GS", {}),
        "slots, key bank and write counter": (slots, "GS", bank | dict(key_bank_marker=first - 1)),
        "one marker, keys of one token": (shared, "GS", {}),
        "one marker, key convolution of 2": (shared, "GS", dict(key_conv_width=2)),
        "one marker, key convolution of 4": (shared, "GS", dict(key_conv_width=4)),
        "one marker, key and query convolutions of 4": (shared, "GS", dict(key_conv_width=4, query_conv_width=4)),
        "one marker, context convolution of 8": (shared, "GS", dict(key_context_conv=8)),
        "one marker, window before the memory": (shared, "SG", {}),
    }
    arms = []
    for name, (task, pattern, changes) in settings.items():
        cfg = dataclasses.replace(size.model(pattern, **SHUT), window_size=32, **changes)
        phase = train.Phase("needles", _needles(size, task, (1, 2, 3, 5)), size.steps)
        tests = _by_length(task, (size.lengths[-1], 4 * size.lengths[-1]))
        arms.append(Arm(name, cfg, (phase,), size.training(**PRESSED), tests, size.trials))
    return arms


def penalties(size: Size) -> list[Arm]:
    """Do penalties on similar keys and on writing help, as the source notes believed? Soft gates, as there."""
    task = data.MultiNeedle(
        seq_len=size.lengths[-1], vocab_size=size.vocab_size, n_needles=size.needles[-1], n_markers=size.needles[-1]
    )
    part = _needles(size, task, size.needles)
    tests = _by_length(task, (size.lengths[-1], 4 * size.lengths[-1], 16 * size.lengths[-1]))
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
        arms.append(Arm(name, size.model("GS", **SHUT), (phase,), size.training(**PRESSED), tests, size.trials))
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
    return [Arm("hybrid", cfg, (phase,), size.training(**PRESSED), tuple(tests), size.trials)]


def layers(size: Size, text: data.LanguageModel | None = None) -> list[Arm]:
    """Do gates that can shut still last with more layers, and in text? One memory layer and two, needles in ids and in text."""
    vocab, sides = _text(size, text, max(size.asked, *size.needles))
    plain = data.MultiNeedle(
        seq_len=size.lengths[0], vocab_size=vocab, n_needles=1, n_markers=max(size.asked, *size.needles)
    )
    hidden = [dataclasses.replace(plain, haystack=side) for side in sides]
    phase = train.Phase("needles", _needles(size, plain, size.needles, *hidden[:1]), size.steps)
    tests = tuple(
        (f"{where}, {n:,} tokens", dataclasses.replace(task, n_needles=size.asked, seq_len=n))
        for where, task in (("ids", plain), *(("text", task) for task in hidden[1:]))
        for n in size.far
    )
    settings = {
        "no decay": ("sigmoid", {}),
        "no decay, hard write, penalty": ("hard", PRESSED),
        "no decay, straight-through write, penalty": ("straight", PRESSED),
    }
    arms = []
    for pattern in ("GS", "GSGS"):
        for name, (gate, more) in settings.items():
            cfg = dataclasses.replace(size.model(pattern, decay="none", write_gate=gate), vocab_size=vocab)
            arms.append(Arm(f"{name}, {pattern}", cfg, (phase,), size.training(**more), tests, size.trials))
    return arms


def ruler_tasks(size: Size, text: data.LanguageModel | None = None) -> list[Arm]:
    """The eight tasks of ruler.py at once, trained at short lengths, asked at `size.far`; two layers of memory, for the hops.

    Needles come first, for a third as many steps: they ask for many more values in a row, and one answer in 2,048 tokens teaches
    a vocabulary of 50,000 nothing. Training then asks for all keys and chains of a row, and has fewer values and hops besides.
    """
    vocab, sides = _text(size, text, 33)
    sides = sides or [None, None]
    at = lambda length, side: ruler.suite(length, vocab, haystack=side)  # noqa: E731
    # One task a step: a step of all eight is eight small ones, and takes the time of eight large ones.
    every = []
    for length in size.lengths:
        suite = at(length, sides[0])
        every += [suite[name] for name in suite if name != "multi-key"]
        every += [dataclasses.replace(suite["multi-key"], queries=None)]
        every += [dataclasses.replace(suite["multi-value"], n_needles=n) for n in (1, 2)]
        every += [dataclasses.replace(suite["variable tracking"], hops=hops, queries=None) for hops in (0, 1, 2)]
    plain = data.MultiNeedle(seq_len=size.lengths[0], vocab_size=vocab, n_needles=1, n_markers=33)
    hidden = [dataclasses.replace(plain, haystack=side) for side in sides[:1] if side is not None]
    phases = (
        train.Phase("needles", _needles(size, plain, (1, 4, 16, 32), *hidden), max(1, size.steps // 3)),
        train.Phase("ruler", train.Part(tuple(every), tokens=size.tokens, name="ruler"), size.steps),
    )
    tests = tuple((f"{name} at {n:,}", task) for n in size.far for name, task in at(n, sides[1]).items())
    arms = []
    for rope in (False, True):
        # RoPE lets the window tell which token stands before: what a second memory needs for values of several tokens.
        changes = dict(vocab_size=vocab, value_dim=2 * size.width, use_rope=rope)
        cfg = dataclasses.replace(size.model("GSGS", **STRAIGHT), **changes)
        name = f"hybrid, GSGS, {'with' if rope else 'without'} RoPE"
        arms.append(Arm(name, cfg, phases, size.training(**PRESSED), tests, size.trials))
    return arms


def language(
    size: Size, text: data.LanguageModel, *, weights: Iterable[float] = (0.0, 0.05, 0.2, 0.5, 1.0)
) -> list[Arm]:
    """Language modelling with five needles beside it, by the weight of their loss; every arm sees the same text.

    Soft gates that forget over 2,000 tokens and some that do not decay, beside two kinds that can be shut besides, with a small
    penalty: does language keep them open? And two window layers without a memory, on language alone: what is it worth to that?
    """
    vocab, (seen, held_out) = _text(size, text, 16)
    length = size.lengths[-1]
    seen, held_out = (dataclasses.replace(side, seq_len=length) for side in (seen, held_out))
    plain = data.MultiNeedle(seq_len=length, vocab_size=vocab, n_needles=5, n_markers=16)
    hidden = [dataclasses.replace(plain, haystack=side) for side in (seen, held_out)]
    words = train.Part(seen, tokens=size.tokens, name="language")
    far = dataclasses.replace(hidden[1], seq_len=8 * length)  # do gates that language has trained still keep?
    tests = (("language", held_out), ("five in random ids", plain), ("five in text", hidden[1]))
    tests += ((f"five in text, {far.seq_len:,} tokens", far),)
    arms = []
    weights = list(weights)
    few = [weight for weight in weights if weight in (0.0, 0.05, 0.5)]
    gates = (
        ("soft gates", {}, {}, weights),
        ("no decay", dict(decay="none"), {}, few),  # what of the next two is not the gate's own doing
        ("gates that can shut", SHUT, PRESSED, few),
        ("straight-through gates", STRAIGHT, PRESSED, few),
    )
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
    """Needles first, language first, or both at once; the same number of steps on text at the same rate in every arm.

    Each phase has its own warm-up and cosine. Where needles or language come first and then both, they do for half the steps.
    """
    first, *_ = language(size, text, weights=(0.5,))
    (joint,) = first.phases
    words, asked = joint.streams
    half = max(1, size.steps // 2)
    phases = {
        "both at once": (joint,),
        "needles, then language": (train.Phase("n", asked, size.steps), train.Phase("w", words, size.steps)),
        "language, then needles": (train.Phase("w", words, size.steps), train.Phase("n", asked, size.steps)),
        "needles, then both": (train.Phase("n", asked, half), joint),
        "language, then both": (train.Phase("w", words, half), dataclasses.replace(joint, steps=size.steps - half)),
    }
    return [dataclasses.replace(first, name=name, phases=chosen) for name, chosen in phases.items()]


STUDIES: dict[str, Callable[..., list[Arm]]] = dict(gates=gates, mixers=mixers, keys=keys, penalties=penalties, ids=ids)
# These take a text besides: `counts` and `ruler` for a haystack, `language` to learn it.
WITH_TEXT: dict[str, Callable[..., list[Arm]]] = dict(
    counts=counts, layers=layers, ruler=ruler_tasks, language=language, order=order
)
