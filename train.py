"""Fit one model through a curriculum of phases, or an ensemble of seeds at once; keep every run on disk.

    run = train.fit(net, [train.Phase("retrieval", train.Part(task, batch_size=32), steps=500)], config.TrainConfig())
    run.history      # pandas: one row per logged step

A run folder holds config.json, metrics.jsonl, weights.safetensors and state.pt. Every batch is drawn from a generator
seeded by (seed, phase, step), so a run killed at any moment and resumed ends with the same weights as one left alone.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

import analysis
import config
import data

ROOT = Path(__file__).resolve().parent


class NonFinite(RuntimeError):
    """The loss or a gradient stopped being a finite number. Says which phase, step and batch seed; the last good state
    is in the run folder."""


# ------------------------------------------------------------------------------------------------ curricula


@dataclass(frozen=True)
class Part(config.Settings):
    """One stream of batches of a phase. Given several tasks (lengths, numbers of needles), each step draws one of them.

    weight: factor on this part's mean loss in the sum that is minimised.
    batch_size: sequences per micro-batch; `tokens` instead keeps batch_size * seq_len at so many tokens.
    """

    tasks: data.Task | tuple[data.Task, ...]
    batch_size: int = 0
    tokens: int = 0
    weight: float = 1.0
    name: str = ""

    def validate(self):
        self.require((self.batch_size > 0) != (self.tokens > 0), "batch_size", "give either batch_size or tokens")
        self.require(self.weight > 0, "weight", "needs a factor above 0")
        self.require(len(self.options) > 0, "tasks", "needs at least one task")

    @property
    def options(self) -> tuple[data.Task, ...]:
        return self.tasks if isinstance(self.tasks, tuple) else (self.tasks,)

    @property
    def label(self) -> str:
        return self.name or type(self.options[0]).__name__

    def sample(self, generator: torch.Generator) -> data.Batch:
        i = int(torch.randint(len(self.options), (), generator=generator))
        task = self.options[i]
        return task.sample(self.batch_size or max(1, self.tokens // task.seq_len), generator)


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
        self.require(0 < self.accuracy <= 1, "accuracy", "needs a share above 0 and at most 1")
        self.require_positive("every", "trials", "times")


@dataclass(frozen=True)
class Phase(config.Settings):
    """Train on `parts` for at most `steps` steps, or until `leave` says so. `lr` overrides the configuration's."""

    name: str
    parts: Part | tuple[Part, ...]
    steps: int
    leave: Leave | None = None
    lr: float | None = None

    def validate(self):
        self.require_positive("steps")
        labels = [p.label for p in self.streams]
        self.require(len(labels) > 0, "parts", "needs at least one part")
        self.require(len(set(labels)) == len(labels), "parts", f"labels must differ, are {labels}; set Part.name")
        self.require(self.lr is None or self.lr > 0, "lr", "needs a learning rate above 0, or None")

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


# ------------------------------------------------------------------------------------------------ provenance


def module_hashes() -> dict[str, str]:
    """First 10 digits of the SHA-256 of every module of the workbook."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest()[:10] for p in sorted(ROOT.glob("*.py"))}


def git_revision() -> str:
    """Short revision of the checkout, with `+changes` where tracked files differ from it.

    Outside a repository, as in a copy sent to a GPU machine, what WORKBOOK_REVISION says, or `unknown`.
    """
    unknown = os.environ.get("WORKBOOK_REVISION", "unknown")
    try:
        run = lambda *args: subprocess.run(("git", *args), cwd=ROOT, capture_output=True, text=True, timeout=10)  # noqa: E731
        head = run("rev-parse", "--short", "HEAD")
        if head.returncode:
            return unknown
        return head.stdout.strip() + ("+changes" if run("status", "--porcelain", "-uno").stdout.strip() else "")
    except (OSError, subprocess.TimeoutExpired):
        return unknown


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "platform": sys.platform}


def code_hash() -> str:
    return hashlib.sha256(json.dumps(module_hashes(), sort_keys=True).encode()).hexdigest()[:10]


def provenance(*, seconds: float | None = None) -> str:
    """The last lines of a notebook: profile, revision, module hashes, versions, device and seconds, as plain text."""
    lines = [f"{'profile':<12} {config.profile()}", f"{'revision':<12} {git_revision()}"]
    lines += [f"{name:<12} {version}" for name, version in versions().items()]
    lines.append(f"{'device':<12} {device_name()}")
    if seconds is not None:
        lines.append(f"{'seconds':<12} {seconds:.0f}")
    lines.append(f"{'modules':<12} " + ", ".join(f"{n} {h}" for n, h in module_hashes().items()))
    return "provenance\n" + "\n".join(lines)


def _describe(value):
    """A value as JSON can hold it; tasks and configurations keep their type's name."""
    if isinstance(value, config.Settings):
        fields = {f.name: _describe(getattr(value, f.name)) for f in dataclasses.fields(value) if f.repr and f.init}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, (tuple, list)):
        return [_describe(v) for v in value]
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return getattr(value, "fingerprint", type(value).__name__)


