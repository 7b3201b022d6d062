"""Analysis: statistics against independent formulas, accuracies against models whose accuracy is known exactly."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import analysis
import config
import core
import data
import model

TASK = data.MultiNeedle(seq_len=32, vocab_size=64, n_needles=3, n_markers=4)
CFG = config.HybridConfig(
    d_model=16,
    n_heads=2,
    head_dim=8,
    value_dim=8,
    vocab_size=64,
    window_size=4,
    chunk_size=16,
    g_bias=6.0,
    init_std=0.1,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs(data.RecallTask, abstract=True):
    """One needle, marker and value, its marker again at the end. `fixed`: the marker alone tells the value.

    That is the mistake of a needle with a fixed id: whoever knows marker and value needs no memory.
    """

    seq_len: int = 24
    vocab_size: int = 64  # ids 60 to 63 are markers, 32 to 59 values, the rest haystack
    fixed: bool = False

    chance = 1 / 28
    scored_per_row = 1
    removed_width = 2

    def background(self, n, generator):
        return torch.randint(0, 32, (n, self.seq_len), generator=generator)

    def _draw(self, n, generator):
        tokens = self.background(n, generator)
        marker = torch.randint(60, 64, (n, 1), generator=generator)
        value = torch.randint(32, 60, (n, 1), generator=generator)
        if self.fixed:
            value = marker - 28
        at = torch.randint(0, self.seq_len - 3, (n, 1), generator=generator)
        tokens.scatter_(1, at, marker).scatter_(1, at + 1, value)
        tokens[:, -1:] = marker
        return self._score(tokens, torch.full((n, 1), self.seq_len - 1), value, at + 1, torch.zeros_like(at))

    def oracle(self, batch):
        found = (batch.tokens >= 32) & (batch.tokens < 60)
        value = batch.tokens.gather(1, found.int().argmax(1, keepdim=True))
        value = torch.where(found.any(1, keepdim=True), value, 32)
        return torch.where(batch.scored, value, -100)


class Answers(torch.nn.Module):
    """A model that answers as `rule(tokens, positions) -> int64 [N]` says; it counts the rows and answers it gave."""

    def __init__(self, rule, vocab_size=64, cfg=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.rule, self.vocab_size, self.cfg, self.rows, self.given = rule, vocab_size, cfg, 0, 0

    def forward(self, tokens, targets=None, *, positions=None):
        answers = self.rule(tokens, positions)
        self.rows += len(tokens)
        self.given += len(answers)
        logits = torch.nn.functional.one_hot(answers, self.vocab_size).float()
        return model.Output(logits, None, None, None)


def reader(task, wrong=None, cfg=None):
    """The oracle of `task` as a model; `wrong(i)` says whether its i-th answer of all is to be spoilt."""

    def rule(tokens, positions):
        best = task.oracle(data.Batch(tokens, torch.where(positions, 0, -100)))[positions]
        i = net.given + torch.arange(len(best))
        spoil = torch.zeros(len(best), dtype=torch.bool) if wrong is None else wrong(i)
        return torch.where(spoil, (best + 1) % net.vocab_size, best)

    net = Answers(rule, task.vocab_size, cfg)
    return net


def wilson(count, n, level=0.95):
    """The closed form, with the effective size n; independent of the module's own arrangement of it."""
    z, p = stats.norm.isf((1 - level) / 2), count / n
    roots = np.roots([1 + z**2 / n, -(2 * p + z**2 / n), p**2])  # (p - x)^2 = z^2 x (1 - x) / n
    return sorted(roots.real)


# ------------------------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize(("count", "total"), [(0, 1), (1, 1), (0, 1000), (1000, 1000), (3, 8), (987, 1000), (7, 30)])
@pytest.mark.parametrize("level", [0.95, 0.8, 0.999])
def test_rate_has_the_wilson_interval(count, total, level):
    rate = analysis.Rate(count, total, level)
    ci = stats.binomtest(count, total).proportion_ci(level, method="wilson")
    assert rate.interval == pytest.approx((ci.low, ci.high), abs=1e-12)
    assert rate.interval == pytest.approx(wilson(count, total, level), abs=1e-7)
    assert 0 <= rate.low <= rate.value <= rate.high <= 1
    assert rate.row() == {"accuracy": count / total, "low": rate.low, "high": rate.high, "trials": total}


