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
