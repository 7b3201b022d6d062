"""Controls: each mistake is planted and must be caught; the clean case next to it must pass."""

import copy
import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import test_analysis as planted
import torch

import analysis
import audit
import config
import core
import data
import mixers
import model
import train

TASK, CFG = planted.TASK, planted.CFG


def passes(table):
    return bool(table["ok"].all())


# ------------------------------------------------------------------------------------------------ require


def test_require_hands_back_what_is_sound_and_names_what_is_not():
    good = pd.DataFrame({"name": ["a", "b"], "ok": [True, True]})
    assert audit.require(good) is good
    with pytest.raises(RuntimeError, match="audit failed") as error:
        audit.require(pd.DataFrame({"name": ["sound", "rotten"], "ok": [True, False]}))
    assert "rotten" in str(error.value) and "sound" not in str(error.value)


@pytest.mark.parametrize("missing", [None, math.nan, pd.NA, np.bool_(False), 0])
def test_require_counts_a_missing_verdict_as_a_failure(missing):
    """Two tables joined where one has no verdict: bool(nan) is True."""
    with pytest.raises(RuntimeError):
        audit.require(pd.DataFrame({"ok": [True, missing]}))


def test_require_refuses_tables_in_which_nothing_was_checked():
    for table in (pd.DataFrame({"ok": []}), pd.DataFrame({"accuracy": [1.0]})):
        with pytest.raises(ValueError, match="table"):
            audit.require(table)


# ------------------------------------------------------------------------------------------------ causality


class OneMemory(torch.nn.Module):
    """Embedding, one delta memory, a head. `read`: causal, or of the final state, which is the leak of the sources."""

    def __init__(self, read):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed, self.key, self.head = (
            torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((64, 8), (8, 8), (8, 64))
        )
        self.read = read

    def forward(self, tokens, *, positions=None):
        x = self.embed[tokens]
        k = torch.nn.functional.normalize(x @ self.key, dim=-1)[:, :, None]
        gate = torch.ones(k.shape[:3])
        memory = core.delta_write(k, x[:, :, None], 0.5 * gate, -0.1 * gate)
        if self.read == "final":
            out = torch.einsum("bthk,bhkv->bthv", k, memory.state)
        else:
            out = memory.read(k)
        return model.Output((x + out[:, :, 0]) @ self.head, None, None, None)


def test_causality_passes_causal_models_and_catches_a_read_of_the_final_state():
    tokens = TASK.sample(2, analysis.fresh(0)).tokens
    for pattern in ("GS", "SG", "GSGS", "G", "S"):
        assert passes(audit.causality(model.build(dataclasses.replace(CFG, layer_pattern=pattern)), tokens)), pattern
    assert passes(audit.causality(OneMemory("causal"), tokens))
    table = audit.causality(OneMemory("final"), tokens)
    assert not table["ok"].any() and (table["largest change up to t"] > 1e-3).all()
    with pytest.raises(RuntimeError):
        audit.require(table)


def test_causality_catches_the_smallest_leak_at_any_place():
    tokens = TASK.sample(2, analysis.fresh(0)).tokens

    class Peeks(OneMemory):  # one position sees one later token
        def forward(self, tokens, *, positions=None):
            logits = super().forward(tokens).logits.clone()
            logits[:, 3, 0] += 1e-5 * tokens[:, 31]
            return model.Output(logits, None, None, None)

    table = audit.causality(Peeks("causal"), tokens, positions=[0, 2, 3, 30])
    assert table["ok"].tolist() == [True, True, False, False]


def test_causality_is_not_satisfied_by_models_that_ignore_their_input():
    tokens = TASK.sample(2, analysis.fresh(0)).tokens
    constant = planted.Answers(lambda tokens, positions: torch.zeros(tokens.shape, dtype=torch.long))
    table = audit.causality(constant, tokens)
    assert (table["largest change up to t"] == 0).all() and not table["ok"].any()
    broken = model.build(CFG)
    with torch.no_grad():
        broken.norm.weight.fill_(math.nan)
    assert not audit.causality(broken, tokens)["ok"].any()


def test_causality_spreads_over_the_sequence_and_names_bad_input():
    tokens = TASK.sample(2, analysis.fresh(0)).tokens
    table = audit.causality(model.build(CFG), tokens)
    assert len(table) == 8 and table["t"].min() == 0 and table["t"].max() == TASK.seq_len - 2
    assert audit.causality(model.build(CFG), tokens[:, :2])["t"].tolist() == [0]
    for bad, options, name in (
        (tokens[:, :1], {}, "tokens"),
        (torch.zeros_like(tokens), {}, "tokens"),
        (tokens, {"positions": [TASK.seq_len - 1]}, "positions"),
        (tokens, {"positions": [-1]}, "positions"),
        (tokens, {"positions": []}, "positions"),
    ):
        with pytest.raises(ValueError, match=name):
            audit.causality(model.build(CFG), bad, positions=options.get("positions"))


# ------------------------------------------------------------------------------------------------ what a task allows