def test_rate_prints_itself():
    assert str(analysis.Rate(987, 1000)) == "98.7% [97.8, 99.2] (987/1,000)"


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((0, 0), "total"),
        ((-1, 5), "count"),
        ((6, 5), "count"),
        ((0.5, 5), "count"),
        ((True, 5), "count"),
        ((1, 5, 95), "level"),
        ((1, 5, 0.95, 0.5), "design"),
        ((1, 5, 0.95, 6.0), "design"),
        ((1, 5, 0.95, math.nan), "design"),
    ],
)
def test_rate_refuses(arguments, name):
    with pytest.raises(ValueError, match=name):
        analysis.Rate(*arguments)


def test_answers_of_a_row_that_fail_together_widen_the_interval():
    """Rows of 5 answers all alike: R rows hold R - 1 independent deviations, whatever their answers number."""
    R, m = 40, 5
    correct, row = np.repeat(np.arange(R) % 4 > 0, m), np.repeat(np.arange(R), m)
    rate = analysis.Rate.of(correct, row)
    assert (rate.count, rate.total) == (150, 200)
    assert rate.design == pytest.approx(m * R / (R - 1))
    assert rate.interval == pytest.approx(wilson(0.75 * (R - 1), R - 1), abs=1e-7)
    assert rate.high - rate.low > 2 * (analysis.Rate(150, 200).high - analysis.Rate(150, 200).low)


def test_independent_answers_keep_the_plain_interval():
    single = analysis.Rate.of([True, False, True, True], [3, 1, 0, 2])
    assert single == analysis.Rate(3, 4)
    everything = analysis.Rate.of([True] * 10, np.repeat(np.arange(5), 2))
    assert everything == analysis.Rate(10, 10)
    # One right and one wrong in every row: less variance than independent answers, which narrows nothing.
    assert analysis.Rate.of([True, False] * 6, np.repeat(np.arange(6), 2)) == analysis.Rate(6, 12)
    assert analysis.Rate.of([True, False, True], [0, 0, 0]).design == 3  # one row is one trial
    with pytest.raises(ValueError, match="total"):
        analysis.Rate.of([], [])


def test_the_interval_covers_where_rows_share_their_fate():
    rng = np.random.default_rng(0)
    rows, covered, naive = np.repeat(np.arange(80), 5), 0, 0
    for _ in range(300):
        p = np.repeat(rng.beta(1.6, 0.4, size=80), 5)  # mean 0.8
        rate = analysis.Rate.of(rng.random(400) < p, rows)
        plain = analysis.Rate(rate.count, rate.total)
        covered += rate.low <= 0.8 <= rate.high
        naive += plain.low <= 0.8 <= plain.high
    assert 0.91 <= covered / 300 <= 0.99
    assert naive / 300 < 0.88


def test_mean_interval_against_numpy():
    values = [0.91, 0.99, 0.97, 1.0, 0.93]
    mean, low, high = analysis.mean_interval(values)
    half = 2.7764451051977987 * np.std(values, ddof=1) / np.sqrt(5)  # t quantile .975 at 4 degrees of freedom, tabled
    assert (mean, low, high) == pytest.approx((np.mean(values), np.mean(values) - half, np.mean(values) + half))
    wide = analysis.mean_interval(values, level=0.99)
    assert wide[1] < low and wide[2] > high
    for bad in ([0.5], [], [0.5, math.nan], [[0.5, 0.6], [0.1, 0.2]]):
        with pytest.raises(ValueError, match="values"):
            analysis.mean_interval(bad)
    with pytest.raises(ValueError, match="level"):
        analysis.mean_interval(values, level=95)


# ------------------------------------------------------------------------------------------------ accuracy


def test_accuracy_counts_exactly():
    net = reader(TASK, wrong=lambda i: i % 10 == 3)
    rate = analysis.accuracy(net, TASK, trials=300)
    assert (rate.count, rate.total) == (270, 300)
    assert (net.rows, net.given) == (100, 300)  # three answers a row: as many rows as the trials need
    assert analysis.accuracy(reader(TASK), TASK, trials=100).value == 1
    assert analysis.accuracy(reader(TASK, wrong=lambda i: i >= 0), TASK, trials=100).value == 0
    assert analysis.accuracy(reader(TASK), TASK, trials=1).total == 3


def test_accuracy_goes_on_over_several_batches(monkeypatch):
    monkeypatch.setattr(analysis, "BATCH_TOKENS", 7 * TASK.seq_len)
    net = reader(TASK, wrong=lambda i: i % 10 == 3)
    assert analysis.accuracy(net, TASK, trials=300).count == 270
    frame = analysis.answers(reader(TASK), TASK, trials=300)
    assert frame["row"].tolist() == np.repeat(np.arange(100), 3).tolist()
    text = data.Bigrams(seq_len=16, vocab_size=64)
    monkeypatch.setattr(analysis, "BATCH_LOGITS", 2 * 16 * 64)
    assert [len(b.tokens) for b in analysis.draws(text, 70, 0)] == [2, 2, 1]