# ------------------------------------------------------------------------------------------------ run folders


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


def _write(path: Path, save: Callable[[Path], None]) -> None:
    """Write beside the target, flush to disk, then rename over it: a reader sees the old file or the new, never half."""
    part = path.with_name(path.name + ".part")
    save(part)
    with open(part, "rb") as f:
        os.fsync(f.fileno())
    os.replace(part, path)


def _load_state(path: Path) -> dict:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file: each means the same to the user
        raise ValueError(
            f"run_dir: {path} cannot be read as a saved state ({type(error).__name__}: {error})"
        ) from error


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Load weights.safetensors (or the run folder that holds it) into `model`, which must have the same parameters.

    Raises OSError where there is no file, ValueError for a damaged one or one of another model. The model is left as it
    was unless everything fits.
    """
    path = Path(path)
    path = path / "weights.safetensors" if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"path: no weights at {path}")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"path: {path} is not a readable safetensors file ({error})") from error
    own = model.state_dict()
    wrong = sorted(set(own) ^ set(tensors)) or [n for n in own if own[n].shape != tensors[n].shape]
    if wrong:
        raise ValueError(f"path: {path} belongs to another model; parameters that do not match: {wrong[:5]}")
    model.load_state_dict(tensors)
    return model


class _Folder:
    """One run on disk. Every method is a no-op where the run keeps no folder or this is not the main process."""

    def __init__(self, path, description: dict, *, resume: bool, main: bool):
        self.path, self.main = None if path is None else Path(path), main
        self.state = None
        if self.path is None:
            return
        file = self.path / "config.json"
        if file.exists():
            if not resume:
                raise ValueError(f"run_dir = {str(path)!r}: already holds a run; pass resume=True or another folder")
            try:
                kept = json.loads(file.read_text())
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"run_dir: {file} is damaged ({error}); restore it or choose another folder"
                ) from error
            if kept != json.loads(json.dumps(description)):
                differ = sorted(
                    k for k in {*kept, *description} if kept.get(k) != json.loads(json.dumps(description)).get(k)
                )
                raise ValueError(
                    f"run_dir = {str(path)!r}: holds a run of another configuration; these differ: {differ}"
                )
            if (self.path / "state.pt").exists():
                self.state = _load_state(self.path / "state.pt")
        elif self.path.exists() and any(p.name != "config.json.part" for p in self.path.iterdir()):
            raise ValueError(f"run_dir = {str(path)!r}: holds other files; choose a new or empty folder")
        elif main:
            self.path.mkdir(parents=True, exist_ok=True)
            _write(file, lambda p: p.write_text(json.dumps(description, indent=1)))
        if main:
            # Rows logged after the saved state will be logged again.
            last = -1 if self.state is None else self.state["step"]
            rows = [r for r in self.rows() if r["step"] < last]
            _write(self.path / "metrics.jsonl", lambda p: p.write_text("".join(json.dumps(r) + "\n" for r in rows)))

    def rows(self) -> list[dict]:
        file = self.path / "metrics.jsonl" if self.path else None
        if file is None or not file.exists():
            return []
        rows = []
        for line in file.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break  # the line that the kill cut short
        return rows

    def log(self, row: dict):
        if self.path and self.main:
            with open(self.path / "metrics.jsonl", "a") as f:
                f.write(json.dumps(row) + "\n")

    def save(self, state: dict):
        if self.path and self.main:
            _write(self.path / "state.pt", lambda p: torch.save(state, p))

    def finish(self, model: nn.Module):
        if self.path and self.main:
            tensors = {n: t.detach().cpu().contiguous() for n, t in model.state_dict().items()}
            _write(self.path / "weights.safetensors", lambda p: save_file(tensors, p))


def record(summary: dict, path: str | Path = ROOT / "results" / "runs.jsonl") -> None:
    """Append one finished run as a line of results/runs.jsonl."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as f:
        f.write(json.dumps(summary) + "\n")


