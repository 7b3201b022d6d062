"""Studies of recall at toy size: arms differ, rows say what they are of, nothing is trained twice, summaries count seeds."""

import dataclasses
import json
import math

import pandas as pd
import pytest
import scipy.stats
import torch

import analysis
import audit
import config
import data
import model
import recall
import studies

TINY = studies.Size(
    d_model=16, n_heads=2, width=8, vocab_size=64, lengths=(16, 32), needles=(1, 2), tokens=64, steps=3,
    far=(32, 64), furthest=128,
    asked=3, widths=(16, 32), mqar=(32, 4), mqar_far=(64, 8), trials=20,
)  # fmt: skip


@pytest.fixture
def cpu(monkeypatch):
    monkeypatch.setattr(recall.torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("size", [TINY, studies.SMOKE, studies.FULL], ids=["tiny", "smoke", "full"])
def test_arms_of_a_study_are_all_different(size):
    rates = dict.fromkeys(studies.MIXERS, 1e-3)
    for arms in (
        studies.gates(size),
        studies.gates(size, patterns=("G", "GSGS")),
        studies.mixers(size),
        studies.mixers(size, rates=rates),
    ):
        assert len({arm.name for arm in arms}) == len({arm.key for arm in arms}) == len(arms)
    assert len(studies.mixers(size)) == len(studies.MIXERS) * len(studies.RATES)
    assert len(studies.mixers(size, rates=rates)) == len(studies.MIXERS) * len(size.widths)


def test_the_key_of_an_arm_follows_every_setting_but_its_name():
    arm = studies.gates(TINY)[0]
    assert dataclasses.replace(arm, name="other").key == arm.key
    task = arm.tests[0][1]
    changes = [
        dict(cfg=dataclasses.replace(arm.cfg, g_bias=3.0)),
        dict(training=dataclasses.replace(arm.training, lr=1e-4)),
        dict(phases=(dataclasses.replace(arm.phases[0], steps=4),)),
        dict(tests=(("a", dataclasses.replace(task, n_needles=1)),)),
        dict(trials=21),
    ]
    keys = {dataclasses.replace(arm, **change).key for change in changes}
    assert len(keys) == len(changes) and arm.key not in keys


def test_mixers_differ_in_what_they_compute():
    arms = [arm for arm in studies.mixers(TINY) if arm.training.lr == studies.RATES[0]]
    nets = {arm.name: model.build(arm.cfg) for arm in arms if "penalty" not in arm.name}
    tokens = arms[0].tests[0][1].sample(4, analysis.fresh(0)).tokens
    outputs = [net(tokens).logits for net in nets.values()]
    assert all((a - b).abs().max() > 0 for i, a in enumerate(outputs) for b in outputs[:i])
    for net in nets.values():
        audit.require(audit.causality(net, tokens, positions=(0, 12, 30)))


def test_rows_are_kept_and_nothing_is_trained_twice(tmp_path, cpu, monkeypatch):
    path, arms = tmp_path / "rows.jsonl", studies.gates(TINY)[:2]
    rows = recall.run(arms, seeds=(0, 1), out=path, study="gates")
    assert len(rows) == 2 * 2 * len(TINY.far) and set(rows["seed"]) == {0, 1}
    assert (rows["trials"] >= TINY.trials).all() and set(rows["length"]) == set(TINY.far)
    assert rows["chance"].tolist() == [1 / (64 - 3)] * len(rows) and set(rows["steps"]) == {3}
    assert (rows["parameters"] == model.build(arms[0].cfg).count_params()).all()
    assert rows.groupby("seed")["accuracy"].size().tolist() == [4, 4]
    lines = path.read_text().splitlines()

    def never(*args, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr(recall, "trained", never)
    again = recall.run(arms, seeds=(0, 1), out=path, study="gates")
    pd.testing.assert_frame_equal(again, rows)
    assert path.read_text().splitlines() == lines and [json.loads(line)["study"] for line in lines] == ["gates"] * 8
    with pytest.raises(AssertionError, match="trained again"):
        recall.run([dataclasses.replace(arms[0], trials=21)], seeds=(0,), out=path)
    pd.testing.assert_frame_equal(recall.load(path, "gates"), rows)
    assert recall.load(path, "mixers").empty and recall.load(tmp_path / "none", "gates").empty


def test_what_is_said_of_the_memory(cpu):
    cfg = TINY.model(write_gate="hard", decay="none")
    net = model.build(cfg)
    task = studies.gates(TINY)[0].tests[0][1]
    with recall.torch.no_grad():
        net.layers[0].write_gate.weight.zero_()
        net.layers[0].write_gate.bias.fill_(-9.0)
    batch = task.sample(4, analysis.fresh(2))
    record = next(r for r in analysis.records(net, batch.tokens) if r["layer"] == "G")
    hay = record["keys"][recall.probes.roles(task, batch) == 0]  # [n, H, K]
    pairs = torch.combinations(torch.arange(len(hay)))
    similar = float((hay[pairs[:, 0]] * hay[pairs[:, 1]]).sum(-1).abs().mean())
    assert recall.memory_of(net, task) == dict(
        beta=0.0, log_decay=0.0, shut=1.0, leak=0.0, written=0.0, erased=0.0, similarity=pytest.approx(similar)
    )
    with recall.torch.no_grad():
        net.layers[0].write_gate.bias[0] = 9.0
    found = recall.memory_of(net, task)
    batch = task.sample(4, analysis.fresh(2))
    keys = next(r for r in analysis.records(net, batch.tokens) if r["layer"] == "G")["keys"][
        :, :, 0
    ]  # head 0 alone writes
    roles = recall.probes.roles(task, batch)
    marked, hay = keys[roles == 1], keys[roles == 0]
    assert found.pop("similarity") == pytest.approx(similar)
    assert found.pop("erased") == pytest.approx(float((marked @ hay.mT).square().mean() / 2))
    assert found == dict(beta=0.5, log_decay=0.0, shut=0.0, leak=0.5, written=0.5)
    with recall.torch.no_grad():  # now head 1 alone writes, and only at markers
        marked = net.layers[0].write_gate.weight
        net.layers[0].write_gate.bias[0] = -9.0
        net.embed.weight[:] = 0.0
        net.embed.weight[task.first_marker :, 0] = 1.0
        marked[1, 0], net.layers[0].write_gate.bias[1] = 99.0, -9.0
    found = recall.memory_of(net, task)
    assert (found["leak"], found["written"]) == (0.0, 0.5) and 0 < found["beta"] < 0.5
    assert "leak" not in recall.memory_of(net, data.MQAR(seq_len=16, n_pairs=2, vocab_size=64))
    assert recall.memory_of(model.build(TINY.model("S")), task) == {}


def rows_of(arm, values, *, test="far", lr=1e-3, loss=0.1):
    common = dict(
        arm=arm, test=test, length=64, trials=1000, chance=0.01, parameters=10, state=5, lr=lr, last_loss=loss
    )
    return [dict(common, accuracy=a, low=a - 0.1, high=min(1.0, a + 0.1), seed=i) for i, a in enumerate(values)]


def test_summaries_are_over_seeds():
    table = recall.summary(pd.DataFrame(rows_of("a", [1.0, 0.9, 0.8]) + rows_of("b", [0.5]))).set_index("arm")
    mean, low, high = analysis.mean_interval([1.0, 0.9, 0.8])
    assert table.loc["a", ["accuracy", "low", "high", "worst", "seeds"]].tolist() == [mean, low, min(high, 1.0), 0.8, 3]
    assert table.loc["b", ["accuracy", "low", "high", "seeds"]].tolist() == [0.5, 0.4, 0.6, 1]
    sure = recall.summary(pd.DataFrame(rows_of("a", [1.0] * 5))).iloc[0]
    assert (sure["low"], sure["high"]) == (analysis.Rate(5000, 5000).low, 1.0) and 0.999 < sure["low"] < 1


def test_tables_of_a_study(cpu):
    rows = recall.run(studies.gates(TINY)[:2], seeds=(0, 1), study="gates")
    table = recall.by_test(rows)
    assert list(table.index) == [arm.name for arm in studies.gates(TINY)[:2]]
    assert list(table.columns[:2]) == ["32 tokens", "64 tokens"] and set(table["seeds"]) == {2}
    mean, low, high = recall.summary(rows)[["accuracy", "low", "high"]].iloc[0]
    assert table.iloc[0, 0] == f"{100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    inside = recall.inside(rows)
    assert inside.loc["sigmoid decay, bias 2", "half-life"] == pytest.approx(config.half_life(2.0), rel=0.2)
    assert inside.loc["sigmoid decay", "half-life"] > 100 * inside.loc["sigmoid decay, bias 2", "half-life"]
    line = recall.source("gates", rows)
    assert (line["models"], line["seeds"]) == (4, 2) and line["device"] == "cpu" and len(line["day"]) == 10
    assert recall.source("keys", rows[:0])["models"] == 0
    live = rows[(rows["seed"] == 0) & (rows["arm"] == "sigmoid decay")]
    found = recall.beside(live, rows)
    assert len(found) == 2 and set(found["models in the file"]) == {2}
    assert (found["now"] >= found["min"]).all() and (found["now"] <= found["max"]).all()
    assert recall.beside(live, rows[:0]).empty


def test_missing_studies_say_how_to_run_them(capsys):
    rows = pd.DataFrame(rows_of("a", [1.0]))
    assert recall.shown(rows, "keys") is rows and capsys.readouterr().out == ""
    assert recall.shown(rows[:0], "keys") is None and "python recall.py keys" in capsys.readouterr().out


def test_losses_are_paired_by_seed():
    same = dict(last_loss=3.0, parameters=7)
    loss = lambda arm, values: [dict(same, arm=arm, seed=s, loss=v) for s, v in values.items()]  # noqa: E731
    rows = pd.DataFrame(
        loss("alone", {0: 4.0, 1: 5.0, 2: 9.0}) + loss("both", {0: 4.04, 1: 5.05}) + loss("one", {2: 9})
    )
    table = recall.losses(rows, than="alone").set_index("arm")
    assert table.loc["both", ["excess, %", "excess low", "excess high", "seeds"]].tolist() == pytest.approx(
        [1, 1, 1, 2]
    )
    assert table.loc["alone", ["loss", "excess, %", "seeds", "training"]].tolist() == [6.0, 0.0, 3, 3.0]
    assert list(table.index) == ["alone", "both"]  # a single seed in common has no interval
    assert recall.losses(rows, than="none").empty and recall.losses(rows[:0], than="alone").empty


def test_what_is_lost_on_the_way_is_paired_by_seed():
    near, far = ([1.0, 0.9, 0.8], [0.9, 0.7, 0.7])
    rows = rows_of("a", near, test="near") + rows_of("a", far) + rows_of("b", [1.0], test="near") + rows_of("b", [0.5])
    table = recall.lost(pd.DataFrame(rows), "far", near="near").set_index("arm")
    assert table.loc["a", ["lost", "lost low", "lost high"]].tolist() == pytest.approx(
        analysis.mean_interval([10, 20, 10])
    )
    assert table.loc["b", "lost"] == pytest.approx(50) and math.isnan(table.loc["b", "lost low"])
    assert table.loc["a", "accuracy"] == pytest.approx(sum(far) / 3)
    assert recall.lost(pd.DataFrame(rows), "none", near="near").empty
    assert recall.lost(pd.DataFrame(), "far", near="near").empty


def test_differences_are_paired_by_seed_and_corrected():
    rows = pd.DataFrame(
        rows_of("none", [0.50, 0.60, 0.70, 0.80, 0.90])
        + rows_of("up", [0.61, 0.69, 0.81, 0.90, 0.99])  # 11, 9, 11, 10, 9 points more
        + rows_of("same", [0.51, 0.59, 0.71, 0.79, 0.90])
        + rows_of("equal", [0.50, 0.60, 0.70, 0.80, 0.90])
        + rows_of("short", [0.1, 0.2])
        + rows_of("one", [0.1])
    ).assign(trials=10**8)  # so many that only the seeds count
    table = recall.differences(rows, dict.fromkeys(("up", "same", "equal", "short", "one", "missing"), "none"))
    table = table.set_index("arm")
    assert list(table.index) == ["up", "same", "equal", "short"] and set(table["than"]) == {"none"}
    assert table["seeds"].tolist() == [5, 5, 5, 2] and table.loc["up", "difference"] == pytest.approx(10)
    mean, low, high = analysis.mean_interval([11, 9, 11, 10, 9])
    assert table.loc["up", ["low", "high"]].tolist() == pytest.approx([low, high])
    t = 10 / (1 / 5**0.5)  # the sample deviation of 11, 9, 11, 10, 9 is 1
    assert table.loc["up", "p"] == pytest.approx(2 * scipy.stats.t.sf(t, 4))
    assert table.loc["same", "p"] == pytest.approx(1) and table.loc["equal", "p"] == 1  # +1, -1, +1, -1, 0
    assert table.loc["up", "holm"] == pytest.approx(4 * table.loc["up", "p"])  # one of four lines, the least
    assert (table["holm"] >= table["p"]).all() and (table["holm"] <= 1).all()
    said = recall.verdict(table.reset_index())
    assert said[0].startswith("up against none: **better** (points: far +10.00 [")
    assert "**no effect shown**" in said[1] and "**no verdict from 2 of 5 seeds**" in said[3]
    down = recall.differences(pd.concat([rows, rows.assign(test="near", accuracy=0.5)]), {"none": "up"})
    assert down["test"].tolist() == ["far", "near"] and down["holm"][1] == 1
    assert recall.verdict(down)[0].startswith(
        "none against up: **worse in far; no effect shown in near** (points: far -10.00"
    )
    # By itself an interval that leaves out 0, among ten such lines none.
    wide = recall.differences(
        pd.DataFrame(rows_of("a", [0.5] * 5) + rows_of("b", [0.52, 0.51, 0.55, 0.51, 0.53])).assign(trials=10**8),
        {"b": "a"},
    )
    assert wide["low"][0] > 0 and wide["p"][0] < 0.05
    assert "**better**" in recall.verdict(wide)[0] and "**undecided**" in recall.verdict(wide.assign(holm=0.4))[0]
    sure = pd.DataFrame(rows_of("all", [1.0] * 5) + rows_of("none", [0.0] * 5) + rows_of("also", [1.0] * 5))
    table = recall.differences(sure, {"none": "all", "also": "all"}).set_index("arm")  # 1,000 answers a seed
    assert table.loc["none", "holm"] < 1e-8 and -100.2 < table.loc["none", "low"] < -100 < table.loc["none", "high"]
    assert table.loc["also", "p"] == 1 and 0.05 < table.loc["also", "high"] < 0.2
    assert recall.differences(rows[:0], {"up": "none"}).empty and recall.verdict(pd.DataFrame()) == []
    assert recall.differences(pd.DataFrame(), {"up": "none"}).empty


def test_the_trade_off_is_paired_by_seed():
    def trained(arm, losses, right):
        rows = []
        for seed, (loss, accuracy) in enumerate(zip(losses, right, strict=True)):
            rows += [
                dict(arm=arm, seed=seed, test="language", loss=loss),
                dict(rows_of(arm, [accuracy], test="five")[0], seed=seed),
            ]
        return rows

    rows = trained("soft gates, language alone", [4.0, 5.0, 8.0], [0, 0, 0])
    rows += trained("soft gates, weight 0.05", [4.04, 5.1, 8.08], [1.0, 0.98, 0.99])
    rows += trained("gates that can shut, weight 0.5", [4.0], [1.0])
    rows += trained("sure gates, language alone", [4.0] * 3, [0.0] * 3)
    rows += trained("sure gates, weight 0.5", [4.0] * 3, [1.0] * 3)
    rows += trained("gates that can shut, language alone", [4.0, 4.0], [0.0, 0.0])
    table = recall.trade_off(pd.DataFrame(rows), "five").set_index(["gate", "weight"])
    line = table.loc["soft gates", 0.05]
    mean, low, high = analysis.mean_interval([1, 2, 1])
    assert line[["excess, %", "excess low", "excess high"]].tolist() == pytest.approx([mean, low, high])
    assert line[["accuracy", "worst", "seeds", "succeeded"]].tolist() == pytest.approx([0.99, 0.98, 3, 2])
    assert line[["loss", "alone", "high"]].tolist() == pytest.approx([17.22 / 3, 17 / 3, 1.0])
    assert line["low"] == pytest.approx(analysis.mean_interval([1.0, 0.98, 0.99])[1])
    assert table.loc[("soft gates", 0.0), ["excess, %", "excess low", "accuracy"]].tolist() == [0, 0, 0]
    single = table.loc["gates that can shut", 0.5]
    assert math.isnan(single["excess low"]) and (single["enough"], line["enough"]) == (False, True)
    sure = table.loc["sure gates", 0.5]  # three seeds at 100% are no certainty
    assert (sure["low"], sure["high"]) == (analysis.Rate(3000, 3000).low, 1.0)
    lonely = pd.DataFrame(trained("soft gates, weight 1", [4.0], [1.0]))
    assert recall.trade_off(lonely, "five").empty


def test_losses_beside_the_file():
    same = dict(key="k", test="language", accuracy=math.nan)
    rows = pd.DataFrame([dict(same, loss=4.0), dict(same, loss=4.2), dict(same, test="five", accuracy=1.0)])
    live = pd.DataFrame([dict(key="k", test="language", loss=4.1, loss_low=4.0, loss_high=4.2)])
    found = recall.beside(live, rows, "loss").loc["language"]
    assert found[["now", "loss_low", "min", "mean", "max", "models in the file"]].tolist() == [4.1, 4, 4, 4.1, 4.2, 2]


TEXT = data.LanguageModel(
    data.Corpus("articles", tuple(f"Article {i}. " + "word " * 60 for i in range(120))), seq_len=32
)
SMALL = dataclasses.replace(TINY, vocab_size=320, lengths=(64, 128), far=(128,), tokens=256, steps=2, asked=3)


@pytest.mark.parametrize("study", studies.WITH_TEXT)
def test_studies_with_a_text(study, cpu):
    arms = studies.WITH_TEXT[study](SMALL, TEXT)
    assert len({arm.key for arm in arms}) == len({arm.name for arm in arms}) == len(arms)
    rows = recall.run(arms[-1:], seeds=(0,), study=study)
    assert len(rows) == len(arms[-1].tests)
    if study in ("language", "order"):
        assert rows["loss"].notna().sum() == 1 and rows["loss"].dropna().item() == pytest.approx(math.log(320), rel=0.3)
    for task in (task for _, task in arms[-1].tests if getattr(task, "haystack", None)):
        assert task.haystack.split == "validation"
    for phase in arms[-1].phases:
        for part in phase.streams:
            for task in part.options:
                text = task if isinstance(task, data.LanguageModel) else getattr(task, "haystack", None)
                assert text is None or text.split == "train"


@pytest.mark.parametrize("study", ["keys", "penalties", "ids"])
def test_studies_without_a_text(study, cpu):
    size = dataclasses.replace(SMALL, vocab_size=1100, width=16)
    arms = studies.STUDIES[study](size)
    assert len({arm.key for arm in arms}) == len({arm.name for arm in arms}) == len(arms)
    rows = recall.run([arm for arm in arms if "slots" in arm.name or "slower" in arm.name] or arms, seeds=(0,))
    assert rows["accuracy"].notna().all()


def test_orders_train_each_part_for_as_many_steps():
    arms = {arm.name: arm for arm in studies.order(SMALL, TEXT)}
    for name in ("both at once", "needles, then language", "language, then needles"):
        steps = {}
        for phase in arms[name].phases:
            for part in phase.streams:
                steps[part.label] = steps.get(part.label, 0) + phase.steps
        assert steps == {"language": SMALL.steps, "needles": SMALL.steps}


def test_the_best_rate_of_each_mixer():
    rows = [
        *rows_of("DeltaNet, d 128, rate 0.001", [0.5], lr=1e-3),
        *rows_of("DeltaNet, d 128, rate 0.01", [0.7], lr=1e-2),
        *rows_of("hybrid, d 128, rate 0.01", [1.0], lr=1e-2, test="near"),
        *rows_of("hybrid, d 128, rate 0.001", [1.0], lr=1e-3, test="near", loss=0.2),
        *rows_of("hybrid, d 128, rate 0.01", [0.4], lr=1e-2),
        *rows_of("hybrid, d 128, rate 0.001", [0.6], lr=1e-3, loss=0.2),  # better where it is not easy
        *rows_of("linear, d 128, rate 0.01", [1.0], lr=1e-2, loss=0.2),
        *rows_of("linear, d 128, rate 0.001", [1.0], lr=1e-3),
        *rows_of("hybrid, d 64", [1.0], lr=1e-4, loss=0.0),
    ]
    assert recall.best_rates(pd.DataFrame(rows)) == {"DeltaNet": 1e-2, "hybrid": 1e-3, "linear": 1e-3}
    for found in (pd.DataFrame(rows_of("hybrid, d 64", [1.0])), pd.DataFrame()):
        with pytest.raises(ValueError, match="no sweep"):
            recall.best_rates(found)


def test_the_command(tmp_path, cpu, monkeypatch, capsys):
    monkeypatch.setattr(studies, "SMOKE", TINY)
    out = tmp_path / "rows.jsonl"
    recall.main(["gates", "--smoke", "--seeds", "0", "--arms", "bias 2;hard decay", "--out", str(out)])
    assert len(out.read_text().splitlines()) == 4 * 2 + 1  # one arm may last
    assert "hard decay, hard write, penalty" in capsys.readouterr().out
    for words in (["none"], ["gates", "--rates-of", str(out)]):
        with pytest.raises(SystemExit):
            recall.main(words)
    recall.main(["mixers", "--smoke", "--seeds", "0", "--out", str(out)])
    recall.main(
        ["mixers", "--smoke", "--seeds", "0", "--rates-of", str(out), "--arms", "hybrid, d 32", "--out", str(out)]
    )
    rows = recall.load(out, "mixers")
    rates = recall.best_rates(rows)
    chosen = recall.named(rows, studies.mixers(TINY, rates=rates))
    # The best of the sweep is there already, under a longer name: kept under both, trained once.
    both = rows[rows["key"].isin(chosen["key"][chosen["arm"] == "hybrid, d 32"])]
    assert set(both["arm"]) == {"hybrid, d 32", f"hybrid, d 32, rate {rates['hybrid']:g}"}
    first, second = (part["accuracy"].tolist() for _, part in both.groupby("arm"))
    assert first == second and len(both) == 2 * 3
    assert set(chosen["arm"].str[-4:]) == {"d 32"} and recall.named(rows[:0], []).empty


def test_what_writes_leave_of_a_needle(cpu):
    """A layer's own keys, gates and decay over haystack drawn afresh, and what is left of a value under a marker's key."""
    task = studies.gates(TINY)[0].tests[0][1]
    net = model.build(TINY.model(decay="sigmoid"))
    with recall.torch.no_grad():
        net.layers[0].decay_gate.bias.copy_(torch.tensor([3.0, 6.0]))  # two heads that forget at different rates
        net.layers[0].decay_gate.weight.zero_()
    batch = task.sample(4, analysis.fresh(2))
    record = next(r for r in analysis.records(net, batch.tokens) if r["layer"] == "G")
    roles = recall.probes.roles(task, batch)
    length, trials = 12, 4000
    generator = torch.Generator().manual_seed(0)
    pick = lambda of: torch.randint(len(of), (trials,), generator=generator)  # noqa: E731
    hay, marked = record["keys"][roles == 0], record["keys"][roles == 1]
    beta, decay = record["beta"][roles == 0], record["log_decay"][roles == 0]
    key = marked[pick(marked)]  # [n, H, K]
    state = key.clone()  # the value 1 under the marker's key
    for _ in range(length):
        i = pick(hay)
        state = state * decay[i].exp()[..., None]
        state = state - beta[i][..., None] * hay[i] * (hay[i] * state).sum(-1, keepdim=True)
    left = (key * state).sum(-1).mean(-1)
    kept, none, far = recall.retention(net, task, [length, 0, 10_000])
    _, low, high = analysis.mean_interval(left.double().numpy(), level=0.999)
    assert low < kept < high and 0.2 < kept < 0.95
    assert none == pytest.approx(1) and far < 1e-9
    with pytest.raises(ValueError, match="no memory layer"):
        recall.retention(model.build(TINY.model("S")), task, [1])


def test_the_last_loss_is_that_of_the_last_phase(cpu):
    arm = studies.order(SMALL, TEXT)[1]
    assert arm.name == "needles, then language"
    _, rows, fitted = recall.trained(arm, 0)
    assert rows[0]["last_loss"] == pytest.approx(fitted.history["loss/language"].dropna().iloc[-5:].mean())
    assert rows[0]["text"] == TEXT.corpus.sha256[:12]
    assert recall.trained(studies.gates(TINY)[0], 0)[1][0]["text"] == ""


def test_rows_of_two_settings_are_no_arm():
    rows = pd.DataFrame(rows_of("a", [1.0, 0.0])).assign(key=["now", "before"])
    with pytest.raises(ValueError, match="'a' has rows of 2 settings"):
        recall.summary(rows)
    assert len(recall.summary(rows[rows["key"] == "now"])) == 1


def test_phases_train_at_every_length_and_count():
    options = studies.gates(studies.FULL)[0].phases[0].streams[0].options
    assert {t.seq_len for t in options} == set(studies.FULL.lengths)
    assert {t.n_needles for t in options} == set(studies.FULL.needles)
    assert isinstance(studies.FULL, config.Settings)