def test_answers_are_those_of_the_rows():
    """Every column against a loop over the very batch that the seed gives."""
    frame = analysis.answers(reader(TASK, wrong=lambda i: i % 7 == 0), TASK, trials=60, seed=3)
    batch = TASK.sample(20, analysis.fresh(3))
    expected = []
    for row in range(20):
        for t in range(TASK.seq_len):
            if batch.targets[row, t] != -100:
                target, cue = int(batch.targets[row, t]), int(batch.tokens[row, t])
                text = batch.tokens[row, : TASK.seq_len - 3].tolist()
                source = text.index(cue) + 1  # the value stands behind the marker that the cue repeats
                assert text[source] == target
                markers = [token for token in text if token >= TASK.first_special]
                expected.append((row, t, target, len(expected) % 7 != 0, t - source - 1, markers.index(cue)))
    columns = ["row", "position", "target", "correct", "distance", "index"]
    pd.testing.assert_frame_equal(frame[columns], pd.DataFrame(expected, columns=columns))


def test_accuracy_of_an_untrained_model_is_near_chance():
    rate = analysis.accuracy(model.build(CFG), TASK, trials=600)
    assert stats.binom.sf(rate.count - 1, rate.total, TASK.chance) > 1e-4


def test_by_index_against_pandas():
    wrong = lambda i: (i % 7 == 0) | (i % 5 == 2)  # noqa: E731
    frame = analysis.answers(reader(TASK, wrong), TASK, trials=600)
    table = analysis.accuracy_by_index(reader(TASK, wrong), TASK, trials=600)
    by_hand = frame.groupby("index")["correct"].agg(["mean", "size", "sum"])
    assert table["index"].tolist() == [0, 1, 2] and table["trials"].sum() == 600
    assert (
        table["accuracy"].tolist() == by_hand["mean"].tolist() and table["trials"].tolist() == by_hand["size"].tolist()
    )
    for row, (count, size) in zip(table.itertuples(), by_hand[["sum", "size"]].to_numpy(), strict=True):
        assert (row.low, row.high) == pytest.approx(wilson(count, size), abs=1e-7)  # one answer a row: independent


def test_by_distance_against_pandas():
    wrong = lambda i: (i % 7 == 0) | (i % 5 == 2)  # noqa: E731
    task = dataclasses.replace(TASK, queries=1)
    frame = analysis.answers(reader(task, wrong), task, trials=500)
    table = analysis.accuracy_by_distance(reader(task, wrong), task, trials=500, bins=4)
    by_hand = frame.groupby(pd.qcut(frame["distance"], 4), observed=True)
    assert table["trials"].tolist() == by_hand.size().tolist() and table["trials"].sum() == 500
    assert table["accuracy"].tolist() == by_hand["correct"].mean().tolist()
    assert table["distance"].tolist() == by_hand["distance"].median().tolist()
    assert table["nearest"].tolist() == by_hand["distance"].min().tolist()
    assert table["furthest"].tolist() == by_hand["distance"].max().tolist()


def test_by_distance_finds_where_memory_ends():
    def rule(tokens, positions):  # forgets what lies more than 10 tokens back
        row, at = positions.nonzero(as_tuple=True)
        best = TASK.oracle(data.Batch(tokens, torch.where(positions, 0, -100)))[positions]
        source = (tokens[row] == tokens[row, at][:, None]).int().argmax(1) + 1
        return torch.where(at - source - 1 <= 10, best, 0 * best + TASK.first_special)

    table = analysis.accuracy_by_distance(Answers(rule), TASK, trials=900, bins=12)
    assert (table.loc[table["furthest"] <= 10, "accuracy"] == 1).all()
    assert (table.loc[table["nearest"] > 10, "accuracy"] == 0).all()
    assert len(table) > 6 and table["distance"].is_monotonic_increasing


def test_by_distance_with_one_distance_is_one_group():
    task = dataclasses.replace(TASK, distance=9)
    table = analysis.accuracy_by_distance(reader(task), task, trials=50)
    assert table[["distance", "nearest", "furthest", "trials"]].to_numpy().tolist() == [[9, 9, 9, 50]]