# ------------------------------------------------------------------------------------------------ fit


def _accelerator(cfg: config.TrainConfig) -> Accelerator:
    on_gpu = torch.cuda.is_available() and cfg.device != "cpu"
    bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and on_gpu and torch.cuda.is_bf16_supported())
    # Accelerate keeps one precision per process; a notebook that trains twice may need two.
    AcceleratorState._reset_state()
    if PartialState._shared_state and (PartialState().device.type == "cpu") != (cfg.device == "cpu" or not on_gpu):
        PartialState._reset_state()
    return Accelerator(mixed_precision="bf16" if bf16 else "no", cpu=cfg.device == "cpu")


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

    Weights stay fp32; on a GPU the passes run under bf16 autocast (`cfg.precision`). Warm-up and cosine restart with
    each phase, and the learning rate logged is the optimizer's own. Device, processes and precision are Accelerate's,
    so `accelerate launch` spreads the same call over several GPUs or hosts; each process draws its own batches.

    run_dir: folder to keep the run in; resume: go on from what is there. on_log: called with all rows so far after each
    logged step (`plots.LiveCurve`). results: a runs.jsonl to append a line to.
    Raises ValueError for a run folder of another configuration or a damaged one, `NonFinite` when loss or gradients are.
    """
    phases = (phases,) if isinstance(phases, Phase) else tuple(phases)
    if not phases:
        raise ValueError("phases: needs at least one Phase")
    accelerator = _accelerator(cfg)
    description = {
        "name": name,
        "model": _describe(getattr(model, "cfg", None)),
        "train": _describe(cfg),
        "phases": _describe(phases),
    }
    folder = _Folder(run_dir, description, resume=resume, main=accelerator.is_main_process)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay)
    model.train()
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    try:
        return _fit(accelerator, wrapped, model, optimizer, phases, cfg, folder, description, progress, on_log, results)
    finally:
        accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        model.eval()


def _fit(accelerator, wrapped, model, optimizer, phases, cfg, folder, description, progress, on_log, results) -> Run:
    rows = folder.rows()
    at = {"phase": 0, "phase_step": 0, "step": 0, "passes": 0, "phases": [], "seconds": 0.0}
    if folder.state is not None:
        saved = folder.state
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        at = {k: saved[k] for k in at}

    def save():
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **at}
        folder.save({**state, "seconds": before + time.perf_counter() - start})

    before, start = at["seconds"], time.perf_counter()
    total = sum(p.steps for p in phases)
    bar = tqdm(total=total, initial=at["step"], disable=not (progress and accelerator.is_main_process), mininterval=0.5)
    window = {"tokens": 0, "time": time.perf_counter(), "losses": {}, "steps": 0}

    for number in range(at["phase"], len(phases)):
        phase = phases[number]
        bar.set_description(phase.name)
        left, reached = "budget", None
        while at["phase_step"] < phase.steps:
            step = at["phase_step"]
            for group in optimizer.param_groups:
                group["lr"] = (phase.lr or cfg.lr) * lr_factor(step, phase.steps, cfg)
            losses, tokens = _gradients(accelerator, wrapped, phase, number, step, cfg)
            norm = _clip(accelerator, model, cfg.grad_clip)
            # One wait for the device a step: it guards the update, so that a bad one never reaches the weights.
            values = torch.stack([*losses.values(), norm]).tolist()
            if not all(map(math.isfinite, values)):
                named = dict(zip([*losses, "gradient norm"], values, strict=True))
                seed = batch_seed(cfg.seed, number, step, 0, accelerator.process_index)
                optimizer.zero_grad()
                save()
                where = "" if folder.path is None else f"; the state before it is in {folder.path}"
                raise NonFinite(f"phase {phase.name!r}, step {step}, batch seed {seed}: {named}{where}")
            optimizer.step()
            optimizer.zero_grad()
            at["step"], at["phase_step"] = at["step"] + 1, step + 1
            bar.update()

            window["tokens"] += tokens * accelerator.num_processes
            window["steps"] += 1
            for label, value in zip(losses, values, strict=False):
                window["losses"].setdefault(label, []).append(value)
            check = phase.leave is not None and at["phase_step"] % phase.leave.every == 0
            rate = None
            if check:
                rate = analysis.accuracy(
                    model,
                    phase.leave.task,
                    trials=phase.leave.trials,
                    seed=20_000 + at["step"],
                    precision=cfg.precision,
                )
                model.train()
            if at["step"] % cfg.log_every == 0 or check:
                now = time.perf_counter()
                row = {"step": at["step"] - 1, "phase": phase.name, "lr": optimizer.param_groups[0]["lr"]}
                row |= {"grad_norm": values[-1]}
                row |= {f"loss/{k}": sum(v) / len(v) for k, v in window["losses"].items()}
                row |= {"tokens_per_s": window["tokens"] / (now - window["time"]), "seconds": before + now - start}
                if rate is not None:
                    row |= {"accuracy": rate.value, "accuracy_low": rate.low, "accuracy_high": rate.high}
                rows.append(row)
                folder.log(row)
                bar.set_postfix({k.removeprefix("loss/"): f"{v:.3f}" for k, v in row.items() if k.startswith("loss/")})
                if on_log is not None and accelerator.is_main_process:
                    on_log(rows)
                window = {"tokens": 0, "time": time.perf_counter(), "losses": {}, "steps": 0}
            if rate is not None:
                reached = str(rate)
                at["passes"] = at["passes"] + 1 if rate.value >= phase.leave.accuracy else 0
                if at["passes"] == phase.leave.times:
                    left = "accuracy"
                    break
            if cfg.save_every and at["step"] % cfg.save_every == 0:
                save()
        at["phases"] = [
            *at["phases"],
            {"name": phase.name, "steps": at["phase_step"], "left_by": left, "rate": reached},
        ]
        bar.total -= phase.steps - at["phase_step"]
        at |= {"phase": number + 1, "phase_step": 0, "passes": 0}
        save()

    bar.close()
    folder.finish(model)
    seconds = before + time.perf_counter() - start
    summary = {
        **description,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": at["step"],
        "passed": at["phases"],
        "seconds": round(seconds, 2),
        "config_hash": hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:10],
        "code_hash": code_hash(),
        "revision": git_revision(),
        "device": device_name() if accelerator.device.type == "cuda" else str(accelerator.device),
        **versions(),
        "last": rows[-1] if rows else {},
    }
    if results is not None and accelerator.is_main_process:
        record(summary, results)
    return Run(model, pd.DataFrame(rows), at["phases"], seconds, at["step"], folder.path, summary)


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
        with contextlib.nullcontext() if last else accelerator.no_sync(wrapped), accelerator.autocast():
            loss = wrapped(batch.tokens, batch.targets).loss
            accelerator.backward(loss * (part.weight / cfg.grad_accum))
        losses[part.label] = losses.get(part.label, 0.0) + loss.detach() / cfg.grad_accum
        tokens += batch.tokens.numel()
    return losses, tokens


def _clip(accelerator, model, largest: float) -> torch.Tensor:
    """Total gradient norm before clipping; clips where `largest` is above 0."""
    norm = accelerator.clip_grad_norm_(model.parameters(), largest if largest > 0 else math.inf)
    return norm.detach().float().reshape(())


def step_memory(
    build: Callable[[], nn.Module], shapes: Iterable[tuple[int, int]], *, vocab_size: int, steps: int = 3
) -> pd.DataFrame:
    """GPU memory and time of a training step (AdamW, every token scored, bf16 autocast) for each (T, B) of `shapes`.

    held: weights, gradients and optimizer state; activations: peak minus held. In MB of 2^20 bytes, as allocated by torch,
    after a first step that fills caches; ms: mean of `steps` steps. Raises ValueError without a CUDA device.
    """
    if not torch.cuda.is_available():
        raise ValueError("step_memory: needs a CUDA device; torch counts no peak on a CPU")
    model = build().cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    generator, rows = torch.Generator().manual_seed(0), []
    for T, B in shapes:
        tokens = torch.randint(vocab_size, (B, T), generator=generator).cuda()
        for step in range(1 + steps):
            if step == 1:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                held, start = torch.cuda.memory_allocated(), time.perf_counter()
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(tokens, tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)  # keep them: gradients count as held
            del loss
        torch.cuda.synchronize()
        ms, peak = 1e3 * (time.perf_counter() - start) / steps, torch.cuda.max_memory_allocated()
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

    build: seed -> module; all members must have the same parameters. Each member draws its own batches and initial
    weights from its seed, as it would alone; gradients are clipped per member. lr: one rate per member, to sweep it in the
    same run; None: cfg.lr for all. Several tasks: each step draws one, the same for all members, so that shapes agree.
    A member whose loss stops being finite is frozen as it was before that step, and its history says so.
    Raises ValueError for no seeds, repeated seeds at equal rates, or rates that do not match the seeds.
    """
    seeds = tuple(seeds)
    rates = [cfg.lr] * len(seeds) if lr is None else list(lr)
    if not seeds:
        raise ValueError("seeds: needs at least one")
    if len(rates) != len(seeds):
        raise ValueError(f"lr: {len(rates)} rates for {len(seeds)} seeds; give one per seed")
    if len(set(zip(seeds, rates, strict=True))) < len(seeds):
        raise ValueError("seeds: a member appears twice (same seed, same rate); an ensemble needs members that differ")
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps = {steps}, batch_size = {batch_size}: both need to be at least 1")
    tasks = task if isinstance(task, tuple) else (task,)
    members = [build(seed).to(device) for seed in seeds]
    params, buffers = torch.func.stack_module_state(members)
    base = copy.deepcopy(members[0])

    def loss_of(p, b, tokens, targets):
        return torch.func.functional_call(base, (p, b), (tokens, targets)).loss

    gradient = torch.func.vmap(torch.func.grad_and_value(loss_of))
    # The update of AdamW is proportional to its rate, so one optimizer at rate 1 serves every member: its step is
    # taken, and each member moves that way by its own rate.
    optimizer = torch.optim.AdamW(params.values(), lr=1.0, betas=cfg.betas, weight_decay=cfg.weight_decay)
    rate = torch.tensor(rates, device=device)
    alive = torch.ones(len(seeds), dtype=torch.bool, device=device)
    rows, start = [], time.perf_counter()
    along = lambda x, like: x.view(-1, *[1] * (like.ndim - 1))  # noqa: E731  [M] -> [M, 1, ...]
    bar = tqdm(range(steps), disable=not progress, mininterval=0.5, desc=f"{len(seeds)} members")
    for step in bar:
        choice = batch_seed(cfg.seed, 0, step) % len(tasks)
        generators = (torch.Generator().manual_seed(batch_seed(seed, 0, step)) for seed in seeds)
        drawn = [tasks[choice].sample(batch_size, generator) for generator in generators]
        tokens = torch.stack([b.tokens for b in drawn]).to(device)
        targets = torch.stack([b.targets for b in drawn]).to(device)
        grads, loss = gradient(params, buffers, tokens, targets)
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
            values = loss.tolist()
            for member, value in enumerate(values):
                row = {"step": step, "member": member, "seed": seeds[member], "lr": rates[member], "loss": value}
                rows.append(row | {"alive": bool(alive[member])})
            bar.set_postfix(loss=f"{sum(values) / len(values):.3f}")
    params = {n: p.detach() for n, p in params.items()}
    return Ensemble(base, params, buffers, seeds, pd.DataFrame(rows), time.perf_counter() - start)
