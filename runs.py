"""Runs on disk, and where a number came from: run folders that survive being killed, weights, and provenance.

    net = runs.load_weights(model.build(cfg), "runs/one")    # what train.fit(run_dir="runs/one") left there
    print(runs.provenance(seconds=12.0))                     # the last lines of a notebook

A run folder holds config.json, metrics.jsonl, state.pt and, once the run has ended, weights.safetensors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import config

ROOT = Path(__file__).resolve().parent


# ------------------------------------------------------------------------------------------------ provenance


def module_hashes() -> dict[str, str]:
    """First 10 digits of the SHA-256 of every module of the workbook."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest()[:10] for p in sorted(ROOT.glob("*.py"))}


def git_revision() -> str:
    """Short revision of the checkout, with `+changes` where tracked files differ from it.

    Outside a repository, as in an unpacked archive, what WORKBOOK_REVISION says, or `unknown`.
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
    """One hash of all modules."""
    return short_hash(module_hashes())


def short_hash(value) -> str:
    """First 10 digits of the SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


def provenance(*, seconds: float | None = None) -> str:
    """The last lines of a notebook: profile, revision, module hashes, versions, device and seconds, as plain text."""
    lines = [f"{'profile':<12} {config.profile()}", f"{'revision':<12} {git_revision()}"]
    lines += [f"{name:<12} {version}" for name, version in versions().items()]
    lines.append(f"{'device':<12} {device_name()}")
    if seconds is not None:
        lines.append(f"{'seconds':<12} {seconds:.0f}")
    lines.append(f"{'modules':<12} " + ", ".join(f"{n} {h}" for n, h in module_hashes().items()))
    return "provenance\n" + "\n".join(lines)


def describe(value):
    """A value as JSON can hold it; tasks and configurations keep their type's name."""
    if isinstance(value, config.Settings):
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value) if f.repr and f.init}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, (tuple, list)):
        return [describe(v) for v in value]
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return getattr(value, "fingerprint", type(value).__name__)