def test_by_length_changes_the_length_alone():
    seen = []

    def rule(tokens, positions):
        seen.append(tokens.shape[1])
        task = dataclasses.replace(TASK, seq_len=tokens.shape[1])
        best = task.oracle(data.Batch(tokens, torch.where(positions, 0, -100)))[positions]
        return best if tokens.shape[1] == 32 else torch.full_like(best, 63)

    table = analysis.accuracy_by_length(Answers(rule), TASK, (32, 128), trials=99)
    assert seen == [32, 128]
    assert table[["seq_len", "accuracy", "trials"]].to_numpy().tolist() == [[32, 1, 99], [128, 0, 99]]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda net: analysis.accuracy(net, TASK, trials=0), "trials"),
        (lambda net: analysis.accuracy(net, TASK, trials=10, precision="half"), "precision"),
        (lambda net: analysis.accuracy_by_distance(net, TASK, trials=10, bins=0), "bins"),
        (
            lambda net: analysis.accuracy_by_distance(net, data.Bigrams(seq_len=8, vocab_size=64), trials=9),
            "no distance",
        ),
        (lambda net: analysis.accuracy_by_index(net, data.Bigrams(seq_len=8, vocab_size=64), trials=9), "no index"),
        (lambda net: analysis.needle_removed(net, data.Bigrams(seq_len=8, vocab_size=64)), "remove_needle"),
        (lambda net: analysis.state_versus_window(net, data.Bigrams(seq_len=8, vocab_size=64)), "distance"),
        (
            lambda net: analysis.accuracy_by_length(
                net, data.Mixture(tasks=(TASK, TASK), shares=(0.5, 0.5)), (64,), trials=9
            ),
            "no field 'seq_len'",
        ),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call(model.build(CFG))


def test_a_task_that_scores_nothing_is_refused():
    """Not an accuracy over 0 trials, and not a loop without end."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Silent(Pairs, abstract=True):
        def _draw(self, n, generator):
            batch = super()._draw(n, generator)
            return data.Batch(batch.tokens, torch.full_like(batch.targets, -100), batch.info)

    for measure in (lambda t: analysis.accuracy(reader(Pairs()), t), analysis.oracle_accuracy):
        with pytest.raises(ValueError, match="Silent scored nothing"):
            measure(Silent())


def test_evaluating_leaves_the_model_as_it_was():
    net = model.build(CFG).train()
    with analysis.evaluating(net):
        assert not net.training and not net.layers[0].training and not torch.is_grad_enabled()
    assert net.training and net.layers[0].training and torch.is_grad_enabled()
    with pytest.raises(KeyError), analysis.evaluating(net):
        raise KeyError
    assert net.training
    with analysis.evaluating(net, precision="bf16"):
        assert net(TASK.sample(1, analysis.fresh(0)).tokens).logits.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------ loss


def test_loss_weighs_batches_by_their_scored_tokens():
    """The mean over all scored tokens, as one cross-entropy over all of them would give it."""
    net = model.build(CFG, seed=1)
    batches = []
    for i, keep in enumerate((2, 31, 7, 32, 0)):
        batch = data.Bigrams(seq_len=32, vocab_size=64).sample(1 + i, analysis.fresh(i))
        targets = batch.targets.clone()
        targets[:, keep:] = -100
        batches.append(data.Batch(batch.tokens, targets))
    mean, low, high, count = analysis.loss(net, batches, precision="fp32")
    nll, sizes = [], []
    with torch.no_grad():
        for batch in batches[:4]:
            log_p = net(batch.tokens).logits.double().log_softmax(-1)
            each = -log_p.gather(2, batch.targets.clamp_min(0)[..., None])[..., 0][batch.scored]
            nll.append(each.numpy())
            sizes.append(len(each))
    assert count == sum(sizes) == 2 + 62 + 21 + 128
    assert mean == pytest.approx(np.concatenate(nll).mean(), rel=1e-6)
    means, share = np.array([x.mean() for x in nll]), np.array(sizes) / count
    error = np.sqrt(4 / 3 * (share**2 * (means - mean) ** 2).sum())
    half = 3.182446305284263 * error  # t quantile .975 at 3 degrees of freedom, tabled
    assert (low, high) == pytest.approx((mean - half, mean + half), rel=1e-5)


def test_loss_with_even_batches_is_the_plain_t_interval():
    net = model.build(CFG)
    task = data.Bigrams(seq_len=16, vocab_size=64)
    batches = list(analysis.batches(task, 12, seed=0, tokens_per_batch=4 * 16))
    assert [len(b.tokens) for b in batches] == [4, 4, 4]
    with torch.no_grad():
        values = [float(net(b.tokens, b.targets).loss) for b in batches]
    assert analysis.loss(net, batches)[:3] == pytest.approx(analysis.mean_interval(values))
    assert analysis.loss(net, iter(batches))[3] == 12 * 16
    nothing = data.Batch(batches[0].tokens, torch.full_like(batches[0].targets, -100))
    for bad in ([], batches[:1], [nothing, nothing]):
        with pytest.raises(ValueError, match="batch_list"):
            analysis.loss(net, bad)


# ------------------------------------------------------------------------------------------------ ablations


@pytest.mark.parametrize(("pattern", "window"), [("S", 8), ("SS", 5), ("SSS", 3), ("S", 2)])
def test_inside_is_seen_by_attention_and_outside_is_not(pattern, window):
    """On a model of attention alone, the value inside moves the answer's logits and the one outside cannot."""
    cfg = dataclasses.replace(CFG, layer_pattern=pattern, window_size=window)
    net = model.build(cfg, seed=2)
    task = data.SingleNeedle(seq_len=64, vocab_size=64)
    table = analysis.state_versus_window(net, task, trials=30)
    assert table["needle"].tolist() == ["inside the window", "outside the window"]
    moved = []
    for distance in table["distance"]:
        batch = dataclasses.replace(task, distance=distance).sample(1, analysis.fresh(0))
        assert batch.info["distance"][0, -1] == distance
        changed = batch.tokens.clone()
        changed[0, 63 - 1 - distance] += 1
        with torch.no_grad():
            moved.append(not torch.equal(net(batch.tokens).logits[0, -1], net(changed).logits[0, -1]))
    assert moved == [True, False]


