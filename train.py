"""Fit one model through a curriculum of phases, or an ensemble of seeds at once; keep every run on disk.

    run = train.fit(net, [train.Phase("retrieval", train.Part(task, batch_size=32), steps=500)], config.TrainConfig())
    run.history      # pandas: one row per logged step

A run folder holds config.json, metrics.jsonl, weights.safetensors and state.pt. Every batch is drawn from a generator
seeded by (seed, phase, step), so a run killed at any moment and resumed ends with the same weights as one left alone.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from tqdm.auto import tqdm

import analysis
import config
import data
import model as models
import runs

# Runs on disk and where numbers come from, under the names that notebooks use.
provenance = runs.provenance
device_name = runs.device_name
load_weights = runs.load_weights
record = runs.record


class NonFinite(RuntimeError):
    """The loss or a gradient stopped being a finite number. Says which phase, step and batch seed; the last good state
    is in the run folder."""


# ------------------------------------------------------------------------------------------------ curricula


def _is_task(value) -> bool:
    # By what it offers: after an edit of tasks.py in a running notebook, older tasks are of a class of the past.
    return callable(getattr(value, "sample", None)) and hasattr(value, "seq_len") and hasattr(value, "vocab_size")


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Part(config.Settings):
    """One stream of batches of a phase. Given several tasks (lengths, numbers of needles), each step draws one of them.

    weight: factor on this part's mean loss in the sum that is minimised.
    batch_size: sequences per micro-batch; `tokens` instead keeps batch_size * seq_len at most at so many tokens.
    """

    tasks: data.Task | tuple[data.Task, ...]
    batch_size: int = 0
    tokens: int = 0
    weight: float = 1.0
    name: str = ""

    def validate(self):
        self.require_whole("batch_size", "tokens", least=0)
        self.require((self.batch_size > 0) != (self.tokens > 0), "batch_size", "give either batch_size or tokens")
        self.require(_is_number(self.weight) and self.weight > 0, "weight", "needs a finite factor above 0")
        self.require(isinstance(self.name, str), "name", "needs a string")
        ok = len(self.options) > 0 and all(map(_is_task, self.options))
        self.require(ok, "tasks", "needs a task, or a tuple of at least one task")
        if self.tokens:
            longest = max(task.seq_len for task in self.options)
            self.require(self.tokens >= longest, "tokens", f"needs at least one row of the longest task, {longest}")

    @property
    def options(self) -> tuple[data.Task, ...]:
        return self.tasks if isinstance(self.tasks, tuple) else (self.tasks,)

    @property
    def label(self) -> str:
        return self.name or type(self.options[0]).__name__

    def sample(self, generator: torch.Generator) -> data.Batch:
        i = int(torch.randint(len(self.options), (), generator=generator))
        task = self.options[i]
        return task.sample(self.batch_size or self.tokens // task.seq_len, generator)


@dataclass(frozen=True)
class Leave(config.Settings):
    """Leave a phase once the accuracy on `task` has reached `accuracy` at `times` checks in a row.

    A check comes every `every` steps, on `trials` fresh answers.
    """

    task: data.Task
    accuracy: float
    every: int = 50
    trials: int = 500
    times: int = 1

    def validate(self):
        self.require(_is_task(self.task), "task", "needs a task")
        ok = _is_number(self.accuracy) and 0 < self.accuracy <= 1
        self.require(ok, "accuracy", "needs a share above 0 and at most 1")
        self.require_positive("every", "trials", "times")


@dataclass(frozen=True)
class Phase(config.Settings):
    """Train on `parts` for at most `steps` steps, or until `leave` says so.

    lr, write_penalty and key_penalty override the configuration's.
    """

    name: str
    parts: Part | tuple[Part, ...]
    steps: int
    leave: Leave | None = None
    lr: float | None = None
    write_penalty: float | None = None
    key_penalty: float | None = None

    def validate(self):
        self.require(isinstance(self.name, str), "name", "needs a string")
        self.require_positive("steps")
        ok = len(self.streams) > 0 and all(isinstance(p, Part) for p in self.streams)
        self.require(ok, "parts", "needs a Part, or a tuple of at least one Part")
        labels = [p.label for p in self.streams]
        self.require(len(set(labels)) == len(labels), "parts", f"labels must differ, are {labels}; set Part.name")
        ok = self.leave is None or isinstance(self.leave, Leave)
        self.require(ok, "leave", "needs a Leave, or None to use up all steps")
        ok = self.lr is None or (_is_number(self.lr) and self.lr > 0)
        self.require(ok, "lr", "needs a finite learning rate above 0, or None")
        for name in ("write_penalty", "key_penalty"):
            value = getattr(self, name)
            self.require(value is None or value >= 0, name, "needs a weight of at least 0, or None")

    @property
    def streams(self) -> tuple[Part, ...]:
        return self.parts if isinstance(self.parts, tuple) else (self.parts,)


def batch_seed(seed: int, phase: int, step: int, micro: int = 0, process: int = 0) -> int:
    """The generator seed of one batch, a hash: neighbouring steps and seeds share nothing.

    32 bits, because torch's CPU generator keeps no more of a seed.
    """
    key = f"{seed}/{phase}/{step}/{micro}/{process}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big")


def lr_factor(step: int, steps: int, cfg: config.TrainConfig) -> float:
    """Share of the learning rate at `step` of a phase of `steps`: linear warm-up, then cosine to min_lr_ratio."""
    if step < cfg.warmup_steps:
        return (step + 1) / cfg.warmup_steps
    if cfg.schedule == "constant":
        return 1.0
    done = (step - cfg.warmup_steps) / max(1, steps - cfg.warmup_steps)
    return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


# ------------------------------------------------------------------------------------------------ fit


@dataclass
class Run:
    """What a fit leaves behind. `history` has one row per logged step; `phases` one entry per phase passed."""

    model: nn.Module
    history: pd.DataFrame
    phases: list[dict]
    seconds: float
    steps: int
    path: Path | None = None
    summary: dict = field(default_factory=dict)


def _accelerator(cfg: config.TrainConfig) -> Accelerator:
    """CUDA or the CPU; left to itself Accelerate would also take MPS, which the evaluation does not use."""
    on_gpu = torch.cuda.is_available() and cfg.device != "cpu"
    bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and on_gpu and torch.cuda.is_bf16_supported())
    # Accelerate keeps one precision per process; a notebook that trains twice may need two.
    AcceleratorState._reset_state()
    if PartialState._shared_state and (PartialState().device.type == "cpu") == on_gpu:
        PartialState._reset_state()
    return Accelerator(mixed_precision="bf16" if bf16 else "no", cpu=not on_gpu)


def _together(action: Callable):
    """`action()` in every process; where it fails in one it fails in all, so that none waits for the others for ever."""
    result, problem = None, None
    try:
        result = action()
    except Exception as error:
        problem = error
    told = gather_object([None if problem is None else f"{type(problem).__name__}: {problem}"])
    if problem is not None:
        raise problem
    if any(told):
        raise ValueError(f"another process stopped: {next(filter(None, told))}")
    return result


def _decay_groups(parameters: Iterable[torch.Tensor], weight_decay: float, *, stacked: int = 0) -> list[dict]:
    """Parameter groups of an optimizer: weight decay for matrices only.

    Norms, biases and the decay bias of a memory, which is a half-life, have no reason to be near zero. stacked: leading
    axes that number members of an ensemble.
    """
    parameters = list(parameters)
    matrices = [p for p in parameters if p.ndim - stacked >= 2]
    others = [p for p in parameters if p.ndim - stacked < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _check_vocabulary(model: nn.Module, tasks: Iterable[data.Task]) -> None:
    """ValueError where a task has ids that `model.cfg` has no embedding for."""
    own = getattr(getattr(model, "cfg", None), "vocab_size", None)
    for task in tasks:
        if own is not None and task.vocab_size > own:
            what = f"{type(task).__name__}.vocab_size = {task.vocab_size} but the model's is {own}"
            raise ValueError(f"phases: {what}; build the model with vocab_size >= {task.vocab_size}")


def fit(
    model: nn.Module,
    phases: Phase | Iterable[Phase],
    cfg: config.TrainConfig,
    *,
    run_dir: str | Path | None = None,
    resume: bool = False,
    name: str = "",
    progress: bool = True,
    on_log: Callable[[list[dict]], None] | None = None,
    results: str | Path | None = None,
) -> Run:
    """Train `model` through `phases` with AdamW and return the `Run`; the model ends in evaluation mode.

    Weights stay fp32; on a GPU the forward pass runs under bf16 autocast (`cfg.precision`). device="auto" is CUDA where
    there is one, else the CPU. Weight decay acts on parameters of two or more axes. Warm-up and cosine restart with each
    phase; the learning rate logged is the optimizer's own, the losses logged are without the penalties of `cfg`. Processes
    are Accelerate's, so `accelerate launch` spreads the same call over several GPUs or hosts (which share run_dir); each
    process draws its own batches, the first one measures and writes, and losses logged are means over all.

    run_dir: folder to keep the run in, saved before the first step, every `cfg.save_every` steps, after each phase and
    when interrupted; resume: go on from what is there. on_log: called with all rows so far after each logged step
    (`plots.LiveCurve`). results: a runs.jsonl to append a line to when the run ends.
    Raises ValueError for phases that do not fit the model and for a run folder that is damaged or of another run, which
    is left as it was; `NonFinite` when loss or gradients stop being finite.
    """
    phases = (phases,) if isinstance(phases, Phase) else tuple(phases)
    if not phases or not all(isinstance(p, Phase) for p in phases):
        raise ValueError(f"phases: needs at least one Phase, and only those; got {[type(p).__name__ for p in phases]}")
    if resume and run_dir is None:
        raise ValueError("resume = True: needs the run_dir of the run to go on with")
    for phase in phases:
        asked = () if phase.leave is None else (phase.leave.task,)
        _check_vocabulary(model, [*(task for part in phase.streams for task in part.options), *asked])
    accelerator = _accelerator(cfg)
    description = {
        "name": name,
        "model": runs.describe(getattr(model, "cfg", None)),
        "train": runs.describe(cfg),
        "phases": runs.describe(phases),
    }
    groups = _decay_groups(model.parameters(), cfg.weight_decay)
    # One kernel over all parameters on a GPU: the update takes 28 bytes each, and torch's own choice moves several times that.
    fused = True if accelerator.device.type == "cuda" else None
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, fused=fused)
    folder, main = runs.Folder(run_dir), accelerator.is_main_process
    _together(lambda: folder.open(description, _beginning(), model, optimizer, resume=resume) if main else None)
    state, rows = _together(folder.read)
    hooks = ("forward", "_original_forward", "_is_accelerate_prepared")
    own = {hook: vars(model)[hook] for hook in hooks if hook in vars(model)}
    model.train()
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    try:
        job = (accelerator, wrapped, model, optimizer, phases, cfg)
        return _fit(*job, folder, state, rows, description, progress, on_log, results)
    finally:
        # What Accelerate hung on the model would pin today's forward, and make the next fit skip its autocast.
        for hook in hooks:
            vars(model).pop(hook, None)
        vars(model).update(own)
        model.eval()


def _window(seconds: float) -> dict:
    """What is gathered between two logged rows, beginning at `seconds` of the run."""
    return {"since": seconds, "tokens": 0, "losses": {}, "lr": 0.0, "grad_norm": 0.0}


def _beginning() -> dict:
    """Progress of a run that begins. All of it is saved beside the weights.

    step counts all steps, phase_step those of this phase; passes: good checks in a row; left: why the phase is over, as
    soon as it is; rate: the last check. pending: the last step has moved the weights, but is not yet checked and logged.
    """
    at = {"phase": 0, "phase_step": 0, "step": 0, "pending": False, "passes": 0, "left": "", "rate": None}
    return at | {"phases": [], "seconds": 0.0, "window": _window(0.0)}


def _fit(
    accelerator, wrapped, model, optimizer, phases, cfg, folder, state, rows, description, progress, on_log, results
) -> Run:
    main, start = accelerator.is_main_process, time.perf_counter()
    written = folder if main else runs.Folder(None)
    at = _beginning()
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        at = {k: state[k] for k in at}
    before = at["seconds"]
    finished = at["phase"] == len(phases) and folder.finished
    seconds = lambda: before + time.perf_counter() - start  # noqa: E731

    def save():
        saved = {**at, "seconds": seconds(), "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        written.save(saved)

    if state is None:
        save()
    optimizer.zero_grad()
    total = sum(p.steps for p in phases)
    bar = tqdm(total=total, initial=at["step"], disable=not (progress and main), mininterval=0.5)
    moving = False  # whether the weights are between two steps, where no state could be saved

    try:
        for number in range(at["phase"], len(phases)):
            phase = phases[number]
            bar.set_description(phase.name)
            while at["pending"] or (at["phase_step"] < phase.steps and not at["left"]):
                if not at["pending"]:
                    rate = (phase.lr or cfg.lr) * lr_factor(at["phase_step"], phase.steps, cfg)
                    for group in optimizer.param_groups:
                        group["lr"] = rate
                    losses, tokens = _gradients(accelerator, wrapped, phase, number, at["phase_step"], cfg)
                    norm = _clip(accelerator, model, cfg.grad_clip)
                    # One wait for the device a step: it guards the update, so that a bad one never reaches the weights.
                    # A mean over processes is finite only where all of them are, so that they stop together.
                    own = torch.stack([*losses.values(), norm])
                    means = accelerator.reduce(own, "mean").tolist()
                    values = dict(zip([*losses, "gradient norm"], means, strict=True))
                    if not all(map(math.isfinite, values.values())):
                        optimizer.zero_grad()
                        save()
                        _stop(accelerator, own[:-1], values, phase, number, at["phase_step"], cfg, folder)
                    window = copy.deepcopy(at["window"])
                    window |= {"lr": optimizer.param_groups[0]["lr"], "grad_norm": values["gradient norm"]}
                    window["tokens"] += tokens * accelerator.num_processes
                    for label in losses:
                        window["losses"].setdefault(label, []).append(values[label])
                    moving = True
                    optimizer.step()
                    counted = {key: at[key] + 1 for key in ("step", "phase_step")}
                    at |= {**counted, "pending": True, "window": window}
                    moving = False
                    optimizer.zero_grad()
                    bar.update()

                measured, after = None, {"pending": False}
                if phase.leave is not None and at["phase_step"] % phase.leave.every == 0:
                    measured = _measure(accelerator, model, phase.leave, at["step"], cfg)
                    passes = at["passes"] + 1 if measured.value >= phase.leave.accuracy else 0
                    left = "accuracy" if passes == phase.leave.times else ""
                    after |= {"rate": str(measured), "passes": passes, "left": left}
                if at["step"] % cfg.log_every == 0 or measured is not None:
                    row = _row(at, phase.name, seconds(), measured)
                    rows.append(row)
                    written.log(row)
                    shown = {k.removeprefix("loss/"): f"{v:.3f}" for k, v in row.items() if k.startswith("loss/")}
                    bar.set_postfix(shown)
                    if on_log is not None and main:
                        on_log(rows)
                    after |= {"window": _window(seconds())}
                at |= after
                if cfg.save_every and at["step"] % cfg.save_every == 0:
                    save()
            bar.total -= phase.steps - at["phase_step"]
            passed = {"name": phase.name, "steps": at["phase_step"], "left_by": at["left"] or "budget"}
            fresh = {"phase_step": 0, "passes": 0, "left": "", "rate": None}
            at |= {"phase": number + 1, "phases": [*at["phases"], passed | {"rate": at["rate"]}], **fresh}
            save()
    except KeyboardInterrupt:
        if not moving:
            save()
        raise
    finally:
        bar.close()

    summary = {
        **description,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": at["step"],
        "passed": at["phases"],
        "seconds": round(seconds(), 2),
        "config_hash": runs.short_hash(description),
        "code_hash": runs.code_hash(),
        "revision": runs.git_revision(),
        "device": device_name() if accelerator.device.type == "cuda" else str(accelerator.device),
        **runs.versions(),
        "last": rows[-1] if rows else {},
    }
    if not finished:
        written.finish(model)
        if results is not None and main:
            runs.record(summary, results)
    return Run(model, pd.DataFrame(rows), at["phases"], seconds(), at["step"], folder.path, summary)


def _row(at: dict, phase: str, seconds: float, measured: analysis.Rate | None) -> dict:
    """The line to log after a step: means over the window since the last one."""
    window = at["window"]
    row = {"step": at["step"] - 1, "phase": phase, "lr": window["lr"], "grad_norm": window["grad_norm"]}
    row |= {f"loss/{label}": sum(v) / len(v) for label, v in window["losses"].items()}
    row |= {"tokens_per_s": window["tokens"] / max(seconds - window["since"], 1e-9), "seconds": seconds}
    if measured is not None:
        row |= {"accuracy": measured.value, "accuracy_low": measured.low, "accuracy_high": measured.high}
    return row


def _measure(accelerator, model, leave: Leave, step: int, cfg) -> analysis.Rate:
    """One process measures and all go by what it found: rounding must not make some leave a phase and others stay."""
    options = {"trials": leave.trials, "seed": 20_000 + step, "precision": cfg.precision}
    measure = lambda: analysis.accuracy(model, leave.task, **options) if accelerator.is_main_process else None  # noqa: E731
    return broadcast_object_list([_together(measure)])[0]


def _stop(accelerator, losses, values, phase, number, step, cfg, folder):
    """Raise NonFinite with the seeds of the batches whose loss was not finite; of all, where only gradients were not."""
    seed = batch_seed(cfg.seed, number, step, 0, accelerator.process_index)
    told = gather_object([(seed, bool(torch.isfinite(losses).all()))])
    seeds = [s for s, fine in told if not fine] or [s for s, _ in told]
    where = "" if folder.path is None else f"; the state before it is in {folder.path}"
    raise NonFinite(f"phase {phase.name!r}, step {step}, batch seed {', '.join(map(str, seeds))}: {values}{where}")


def _gradients(accelerator, wrapped, phase, number, step, cfg) -> tuple[dict[str, torch.Tensor], int]:
    """Accumulate the gradients of one step over parts and micro-batches. Returns mean losses by part, and tokens."""
    losses, tokens = {}, 0
    todo = [(micro, part) for micro in range(cfg.grad_accum) for part in phase.streams]
    for i, (micro, part) in enumerate(todo):
        seed = batch_seed(cfg.seed, number, step, micro, accelerator.process_index)
        # One generator per part, so that adding a part leaves the batches of the others as they were.
        generator = torch.Generator().manual_seed(batch_seed(seed, phase.streams.index(part), step))
        batch = part.sample(generator).to(accelerator.device)
        last = i == len(todo) - 1
        # The forward that Accelerate prepared brings its own autocast, which must not span the backward.
        with contextlib.nullcontext() if last else accelerator.no_sync(wrapped):
            out = wrapped(batch.tokens, batch.targets, **_asked(cfg, phase))
            loss = out.loss
            total = loss if out.penalty is None else loss + out.penalty
            accelerator.backward(total * (part.weight / cfg.grad_accum))
        losses[part.label] = losses.get(part.label, 0.0) + loss.detach() / cfg.grad_accum
        tokens += batch.tokens.numel()
    return losses, tokens


def _asked(cfg: config.TrainConfig, phase: Phase | None = None) -> dict:
    """What to call a model with besides tokens and targets. A model without memory layers refuses penalties."""
    own = [getattr(phase, name, None) for name in ("write_penalty", "key_penalty")]
    weights = [
        ours if own is None else own for own, ours in zip(own, (cfg.write_penalty, cfg.key_penalty), strict=True)
    ]
    return {"penalties": models.Penalties(*weights)} if any(weights) else {}


def _clip(accelerator, model, largest: float) -> torch.Tensor:
    """Total gradient norm before clipping; clips where `largest` is above 0."""
    norm = accelerator.clip_grad_norm_(model.parameters(), largest if largest > 0 else math.inf)
    return norm.detach().float().reshape(())


def step_memory(
    build: Callable[[], nn.Module], shapes: Iterable[tuple[int, int]], *, vocab_size: int, steps: int = 3
) -> pd.DataFrame:
    """GPU memory and time of a training step (AdamW, every token scored, bf16 autocast) for each (T, B) of `shapes`.

    held: weights, gradients and optimizer state; activations: peak minus held. In MB of 2^20 bytes, as allocated by torch,
    less what was allocated before, after a first step that fills caches; ms: mean of `steps` steps. Raises ValueError
    without a CUDA device.
    """
    if not torch.cuda.is_available():
        raise ValueError("step_memory: needs a CUDA device; torch counts no peak on a CPU")
    others = torch.cuda.memory_allocated()
    model = build().cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator, rows = torch.Generator().manual_seed(0), []
    for T, B in shapes:
        tokens = torch.randint(vocab_size, (B, T), generator=generator).cuda()
        for step in range(1 + steps):
            if step == 1:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                held, start = torch.cuda.memory_allocated() - others, time.perf_counter()
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(tokens, tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)  # keep them: gradients count as held
            del loss
        torch.cuda.synchronize()
        ms, peak = 1e3 * (time.perf_counter() - start) / steps, torch.cuda.max_memory_allocated() - others
        row = {"T": T, "batch": B, "total": peak / 2**20, "held": held / 2**20, "activations": (peak - held) / 2**20}
        rows.append(row | {"ms": ms})
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------------------------------ ensembles


@dataclass
class Ensemble:
    """Members trained side by side: stacked parameters, one axis of members.

    params, buffers: name -> tensor [M, ...]. history: one row per member and logged step.
    """

    base: nn.Module
    params: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    seeds: tuple[int, ...]
    history: pd.DataFrame
    seconds: float

    def member(self, i: int) -> nn.Module:
        """Member i as a module of its own (a copy), in evaluation mode."""
        module = copy.deepcopy(self.base)
        state = {n: t[i].detach().clone() for n, t in {**self.params, **self.buffers}.items()}
        for name, tensor in state.items():
            owner, _, leaf = name.rpartition(".")
            target = getattr(module.get_submodule(owner), leaf)
            target.data = tensor
        return module.eval()

    def accuracies(self, task: data.Task, *, trials: int = 1000, seed: int = 10_000) -> list[analysis.Rate]:
        """Accuracy of every member on fresh rows of `task`, the same rows for all."""
        return [analysis.accuracy(self.member(i), task, trials=trials, seed=seed) for i in range(len(self.seeds))]


def fit_ensemble(
    build: Callable[[int], nn.Module],
    task: data.Task | tuple[data.Task, ...],
    cfg: config.TrainConfig,
    *,
    seeds: Iterable[int],
    steps: int,
    batch_size: int,
    lr: Iterable[float] | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Ensemble:
    """Train one small model from many seeds at once, with `torch.func`: stacked parameters, vmap, one optimizer.

    build: seed -> module; all members must have the same parameters and the same `cfg`. Each member draws its own batches
    and initial weights from its seed, as it would alone; gradients are clipped per member. lr: one rate per member, to
    sweep it in the same run; None: cfg.lr for all. Several tasks: each step draws one, the same for all members, so that
    shapes agree. device: where to train. precision "auto" is fp32 here, on a GPU too: these models are small, and their
    rates are compared; "bf16" runs the forward under autocast.
    history: loss by step and member, `lr` as the update took it (0 once a member is frozen) and `peak_lr` as it was asked.
    A member whose loss stops being finite is frozen as it was before that step, and its history says so.
    Raises ValueError for no seeds, repeated seeds at equal rates, rates that do not match the seeds, members that differ
    in more than their weights, a `cfg` that contradicts `device`, and `cfg.save_every`: an ensemble keeps no folder.
    """
    seeds = tuple(seeds)
    rates = [cfg.lr] * len(seeds) if lr is None else list(lr)
    if not seeds:
        raise ValueError("seeds: needs at least one")
    if len(rates) != len(seeds):
        raise ValueError(f"lr: {len(rates)} rates for {len(seeds)} seeds; give one per seed")
    if not all(_is_number(rate) and rate > 0 for rate in rates):
        raise ValueError(f"lr = {rates}: needs finite learning rates above 0")
    if len(set(zip(seeds, rates, strict=True))) < len(seeds):
        raise ValueError("seeds: a member appears twice (same seed, same rate); an ensemble needs members that differ")
    if not all(isinstance(n, int) and n >= 1 for n in (steps, batch_size)):
        raise ValueError(f"steps = {steps}, batch_size = {batch_size}: both need to be integers of at least 1")
    kind = torch.device(device).type
    if cfg.device == "cpu" and kind != "cpu":
        raise ValueError(
            f"device = {str(device)!r}: cfg.device says 'cpu'; make them agree, or leave cfg.device at 'auto'"
        )
    if cfg.save_every:
        raise ValueError(f"cfg.save_every = {cfg.save_every}: an ensemble keeps no run folder to resume from; set 0")
    tasks = task if isinstance(task, tuple) else (task,)
    if not tasks or not all(map(_is_task, tasks)):
        raise ValueError(f"task = {task!r}: needs a task, or a tuple of at least one task")
    members = [build(seed).to(device) for seed in seeds]
    _check_members(members)
    _check_vocabulary(members[0], tasks)
    params, buffers = torch.func.stack_module_state(members)
    base = copy.deepcopy(members[0])

    def loss_of(p, b, tokens, targets):
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=cfg.precision == "bf16"):
            out = torch.func.functional_call(base, (p, b), (tokens, targets), _asked(cfg))
            return (out.loss + out.penalty if _asked(cfg) else out.loss), out.loss

    gradient = torch.func.vmap(torch.func.grad_and_value(loss_of, has_aux=True))
    # The update of AdamW is proportional to its rate, so one optimizer at rate 1 serves every member: its step is
    # taken, and each member moves that way by its own rate.
    groups = _decay_groups(params.values(), cfg.weight_decay, stacked=1)
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=cfg.betas)
    rate = torch.tensor(rates, device=device)
    alive = torch.ones(len(seeds), dtype=torch.bool, device=device)
    rows, start = [], time.perf_counter()
    along = lambda x, like: x.view(-1, *[1] * (like.ndim - 1))  # noqa: E731  [M] -> [M, 1, ...]
    bar = tqdm(range(steps), disable=not progress, mininterval=0.5, desc=f"{len(seeds)} members")
    for step in bar:
        grads, loss = {}, 0.0
        for micro in range(cfg.grad_accum):
            choice = batch_seed(cfg.seed, 0, step, micro) % len(tasks)
            generators = (torch.Generator().manual_seed(batch_seed(seed, 0, step, micro)) for seed in seeds)
            drawn = [tasks[choice].sample(batch_size, generator) for generator in generators]
            tokens = torch.stack([b.tokens for b in drawn]).to(device)
            targets = torch.stack([b.targets for b in drawn]).to(device)
            found, (_, value) = gradient(params, buffers, tokens, targets)
            loss = loss + value.detach() / cfg.grad_accum
            grads = {n: grads.get(n, 0.0) + g / cfg.grad_accum for n, g in found.items()}
        norm = torch.stack([g.flatten(1).norm(dim=1) for g in grads.values()]).norm(dim=0)
        alive &= torch.isfinite(loss) & torch.isfinite(norm)
        scale = torch.where(alive, 1.0, 0.0)
        if cfg.grad_clip:
            scale = scale * (cfg.grad_clip / (norm + 1e-6)).clamp_max(1.0)
        old = {}
        for name, p in params.items():
            # 0 * nan is nan: a dead member's gradient is replaced, not scaled.
            p.grad = torch.where(along(alive, p), grads[name] * along(scale, p), 0.0)
            old[name] = p.detach().clone()
        optimizer.step()
        with torch.no_grad():
            move = torch.where(alive, rate * lr_factor(step, steps, cfg), 0.0)
            for name, p in params.items():
                p.copy_(old[name] + along(move, p) * (p - old[name]))
        if (step + 1) % cfg.log_every == 0 or step + 1 == steps:
            values, applied = loss.tolist(), move.tolist()
            for member, value in enumerate(values):
                row = {"step": step, "member": member, "seed": seeds[member], "peak_lr": rates[member]}
                row |= {"lr": applied[member], "loss": value}
                rows.append(row | {"alive": bool(alive[member])})
            bar.set_postfix(loss=f"{sum(values) / len(values):.3f}")
    params = {n: p.detach() for n, p in params.items()}
    return Ensemble(base, params, buffers, seeds, pd.DataFrame(rows), time.perf_counter() - start)


def _check_members(members: list[nn.Module]) -> None:
    """ValueError unless the members are one model with different weights: all run with the settings of the first."""
    first = members[0]
    for i, member in enumerate(members[1:], 1):
        a, b = getattr(first, "cfg", None), getattr(member, "cfg", None)
        if type(member) is not type(first) or a != b:
            fields = [f for f in vars(a) if vars(a)[f] != vars(b).get(f)] if type(a) is type(b) and a != b else [a, b]
            raise ValueError(f"build: members 0 and {i} differ in more than their weights: {fields}; build one model")
        wrong = runs.mismatches(first.state_dict(), member.state_dict())
        if wrong:
            raise ValueError(f"build: members 0 and {i} differ in the shapes of {wrong[:5]}; build one model")