def record(summary: dict, path: str | Path = ROOT / "results" / "runs.jsonl") -> None:
    """Append one finished run as a line of results/runs.jsonl."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as f:
        f.write(json.dumps(summary) + "\n")


# ------------------------------------------------------------------------------------------------ weights


def mismatches(own: dict[str, torch.Tensor], saved) -> list[str]:
    """Names whose tensors in `saved` are missing, unknown or of another shape than in `own`; empty where all fit."""
    if not isinstance(saved, dict):
        return [f"{type(saved).__name__} instead of named tensors"]
    fits = lambda name: isinstance(saved[name], torch.Tensor) and saved[name].shape == own[name].shape  # noqa: E731
    return sorted(map(str, set(own) ^ set(saved))) or [name for name in own if not fits(name)]


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
    wrong = mismatches(model.state_dict(), tensors)
    if wrong:
        raise ValueError(f"path: {path} belongs to another model; parameters that do not match: {wrong[:5]}")
    model.load_state_dict(tensors)
    return model


# ------------------------------------------------------------------------------------------------ run folders


def _write(path: Path, save: Callable[[Path], None]) -> None:
    """Write beside the target, flush to disk, then rename over it: a reader sees the old file or the new, never half."""
    part = path.with_name(path.name + ".part")
    save(part)
    _flush(part)
    os.replace(part, path)


def _flush(path: Path) -> None:
    with open(path, "rb") as f:
        os.fsync(f.fileno())


class Folder:
    """One run on disk, or none where `path` is None: every method then does nothing.

    Looking at what is there (`open`) comes first and changes nothing until all of it has been found sound, so that a
    folder which is refused stays as it was. Where there are several processes, one opens and writes and all `read`.
    """

    def __init__(self, path: str | Path | None):
        self.path = None if path is None else Path(path)

    def _file(self, name: str) -> Path:
        return self.path / name

    def open(self, description: dict, like: dict, model: nn.Module, optimizer, *, resume: bool) -> None:
        """Create the folder, or check that what it holds can be resumed by `model` and `optimizer`.

        description: what config.json must hold. like: progress counters of a state, for their names and types.
        Raises ValueError for a folder that is occupied, damaged or of another run.
        """
        if self.path is None:
            return
        description = json.loads(json.dumps(description))  # as it comes back from the file: tuples become lists
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run_dir = {str(self.path)!r}: is a file; choose a folder")
        if not self._file("config.json").exists():
            if self.path.exists() and any(p.name != "config.json.part" for p in self.path.iterdir()):
                raise ValueError(f"run_dir = {str(self.path)!r}: holds other files; choose a new or empty folder")
            self.path.mkdir(parents=True, exist_ok=True)
            _write(self._file("config.json"), lambda p: p.write_text(json.dumps(description, indent=1)))
            return
        if not resume:
            raise ValueError(f"run_dir = {str(self.path)!r}: already holds a run; pass resume=True or another folder")
        self._check_description(description)
        state, rows = self._state(), self._rows()
        if state is None:
            left = [n for n in ("weights.safetensors", "metrics.jsonl") if self._file(n).exists()]
            if left:
                why = f"state.pt is missing beside {left}, and training anew would overwrite them"
                raise ValueError(f"run_dir = {str(self.path)!r}: {why}; restore it or choose another folder")
            return
        self._check_state(state, like, model, optimizer)
        # Rows logged after the saved state will be logged again, and so will that of a step saved before it was logged.
        kept = "".join(json.dumps(row) + "\n" for row in rows if row["step"] < state["step"] - state["pending"])
        metrics = self._file("metrics.jsonl")
        if metrics.exists() and metrics.read_text() != kept:
            _write(metrics, lambda p: p.write_text(kept))

    def _check_description(self, description: dict) -> None:
        file = self._file("config.json")
        try:
            kept = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"run_dir: {file} is damaged ({error}); restore it or choose another folder") from error
        if not isinstance(kept, dict):
            raise ValueError(f"run_dir: {file} is damaged (no JSON object); restore it or choose another folder")
        differ = sorted(k for k in {*kept, *description} if kept.get(k) != description.get(k))
        if kept != description:
            raise ValueError(
                f"run_dir = {str(self.path)!r}: holds a run of another configuration; these differ: {differ}"
            )

    def _check_state(self, state: dict, like: dict, model: nn.Module, optimizer) -> None:
        """ValueError unless `state` is one of this model, this optimizer and these counters."""
        if not isinstance(state, dict):
            wrong = [f"{type(state).__name__} instead of a dictionary"]
        elif set(state) != {*like, "model", "optimizer"}:
            wrong = sorted(map(str, {*like, "model", "optimizer"} ^ set(state)))
        else:
            wrong = [k for k, v in like.items() if v is not None and type(state[k]) is not type(v)]
            wrong = wrong or mismatches(model.state_dict(), state["model"]) or _optimizer_mismatches(optimizer, state)
        if wrong:
            file = self._file("state.pt")
            raise ValueError(f"run_dir: {file} belongs to another model or run; what does not match: {wrong[:5]}")

    def read(self) -> tuple[dict | None, list[dict]]:
        """(saved state, logged rows); (None, []) for a run that begins."""
        return (None, []) if self.path is None else (self._state(), self._rows())

    def _state(self) -> dict | None:
        file = self._file("state.pt")
        if not file.exists():
            return None
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file: each means the same to the user
            why = f"{type(error).__name__}: {error}"
            raise ValueError(f"run_dir: {file} cannot be read as a saved state ({why})") from error

    def _rows(self) -> list[dict]:
        """Rows of metrics.jsonl. A kill can cut the last line short, which is left out; damage elsewhere: ValueError."""
        file = self._file("metrics.jsonl")
        if not file.exists():
            return []
        lines, rows = file.read_text(errors="replace").splitlines(), []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                row = None
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
            elif number < len(lines):
                raise ValueError(f"run_dir: line {number} of {file} is damaged; restore it or choose another folder")
        return rows

    def log(self, row: dict) -> None:
        if self.path:
            with open(self._file("metrics.jsonl"), "a") as f:
                f.write(json.dumps(row) + "\n")

    def save(self, state: dict) -> None:
        if self.path:
            metrics = self._file("metrics.jsonl")
            if metrics.exists():
                _flush(metrics)  # rows reach the disk before the state that counts on them
            _write(self._file("state.pt"), lambda p: torch.save(state, p))

    @property
    def finished(self) -> bool:
        """Whether the weights of the whole run are there."""
        return self.path is not None and self._file("weights.safetensors").exists()

    def finish(self, model: nn.Module) -> None:
        if self.path:
            tensors = {n: t.detach().cpu().contiguous() for n, t in model.state_dict().items()}
            _write(self._file("weights.safetensors"), lambda p: save_file(tensors, p))


def _optimizer_mismatches(optimizer, state: dict) -> list[str]:
    """What of a saved optimizer does not fit `optimizer`: its groups, or the shapes of its moments."""
    saved, own = state["optimizer"], optimizer.state_dict()["param_groups"]
    try:
        fits = [g["params"] for g in saved["param_groups"]] == [g["params"] for g in own]
        moments = [(i, n, t) for i, held in saved["state"].items() for n, t in held.items()]
    except (TypeError, KeyError, AttributeError, IndexError):
        fits = False
    if not fits:
        return ["optimizer.param_groups"]
    shapes = dict(enumerate(p.shape for group in optimizer.param_groups for p in group["params"]))
    good = lambda i, n, t: i in shapes and isinstance(t, torch.Tensor) and (n == "step" or t.shape == shapes[i])  # noqa: E731
    return [f"optimizer.{n} of parameter {i}" for i, n, t in moments if not good(i, n, t)]