def test_state_versus_window_tells_attention_from_memory():
    task = data.SingleNeedle(seq_len=64, vocab_size=64)

    def rule(tokens, positions):  # sees 8 tokens, the current one included
        seen = tokens.clone()
        seen[:, : 64 - 8] = 0
        return task.oracle(data.Batch(seen, torch.where(positions, 0, -100)))[positions]

    cfg = dataclasses.replace(CFG, window_size=8)
    table = analysis.state_versus_window(Answers(rule, cfg=cfg), task, trials=200)
    assert table["distance"].tolist() == [4, 16] and table["accuracy"][0] == 1 and table["high"][1] < 0.1
    table = analysis.state_versus_window(reader(task, cfg=cfg), task, trials=200)
    assert table["accuracy"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="window of 1"):
        analysis.state_versus_window(reader(task, cfg=dataclasses.replace(CFG, window_size=1)), task)
    with pytest.raises(ValueError, match="distance"):
        analysis.state_versus_window(reader(task, cfg=dataclasses.replace(CFG, window_size=64)), task)


def test_needle_removed_tells_memory_from_memorising():
    for task, net, removed in (
        (Pairs(), reader(Pairs()), (0, 0.06)),
        (Pairs(fixed=True), Answers(lambda tokens, positions: tokens[positions] - 28), (1, 1)),
    ):
        table = analysis.needle_removed(net, task, trials=400)
        assert table[""].tolist() == ["needle present", "needle removed"]
        assert table["accuracy"][0] == 1 and removed[0] <= table["accuracy"][1] <= removed[1]
        assert table["oracle"][0] == 1 and table["oracle"][1] < 0.1 or task.fixed
        assert (table["chance"] == task.chance).all()


def test_fresh_ids_tells_reading_from_known_ids():
    task = data.SingleNeedle(seq_len=32, vocab_size=64, needle_range=(10, 20))

    def known(tokens, positions):  # finds the value by its id, whatever stands before it
        text = tokens[:, :-1]
        hit = (text >= 10) & (text < 20)
        return text.gather(1, hit.int().argmax(1, keepdim=True))[:, 0]

    hay = dataclasses.replace(task, haystack_range=(20, 63))
    table = analysis.fresh_ids(Answers(known), hay, (0, 10), trials=300)
    assert table[["from", "to"]].to_numpy().tolist() == [[10, 19], [0, 9]]
    assert table["accuracy"][0] == 1 and table["high"][1] < 0.1
    assert table["chance"].tolist() == [0.1, 0.1]
    assert analysis.fresh_ids(reader(hay), hay, (40, 60), trials=50)["accuracy"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="fresh_range"):
        analysis.fresh_ids(reader(hay), hay, (19, 30))
    with pytest.raises(ValueError, match="needle_range"):
        analysis.fresh_ids(reader(Pairs()), Pairs(), (19, 30))


def test_oracle_accuracy():
    assert str(analysis.oracle_accuracy(TASK, trials=30)) == str(analysis.Rate(30, 30))
    rate = analysis.oracle_accuracy(data.Bigrams(seq_len=64, vocab_size=64), trials=4000)
    assert (
        analysis.Rate(rate.count, rate.total, 0.999).low
        <= 0.7 + 0.3 / 64
        <= analysis.Rate(rate.count, 4032, 0.999).high
    )
    with pytest.raises(ValueError, match="no oracle"):
        analysis.oracle_accuracy(data.LanguageModel(corpus=data.Corpus("x", ("abc " * 50,)), seq_len=8, split="all"))


