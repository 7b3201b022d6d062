"""Training: resume to the bit after a kill, learning rates, phases, run folders, guards, ensembles."""

import dataclasses
import json
import math
import os
import signal
import socket
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


def watch(net, see):
    """Call `see(tokens)` at every forward that trains (gradients on)."""
    net.register_forward_pre_hook(lambda _, args: see(args[0]) if torch.is_grad_enabled() else None)
    return net


class Recording(torch.optim.AdamW):
    """Keeps the gradients of every step, as they were given to it."""

    made: list["Recording"]

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.steps = []
        self.made.append(self)

    def step(self, closure=None):
        self.steps.append({p: p.grad.clone() for group in self.param_groups for p in group["params"]})
        return super().step(closure)


@pytest.fixture
def recorded(monkeypatch):
    """The optimizers made during a test, oldest first."""
    monkeypatch.setattr(Recording, "made", [], raising=False)
    monkeypatch.setattr(torch.optim, "AdamW", Recording)
    return Recording.made


def drawn(part, *, number=0, step=0, micro=0, index=0):
    """The batch that part `index` of phase `number` sees at a micro-batch of a step."""
    seed = train.batch_seed(train.batch_seed(0, number, step, micro, 0), index, step)
    return part.sample(torch.Generator().manual_seed(seed))


def adamw(net, cfg, lr):
    """AdamW with weight decay on matrices only, none on norms and biases."""
    matrices = [p for p in net.parameters() if p.ndim >= 2]
    others = [p for p in net.parameters() if p.ndim < 2]
    assert matrices and others
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=cfg.betas)


# ------------------------------------------------------------------------------------------------ resuming

# Arguments: folder, file for the weights, seed of the model, and the logged row at which it kills itself (0: none).
SCRIPT = """
    import os, signal, sys
    sys.path[:0] = [{root!r}, {tests!r}]
    import torch
    torch.set_num_threads(1)
    import test_train as t
    path, out, seed, fatal = sys.argv[1:]
    phases = [t.phase(30, name="one"), t.phase(40, name="two", batch_size=3)]
    die = lambda rows: os.kill(os.getpid(), signal.SIGKILL) if len(rows) == int(fatal) else None
    cfg = t.dataclasses.replace(t.TRAIN, save_every=3)
    run = t.fit(phases, cfg, seed=int(seed), run_dir=path, resume=True, on_log=die)
    torch.save(run.model.state_dict(), out)
"""


def launch(path: Path, out: Path, *, seed=0, fatal=0):
    root = Path(__file__).resolve().parents[1]
    code = textwrap.dedent(SCRIPT.format(root=str(root), tests=str(root / "tests")))
    arguments = [sys.executable, "-c", code, str(path), str(out), str(seed), str(fatal)]
    return subprocess.Popen(arguments, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})


def test_killed_at_random_steps_and_resumed_gives_the_same_bits(tmp_path):
    path, metrics, kills = tmp_path / "run", tmp_path / "run" / "metrics.jsonl", 0
    whole = launch(tmp_path / "whole", tmp_path / "whole.pt")
    # At its first row the run has taken two steps and saved none of them; those after it start from other weights.
    assert launch(path, tmp_path / "resumed.pt", fatal=1).wait(120) == -signal.SIGKILL
    assert len(metrics.read_text().splitlines()) == 1
    assert whole.wait(120) == 0
    generator = torch.Generator().manual_seed(time.time_ns() % 2**31)
    for _ in range(2):
        process = launch(path, tmp_path / "resumed.pt", seed=5)
        rows = lambda: len(metrics.read_text().splitlines()) if metrics.exists() else 0  # noqa: E731
        target = rows() + int(torch.randint(3, 12, (), generator=generator))
        while process.poll() is None and rows() < target:
            time.sleep(0.001)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills == 2, "the runs ended before they could be killed"
    final = launch(path, tmp_path / "resumed.pt", seed=5)
    assert final.wait(120) == 0
    a, b = torch.load(tmp_path / "whole.pt"), torch.load(tmp_path / "resumed.pt")
    assert equal(a, b)
    assert logged(metrics) == logged(tmp_path / "whole" / "metrics.jsonl")
    assert [r["step"] for r in logged(metrics)] == list(range(1, 70, 2)), "metrics are written once per logged step"


