"""Training: resume to the bit after a kill, learning rates, phases, run folders, guards, ensembles."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

import config
import data
import model
import train

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
TASK = data.MultiNeedle(seq_len=32, vocab_size=64, n_needles=2, n_markers=4)
TRAIN = config.TrainConfig(lr=3e-3, warmup_steps=3, log_every=2, device="cpu", precision="fp32")


def phase(steps=6, *, name="retrieval", batch_size=4, **options):
    return train.Phase(name, train.Part(TASK, batch_size=batch_size), steps, **options)


def fit(phases=None, cfg=TRAIN, seed=0, **options):
    return train.fit(model.build(CFG, seed=seed), phases or phase(), cfg, progress=False, **options)


def weights(run):
    return run.model.state_dict()


def equal(a, b):
    return all(torch.equal(a[n], b[n]) for n in a)


# ------------------------------------------------------------------------------------------------ resuming

SCRIPT = """
    import sys
    sys.path[:0] = [{root!r}, {tests!r}]
    import torch
    torch.set_num_threads(1)
    import test_train as t
    phases = [t.phase(30, name="one"), t.phase(40, name="two", batch_size=3)]
    run = t.fit(phases, t.dataclasses.replace(t.TRAIN, save_every=3), run_dir={path!r}, resume=True)
    torch.save(run.model.state_dict(), {out!r})