# ------------------------------------------------------------------------------------------------ looking inside


def gated(*, write_bias=(0.3, -1.2), decay_bias=(4.0, 6.0), **changes):
    """A model whose gates are constants: sigmoid of the given logits, per head."""
    net = model.build(dataclasses.replace(CFG, **changes), seed=3)
    with torch.no_grad():
        for layer in net.layers:
            if isinstance(layer, model.MemoryLayer):
                layer.write_gate.weight.zero_()
                layer.write_gate.bias.copy_(torch.tensor(write_bias))
                if net.cfg.decay != "none":
                    layer.decay_gate.weight.zero_()
                    layer.decay_gate.bias.copy_(torch.tensor(decay_bias))
    return net


def test_diagnose_reads_known_gates():
    tokens = TASK.sample(3, analysis.fresh(0)).tokens
    table = analysis.diagnose(gated(shifted_value=False), tokens).set_index("layer")
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    g = [math.log(sigmoid(4.0)), math.log(sigmoid(6.0))]
    assert table.loc["0 G", "beta"] == pytest.approx((sigmoid(0.3) + sigmoid(-1.2)) / 2, rel=1e-5)
    assert table.loc["0 G", "half_life"] == pytest.approx(math.log(0.5) / (sum(g) / 2), rel=1e-5)
    assert table.loc["0 G", "best_half_life"] == pytest.approx(config.half_life(6.0), rel=1e-5)
    directions = torch.nn.functional.normalize(torch.randn(2, 200_000, 8, generator=analysis.fresh(0)), dim=-1)
    assert table.loc["0 G", "random_keys"] == pytest.approx(
        float((directions[0] * directions[1]).sum(-1).abs().mean()), rel=0.01
    )
    assert np.isnan(table.loc["1 S", "beta"]) and 0 < table.loc["1 S", "read_gate"] < 1
    none = analysis.diagnose(gated(decay="none"), tokens)
    assert none["half_life"][0] == none["best_half_life"][0] == math.inf


def test_diagnose_measures_keys_and_state():
    net = gated(layer_pattern="G", write_bias=(40.0, 40.0), decay_bias=(40.0, 40.0), shifted_value=False)
    same = analysis.diagnose(net, torch.full((2, 9), 5))
    assert same["key_similarity"][0] == pytest.approx(1, abs=1e-5)
    # Written again and again under one key, the state is the outer product of that key and the value: rank 1.
    assert same["state_rank"][0] == pytest.approx(1, abs=1e-3)
    record = analysis.records(net, torch.full((2, 9), 5))[0]
    assert same["state_norm"][0] == pytest.approx(float(record["values"][0, 0].norm(dim=-1).mean()), rel=1e-5)
    tokens = torch.randperm(64, generator=analysis.fresh(0))[None, :40]
    keys = analysis.records(net, tokens)[0]["keys"][0].double()
    cosines = [abs(float(keys[i, h] @ keys[j, h])) for h in range(2) for i in range(40) for j in range(40) if i != j]
    table = analysis.diagnose(net, tokens)
    assert table["key_similarity"][0] == pytest.approx(np.mean(cosines), rel=1e-5)
    assert table["state_rank"][0] > 3
    empty = analysis.diagnose(gated(layer_pattern="G", write_bias=(-200.0, -200.0)), tokens)
    assert empty["state_norm"][0] == 0 and empty["state_rank"][0] == 0


def test_records_build_no_logits(monkeypatch):
    net, rows = model.build(CFG), []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(model.F, "linear", lambda x, w, b=None: (rows.append(x.shape[:-1]), linear(x, w, b))[1])
    assert [r["layer"] for r in analysis.records(net, torch.zeros(2, 5, dtype=torch.long))] == ["G", "S"]
    assert rows[-1] == (0,)


def test_retention_is_the_closed_form():
    tokens = TASK.sample(2, analysis.fresh(0)).tokens
    distances = [0, 1, 5, 31, 32, 1000]
    table = analysis.retention(gated(layer_pattern="GSG"), tokens, distances)
    assert table[["layer", "distance"]].to_numpy().tolist() == [[i, d] for i in (0, 2) for d in distances]
    for row in table.itertuples():
        heads = [1 / (1 + math.exp(-b)) ** row.distance for b in (4.0, 6.0)]
        assert row.kept == pytest.approx(sum(heads) / 2, rel=1e-4)
        assert row.best_head == pytest.approx(heads[1], rel=1e-4)
    assert (analysis.retention(gated(decay="none"), tokens, [7, 500])["kept"] == 1).all()
    assert len(analysis.retention(model.build(dataclasses.replace(CFG, layer_pattern="S")), tokens, [5])) == 0
    for bad in ([-1], [0.5]):
        with pytest.raises(ValueError, match="distances"):
            analysis.retention(gated(), tokens, bad)


