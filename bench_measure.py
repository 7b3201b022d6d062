"""What one process of bench_gpu.py measures: inputs, implementations, timers, errors. Run as `python bench_measure.py JOB`.

JOB is a JSON object: `kind` ("first", "speed", "errors" or "step"), `rows`, the file that takes one JSON line per row, and the
arguments of that kind's function below. bench_gpu.py says what the numbers mean.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gc
import importlib.metadata
import itertools
import json
import sys
import time
import traceback
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import bench_cpu
import core

DEVICE = "cuda"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
IMPLS = {"ours": None, "torch": None, "fla": "fla-core", "flashqla": "flash-qla"}  # name: the package that brings it
WHAT = ("forward", "forward_backward")
ERROR_TOKENS = 512
TORCH_TURNS, TORCH_STEPS = 10, 2  # of the PyTorch path, which is slow and no rival


class Shape(NamedTuple):
    """Batch, tokens, heads, key width, value width."""

    B: int
    T: int
    H: int
    K: int
    V: int

    def __str__(self):
        return " ".join(f"{letter}{size}" for letter, size in zip("BTHKV", self, strict=True))


# ------------------------------------------------------------------------------------------------ inputs


def inputs(
    shape: Shape,
    *,
    dtype=torch.bfloat16,
    decay: str = "usual",
    keys: str = "random",
    gates: str = "open",
    seed: int = 0,
) -> dict:
    """q, k (unit vectors), v (normal) in `dtype`, beta and g in float32, all leaves that ask for a gradient.

    decay: g = logsigmoid(normal + 4) "usual" (half-life 23 tokens), + 8 "slow" (1,250 tokens), - 2 "fast" (a third of a token),
    0 "none". keys: "random", or "correlated" (cosine of two keys of a head about 0.9). gates: beta = sigmoid(normal) "open", or
    "shut": exactly 0 at three tokens in four, and at all of the first head's.
    """
    B, T, H, K, V = shape
    gen = torch.Generator(DEVICE).manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=gen, device=DEVICE)  # noqa: E731
    q, k = F.normalize(draw(B, T, H, K), dim=-1), F.normalize(draw(B, T, H, K), dim=-1)
    if keys == "correlated":
        k = F.normalize(F.normalize(draw(1, 1, H, K), dim=-1) + 0.3 * k, dim=-1)
    beta = draw(B, T, H).sigmoid()
    if gates == "shut":
        beta = beta * (torch.rand(B, T, H, generator=gen, device=DEVICE) < 0.25)
        beta[:, :, 0] = 0
    offset = {"usual": 4, "slow": 8, "fast": -2, "none": None}[decay]
    g = torch.zeros(B, T, H, device=DEVICE) if offset is None else F.logsigmoid(draw(B, T, H) + offset)
    tensors = dict(q=q.to(dtype), k=k.to(dtype), v=draw(B, T, H, V).to(dtype), beta=beta, g=g)
    return {name: x.detach().requires_grad_() for name, x in tensors.items()}


def cotangents(shape: Shape, *, dtype=torch.bfloat16, seed: int = 1) -> tuple:
    """d_out [B, T, H, V] in `dtype` and d_state [B, H, K, V] in float32."""
    B, T, H, K, V = shape
    gen = torch.Generator(DEVICE).manual_seed(seed)
    d_out = torch.randn(B, T, H, V, generator=gen, device=DEVICE).to(dtype)
    return d_out, torch.randn(B, H, K, V, generator=gen, device=DEVICE)


# ------------------------------------------------------------------------------------------------ implementations


def load(name: str):
    """The implementation as a function (q, k, v, beta, g, *, scale, last) of (out, state); `last`: the state is wanted.

    Raises whatever an absent or unwilling peer raises.
    """
    if name in ("ours", "torch"):
        impl = "triton" if name == "ours" else "torch"
        return lambda q, k, v, beta, g, *, scale, last: core.delta_rule(q, k, v, beta, g, scale=scale, impl=impl)
    if name == "fla":
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule as peer
    else:
        from flash_qla import chunk_gated_delta_rule as peer
    return lambda q, k, v, beta, g, *, scale, last: peer(q, k, v, g, beta, scale=scale, output_final_state=last)


def label(name: str) -> str:
    """What a table calls an implementation."""
    package = IMPLS[name]
    if package is None:
        return {"ours": "ours", "torch": "ours (PyTorch)"}[name]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return f"{name} {importlib.metadata.version(package)}"
    return name


def timed(function, shape: Shape):
    """`function` as it is timed: out alone, scale K^-0.5."""
    return lambda **tensors: function(**tensors, scale=shape.K**-0.5, last=False)[:1]


@contextlib.contextmanager
def refusals(row: dict, key: str = "error"):
    """An exception becomes `row[key]`, one line, and a traceback on stderr: a peer may raise anything."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        words = " ".join(str(error).split()) or traceback.extract_tb(error.__traceback__)[-1].line
        row[key] = f"{type(error).__name__}: {words[:200]}"