def logged(metrics):
    """Rows without what depends on the clock."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s")} for row in rows]


class Gone(BaseException):
    """As good as a kill: nothing catches it."""


@pytest.mark.parametrize("where", ["first step", "forward", "check", "log"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, Gone])
def test_stopped_anywhere_and_resumed_gives_the_same_run(tmp_path, monkeypatch, where, kind):
    """Whatever a run was doing: same weights, same rows, same phases. An interrupt loses no step, a kill up to three."""
    leave = train.Leave(TASK, accuracy=1.0, every=4, trials=20)
    phases = [phase(9, leave=leave), phase(8, name="b", batch_size=3)]
    cfg = dataclasses.replace(TRAIN, log_every=5, save_every=3)
    whole = fit(phases, cfg, run_dir=tmp_path / "whole")

    def stop(*_, **__):
        raise kind

    net, calls, rows = model.build(CFG, seed=0), [], []
    at = {"first step": 1, "forward": 8}.get(where)
    watch(net, lambda tokens: calls.append(1) or (stop() if len(calls) == at else None))
    with monkeypatch.context() as patch, pytest.raises(kind):
        if where == "check":
            patch.setattr(train.analysis, "accuracy", stop)
        on_log = lambda all_rows: rows.append(1) or (stop() if where == "log" and len(rows) == 2 else None)  # noqa: E731
        train.fit(net, phases, cfg, run_dir=tmp_path / "r", progress=False, on_log=on_log)
    kept = torch.load(tmp_path / "r" / "state.pt")["step"]
    taken = {"first step": 0, "forward": 7, "check": 4, "log": 5}[where]
    assert kept == (taken if kind is KeyboardInterrupt else taken // 3 * 3)
    again = fit(phases, cfg, run_dir=tmp_path / "r", resume=True, seed=5)
    assert equal(weights(whole), weights(again)) and again.phases == whole.phases
    assert logged(tmp_path / "r" / "metrics.jsonl") == logged(tmp_path / "whole" / "metrics.jsonl")


def test_finished_run_is_not_trained_again(tmp_path):
    options = {"run_dir": tmp_path / "r", "results": tmp_path / "runs.jsonl"}
    a = fit(**options)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "r").iterdir()}
    b = fit(resume=True, seed=5, **options)
    assert equal(weights(a), weights(b)) and b.steps == a.steps
    assert before == {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "r").iterdir()}
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 1


def test_run_killed_before_its_weights_were_written_gets_them(tmp_path):
    a = fit(run_dir=tmp_path / "r")
    (tmp_path / "r" / "weights.safetensors").unlink()
    fit(run_dir=tmp_path / "r", resume=True, seed=5, results=tmp_path / "runs.jsonl")
    assert equal(train.load_weights(model.build(CFG, seed=9), tmp_path / "r").state_dict(), weights(a))
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 1


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


def test_gradient_is_that_of_the_weighted_sum_over_micro_batches(recorded):
    """What reaches the optimizer, not what Adam makes of it, whose first step ignores every factor."""
    parts = (train.Part(TASK, batch_size=3), train.Part(data.Echo(vocab_size=64), batch_size=2, weight=0.25))
    fit(train.Phase("joint", parts, 1), dataclasses.replace(TRAIN, grad_accum=2, grad_clip=0.0))
    net = model.build(CFG)
    for micro in range(2):
        for i, part in enumerate(parts):
            batch = drawn(part, micro=micro, index=i)
            (net(batch.tokens, batch.targets).loss * part.weight / 2).backward()
    given = [g for group in recorded[0].param_groups for g in (recorded[0].steps[0][p] for p in group["params"])]
    wanted = [p.grad for wide in (True, False) for p in net.parameters() if (p.ndim >= 2) == wide]
    assert len(given) == len(wanted)
    for a, b in zip(given, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("largest", [0.0, 0.05, 1e6])
def test_gradients_are_clipped_and_the_norm_before_is_logged(recorded, largest):
    run = fit(phase(2), dataclasses.replace(TRAIN, grad_clip=largest, log_every=1))
    norms = [torch.stack([g.norm() for g in step.values()]).norm().item() for step in recorded[0].steps]
    before = run.history["grad_norm"].tolist()
    assert min(before) > 0.1
    assert norms == pytest.approx([0.05] * 2 if largest == 0.05 else before, rel=1e-3)


def test_steps_are_adamws_with_decay_on_matrices_only():
    cfg = dataclasses.replace(TRAIN, weight_decay=0.5, betas=(0.5, 0.7), grad_clip=0.0, lr=1e-2, schedule="constant")
    run, net = fit(phase(3), dataclasses.replace(cfg, warmup_steps=0)), model.build(CFG)
    optimizer = adamw(net, cfg, cfg.lr)
    for step in range(3):
        batch = drawn(phase().streams[0], step=step)
        optimizer.zero_grad()
        net(batch.tokens, batch.targets).loss.backward()
        optimizer.step()
    for name, p in net.named_parameters():
        torch.testing.assert_close(weights(run)[name], p.detach(), rtol=1e-4, atol=2e-5)


def test_every_phase_step_and_micro_batch_draws_its_own_batch():
    seen = []
    net = watch(model.build(CFG), lambda tokens: seen.append(tokens.clone()))
    cfg = dataclasses.replace(TRAIN, grad_accum=2)
    train.fit(net, [phase(2, name="a"), phase(2, name="b")], cfg, progress=False)
    wanted = [(n, step, micro) for n in range(2) for step in range(2) for micro in range(2)]
    part = phase().streams[0]
    assert len(seen) == len(wanted)
    for tokens, (n, step, micro) in zip(seen, wanted, strict=True):
        assert torch.equal(tokens, drawn(part, number=n, step=step, micro=micro).tokens)
    assert len({tuple(t.flatten().tolist()) for t in seen}) == len(seen)


def test_part_draws_from_all_its_tasks_at_so_many_tokens():
    part = train.Part((TASK, dataclasses.replace(TASK, seq_len=48)), tokens=101)
    shapes = {tuple(part.sample(torch.Generator().manual_seed(i)).tokens.shape) for i in range(30)}
    assert shapes == {(3, 32), (2, 48)}


def test_on_log_is_given_every_row_so_far():
    seen = []
    run = fit(phase(6), on_log=lambda rows: seen.append([row["step"] for row in rows]))
    assert seen == [[1], [1, 3], [1, 3, 5]] and run.history["step"].tolist() == [1, 3, 5]


def test_model_trains_in_training_mode_before_and_after_a_check_and_ends_in_evaluation_mode():
    modes, net = [], model.build(CFG).eval()
    watch(net, lambda _: modes.append(net.training))
    train.fit(net, phase(6, leave=train.Leave(TASK, accuracy=1.0, every=2, trials=20)), TRAIN, progress=False)
    assert modes == [True] * 6 and not net.training


def test_gradients_from_before_do_not_leak_into_the_first_step():
    net = model.build(CFG)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    assert equal(weights(train.fit(net, phase(2), TRAIN, progress=False)), weights(fit(phase(2))))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "auto"])
def test_precision_is_that_of_the_forward_and_leaves_no_trace(precision):
    """Twice the same model: what Accelerate hangs on it must neither stay nor keep the second fit from its autocast."""
    inside, backward, net = [], [], model.build(CFG)
    net.norm.register_forward_hook(lambda *_: inside.append(torch.is_autocast_enabled("cpu")))
    next(net.parameters()).register_hook(lambda _: backward.append(torch.is_autocast_enabled("cpu")))
    before = set(vars(net))
    for _ in range(2):
        run = train.fit(net, phase(2), dataclasses.replace(TRAIN, precision=precision), progress=False)
        assert set(vars(net)) == before
    assert backward == [False] * 4
    assert inside == [precision == "bf16"] * 4
    assert all(p.dtype == torch.float32 for p in net.parameters())
    if precision == "bf16":
        assert not equal(weights(fit(phase(2))), weights(fit(phase(2), dataclasses.replace(TRAIN, precision="bf16"))))
    assert run.steps == 2


def test_parts_are_weighted_and_logged_apart():
    other = data.Echo(vocab_size=64)
    parts = (train.Part(TASK, batch_size=4), train.Part(other, batch_size=4, weight=0.5))
    run = fit(train.Phase("joint", parts, 4), dataclasses.replace(TRAIN, log_every=1))
    assert {"loss/MultiNeedle", "loss/Echo"} <= set(run.history.columns)
    alone = fit(phase(4), dataclasses.replace(TRAIN, log_every=1))
    # The first loss of a part does not depend on the parts beside it.
    assert run.history["loss/MultiNeedle"][0] == alone.history["loss/MultiNeedle"][0]


def test_phase_is_left_at_the_first_answer_that_suffices():
    """Any right answer suffices in one phase, none in the other; 300 guesses among 60 ids find one soon."""
    easy = train.Leave(TASK, accuracy=1e-9, every=2, trials=300)
    never = train.Leave(TASK, accuracy=1.0, every=3, trials=20)
    run = fit([phase(9, leave=never), phase(20, name="b", leave=easy)])
    assert (run.phases[0]["steps"], run.phases[0]["left_by"]) == (9, "budget")
    rows = run.history[run.history["phase"] == "b"].dropna(subset="accuracy")
    assert run.phases[1]["left_by"] == "accuracy" and run.phases[1]["steps"] < 20
    assert (rows["accuracy"].iloc[:-1] == 0).all() and rows["accuracy"].iloc[-1] > 0


@pytest.mark.parametrize("right, steps", [(8, 6), (9, 3)])
def test_phase_is_left_from_its_accuracy_on(monkeypatch, right, steps):
    monkeypatch.setattr(train.analysis, "accuracy", lambda *_, **__: train.analysis.Rate(right, 10))
    run = fit(phase(6, leave=train.Leave(TASK, accuracy=0.9, every=3, trials=20)))
    assert run.steps == steps


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
        (lambda: train.Part(TASK, batch_size=-3, tokens=64), "batch_size"),
        (lambda: train.Part(TASK, batch_size=2.5), "batch_size"),
        (lambda: train.Part(TASK, batch_size=True), "batch_size"),
        (lambda: train.Part(TASK, tokens=64.0), "tokens"),
        (lambda: train.Part((TASK, dataclasses.replace(TASK, seq_len=48)), tokens=47), "tokens.*48"),
        (lambda: train.Part((), batch_size=2), "tasks"),
        (lambda: train.Part([TASK], batch_size=2), "tasks"),
        (lambda: train.Part((TASK, None), batch_size=2), "tasks"),
        (lambda: train.Part(TASK, batch_size=2, weight=0.0), "weight"),
        (lambda: train.Part(TASK, batch_size=2, weight=math.inf), "weight"),
        (lambda: train.Part(TASK, batch_size=2, weight="1"), "weight"),
        (lambda: train.Part(TASK, batch_size=2, name=3), "name"),
        (lambda: phase(0), "steps"),
        (lambda: phase(name=None), "name"),
        (lambda: phase(lr=math.inf), "lr"),
        (lambda: phase(lr="1e-3"), "lr"),
        (lambda: phase(leave=0.9), "leave"),
        (lambda: train.Phase("x", (train.Part(TASK, batch_size=1),) * 2, 5), "labels"),
        (lambda: train.Phase("x", [train.Part(TASK, batch_size=1)], 5), "parts"),
        (lambda: train.Phase("x", (), 5), "parts"),
        (lambda: train.Phase("x", TASK, 5), "parts"),
        (lambda: train.Leave(TASK, accuracy=1.5), "accuracy"),
        (lambda: train.Leave(TASK, accuracy="1"), "accuracy"),
        (lambda: train.Leave(None, accuracy=0.5), "task"),
        (lambda: train.fit(model.build(CFG), [], TRAIN), "phases"),
        (lambda: train.fit(model.build(CFG), [1], TRAIN), "phases.*int"),
    ],
)
def test_bad_curricula(make, word):
    with pytest.raises(ValueError, match=word):
        make()


WIDE = dataclasses.replace(TASK, vocab_size=65)


@pytest.mark.parametrize(
    "bad", [phase(leave=train.Leave(WIDE, 0.5)), train.Phase("w", train.Part((TASK, WIDE), batch_size=2), 3)]
)
def test_vocabulary_that_the_model_lacks_is_refused_before_anything_is_written(tmp_path, bad):
    with pytest.raises(ValueError, match=r"65 but the model's is 64; build the model with vocab_size >= 65"):
        fit([phase(), bad], run_dir=tmp_path / "r")
    assert not (tmp_path / "r").exists()


# ------------------------------------------------------------------------------------------------ processes

# Two processes on one machine, one after the other: what must go well, then what must stop both.
PROCESSES = """
    import json, os, sys, time
    sys.path[:0] = [{root!r}, {tests!r}]
    import torch
    torch.set_num_threads(1)
    import test_train as t
    import train
    from pathlib import Path
    rank, path = int(os.environ["RANK"]), Path(sys.argv[1])
    out = {{}}

    def attempt(name, **options):
        net = options.pop("net", None) or t.model.build(t.CFG, seed=rank)
        try:
            run = train.fit(net, options.pop("phases"), cfg, progress=False, **options)
            rows = run.history["loss/MultiNeedle"].tolist()
            out[name] = {{"steps": run.steps, "loss": rows, "weights": [p.sum().item() for p in net.parameters()]}}
        except Exception as error:
            out[name] = f"{{type(error).__name__}}: {{error}}"

    cfg = t.dataclasses.replace(t.TRAIN, log_every=1)
    opened = train.runs.Folder.read

    def late(self):
        time.sleep(rank)  # the first process has created the folder by the time the second looks
        return opened(self)

    train.runs.Folder.read = late
    attempt("fresh", phases=t.phase(4), run_dir=path / "r")
    train.runs.Folder.read = opened
    attempt("again", phases=t.phase(4), run_dir=path / "r", resume=True)
    attempt("occupied", phases=t.phase(4), run_dir=path / "r")
    # Their measurements differ: the first one's counts.
    accuracy = train.analysis.accuracy
    train.analysis.accuracy = lambda *_, **__: train.analysis.Rate(10 - 5 * rank, 10)
    attempt("leave", phases=t.phase(6, leave=train.Leave(t.TASK, 0.9, every=2, trials=10)))
    if rank == 0:
        train.analysis.accuracy = lambda *_, **__: 1 / 0
    attempt("check", phases=t.phase(6, leave=train.Leave(t.TASK, 0.9, every=2, trials=10)))
    exploding = t.Exploding(t.CFG, generator=torch.Generator().manual_seed(0))
    exploding.calls = 0 if rank else -99
    attempt("nan", phases=t.phase(6), net=exploding)
    (path / f"{{rank}}.part").write_text(json.dumps(out))
    (path / f"{{rank}}.part").rename(path / f"{{rank}}.json")
    while not (path / f"{{1 - rank}}.json").exists():
        time.sleep(0.01)  # who leaves while the other is still in the last exchange breaks it
    os._exit(0)
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes found, by name of the attempt, and their folder."""
    path, root = tmp_path_factory.mktemp("two"), Path(__file__).resolve().parents[1]
    code = textwrap.dedent(PROCESSES.format(root=str(root), tests=str(root / "tests")))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    start = lambda rank: subprocess.Popen(  # noqa: E731
        [sys.executable, "-c", code, str(path)], env={**common, "RANK": rank, "LOCAL_RANK": rank}
    )
    processes = [start("0"), start("1")]
    try:
        codes = [process.wait(90) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0]
    return [json.loads((path / f"{rank}.json").read_text()) for rank in range(2)], path


def test_two_processes_train_one_model_on_batches_of_their_own(two):
    (a, b), path = two
    assert a["fresh"]["weights"] == b["fresh"]["weights"] and a["fresh"]["steps"] == 4
    rows = [row["loss/MultiNeedle"] for row in logged(path / "r" / "metrics.jsonl")]
    assert a["fresh"]["loss"] == b["fresh"]["loss"] == rows
    # The first loss is the mean over both batches, under the weights of the first process.
    net, part, losses = model.build(CFG, seed=0), phase().streams[0], []
    for process in range(2):
        seed = train.batch_seed(train.batch_seed(0, 0, 0, 0, process), 0, 0)
        batch = part.sample(torch.Generator().manual_seed(seed))
        losses.append(net(batch.tokens, batch.targets).loss.item())
    assert losses[0] != losses[1] and rows[0] == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_two_processes_resume_and_refuse_together(two):
    (a, b), _ = two
    assert a["again"]["weights"] == b["again"]["weights"] == a["fresh"]["weights"]
    assert a["occupied"].startswith("ValueError: run_dir") and "already holds a run" in a["occupied"]
    assert b["occupied"].startswith("ValueError: another process stopped: ValueError: run_dir")


def test_two_processes_leave_a_phase_and_stop_together(two):
    (a, b), _ = two
    assert a["leave"]["steps"] == b["leave"]["steps"] == 2
    assert a["check"].startswith("ZeroDivisionError") and "another process stopped: ZeroDivision" in b["check"]
    seed = train.batch_seed(0, 0, 3, 0, 1)
    for found in (a["nan"], b["nan"]):
        assert found.startswith(f"NonFinite: phase 'retrieval', step 3, batch seed {seed}: ")


# ------------------------------------------------------------------------------------------------ ensembles


def ensemble(seeds, *, build=lambda seed: model.build(CFG, seed=seed), task=TASK, cfg=None, **options):
    settings = {"steps": 8, "batch_size": 4, "progress": False, **options}
    cfg = dataclasses.replace(TRAIN, log_every=1, **(cfg or {}))
    return train.fit_ensemble(build, task, cfg, seeds=seeds, **settings)


def test_member_equals_the_same_seed_alone():
    together, alone = ensemble([0, 1, 2]), ensemble([1])
    a, b = (e.history[e.history["seed"] == 1]["loss"].to_numpy() for e in (together, alone))
    assert a == pytest.approx(b, rel=1e-4)
    for x, y in zip(together.member(1).parameters(), alone.member(0).parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("accum", [1, 2])
def test_ensemble_step_equals_adamw(accum):
    """One member against torch.optim.AdamW with clipping, step by step."""
    cfg = dataclasses.replace(TRAIN, weight_decay=0.5, betas=(0.8, 0.9), grad_accum=accum, grad_clip=0.3)
    run = ensemble([3], steps=5, cfg={k: getattr(cfg, k) for k in ("weight_decay", "betas", "grad_accum", "grad_clip")})
    net = model.build(CFG, seed=3)
    optimizer = adamw(net, cfg, cfg.lr)
    for step in range(5):
        optimizer.zero_grad()
        for micro in range(accum):
            batch = TASK.sample(4, torch.Generator().manual_seed(train.batch_seed(3, 0, step, micro)))
            (net(batch.tokens, batch.targets).loss / accum).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * train.lr_factor(step, 5, cfg)
        optimizer.step()
    for a, b in zip(run.member(0).parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-3, atol=2e-5)


def test_ensemble_gradient_is_the_mean_over_micro_batches(recorded):
    ensemble([3], steps=1, cfg={"grad_accum": 2, "grad_clip": 0.0})
    net = model.build(CFG, seed=3)
    for micro in range(2):
        batch = TASK.sample(4, torch.Generator().manual_seed(train.batch_seed(3, 0, 0, micro)))
        (net(batch.tokens, batch.targets).loss / 2).backward()
    norm = lambda grads: torch.stack([g.norm() for g in grads]).norm().item()  # noqa: E731
    given = norm(recorded[0].steps[0].values())
    assert given == pytest.approx(norm([p.grad for p in net.parameters()]), rel=1e-4)


def test_ensemble_precision_is_that_of_the_forward():
    """bf16 changes the loss by about its rounding; auto is fp32, on a GPU too."""
    loss = {p: ensemble([0], steps=1, cfg={"precision": p}).history["loss"][0] for p in ("fp32", "auto", "bf16")}
    assert loss["auto"] == loss["fp32"] != loss["bf16"]
    assert loss["bf16"] == pytest.approx(loss["fp32"], rel=1e-2)
    batch = TASK.sample(4, torch.Generator().manual_seed(train.batch_seed(0, 0, 0)))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        alone = model.build(CFG, seed=0)(batch.tokens, batch.targets).loss.item()
    assert loss["bf16"] == pytest.approx(alone, rel=2e-3)


def test_rates_per_member_differ():
    run = ensemble([0, 0], lr=[1e-2, 1e-4])
    last = run.history[run.history["step"] == 7].set_index("peak_lr")["loss"]
    assert last[1e-2] != last[1e-4]
    first = run.history[run.history["step"] == 0]["loss"]
    assert first.nunique() == 1
    for row in run.history.itertuples():  # what the update took, warm-up and all
        assert row.lr == pytest.approx(row.peak_lr * train.lr_factor(row.step, 8, TRAIN))


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


class Bare(torch.nn.Linear):
    """A model without a configuration."""

    def __init__(self, width):
        super().__init__(width, width)


@pytest.mark.parametrize(
    "options, word",
    [
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "twice"),
        ({"seeds": [1], "lr": [1e-3, 1]}, "lr"),
        ({"seeds": [1], "steps": 0}, "steps"),
        ({"seeds": [1], "batch_size": 2.5}, "batch_size"),
        ({"seeds": [1, 2], "lr": [1e-3, -1.0]}, "lr"),
        ({"seeds": [1, 2], "lr": [1e-3, math.nan]}, "lr"),
        ({"seeds": [1], "task": [TASK]}, "task"),
        ({"seeds": [1], "task": WIDE}, "65 but the model's is 64"),
        ({"seeds": [1], "cfg": {"save_every": 5}}, "save_every"),
        ({"seeds": [1], "device": "cuda"}, "device"),
        ({"seeds": [0, 1], "build": lambda s: model.build(dataclasses.replace(CFG, window_size=4 + s))}, "window_size"),
        ({"seeds": [0, 1], "build": lambda s: Bare(3 + s)}, "shapes of .*weight"),
        ({"seeds": [0, 1], "build": lambda s: (Bare(3), model.build(CFG))[s]}, "differ"),
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