def test_retention_is_what_the_memory_keeps():
    """Write one value, then nothing but decay: the state shrinks by the share that `retention` says."""
    g = torch.empty(1, 20, 1).uniform_(-0.5, 0, generator=analysis.fresh(0))
    k = torch.nn.functional.normalize(torch.randn(1, 20, 1, 4, generator=analysis.fresh(1)), dim=-1)
    beta = torch.zeros(1, 20, 1)
    beta[:, 3] = 1
    memory = core.delta_write(k, torch.ones(1, 20, 1, 2), beta, g)
    recalled = memory.read(k[:, 3:4].expand_as(k).contiguous())[0, :, 0, 0]

    class OneLayer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, tokens, *, positions, diagnostics):
            return model.Output(None, None, [{"layer": "G", "index": 0, "log_decay": g[:, 3:]}], None)

    table = analysis.retention(OneLayer(), torch.zeros(1, 17, dtype=torch.long), [16])
    assert table["kept"][0] == pytest.approx(float(recalled[19] / recalled[3]), rel=1e-5)


@pytest.mark.parametrize(("window", "use_rope"), [(1, False), (4, False), (4, True), (100, False)])
def test_attention_map_is_what_the_layer_does(window, use_rope):
    net = model.build(dataclasses.replace(CFG, layer_pattern="S", window_size=window, use_rope=use_rope), seed=4)
    tokens = TASK.sample(2, analysis.fresh(0)).tokens
    values = []
    net.layers[0].v.register_forward_hook(lambda module, inputs, out: values.append(out))
    record = analysis.records(net, tokens)[0]
    weights = analysis.attention_map(record, window)
    assert weights.shape == (2, 2, 32, 32)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 2, 32), atol=1e-6)
    i, j = torch.arange(32)[:, None], torch.arange(32)[None, :]
    outside = (j > i) | (i - j >= window)
    assert (weights[..., outside] == 0).all() and (weights[..., ~outside] > 0).all()
    v = values[0].view(2, 32, 2, 8).transpose(1, 2)
    mixed = net.layers[0].out((weights @ v).transpose(1, 2).reshape(2, 32, 16))
    assert torch.allclose(mixed, record["window"], atol=1e-5)
    with pytest.raises(ValueError, match="record"):
        analysis.attention_map({"layer": "G"}, window)


@pytest.mark.parametrize("pattern", ["GS", "GA", "SL"])
def test_long_rows_in_pieces_give_the_answers_of_the_whole(pattern):
    net = model.build(dataclasses.replace(config.preset("smoke"), layer_pattern=pattern, vocab_size=64, init_std=0.3))
    task = data.MultiNeedle(seq_len=100, vocab_size=64, n_needles=3, layout="answers")
    batch = task.sample(20, analysis.fresh(0))
    # Half of the targets are what the model says, so that both outcomes occur.
    with torch.no_grad():
        said = net(batch.tokens).logits.argmax(-1)
    batch.targets[::2] = torch.where(batch.scored[::2], said[::2], batch.targets[::2])
    with analysis.evaluating(net):
        whole, scored = analysis.score(net, batch)
        for segment in (17, 99):
            again, same = analysis.score(net, batch, segment=segment)
            assert torch.equal(again, whole) and torch.equal(same, scored)
    assert 0 < whole.sum() < len(whole)


# ------------------------------------------------------------------------------------------------ positions and paths


def test_loss_by_position_is_the_loss_of_its_tokens():
    net = model.build(dataclasses.replace(config.preset("smoke"), vocab_size=64, init_std=0.3))
    rows = data.Bigrams(seq_len=40, vocab_size=64).sample(7, analysis.fresh(0))
    rows.targets[:, 5:9] = -100
    rows.targets[3, 20:] = -100
    table = analysis.loss_by_position(net, rows, [0, 8, 20, 40], rows_per_batch=3)
    with torch.no_grad():
        nats = torch.nn.functional.cross_entropy(net(rows.tokens).logits.mT, rows.targets, reduction="none")
    for line, (a, b) in zip(table.itertuples(), ((0, 8), (8, 20), (20, 40)), strict=True):
        scored = rows.scored[:, a:b]
        assert (line.position, line.until, line.tokens) == (a, b - 1, int(scored.sum()))
        assert line.loss == pytest.approx(float(nats[:, a:b][scored].mean()), rel=1e-5)
        assert line.low < line.loss < line.high and line.rows == (6 if a == 20 else 7)
    for edges in ([0], [8, 0], [0, 41], [0, 5, 5]):
        with pytest.raises(ValueError, match="edges"):
            analysis.loss_by_position(net, rows, edges)
    with pytest.raises(ValueError, match="0 rows are scored from 5 to 8"):
        analysis.loss_by_position(net, rows, [5, 9])