# ------------------------------------------------------------------------------------------------ measurement


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def activities(events) -> dict:
    """Milliseconds by name of what the device did, from the events of torch.profiler. Waiting and annotations are not work."""
    total = {}
    for event in events:
        waits = event.name.endswith(" Sync")  # "Context Sync", "Stream Sync", "Event Sync"
        if event.device_type != torch.autograd.DeviceType.CUDA or waits or getattr(event, "is_user_annotation", False):
            continue
        total[event.name] = total.get(event.name, 0.0) + event.time_range.elapsed_us() / 1e3
    return total


def longest(kernels: dict, *, most: int = 16) -> dict:
    """The longest of the kernels by their names' first 100 characters, and the sum of the others."""
    ordered = sorted(kernels.items(), key=lambda item: -item[1])
    found = {}
    for name, ms in ordered[:most]:
        found[name[:100]] = found.get(name[:100], 0.0) + ms
    rest = sum(ms for _, ms in ordered[most:])
    return found | {f"{len(ordered) - most} others": rest} if rest else found


def device_work(call, *, steps: int) -> tuple[float, dict]:
    """Milliseconds of device work in one call, the median of `steps`, and those of its longest kernels in the middle one."""
    runs = []
    for _ in range(steps + 1):  # the first profile of a process sets the tracer up
        synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            synchronize()
        runs.append(activities(profile.events()))
    if not all(runs[1:]):
        raise RuntimeError("torch.profiler saw no work on the device")
    runs = sorted(runs[1:], key=lambda run: sum(run.values()))
    return float(np.median([sum(run.values()) for run in runs])), longest(runs[(len(runs) - 1) // 2])


def peak_mib(call) -> float:
    """MiB that one call adds, at most, to what is allocated before it."""
    call()
    synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _results = call()  # kept: its tensors belong to the peak
    synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_bandwidth(*, mib: int = 1024, turns: int = 10) -> float:
    """Bytes per second, read and written, of a copy within the device's memory."""
    source = torch.ones(mib * 2**18, device=DEVICE)  # float32
    target = torch.empty_like(source)
    times = []
    for _ in range(turns + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * mib * 2**20 / (1e-3 * float(np.median(times[2:])))


def moved_bytes(shape: Shape, dtype) -> dict:
    """Bytes that forward, and forward+backward, cannot but read or write. The state is too small to count."""
    B, T, H, K, V = shape
    wide, gates = B * T * H * dtype.itemsize, 2 * 4 * B * T * H
    given, out = (2 * K + V) * wide + gates, V * wide
    return {"forward": given + out, "forward_backward": 3 * given + 2 * out}


def relative(x, reference) -> float:
    """|x - reference| / |reference|, Euclidean norms; |x| where the reference is zero."""
    size = reference.norm()
    return ((x.double() - reference).norm() / (size if size > 0 else 1.0)).item()


def exact(tensors, grads, *, scale) -> list:
    """out, state and every gradient in float64 for the given inputs, in the order of bench_cpu.NAMES."""
    doubles = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    function = functools.partial(core.delta_rule, scale=scale, impl="torch")
    return bench_cpu.results(function, doubles, [x.double() for x in grads])


def errors(function, tensors, grads, reference, *, scale) -> dict:
    """Relative error of out, state and every gradient."""
    given = bench_cpu.results(functools.partial(function, scale=scale, last=True), tensors, grads)
    return {name: relative(x, r) for name, x, r in zip(bench_cpu.NAMES, given, reference, strict=True)}


def quartiles(times) -> list:
    return [float(x) for x in np.percentile(times, (25, 50, 75))]


# ------------------------------------------------------------------------------------------------ what one process measures


def first_calls(job: dict) -> list[dict]:
    """Seconds from the import of one implementation to its first gradients, then what else other processes will need compiled."""
    name, shape, dtype = job["impl"], Shape(*job["shape"]), DTYPES[job["dtype"]]
    row = dict(impl=name, label=label(name), shape=shape, at_once=job["at_once"], error=None)
    with refusals(row):
        tensors, (d_out, _) = inputs(shape, dtype=dtype), cotangents(shape, dtype=dtype)
        synchronize()
        start = time.perf_counter()
        function = load(name)
        row["import_s"] = time.perf_counter() - start
        bench_cpu.forward_backward(timed(function, shape), tensors, [d_out])()
        synchronize()
        row["first_call_s"] = time.perf_counter() - start
    if job["all"] and not row["error"]:
        with refusals(row, "later"):  # the process that measures will meet it again, and report it
            bench_cpu.forward(timed(function, shape), tensors)()
            short = shape._replace(T=min(shape.T, ERROR_TOKENS))
            tensors, grads = inputs(short, dtype=dtype), cotangents(short, dtype=dtype)
            bench_cpu.results(functools.partial(function, scale=shape.K**-0.5, last=True), tensors, grads)
            synchronize()
    return [row]


def wait_for_turn(path: str):
    """The GPU for this process alone: an open file, locked until it is closed. Peers take up to 20 s to import, which others may
    do while one measures.
    """
    turn = open(path, "w")
    fcntl.flock(turn, fcntl.LOCK_EX)
    return turn


def speed(job: dict) -> list[dict]:
    """Time, memory and error of every implementation at one shape, in one process, on the same tensors."""
    shape, dtype = Shape(*job["shape"]), DTYPES[job["dtype"]]
    rows, functions, calls = {}, {}, {}
    for name in job["impls"]:
        rows[name] = dict(impl=name, label=label(name), shape=shape, dtype=job["dtype"], error=None)
        with refusals(rows[name]):
            functions[name] = load(name)
    _turn = wait_for_turn(job["turn"]) if "turn" in job else None  # ends with this function
    bandwidth = copy_bandwidth()
    limit = {what: 1e3 * size / bandwidth for what, size in moved_bytes(shape, dtype).items()}
    tensors, (d_out, _) = inputs(shape, dtype=dtype), cotangents(shape, dtype=dtype)
    for name, row in rows.items():
        row.update(bandwidth=bandwidth, limit_ms=limit, wall_ms={}, wall_ratio={}, device_ms={}, share={}, kernels={})
        row.update(peak_mib=None, errors={}, failed={})
        if row["error"]:
            continue
        with refusals(row):
            run = timed(functions[name], shape)
            both = bench_cpu.forward(run, tensors), bench_cpu.forward_backward(run, tensors, [d_out])
            for call in reversed(both):  # whatever compiles or tunes itself does so here, on the shape measured
                call()
                synchronize()
            calls[name] = dict(zip(WHAT, both, strict=True))
    for what in WHAT:
        quick = {name: call[what] for name, call in calls.items() if name != "torch"}
        slow = {name: call[what] for name, call in calls.items() if name == "torch"}
        times = bench_cpu.interleave(quick, pairs=job["pairs"], synchronize=synchronize)
        turns = min(job["pairs"], TORCH_TURNS)
        times |= bench_cpu.interleave(slow, pairs=turns, warmup=1, synchronize=synchronize)
        for name, measured in times.items():
            row = rows[name]
            row["wall_ms"][what] = quartiles(measured)
            if "ours" in quick and name in quick and name != "ours":
                row["wall_ratio"][what] = bench_cpu.ratio(measured, times["ours"])
            steps = TORCH_STEPS if name == "torch" else job["steps"]
            with refusals(row["failed"], f"device ms, {what}"):
                row["device_ms"][what], row["kernels"][what] = device_work(calls[name][what], steps=steps)
                row["share"][what] = limit[what] / row["device_ms"][what]
    for name, call in calls.items():
        with refusals(rows[name]["failed"], "peak"):
            rows[name]["peak_mib"] = peak_mib(call["forward_backward"])
    del tensors, d_out, calls
    short = shape._replace(T=min(shape.T, ERROR_TOKENS))
    tensors, grads = inputs(short, dtype=dtype, seed=2), cotangents(short, dtype=dtype, seed=3)
    reference = exact(tensors, grads, scale=shape.K**-0.5)
    for name, function in functions.items():
        if rows[name]["error"] is None:
            with refusals(rows[name]["failed"], "error"):
                rows[name]["errors"] = errors(function, tensors, grads, reference, scale=shape.K**-0.5)
    return list(rows.values())


# ------------------------------------------------------------------------------------------------ the grid of errors


class Case(NamedTuple):
    """One point of the grid. `scale`: "1" or "K^-0.5"; the other words are those of `inputs`."""

    K: int
    V: int
    T: int = 500
    dtype: str = "bf16"
    decay: str = "usual"
    keys: str = "random"
    gates: str = "open"
    scale: str = "K^-0.5"

    def __str__(self):
        gates = f"decay {self.decay}, keys {self.keys}, gates {self.gates}, scale {self.scale}"
        return f"K{self.K} V{self.V} T{self.T} {self.dtype}, {gates}"


LENGTHS = (1, 63, 64, 65, 500, ERROR_TOKENS, 2049)
DECAYS, KEYS, GATES, SCALES = (
    ("usual", "slow", "fast", "none"),
    ("random", "correlated"),
    ("open", "shut"),
    ("1", "K^-0.5"),
)
FULL = [(64, 128), (128, 128)]  # widths at which everything meets everything
WIDTHS = [
    *FULL,
    (16, 16),
    (16, 256),
    (50, 64),
    (50, 100),
    (64, 50),
    (100, 16),
    (100, 100),
    (128, 50),
    (256, 128),
    (256, 256),
]


def cases(K: int, V: int, dtypes=tuple(DTYPES)) -> list[Case]:
    """The grid at one pair of widths: a full product in bf16 for those in FULL, each setting in turn for the others."""
    plain = Case(K, V)
    if (K, V) in FULL:
        product = itertools.product(LENGTHS, DECAYS, KEYS, GATES, SCALES)
        chosen = [Case(K, V, T, "bf16", d, k, b, s) for T, d, k, b, s in product]
    else:
        chosen = [plain._replace(T=T, scale=scale) for T in LENGTHS for scale in SCALES]
        chosen += [plain._replace(decay=d, keys=k, gates=b) for d in DECAYS for k in KEYS for b in GATES]
    for dtype in ("fp16", "fp32"):
        other = plain._replace(dtype=dtype)
        chosen += [other._replace(T=T) for T in LENGTHS]
        chosen += [other._replace(decay=d, keys=k, gates=b) for d in DECAYS for k in KEYS for b in GATES]
    return [case for case in dict.fromkeys(chosen) if case.dtype in dtypes]


def error_grid(job: dict) -> Iterator[dict]:
    """Errors of every implementation over the cases of one pair of widths; peers in bf16 only.

    A peer that fails twice running is not tried again: some take a minute to fail. Where a failure has ended a process before,
    `done` says how many cases it had tried, and `broken` whose failure it was: not tried again either. Before each attempt a row
    says what is being tried.
    """
    functions, failures = {}, dict.fromkeys(job["impls"], 0)
    for case in cases(*job["widths"], job["dtypes"])[job.get("done", 0) :]:
        shape, dtype = Shape(2, case.T, 4, case.K, case.V), DTYPES[case.dtype]
        scale = 1.0 if case.scale == "1" else case.K**-0.5
        options = dict(decay=case.decay, keys=case.keys, gates=case.gates)
        tensors, grads = inputs(shape, dtype=dtype, **options), cotangents(shape, dtype=dtype)
        reference = exact(tensors, grads, scale=scale)
        for name in job["impls"]:
            if case.dtype != "bf16" and IMPLS[name]:
                continue
            row = dict(impl=name, label=label(name), case=case._asdict(), error=None)
            if name in job.get("broken", ()):
                row["error"] = "not tried: its failure ended a process before at these widths"
            elif failures[name] == 2 and name != "ours":
                row["error"] = "not tried: failed twice before at these widths"
            else:
                yield dict(
                    trying=dict(impl=name, label=row["label"], case=row["case"])
                )  # for who sees this process die
                with refusals(row):
                    if name not in functions:
                        functions[name] = load(name)
                    row["errors"] = errors(functions[name], tensors, grads, reference, scale=scale)
                failures[name] = failures[name] + 1 if row["error"] else 0
            yield row


# ------------------------------------------------------------------------------------------------ one token at a time


def load_step(name: str):
    """One token as a function (q, k, v, beta, g, state) of (out, state); q, k [B, H, K], v [B, H, V], beta, g [B, H]."""
    if name == "fla":
        from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule as peer

        def call(q, k, v, beta, g, state):
            one = dict(q=q[:, None], k=k[:, None], v=v[:, None], g=g[:, None], beta=beta[:, None])
            out, state = peer(**one, scale=k.shape[-1] ** -0.5, initial_state=state, output_final_state=True)
            return out[:, 0], state

        return call
    if name == "flashqla":
        raise NotImplementedError("FlashQLA has no one-token step")
    if name == "torch":  # delta_step itself takes the kernel where there is one

        def formulas(q, k, v, beta, g, state):
            out, state = core._step(*(x.float() for x in (q, k, v, beta, g)), state, k.shape[-1] ** -0.5, False)
            return out.to(v.dtype), state

        return formulas
    if not (chosen := core.explain_impl("auto", device=DEVICE)).startswith("triton"):
        raise RuntimeError(f"delta_step would not run a kernel here: {chosen}")
    return lambda q, k, v, beta, g, state: core.delta_step(q, k, v, beta, g, state, scale=k.shape[-1] ** -0.5)


def generation(job: dict) -> list[dict]:
    """Microseconds per token of a CUDA graph that runs `tokens` steps, each from the state that the one before returned."""
    B, H, K, V, tokens, turns = job["B"], 8, 64, 128, 32, job["pairs"]
    sequence = inputs(Shape(B, tokens, H, K, V), dtype=DTYPES[job["dtype"]])
    each = [[x.detach()[:, t].contiguous() for x in sequence.values()] for t in range(tokens)]
    rows = []
    for name in job["impls"]:
        row = dict(impl=name, label=label(name), B=B, us={}, error=None)
        rows.append(row)
        with refusals(row), torch.no_grad():
            step, state = load_step(name), torch.zeros(B, H, K, V, device=DEVICE)

            def advance(step=step, state=state):
                now = state
                for token in each:
                    _, now = step(*token, now)
                state.copy_(now)  # once in 32 tokens: the graph starts where it ended

            graph = capture(advance)
            fresh = []
            for _ in range(turns):
                state.zero_()
                fresh.append(replay_us(graph) / tokens)
            for _ in range(100_000 // tokens):
                graph.replay()
            late = [replay_us(graph) / tokens for _ in range(turns)]
            row["us"] = {"1": quartiles(fresh), "100000": quartiles(late)}
            if not state.isfinite().all():
                raise FloatingPointError("the state is not finite after 100,000 tokens")
    return rows


def capture(call) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `call`, which runs twice first, on a side stream, to compile and to warm the allocator."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    synchronize()
    return graph


def replay_us(graph) -> float:
    """Microseconds of one replay between two events on the device."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end)


# ------------------------------------------------------------------------------------------------ the process

KINDS = {"first": first_calls, "speed": speed, "errors": error_grid, "step": generation}


def versions() -> dict:
    """Versions of what is installed of torch, triton and the peers' packages."""
    found = {}
    for name in ("torch", "triton", "tilelang", *filter(None, IMPLS.values())):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def brief(row: dict) -> str:
    """A row as a line of JSON, its numbers to six digits."""
    rounded = json.loads(json.dumps(row), parse_float=lambda digits: float(f"{float(digits):.6g}"))
    return json.dumps(rounded)


def main(job: dict):
    """Measure, and leave the rows in the file that the job names, each as soon as it is there."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    stamp = dict(bench=job["kind"], gpu=gpu, versions=versions())
    with open(job["rows"], "w", buffering=1) as out:
        for row in KINDS[job["kind"]](job):
            out.write(brief(row | stamp) + "\n")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