def test_bounds_pass_sound_tasks():
    sound = [
        TASK,
        dataclasses.replace(TASK, needle_range=(3, 9)),
        data.SingleNeedle(seq_len=32, vocab_size=64, own_cue=True),
        data.SharedMarkerNeedles(seq_len=48, vocab_size=64),
        data.MQAR(seq_len=32, vocab_size=64),
        data.Echo(seq_len=32, vocab_size=64),
        data.Bigrams(seq_len=32, vocab_size=64),
        planted.Pairs(),
    ]
    for task in sound:
        table = audit.require(audit.bounds(task))
        assert table["verdict"][0] == "sound" and table["trials"][0] >= 1000
        assert (table["chance"][0], table["floor (nats)"][0]) == (task.chance, task.floor)
    two = data.Mixture(tasks=(data.Echo(seq_len=32, vocab_size=64), TASK), shares=(0.3, 0.7))
    assert audit.require(audit.bounds(two))["task"].tolist() == ["Echo", "MultiNeedle"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneCue(planted.Pairs, abstract=True):
    """Two values behind one marker, and one cue: nobody can tell which is asked for, so the ceiling is a half."""

    def _draw(self, n, generator):
        batch = super()._draw(n, generator)
        other = torch.randint(32, 60, (n,), generator=generator)
        swap = torch.rand(n, generator=generator) < 0.5
        batch.targets[swap, -1] = other[swap]
        return batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowChance(planted.Pairs, abstract=True):
    """Chance said to be 1 in the vocabulary, where only 28 ids are ever asked for: 3.6% looks like learning."""

    chance = 1 / 64 / 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowCeiling(planted.Pairs, abstract=True):
    ceiling = 0.9


@pytest.mark.parametrize(
    ("task", "verdict"),
    [
        (dataclasses.replace(TASK, remove_needle=True), "oracle at chance"),
        (OneCue(), "oracle below the ceiling"),
        (LowCeiling(), "oracle above the ceiling"),
        (LowChance(), "a constant answer beats chance"),
        (planted.Pairs(fixed=True), "a constant answer beats chance"),
        (data.Bigrams(seq_len=32, vocab_size=64, follow=0.0), "oracle at chance"),  # random tokens as a language
    ],
)
def test_bounds_catch_tasks_that_cannot_show_anything(task, verdict):
    table = audit.bounds(task)
    assert table["verdict"][0] == verdict and not table["ok"][0]


def test_fresh_ids_catch_fixed_and_narrow_needles():
    wide = data.SingleNeedle(seq_len=32, vocab_size=256)
    assert passes(audit.fresh_ids(wide)) and passes(audit.fresh_ids(TASK)) and passes(audit.fresh_ids(data.MQAR()))
    for ids in ((100, 101), (200, 230), (0, 80)):
        table = audit.fresh_ids(dataclasses.replace(wide, needle_range=ids), rows=1000)
        assert not passes(table) and table["distinct"][0] == ids[1] - ids[0]
    assert not passes(audit.fresh_ids(planted.Pairs(fixed=True)))
    with pytest.raises(ValueError, match="rows"):
        audit.fresh_ids(wide, rows=1)


def test_needle_removed_catches_a_model_that_memorised():
    memorised = planted.Answers(lambda tokens, positions: tokens[positions] - 28)
    table = audit.needle_removed(memorised, planted.Pairs(fixed=True))
    assert table["ok"].tolist() == [True, False]
    with pytest.raises(RuntimeError, match="needle removed"):
        audit.require(table)
    # Half the answers from memory, half from the context: the half still shows.
    task = planted.Pairs(fixed=True)
    half = planted.reader(task)
    read, half.rule = (
        half.rule,
        lambda tokens, positions: torch.where(
            tokens[positions] % 2 == 0, tokens[positions] - 28, read(tokens, positions)
        ),
    )
    assert audit.needle_removed(half, task)["ok"].tolist() == [True, False]


def test_needle_removed_passes_readers_and_asks_for_something_to_remove():
    for task in (TASK, planted.Pairs(), data.Echo(seq_len=32, vocab_size=64)):
        table = audit.require(audit.needle_removed(planted.reader(task), task))
        assert table["p"][0] < 1e-6 and table["trials"].min() >= 1000
    # A model at chance with its needle as well: nothing fell, so nothing is shown.
    guesses = planted.Answers(lambda tokens, positions: torch.full((int(positions.sum()),), 7))
    assert audit.needle_removed(guesses, TASK)["ok"].tolist() == [False, True]


def test_statistical_controls_seldom_fail_sound_experiments():
    """At most one false alarm in a hundred seeds; an interval of 95% would raise about three."""
    net = planted.reader(planted.Pairs())
    alarms = sum(not passes(audit.needle_removed(net, planted.Pairs(), trials=200, seed=s)) for s in range(100))
    alarms += sum(not passes(audit.bounds(planted.Pairs(), trials=200, seed=s)) for s in range(100))
    assert alarms <= 2


def test_loss_floor_catches_a_loss_that_only_a_leak_can_reach():
    task = data.Bigrams(seq_len=32, vocab_size=64)
    batches = [task.sample(4, analysis.fresh(i)) for i in range(4)]

    class Bigram(torch.nn.Module):
        """The true conditional distribution, or one that has seen the answer."""

        def __init__(self, leak):
            super().__init__()
            self.weight, self.leak = torch.nn.Parameter(torch.zeros(1)), leak

        def forward(self, tokens, targets):
            p = torch.full((*tokens.shape, 64), 0.3 / 64).scatter_(2, ((tokens + 1) % 64)[..., None], 0.7 + 0.3 / 64)
            if self.leak:
                p = p.scatter_(2, targets[..., None], 0.9)
            return model.Output(None, -p.gather(2, targets[..., None]).log().mean(), None, None)

    honest = audit.loss_floor(analysis.loss(Bigram(leak=False), batches), task)
    assert passes(honest) and honest["low"][0] < task.floor < honest["high"][0]
    assert honest["guessing (nats)"][0] == pytest.approx(math.log(64))
    assert not passes(audit.loss_floor(analysis.loss(Bigram(leak=True), batches), task))
    text = data.LanguageModel(corpus=data.Corpus("x", ("abc " * 50,)), seq_len=8, split="all")
    assert passes(audit.loss_floor((1.0, 0.9, 1.1, 100), text))
    assert not passes(audit.loss_floor((math.nan, math.nan, math.nan, 100), text))


def test_loss_floor_catches_a_perplexity_of_4_where_14_is_the_best():
    """Repeated bigrams with 70% successors: the optimum was said to be a perplexity of 4 and is 14.1."""
    task = data.Bigrams(seq_len=32, vocab_size=1024, id_range=(0, 900), follow=0.7)
    assert math.exp(task.floor) == pytest.approx(14.1, abs=0.05)
    around = lambda perplexity: (math.log(perplexity), math.log(perplexity) - 0.01, math.log(perplexity) + 0.01, 1000)  # noqa: E731
    table = audit.loss_floor(around(4.0), task)
    assert not passes(table) and table["floor (nats)"][0] == task.floor
    assert passes(audit.loss_floor(around(14.1), task)) and passes(audit.loss_floor(around(20.0), task))


def test_accuracy_bounds_catch_an_accuracy_that_is_chance():
    """3% over 30 possible values, where chance is 3.3%."""
    thirty = dataclasses.replace(TASK, needle_range=(0, 30))
    assert thirty.chance == pytest.approx(1 / 30)
    table = audit.accuracy_bounds(analysis.Rate(30, 1000), thirty)
    assert table["verdict"][0] == "guessing" and not passes(table)
    assert (table["accuracy"][0], table["trials"][0], table["chance"][0]) == (0.03, 1000, thirty.chance)
    assert not passes(audit.accuracy_bounds(analysis.Rate(40, 1000), thirty))
    assert not passes(audit.accuracy_bounds(analysis.Rate(2, 20), thirty))  # 10%, of 20 trials
    assert passes(audit.accuracy_bounds(analysis.Rate(100, 1000), thirty))
    # 10% once more, but answers of a row fail together: 20 independent trials.
    assert not passes(audit.accuracy_bounds(analysis.Rate(100, 1000, design=50.0), thirty))
    assert passes(audit.accuracy_bounds(analysis.Rate(500, 1000, design=50.0), thirty))


def test_accuracy_bounds_catch_what_only_a_leak_can_reach():
    task = data.Bigrams(seq_len=32, vocab_size=64)
    assert passes(audit.accuracy_bounds(analysis.oracle_accuracy(task), task))
    table = audit.accuracy_bounds(analysis.Rate(900, 1000), task)
    assert table["verdict"][0] == "above the ceiling" and not passes(table)
    for recall in (TASK, planted.Pairs()):
        assert passes(audit.accuracy_bounds(analysis.accuracy(planted.reader(recall), recall), recall))
    removed = dataclasses.replace(planted.Pairs(fixed=True), remove_needle=True)
    memorised = planted.Answers(lambda tokens, positions: tokens[positions] - 28)
    assert audit.accuracy_bounds(analysis.accuracy(memorised, removed), removed)["verdict"][0] == "above the ceiling"


# ------------------------------------------------------------------------------------------------ moved parameters


def trained(net, steps=5, *, lr=3e-4, weight_decay=0.0):
    """A few steps of AdamW on a regression; returns the table of what moved."""
    before = audit.snapshot(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=weight_decay)
    generator = analysis.fresh(0)
    for _ in range(steps):
        x = torch.randn(16, 8, generator=generator).to(next(net.parameters()).dtype)
        loss = (net(x).float() - x.float().sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return audit.moved(net, before).set_index("parameter")


def gate():
    """A linear gate as the sources start it: weights N(0, .02), bias 2."""
    net = torch.nn.Linear(8, 4)
    with torch.no_grad():
        net.weight.copy_(0.02 * torch.randn(4, 8, generator=analysis.fresh(1)))
        net.bias.fill_(2.0)
    return net


def test_moved_catches_biases_of_pure_bf16():
    """A step of 3e-4 beside a bias of 2: half a unit in the last place of bf16 is 8e-3 there."""
    low = trained(gate().bfloat16())
    assert low["ok"].to_dict() == {"weight": True, "bias": False}
    assert low["share moved"]["bias"] == 0 == low["relative change"]["bias"]
    full = trained(gate())
    assert full["ok"].all() and (full["share moved"] == 1).all()
    assert full["relative change"]["bias"] == pytest.approx(5 * 3e-4 / 2, rel=0.5)


class Dead(torch.nn.Module):
    """Two linear maps; the second is multiplied by zero, so its gradient is zero, or it is never called."""

    def __init__(self, factor):
        super().__init__()
        self.live, self.dead, self.factor = gate(), gate(), factor

    def forward(self, x):
        y = self.live(x)
        return y if self.factor is None else y + self.factor * self.dead(x)


@pytest.mark.parametrize("factor", [None, 0.0])
def test_moved_catches_parameters_that_no_gradient_reaches(factor):
    """Weight decay moves every element of them, which is no sign of life."""
    table = trained(Dead(factor), 20, weight_decay=0.01)
    assert table["ok"]["live.weight"] and table["ok"]["live.bias"] and not table["ok"]["dead.weight"]
    assert table["only decayed"]["dead.weight"] == (factor is not None)
    assert trained(Dead(1.0), 20, weight_decay=0.01)["ok"].all()
    assert trained(gate(), 1, weight_decay=0.01)["ok"].all()  # biases that start equal and take one step together


def test_moved_passes_a_trained_hybrid_and_catches_nan():
    net = model.build(CFG)
    before = audit.snapshot(net)
    copied = copy.deepcopy(net)
    assert not audit.moved(net, before)["ok"].any()
    cfg = config.TrainConfig(lr=3e-3, warmup_steps=1, device="cpu")
    train.fit(net, train.Phase("one", train.Part(TASK, batch_size=4), 4), cfg, progress=False)
    audit.require(audit.moved(net, before))
    assert all(torch.equal(a, before[n]) for n, a in copied.state_dict().items() if n in before)
    with torch.no_grad():
        net.norm.weight[0] = math.nan
    assert audit.moved(net, before).set_index("parameter")["ok"].to_dict()["norm.weight"] is False
    with pytest.raises(ValueError, match="another model"):
        audit.moved(model.build(dataclasses.replace(CFG, layer_pattern="G")), before)
    with pytest.raises(ValueError, match="embed.weight"):
        audit.moved(model.build(dataclasses.replace(CFG, vocab_size=65)), before)


# ------------------------------------------------------------------------------------------------ learning rate

TRAIN = config.TrainConfig(lr=3e-3, warmup_steps=4, log_every=2, device="cpu")
PHASES = (
    train.Phase("short", train.Part(TASK, batch_size=2), 6),
    train.Phase("slow", train.Part(TASK, batch_size=2), 9, lr=1e-3),
)


def fitted(cfg=TRAIN, phases=PHASES):
    return train.fit(model.build(CFG), phases, cfg, progress=False)


def test_learning_rate_passes_the_schedule_of_every_phase():
    table = audit.require(audit.learning_rate(fitted(), PHASES, TRAIN))
    assert table["phase"].tolist() == ["short", "short", "slow", "slow"]
    assert table["stretch"].tolist() == ["warm-up", "after it"] * 2 and table["steps"].tolist() == [3, 3, 3, 6]
    # Steps 1, 3 and 5 of the first phase are logged, 1, 3, 5 and 7 of the second, whose last step is not.
    assert table["logged"].tolist() == [1, 2, 1, 3] and table["full rate"].tolist() == [3e-3, 3e-3, 1e-3, 1e-3]
    assert table["highest"].tolist() == pytest.approx([3e-3 / 2, 3e-3, 1e-3 / 2, 1e-3])
    flat = dataclasses.replace(TRAIN, warmup_steps=0, schedule="constant")
    table = audit.require(audit.learning_rate(fitted(flat, PHASES[0]), PHASES[0], flat))
    assert table["stretch"].tolist() == ["after it"] and table["lowest"][0] == table["highest"][0] == 3e-3


def test_learning_rate_follows_a_phase_that_is_left_early():
    """The cosine is asked over the budget, and the next phase begins where this one was left."""
    always = train.Leave(dataclasses.replace(TASK, needle_range=(0, 2)), accuracy=0.01, every=5, trials=200, times=2)
    net, fixed = model.build(CFG), (dataclasses.replace(PHASES[0], steps=50, leave=always), PHASES[1])
    with torch.no_grad():  # answers 0 or 1 whatever it reads: right half of the time
        net.embed.weight.zero_()
    run = train.fit(net, fixed, TRAIN, progress=False)
    assert [p["steps"] for p in run.phases] == [10, 9]
    assert audit.require(audit.learning_rate(run, fixed, TRAIN))["steps"].tolist() == [3, 7, 3, 6]


def test_learning_rate_catches_a_warm_up_that_never_reached_the_optimizer(monkeypatch):
    class Deaf(dict):
        def __setitem__(self, key, value):
            if key != "lr":
                super().__setitem__(key, value)

    class DeafAdamW(torch.optim.AdamW):  # the rate it was built with is the rate it keeps
        def __setstate__(self, state):
            super().__setstate__(state)
            self.param_groups = [Deaf(group) for group in self.param_groups]

        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.param_groups = [Deaf(group) for group in self.param_groups]

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim, "AdamW", DeafAdamW)
        deaf = fitted(phases=PHASES[0])
    assert (deaf.history["lr"] == 3e-3).all()
    table = audit.learning_rate(deaf, PHASES[0], TRAIN)
    assert table["verdict"].tolist() == ["no warm-up", "not as asked"] and not table["ok"].any()
    assert table["deviation"][0] == pytest.approx(1 / 2)
    # A schedule without warm-up, or with that of another phase.
    with monkeypatch.context() as patched:
        patched.setattr(train, "lr_factor", lambda step, steps, cfg: 1.0)
        bare = fitted(phases=PHASES[0])
        assert audit.learning_rate(bare, PHASES[0], TRAIN)["verdict"].tolist() == ["no warm-up", "as asked"]
    assert not audit.learning_rate(bare, PHASES[0], TRAIN)["ok"].any()
    other = dataclasses.replace(PHASES[0], lr=1e-3)
    assert not audit.learning_rate(fitted(phases=other), PHASES[0], TRAIN)["ok"].any()


def test_learning_rate_does_not_pass_what_nobody_logged():
    """The last step of a warm-up has the full rate: logged alone, it looks the same with and without one."""
    coarse = dataclasses.replace(TRAIN, log_every=4)
    table = audit.learning_rate(fitted(coarse, PHASES[1]), PHASES[1], coarse)
    assert table["verdict"].tolist() == ["unseen: log_every = 4", "as asked"] and table["ok"].tolist() == [False, True]
    silent = dataclasses.replace(TRAIN, log_every=100)
    assert not audit.learning_rate(fitted(silent, PHASES[0]), PHASES[0], silent)["ok"].any()
    run = fitted(phases=PHASES[0])
    run.history.loc[run.history["step"] == 3, "lr"] = math.nan
    assert audit.learning_rate(run, PHASES[0], TRAIN)["ok"].tolist() == [True, False]
    with pytest.raises(ValueError, match="phases: the run passed"):
        audit.learning_rate(run, PHASES, TRAIN)
    options = dict(seeds=(0, 1), steps=2, batch_size=2, progress=False)
    ensemble = train.fit_ensemble(lambda seed: model.build(CFG, seed=seed), TASK, TRAIN, **options)
    with pytest.raises(ValueError, match="run: Ensemble"):
        audit.learning_rate(ensemble, PHASES[0], TRAIN)


# ------------------------------------------------------------------------------------------------ retention


def preset(name):
    """The preset's gates at a size that costs nothing."""
    return dataclasses.replace(
        config.preset(name), d_model=16, n_heads=2, head_dim=8, value_dim=8, vocab_size=64, chunk_size=64
    )


def test_retention_catches_the_half_life_of_the_sources():
    task = dataclasses.replace(TASK, seq_len=512)
    notes = audit.retention(model.build(preset("notes")), task)
    assert not notes["ok"].any() and notes["best_head"].max() < 1e-6
    for name in ("seed", "smoke"):
        table = audit.require(audit.retention(model.build(preset(name)), task))
        assert table["kept"].min() > 0.8
    # At the short distances of a short row even the notes' decay leaves something.
    assert passes(audit.retention(model.build(preset("notes")), dataclasses.replace(TASK, distance=8)))


def test_retention_measures_from_the_write_to_the_read():
    """One value with 9 tokens between it and its cue is read 10 tokens later."""
    net = planted.gated(decay_bias=(2.0, 3.0))
    table = audit.retention(net, dataclasses.replace(TASK, distance=9))
    assert table["distance"].tolist() == [10]
    assert table["best_head"][0] == pytest.approx((1 + math.exp(-3.0)) ** -10, rel=1e-4)


def test_retention_judges_each_distance_and_counts_the_best_layer():
    net = planted.gated(layer_pattern="GG", decay_bias=(2.0, 2.0))
    with torch.no_grad():
        net.layers[1].decay_gate.bias.fill_(4.5)
    task = dataclasses.replace(TASK, seq_len=400)
    table = audit.retention(net, task)
    median, longest = sorted(set(table["distance"]))
    kept = {d: (1 + math.exp(-4.5)) ** -d for d in (median, longest)}
    assert kept[median] > 0.1 > kept[longest]  # what this case is built for
    assert table.groupby("distance")["ok"].all().to_dict() == {median: True, longest: False}
    assert len(table) == 4
    with pytest.raises(ValueError, match="no memory layer"):
        audit.retention(model.build(dataclasses.replace(CFG, layer_pattern="S")), TASK)
    with pytest.raises(ValueError, match="no distances"):
        audit.retention(net, data.Bigrams(seq_len=8, vocab_size=64))


# ------------------------------------------------------------------------------------------------ claims and counts


def test_claim_refuses_one_seed():
    table = audit.claim([0.99])
    assert not table["ok"][0] and table["verdict"][0] == "refused: 1 of 5 seeds" and np.isnan(table["low"][0])
    assert not passes(audit.claim([0.99] * 4)) and passes(audit.claim([0.99] * 4, least_seeds=4))
    with pytest.raises(RuntimeError, match="refused: 1 of 5"):
        audit.require(table)
    for bad in ([], [0.9, math.nan, 0.9, 0.9, 0.9]):
        with pytest.raises(ValueError, match="successes_by_seed"):
            audit.claim(bad)


def test_claim_gives_mean_and_success_rate_with_intervals():
    values = [1.0, 0.998, 0.4, 1.0, 0.999, 0.2, 0.995, 1.0]
    table = audit.claim(values, threshold=0.99)
    assert passes(table) and table["verdict"][0] == "stands"
    assert tuple(table.loc[0, ["mean", "low", "high"]]) == pytest.approx(analysis.mean_interval(values))
    assert (table["succeeded"][0], table["success rate"][0]) == (6, 0.75)
    assert tuple(table.loc[0, ["rate low", "rate high"]]) == pytest.approx(planted.wilson(6, 8), abs=1e-7)
    three = audit.claim([1.0, 1.0, 1.0], threshold=0.99)
    assert not passes(three) and three["rate low"][0] == pytest.approx(0.4385, abs=1e-4)


def test_enough_trials_judges_every_row_that_is_quoted():
    row = lambda n, **more: {**more, **analysis.Rate(n, n).row()}  # noqa: E731
    assert passes(audit.enough_trials(pd.DataFrame([row(1000, seq_len=128), row(2000, seq_len=512)])))
    for small in (20, 30, 999):
        assert not passes(audit.enough_trials(pd.DataFrame([row(5000), row(small)])))
    # A column called distance or index makes no sample of rows that were measured one by one.
    assert not passes(audit.enough_trials(pd.DataFrame([row(500, distance=4), row(500, distance=64)])))
    for nothing in ([0], [0, 5000], [], [math.nan, 5000]):
        assert not passes(audit.enough_trials(pd.DataFrame({"trials": nothing})))
    with pytest.raises(ValueError, match="trials"):
        audit.enough_trials(pd.DataFrame({"accuracy": [1.0]}))


def test_enough_trials_pools_groups_of_one_sample_when_told_so():
    groups = lambda *trials: pd.DataFrame({"distance": range(len(trials)), "trials": trials})  # noqa: E731
    assert not passes(audit.enough_trials(groups(170, 170, 165, 165, 165, 165)))
    assert passes(audit.enough_trials(groups(170, 170, 165, 165, 165, 165), pooled=True))
    for trials in ((160, 160, 160, 160, 160, 160), (970, 30), (1000, 0), ()):
        assert not passes(audit.enough_trials(groups(*trials), pooled=True)), trials
    table = audit.enough_trials(groups(970, 30), pooled=True)
    assert table.loc[0, ["rows", "fewest trials", "needed in each", "in all", "needed in all"]].tolist() == [
        2, 30, 100, 1000, 1000,
    ]  # fmt: skip
    net = planted.reader(TASK)
    assert passes(audit.enough_trials(analysis.accuracy_by_distance(net, TASK, trials=1000), pooled=True))
    assert passes(audit.enough_trials(analysis.accuracy_by_index(net, TASK, trials=1000), pooled=True))
    assert passes(audit.enough_trials(analysis.accuracy_by_length(net, TASK, (32,), trials=1000)))


# ------------------------------------------------------------------------------------------------ one task


def test_same_task_names_what_differs():
    free = dataclasses.replace(TASK, seq_len=128, n_needles=1, remove_needle=True)
    assert passes(audit.same_task(TASK, TASK)) and passes(audit.same_task(TASK, free))
    for change in ({"n_markers": 8}, {"vocab_size": 128}, {"needle_range": (0, 30)}, {"layout": "answers"}):
        table = audit.same_task(TASK, dataclasses.replace(TASK, **change))
        assert table["field"].tolist() == list(change) and not table["ok"].any()
        assert repr(next(iter(change.values()))) in table["train and test"][0]
    both = audit.same_task(TASK, dataclasses.replace(TASK, n_markers=8, vocab_size=128))
    assert sorted(both["field"]) == ["n_markers", "vocab_size"]
    other = audit.same_task(TASK, data.SharedMarkerNeedles(seq_len=48, vocab_size=64))
    assert other["field"].tolist() == ["type"] and not passes(other)
    assert other["train and test"][0] == "MultiNeedle against SharedMarkerNeedles"


def test_same_task_looks_into_the_haystack_and_into_mixtures():
    corpus = data.Corpus("x", tuple(f"document {i} " * 20 for i in range(20)))
    text = data.LanguageModel(corpus=corpus, seq_len=32, vocab_size=300)
    task = dataclasses.replace(TASK, vocab_size=300, haystack=text)
    held_out = dataclasses.replace(task, haystack=dataclasses.replace(text, split="validation"))
    table = audit.same_task(task, held_out)
    assert table["field"].tolist() == ["haystack.split"]
    assert table["train and test"][0] == "'train' against 'validation'"
    assert passes(audit.same_task(task, held_out, allowed=("haystack",)))
    assert passes(audit.same_task(task, held_out, allowed=("haystack.split",)))
    assert not passes(audit.same_task(task, dataclasses.replace(held_out, n_markers=8), allowed=("haystack",)))
    longer = dataclasses.replace(task, seq_len=64, haystack=dataclasses.replace(text, seq_len=64))
    assert passes(audit.same_task(task, longer))
    none = audit.same_task(task, dataclasses.replace(task, haystack=None))
    assert none["train and test"].tolist() == ["LanguageModel against None"]
    mix = lambda n: data.Mixture(tasks=(TASK, dataclasses.replace(TASK, n_markers=n)), shares=(0.5, 0.5))  # noqa: E731
    assert audit.same_task(mix(5), mix(6))["field"].tolist() == ["tasks[1].n_markers"]
    assert passes(audit.same_task(mix(5), mix(5)))


def test_claim_keeps_the_interval_inside_what_is_possible():
    table = audit.claim([1.0, 1.0, 1.0, 1.0, 0.9], bounds=(0, 1))
    assert table["high"][0] == 1.0 and 0.9 < table["low"][0] < table["mean"][0]
    assert audit.claim([1.0, 1.0, 1.0, 1.0, 0.9])["high"][0] > 1
    with pytest.raises(ValueError, match="bounds"):
        audit.claim([0.5, 1.5], bounds=(0, 1))


# ------------------------------------------------------------------------------------------------ universe

WORDS = [a + b for a in "abcd" for b in "abcd"]


def test_universe_names_what_is_missing_and_what_is_on_both_sides():
    """Four definitions were in neither set, and were the errors."""
    lost, held_out = ["ac", "bd", "ca", "db"], ["ad", "bc"]
    training = [w for w in WORDS if w not in lost + held_out]
    table = audit.universe(training, held_out, WORDS).set_index("items")
    assert table["ok"].to_dict() == {
        "training": True, "held out": True, "universe": True, "missing: in neither": False,
        "overlap: in both": True, "unknown: outside the universe": True,
    }  # fmt: skip
    assert table["which"]["missing: in neither"] == "ac, bd, ca, db" and table["count"]["missing: in neither"] == 4
    with pytest.raises(RuntimeError, match="ac, bd, ca, db"):
        audit.require(table)
    table = audit.universe([*training, *lost, "ad"], held_out, WORDS).set_index("items")
    assert table["which"]["overlap: in both"] == "ad" and table["ok"].sum() == 5
    table = audit.universe([*training, *lost, "zz"], held_out, WORDS).set_index("items")
    assert table["which"]["unknown: outside the universe"] == "zz" and table["ok"].sum() == 5


def test_universe_passes_a_partition_of_any_kind_of_items():
    assert passes(audit.universe(WORDS[:12] * 3, WORDS[12:], WORDS))
    assert passes(audit.universe(set(WORDS[:12]), frozenset(WORDS[12:]), (w for w in WORDS)))
    rows = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    assert passes(audit.universe(rows[:12], rows[12:].numpy(), [(i, j) for i in range(4) for j in range(4)]))
    assert audit.universe(rows[:12], rows[13:], rows)["which"][3] == "(3, 0)"
    assert passes(audit.universe(pd.Series([1, 2]), [3], range(1, 4)))


def test_universe_is_not_satisfied_by_nothing_and_does_not_print_thousands():
    assert not passes(audit.universe(WORDS, [], WORDS)) and not passes(audit.universe([], WORDS, WORDS))
    with pytest.raises(ValueError, match="everything"):
        audit.universe([], [], [])
    table = audit.universe(range(10), range(10, 20), range(5000))
    assert table["count"][3] == 4980 and table["which"][3].endswith("38, 39 and 4960 more")
    assert audit.universe({"b"}, {"e"}, {"d", "c", "b", "a", "e"})["which"][3] == "a, c, d"


# ------------------------------------------------------------------------------------------------ arms of a sweep

TOKENS = TASK.sample(2, analysis.fresh(3)).tokens


def builder(**changes):
    return lambda seed: model.build(dataclasses.replace(CFG, **changes), seed=seed)


def test_distinct_arms_pass_knobs_that_act():
    arms = {
        "as it is": builder(),
        "window 8": builder(window_size=8),
        "two G": builder(layer_pattern="GGS"),
        "own query": builder(query_proj=True),
        "decayless": builder(decay="none"),
        "unshifted": builder(shifted_value=False),
        "half-life": builder(g_bias=2.0),  # acts through the values of its parameters alone
        "loud start": builder(init_std=0.2),
        "wide": builder(vocab_size=128),
    }
    table = audit.require(audit.distinct_arms(arms, TOKENS))
    assert table["arms"].tolist() == ["all 9"]
    seeds = {f"seed {i}": model.build(CFG, seed=i) for i in range(3)}
    assert passes(audit.distinct_arms(seeds, TOKENS))


def test_distinct_arms_catch_a_knob_that_never_reached_the_constructor():
    def forgetful(window):  # the argument that was forgotten
        return lambda seed: model.build(CFG, seed=seed)

    table = audit.distinct_arms(
        {f"window {w}": forgetful(w) for w in (4, 8)} | {"deep": builder(layer_pattern="GSS")}, TOKENS
    )
    assert table["arms"].tolist() == ["window 4 = window 8"] and not passes(table)
    assert table["verdict"][0] == "inert: equal parameters, equal outputs" and table["differ in"][0] == "nothing"
    with pytest.raises(RuntimeError, match="window 4 = window 8"):
        audit.require(table)
    # Likewise seeds: five of one are one.
    same = {f"seed {i}": model.build(CFG) for i in range(3)}
    assert len(audit.distinct_arms(same, TOKENS)) == 3 and not audit.distinct_arms(same, TOKENS)["ok"].any()
    # And after training, at rates that were all the first.
    trained_arms = {f"lr {lr}": fitted(dataclasses.replace(TRAIN, lr=3e-3), PHASES[0]).model for lr in (1e-3, 3e-3)}
    assert not passes(audit.distinct_arms(trained_arms, TOKENS))
    rates = {f"lr {lr}": fitted(dataclasses.replace(TRAIN, lr=lr), PHASES[0]).model for lr in (1e-3, 3e-3)}
    assert passes(audit.distinct_arms(rates, TOKENS))


def test_distinct_arms_catch_a_flag_without_effect_and_name_it():
    """The configurations differ: base of a rotation that is off, a window longer than the row."""
    arms = {"1e4": builder(), "1e6": builder(rope_base=1e6)}
    table = audit.distinct_arms(arms, TOKENS)
    assert table["arms"].tolist() == ["1e4 = 1e6"] and table["differ in"][0] == "rope_base: 10000.0 against 1000000.0"
    assert passes(audit.distinct_arms({n: builder(use_rope=True, rope_base=float(n)) for n in arms}, TOKENS))
    windows = {w: builder(window_size=w) for w in (16, 64)}
    assert passes(audit.distinct_arms(windows, TOKENS)) and not passes(audit.distinct_arms(windows, TOKENS[:, :12]))


class Gated(torch.nn.Module):
    """Embedding and head, and between them a branch that `use` multiplies, drawn before the head; or none."""

    def __init__(self, seed, use, *, start=1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.nn.Parameter(torch.randn(shape, generator=generator))  # noqa: E731
        self.embed, self.use = draw(64, 8), use
        if use is not None:
            self.branch, self.gate = draw(8, 8), torch.nn.Parameter(torch.tensor(start))
        self.head = draw(8, 64)

    def forward(self, tokens):
        x = self.embed[tokens]
        if self.use:
            x = x + self.gate * (x @ self.branch)
        return model.Output(x @ self.head, None, None, None)


def test_distinct_arms_catch_parameters_that_nothing_reads():
    """They shift the random numbers of those drawn after them, so that outputs differ all the same."""
    arms = {"without": lambda seed: Gated(seed, None), "with": lambda seed: Gated(seed, False)}
    assert not torch.equal(*(arm(0)(TOKENS).logits for arm in arms.values()))
    table = audit.distinct_arms(arms, TOKENS)
    assert table["verdict"].tolist() == ["inert: nothing reads branch, gate"] and not passes(table)
    assert passes(audit.distinct_arms(arms | {"with": lambda seed: Gated(seed, True)}, TOKENS))
    # Trained arms too, and arms whose parameters differ where nothing reads them.
    with torch.no_grad():
        moved = Gated(0, False)
        moved.branch += 1
    table = audit.distinct_arms({"a": Gated(0, False), "b": moved}, TOKENS)
    assert table["verdict"].tolist() == ["inert: equal outputs"]


def test_distinct_arms_see_a_part_that_starts_at_zero_once_it_is_trained():
    arms = {"without": Gated(0, None), "with": Gated(0, True, start=0.0)}
    assert not passes(audit.distinct_arms(arms, TOKENS))
    with torch.no_grad():
        arms["with"].gate += 0.1
    before = {name: audit.snapshot(net) for name, net in arms.items()}
    assert passes(audit.distinct_arms(arms, TOKENS))
    for name, net in arms.items():  # nothing was put into the arms to compare them
        assert all(torch.equal(p, before[name][n]) for n, p in net.named_parameters())


def test_distinct_arms_name_bad_input():
    broken = Gated(0, None)
    with torch.no_grad():
        broken.head[0, 0] = math.nan
    table = audit.distinct_arms({"broken": broken, "also": broken, "sound": Gated(0, None)}, TOKENS)
    assert table["verdict"].tolist() == ["outputs are not finite"] * 2 and not table["ok"].any()
    with pytest.raises(ValueError, match="arms"):
        audit.distinct_arms({"one": builder()}, TOKENS)


def test_parameter_counts_catch_a_baseline_at_28_percent():
    mamba = {"ConvText": 237_952, "LSTMText": 216_064, "MambaText": 67_936}
    table = audit.parameter_counts(mamba)
    assert table["ok"].tolist() == [True, True, False] and table["verdict"][2] == "smaller"
    assert table["share of the first"].tolist() == pytest.approx([1, 0.908, 0.2855], abs=1e-3)
    with pytest.raises(RuntimeError, match="MambaText"):
        audit.require(table)
    allowed = audit.require(audit.parameter_counts(mamba, allowed=("MambaText",)))
    assert allowed["verdict"].tolist() == ["comparable", "comparable", "allowed"]
    assert passes(audit.parameter_counts(mamba, tolerance=0.75))
    assert not passes(audit.parameter_counts(mamba, tolerance=0.05))


def test_parameter_counts_count_models():
    nets = {"GS": builder()(0), "own query": builder(query_proj=True)(0), "SGSG": builder(layer_pattern="SGSG")(0)}
    nets["own query"].embed.weight.requires_grad_(False)
    table = audit.parameter_counts(nets).set_index("arm")
    assert table["parameters"]["GS"] == nets["GS"].count_params()
    assert table["parameters"]["own query"] == table["parameters"]["GS"] + 16 * 2 * 8
    assert table["frozen"].to_dict() == {"GS": 0, "own query": 64 * 16, "SGSG": 0}
    assert table["verdict"].to_dict() == {"GS": "comparable", "own query": "comparable", "SGSG": "larger"}
    for arms, options, name in (
        ({"one": 5}, {}, "arms"),
        ({"one": 5, "none": 0}, {}, "'none'"),
        ({"one": 5, "two": 5}, {"allowed": ("thre",)}, "allowed"),
    ):
        with pytest.raises(ValueError, match=name):
            audit.parameter_counts(arms, **options)


# ------------------------------------------------------------------------------------------------ rotary bands

STATISTICS = {
    "mean": lambda x: x.abs().mean(-1),
    "largest": lambda x: x.abs().amax(-1),
    "norm": lambda x: x.norm(dim=-1),
    "spread": lambda x: x.std(-1),
}


def by_frequency(statistic, n_bands, layout, width=None):
    """The right grouping: [.., H, D] -> [.., H, n_bands], whole pairs, the highest frequencies first."""

    def bands(q):
        q = q[..., :width]
        pairs = torch.stack(q.chunk(2, -1), -1) if layout == "half" else q.unflatten(-1, (-1, 2))  # [.., D/2, 2]
        return statistic(pairs.unflatten(-2, (n_bands, -1)).flatten(-2))

    return bands


def by_number(statistic, n_bands):
    """The mistake: the first dimensions, the next ones, ... ; for rotate_half each group holds all frequencies."""
    return lambda q: statistic(q.unflatten(-1, (n_bands, -1)))


@pytest.mark.parametrize("statistic", STATISTICS.values(), ids=list(STATISTICS))
@pytest.mark.parametrize(("layout", "other"), [("half", "interleaved"), ("interleaved", "half")])
def test_frequency_bands_catch_bands_that_hold_the_same_frequencies(statistic, layout, other):
    for n in (2, 4):
        table = audit.require(audit.frequency_bands(by_frequency(statistic, n, layout), 32, layout=layout))
        assert table["spikes"].tolist() == [32 // n] * n == table["found there alone"].tolist()
        wrong = audit.frequency_bands(by_frequency(statistic, n, other), 32, layout=layout)
        assert not passes(wrong)
        # Neighbours in number are neighbours in frequency only where pairs are interleaved.
        grouped = audit.frequency_bands(by_number(statistic, n), 32, layout=layout)
        assert passes(grouped) == (layout == "interleaved")
    table = audit.frequency_bands(by_number(statistic, 2), 64)
    assert table["first stray"].tolist() == [
        "dimension 32 of frequency 0 in bands [1]", "dimension 16 of frequency 16 in bands [0]",
    ]  # fmt: skip
    assert table["found there alone"].tolist() == [16, 16]


def test_frequency_bands_catch_bands_that_leak_or_are_blind():
    right = by_frequency(STATISTICS["largest"], 4, "half")
    leaky = lambda q: right(q) + 1e-4 * right(q).roll(1, -1)  # noqa: E731
    assert not audit.frequency_bands(leaky, 32)["ok"].any()
    blind = lambda q: torch.where(torch.arange(4) == 2, 1.0, right(q))  # noqa: E731
    table = audit.frequency_bands(blind, 32)
    assert table["ok"].tolist() == [True, True, False, True] and table["first stray"][2].endswith("in bands []")
    nan = lambda q: right(q) * math.nan  # noqa: E731
    assert not audit.frequency_bands(nan, 32)["ok"].any()
    backwards = lambda q: right(q).flip(-1)  # noqa: E731
    assert not passes(audit.frequency_bands(backwards, 32))
    assert passes(audit.frequency_bands(backwards, 32, owner=[3 - i // 4 for i in range(16)]))
    share = lambda q: right(q) / right(q).sum(-1, keepdim=True)  # noqa: E731  what rises in one band falls in others
    assert passes(audit.frequency_bands(share, 32))
    assert passes(audit.frequency_bands(lambda q: right(q).amax((0, 1, 2)), 32))


def test_frequency_bands_of_a_part_that_is_rotated():
    """RoPE on a quarter of the dimensions: the others have no frequency, and count in no band."""
    right = by_frequency(STATISTICS["mean"], 2, "half", width=8)
    table = audit.require(audit.frequency_bands(right, 32, rotary_dim=8))
    assert table["band"].tolist() == [0, 1, "none"] and table["spikes"].tolist() == [4, 4, 24]
    everything = by_frequency(STATISTICS["mean"], 2, "half")
    table = audit.frequency_bands(everything, 32, rotary_dim=8)
    assert not passes(table) and not table["ok"][2]


def test_frequency_bands_know_the_layout_of_our_rope():
    """A rotation by one token mixes each dimension with its partner alone."""
    D = 16
    turned = mixers.rope(torch.eye(D).view(D, 1, 1, D), 1, 10000.0).view(D, D)
    for i in range(D):
        assert turned[i].nonzero().flatten().tolist() == sorted({i, (i + D // 2) % D})
    cos = turned.diagonal()
    assert torch.equal(cos[: D // 2], cos[D // 2 :]) and (cos[: D // 2].diff() > 0).all()  # the highest first


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"layout": "halves"}, "layout"),
        ({"rotary_dim": 7}, "rotary_dim"),
        ({"rotary_dim": 64}, "rotary_dim"),
        ({"rotary_dim": 20}, "owner"),
        ({"owner": [0] * 16}, "owner"),
        ({"owner": range(4)}, "owner"),
    ],
)
def test_frequency_bands_name_bad_input(options, name):
    with pytest.raises(ValueError, match=name):
        audit.frequency_bands(by_frequency(STATISTICS["mean"], 4, "half", width=16), 32, **options)