"""


def launch(path: Path, out: Path):
    root = Path(__file__).resolve().parents[1]
    code = textwrap.dedent(SCRIPT.format(root=str(root), tests=str(root / "tests"), path=str(path), out=str(out)))
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})


def test_killed_at_random_steps_and_resumed_gives_the_same_bits(tmp_path):
    whole = launch(tmp_path / "whole", tmp_path / "whole.pt")
    assert whole.wait(120) == 0
    path, metrics, kills = tmp_path / "run", tmp_path / "run" / "metrics.jsonl", 0
    generator = torch.Generator().manual_seed(time.time_ns() % 2**31)
    for _ in range(2):
        process = launch(path, tmp_path / "resumed.pt")
        rows = lambda: len(metrics.read_text().splitlines()) if metrics.exists() else 0  # noqa: E731
        target = rows() + int(torch.randint(3, 12, (), generator=generator))
        while process.poll() is None and rows() < target:
            time.sleep(0.001)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills == 2, "the runs ended before they could be killed"
    final = launch(path, tmp_path / "resumed.pt")
    assert final.wait(120) == 0
    a, b = torch.load(tmp_path / "whole.pt"), torch.load(tmp_path / "resumed.pt")
    assert equal(a, b)
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 70, 2)), "metrics are written once per logged step"


def test_finished_run_is_not_trained_again(tmp_path):
    a = fit(run_dir=tmp_path / "r")
    b = fit(run_dir=tmp_path / "r", resume=True, seed=5)
    assert equal(weights(a), weights(b)) and b.steps == a.steps


# ------------------------------------------------------------------------------------------------ what is trained


def test_seeds_repeat_and_differ():
    a, b = fit(), fit()
    c = fit(cfg=dataclasses.replace(TRAIN, seed=1))
    assert equal(weights(a), weights(b)) and not equal(weights(a), weights(c))


def test_loss_falls():
    run = fit(phase(80, batch_size=8))
    losses = run.history["loss/MultiNeedle"]
    assert losses.iloc[-5:].mean() < losses.iloc[:5].mean() - 0.1


def test_logged_rate_is_the_optimizers_own():
    run = fit([phase(8), phase(6, name="second", lr=1e-4)], dataclasses.replace(TRAIN, log_every=1))
    rates = run.history["lr"].tolist()
    expected = [3e-3 * train.lr_factor(i, 8, TRAIN) for i in range(8)]
    expected += [1e-4 * train.lr_factor(i, 6, TRAIN) for i in range(6)]
    assert rates == pytest.approx(expected)
    assert rates[0] == pytest.approx(1e-3) and rates[2] == pytest.approx(3e-3)


def test_schedule_ends_where_it_says():
    cfg = config.TrainConfig(warmup_steps=10, min_lr_ratio=0.2)
    assert train.lr_factor(9, 100, cfg) == 1.0 and train.lr_factor(10, 100, cfg) == 1.0
    assert train.lr_factor(100, 100, cfg) == pytest.approx(0.2)
    assert train.lr_factor(99, 100, dataclasses.replace(cfg, schedule="constant")) == 1.0


def test_accumulation_equals_one_large_batch():
    big = fit(phase(1, batch_size=4), dataclasses.replace(TRAIN, grad_accum=2, grad_clip=0.0))
    net = model.build(CFG)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, betas=TRAIN.betas, weight_decay=TRAIN.weight_decay)
    rows = []
    for micro in range(2):
        seed = train.batch_seed(train.batch_seed(0, 0, 0, micro, 0), 0, 0)
        rows.append(train.Part(TASK, batch_size=4).sample(torch.Generator().manual_seed(seed)))
    net(torch.cat([b.tokens for b in rows]), torch.cat([b.targets for b in rows])).loss.backward()
    optimizer.step()
    for name, p in net.named_parameters():
        torch.testing.assert_close(weights(big)[name], p.detach(), rtol=1e-4, atol=2e-5)


def test_parts_are_weighted_and_logged_apart():
    other = data.Echo(vocab_size=64)
    parts = (train.Part(TASK, batch_size=4), train.Part(other, batch_size=4, weight=0.5))
    run = fit(train.Phase("joint", parts, 4), dataclasses.replace(TRAIN, log_every=1))
    assert {"loss/MultiNeedle", "loss/Echo"} <= set(run.history.columns)
    alone = fit(phase(4), dataclasses.replace(TRAIN, log_every=1))
    # The first loss of a part does not depend on the parts beside it.
    assert run.history["loss/MultiNeedle"][0] == alone.history["loss/MultiNeedle"][0]


def test_phase_is_left_at_its_accuracy_and_not_before():
    easy = train.Leave(TASK, accuracy=1e-9, every=3, trials=20)
    never = train.Leave(TASK, accuracy=1.0, every=3, trials=20)
    run = fit([phase(9, leave=never), phase(9, name="b", leave=easy)])
    assert [(p["steps"], p["left_by"]) for p in run.phases][0] == (9, "budget")
    # An accuracy above 1e-9 needs one right answer in 20; where there is none the phase runs on.
    rows = run.history[run.history["phase"] == "b"].dropna(subset="accuracy")
    first = rows[rows["accuracy"] >= 1e-9]
    expected = 9 if first.empty else int(first["step"].iloc[0]) - 9 + 1
    assert run.phases[1]["steps"] == expected


def test_phase_is_left_after_as_many_good_checks_in_a_row_as_asked(monkeypatch):
    """Planted accuracies: good, bad, good, good."""
    answers = iter([9, 2, 9, 9])
    monkeypatch.setattr(train.analysis, "accuracy", lambda *_, **__: train.analysis.Rate(next(answers), 10))
    leave = train.Leave(TASK, accuracy=0.9, every=2, trials=20, times=2)
    plan = phase(40, leave=leave)
    run = fit(plan)
    assert run.phases[0] == {
        "name": "retrieval",
        "steps": 8,
        "left_by": "accuracy",
        "rate": str(train.analysis.Rate(9, 10)),
    }


# ------------------------------------------------------------------------------------------------ run folders


def test_run_folder_holds_everything(tmp_path):
    run = fit(run_dir=tmp_path / "r", results=tmp_path / "runs.jsonl", name="test")
    names = {p.name for p in (tmp_path / "r").iterdir()}
    assert names == {"config.json", "metrics.jsonl", "weights.safetensors", "state.pt"}
    line = json.loads((tmp_path / "runs.jsonl").read_text())
    for key in ("config_hash", "code_hash", "torch", "device", "seconds", "parameters", "passed", "model", "last"):
        assert key in line
    assert line["model"]["d_model"] == 16 and line["parameters"] == run.model.count_params()
    net = train.load_weights(model.build(CFG, seed=9), tmp_path / "r")
    assert equal(net.state_dict(), weights(run))


@pytest.mark.parametrize(
    "spoil, error, word",
    [
        (lambda d: None, ValueError, "already holds a run"),
        (lambda d: (d / "state.pt").write_bytes(b"not a state"), ValueError, "cannot be read"),
        (lambda d: (d / "state.pt").write_bytes((d / "state.pt").read_bytes()[:500]), ValueError, "cannot be read"),
        (lambda d: (d / "config.json").write_text("{"), ValueError, "damaged"),
        (lambda d: (d / "config.json").write_text("{}"), ValueError, "another configuration"),
        (lambda d: (d / "config.json").unlink(), ValueError, "other files"),
    ],
    ids=["occupied", "garbage", "truncated", "config-cut", "config-foreign", "foreign-folder"],
)
def test_bad_run_folders_are_refused_and_kept(tmp_path, spoil, error, word):
    fit(run_dir=tmp_path / "r")
    spoil(tmp_path / "r")
    before = {p.name: p.read_bytes() for p in (tmp_path / "r").iterdir()}
    with pytest.raises(error, match=word):
        fit(run_dir=tmp_path / "r", resume=word != "already holds a run")
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "r").iterdir()}


def test_foreign_weights_are_refused_and_the_model_kept(tmp_path):
    fit(run_dir=tmp_path / "r")
    other = model.build(dataclasses.replace(CFG, d_model=32))
    before = {n: t.clone() for n, t in other.state_dict().items()}
    with pytest.raises(ValueError, match="another model"):
        train.load_weights(other, tmp_path / "r")
    assert equal(before, other.state_dict())
    (tmp_path / "bad.safetensors").write_bytes(b"\x08")
    with pytest.raises(ValueError, match="not a readable"):
        train.load_weights(other, tmp_path / "bad.safetensors")
    with pytest.raises(OSError, match="no weights"):
        train.load_weights(other, tmp_path / "nothing")


# ------------------------------------------------------------------------------------------------ guards


class Exploding(model.TransparentHybrid):
    """Returns a NaN loss at its fourth training call."""

    calls = 0

    def forward(self, tokens, targets=None, **options):
        out = super().forward(tokens, targets, **options)
        if self.training:
            self.calls += 1
        return out._replace(loss=out.loss * math.nan) if self.calls == 4 and out.loss is not None else out


def test_non_finite_loss_stops_and_keeps_the_last_good_state(tmp_path):
    good = fit(phase(6), dataclasses.replace(TRAIN, schedule="constant"), run_dir=tmp_path / "good")
    assert good.steps == 6
    net = Exploding(CFG, generator=torch.Generator().manual_seed(0))
    cfg = dataclasses.replace(TRAIN, schedule="constant")
    with pytest.raises(train.NonFinite, match=r"phase 'retrieval', step 3, batch seed \d+.*nan") as caught:
        train.fit(net, phase(6), cfg, run_dir=tmp_path / "bad", progress=False)
    assert str(train.batch_seed(0, 0, 3)) in str(caught.value)
    assert all(torch.isfinite(p).all() for p in net.parameters())
    state = torch.load(tmp_path / "bad" / "state.pt")
    assert state["step"] == 3 and equal(state["model"], net.state_dict())
    three = fit(phase(3), cfg)
    assert equal(state["model"], weights(three))


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda: train.Part(TASK), "batch_size"),
        (lambda: train.Part(TASK, batch_size=2, tokens=64), "batch_size"),
        (lambda: train.Part((), batch_size=2), "tasks"),
        (lambda: train.Part(TASK, batch_size=2, weight=0.0), "weight"),
        (lambda: phase(0), "steps"),
        (lambda: train.Phase("x", (train.Part(TASK, batch_size=1),) * 2, 5), "labels"),
        (lambda: train.Leave(TASK, accuracy=1.5), "accuracy"),
        (lambda: fit([]) if False else train.fit(model.build(CFG), [], TRAIN), "phases"),
    ],
)
def test_bad_curricula(make, word):
    with pytest.raises(ValueError, match=word):
        make()


# ------------------------------------------------------------------------------------------------ ensembles


def ensemble(seeds, **options):
    build = lambda seed: model.build(CFG, seed=seed)  # noqa: E731
    settings = {"steps": 8, "batch_size": 4, "progress": False, **options}
    return train.fit_ensemble(build, TASK, dataclasses.replace(TRAIN, log_every=1), seeds=seeds, **settings)


def test_member_equals_the_same_seed_alone():
    together, alone = ensemble([0, 1, 2]), ensemble([1])
    a, b = (e.history[e.history["seed"] == 1]["loss"].to_numpy() for e in (together, alone))
    assert a == pytest.approx(b, rel=1e-4)
    for x, y in zip(together.member(1).parameters(), alone.member(0).parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)


def test_ensemble_step_equals_adamw():
    """One member against torch.optim.AdamW with clipping, step by step."""
    run, cfg = ensemble([3], steps=5), TRAIN
    net = model.build(CFG, seed=3)
    optimizer = torch.optim.AdamW(net.parameters(), lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay)
    for step in range(5):
        batch = TASK.sample(4, torch.Generator().manual_seed(train.batch_seed(3, 0, step)))
        optimizer.zero_grad()
        net(batch.tokens, batch.targets).loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.grad_clip)
        optimizer.param_groups[0]["lr"] = cfg.lr * train.lr_factor(step, 5, cfg)
        optimizer.step()
    for a, b in zip(run.member(0).parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-3, atol=2e-5)


def test_rates_per_member_differ():
    run = ensemble([0, 0], lr=[1e-2, 1e-4])
    last = run.history[run.history["step"] == 7].set_index("lr")["loss"]
    assert last[1e-2] != last[1e-4]
    first = run.history[run.history["step"] == 0]["loss"]
    assert first.nunique() == 1


def test_diverged_member_is_frozen_and_the_others_go_on():
    run = ensemble([0, 1], lr=[1e20, 1e-3], steps=10)
    by = run.history.groupby("seed")["alive"].last()
    assert not by[0] and by[1]
    assert all(torch.isfinite(p).all() for p in run.member(1).parameters())
    assert math.isfinite(run.history[run.history["seed"] == 1]["loss"].iloc[-1])
    # Frozen as it was before the step that failed: still finite.
    assert all(torch.isfinite(p).all() for p in run.member(0).parameters())


def test_members_are_measured():
    rates = ensemble([0, 1]).accuracies(TASK, trials=50)
    assert len(rates) == 2 and all(r.total >= 50 for r in rates)


@pytest.mark.parametrize(
    "options, word",
    [
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "twice"),
        ({"seeds": [1], "lr": [1e-3, 1]}, "lr"),
        ({"seeds": [1], "steps": 0}, "steps"),
    ],
)
def test_bad_ensembles(options, word):
    with pytest.raises(ValueError, match=word):
        ensemble(**options)


def test_step_memory_needs_a_gpu():
    if torch.cuda.is_available():
        table = train.step_memory(lambda: model.build(CFG), [(32, 2), (64, 2)], vocab_size=64, steps=1)
        assert (table["activations"] > 0).all() and table["activations"].is_monotonic_increasing
    else:
        with pytest.raises(ValueError, match="CUDA"):
            train.step_memory(lambda: model.build(CFG), [(32, 2)], vocab_size=64)


def test_provenance_names_everything():
    text = train.provenance(seconds=3.0)
    for word in ("profile      smoke", "revision", "torch", "device", "seconds      3", "model.py", "config.py"):
        assert word in text