def test_paths_are_taken_out_and_put_back():
    net = model.build(dataclasses.replace(config.preset("smoke"), vocab_size=64, init_std=0.3))
    x = data.Bigrams(seq_len=40, vocab_size=64).sample(2, analysis.fresh(0)).tokens
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    logits = net(x).logits
    for path, where in (("memory", "layers.0.out"), ("read", "layers.1.read_out"), ("window", "layers.1.out")):
        with analysis.without(net, path):
            gone = {name for name, p in net.named_parameters() if not p.any()}
            assert f"{where}.weight" in gone and len(gone - {n for n, p in before.items() if not p.any()}) == 1
            assert not torch.equal(net(x).logits, logits)
        assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    with pytest.raises(RuntimeError), analysis.without(net, "memory", "read"):
        raise RuntimeError
    assert torch.equal(net(x).logits, logits)
    # Without its memory, a model answers by its window alone: the state of a G layer reaches nothing.
    with analysis.without(net, "memory", "read"):
        state = net(x[:, :20]).state
        other = state._replace(layers=(state.layers[0]._replace(memory=state.layers[0].memory + 1), state.layers[1]))
        assert torch.equal(net(x[:, 20:], state=state).logits, net(x[:, 20:], state=other).logits)
    for paths in ((), ("memoir",)):
        with pytest.raises(ValueError, match="paths"):
            analysis.without(net, *paths).__enter__()
    alone = model.build(dataclasses.replace(config.preset("smoke"), vocab_size=64, layer_pattern="S"))
    with pytest.raises(ValueError, match="no layer S with read_out"):
        analysis.without(alone, "read").__enter__()


def test_ablation_is_paired_by_row():
    net = model.build(dataclasses.replace(config.preset("smoke"), vocab_size=64, init_std=0.3))
    rows = data.Bigrams(seq_len=40, vocab_size=64).sample(7, analysis.fresh(0))
    table = analysis.ablation(net, rows, [0, 8, 40])
    assert list(table["variant"].unique()) == ["whole", *analysis.ABLATIONS] and len(table) == 5 * 3
    assert (table[table["variant"] == "whole"][["added", "added low", "added high"]] == 0).all(axis=None)
    by_row = lambda: torch.nn.functional.cross_entropy(net(rows.tokens).logits.mT, rows.targets, reduction="none")  # noqa: E731
    with torch.no_grad():
        whole = by_row().double()
        with analysis.without(net, "memory", "read"):
            gone = by_row().double()
    lines = table[table["variant"] == "without both"].set_index("position")
    for position, (a, b) in {"all": (0, 40), 0: (0, 8), 8: (8, 40)}.items():
        line = lines.loc[position]
        found = line[["loss", "low", "high"]], line[["added", "added low", "added high"]]
        for numbers, nats in zip(found, (gone, gone - whole), strict=True):
            assert numbers.tolist() == pytest.approx(analysis.mean_interval(nats[:, a:b].mean(1)), rel=1e-4, abs=1e-6)
        assert (line["until"], line["rows"]) == (b - 1, 7)
    by_position = analysis.loss_by_position(net, rows, [0, 8, 40])
    kept = table[(table["variant"] == "whole") & (table["position"] != "all")]
    assert kept["loss"].tolist() == pytest.approx(by_position["loss"].tolist(), rel=1e-5)
    with pytest.raises(ValueError, match="edges"):
        analysis.ablation(net, rows, [0, 41])
    rows.targets[0, 3] = -100
    with pytest.raises(ValueError, match="not scored"):
        analysis.ablation(net, rows, [0, 40])


def test_accuracy_without_asks_the_same_rows():
    net = model.build(dataclasses.replace(config.preset("smoke"), vocab_size=64, init_std=0.3))
    task = data.MultiNeedle(seq_len=40, vocab_size=64, n_needles=3, n_markers=4)
    table = analysis.accuracy_without(net, task, trials=300).set_index("variant")
    assert list(table.index) == ["whole", *analysis.ABLATIONS] and set(table["chance"]) == {task.chance}
    assert table.loc["whole", "accuracy"] == analysis.accuracy(net, task, trials=300).value
    with analysis.without(net, "window"):
        assert table.loc["without the window", "accuracy"] == analysis.accuracy(net, task, trials=300).value
