"""Where a training step of the hybrid goes: time by part beside what the hardware allows, and peak memory.

    python bench_step.py                                       33M hybrid, 8 x 2,048 tokens, eager
    python bench_step.py --compile --graph --memory-op fla     another memory operation under the same settings
    python bench_step.py --toy                                 a dry run on any machine

A step is forward, backward, clipping and AdamW (fused on a GPU), in bf16 autocast over fp32 weights, every token scored. On a
GPU, device time is the sum of kernel durations by torch.profiler, and each part stands beside its own bound: the sum over
its matrix products of max(FLOPs / rate, bytes / bandwidth), and over the elementwise work between two of them of the bytes of
one pass, with rate and bandwidth measured first, in the same process. Nothing is counted at better fusion than that, except
the memory operation: its bound is each input read once and each output written once. MB are 2^20 bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bench_measure
import chunked
import config
import core
import model
import runs
import train

TOY = config.HybridConfig(d_model=32, n_heads=2, head_dim=16, value_dim=16, vocab_size=512, window_size=16)
MB = 2**20


# ------------------------------------------------------------------------------------------------ measurement


def wall_ms(call: Callable, *, device: torch.device, repeats: int, warmup: int = 3) -> float:
    """Median milliseconds of `call`, each waited for."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for i in range(warmup + repeats):
        wait()
        start = time.perf_counter()
        call()
        wait()
        if i >= warmup:
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def device_ms(call: Callable, *, repeats: int = 5, warmup: int = 3) -> tuple[float, dict[str, float]]:
    """Milliseconds of kernels, copies and fills in a call, the median of `repeats`, and those of the middle one by kernel."""
    for _ in range(warmup):
        call()
    return bench_measure.device_work(call, steps=repeats)


@dataclass(frozen=True)
class Speed:
    """What this device does, measured: `rate` bf16 FLOP/s of a matrix product of 8192^3, `bandwidth` byte/s of a copy (read
    and write counted)."""

    rate: float
    bandwidth: float

    @classmethod
    def measure(cls, device: torch.device) -> Speed:
        a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        matmul = wall_ms(lambda: a @ a, device=device, repeats=20)
        return cls(2 * 8192**3 / matmul * 1e3, bench_measure.copy_bandwidth())


# ------------------------------------------------------------------------------------------------ bounds


@dataclass(frozen=True)
class Bound:
    """Seconds that a part takes at least on a device of `speed`, from shapes. M tokens; widths as in the model."""

    speed: Speed

    def passes(self, moved: float) -> float:
        """Reading or writing so many bytes."""
        return moved / self.speed.bandwidth

    def product(self, m: int, k: int, n: int) -> float:
        """One product [m, k] [k, n] in bf16."""
        return max(2 * m * k * n / self.speed.rate, self.passes(2 * (m * k + k * n + m * n)))

    def linear(self, M: int, i: int, o: int) -> float:
        """Forward, gradient of the input, gradient of the weight (fp32)."""
        return self.product(M, i, o) + self.product(M, o, i) + self.product(i, M, o) + self.passes(2 * i * o)

    def norm(self, M: int, d: int) -> float:
        """fp32 in, bf16 out; backward: x and the gradient of the output in, the residual's gradient in and out."""
        return self.passes(M * d * (4 + 2) + M * d * (4 + 2 + 4 + 4))

    def residual(self, M: int, d: int) -> float:
        """x + y: fp32 in and out, bf16 y; backward: the bf16 copy of the gradient."""
        return self.passes(M * d * (4 + 2 + 4) + M * d * (4 + 2))

    def g_layer(self, cfg: config.HybridConfig, M: int) -> float:
        d, K, V = cfg.d_model, cfg.n_heads * cfg.head_dim, cfg.n_heads * cfg.value_dim
        products = self.linear(M, d, K) + self.linear(M, d, V) + self.linear(M, V, d)
        keys = self.passes(
            2 * M * K * (1 + 1 + cfg.shifted_value) + 2 * M * K * (3 + cfg.shifted_value)
        )  # normalise, shift
        gates = self.passes(3 * 2 * M * d)  # read once in each of the three products, whose other sides are thin
        return self.norm(M, d) + products + keys + gates + self.residual(M, d)

    def memory(self, cfg: config.HybridConfig, M: int, reads: int) -> float:
        K, V, H = cfg.n_heads * cfg.head_dim, cfg.n_heads * cfg.value_dim, cfg.n_heads
        write = 2 * M * (K + V) + 8 * M * H  # k, v in bf16, beta and g in fp32
        # Forward; backward: inputs again, the gradient of out in, and as many gradients as there are inputs.
        return self.passes(3 * write + reads * 2 * M * (3 * K + 2 * V))

    def s_layer(self, cfg: config.HybridConfig, M: int, reads: bool) -> float:
        d, K, V = cfg.d_model, cfg.n_heads * cfg.head_dim, cfg.n_heads * cfg.value_dim
        total = self.norm(M, d) + 4 * self.linear(M, d, d) + self.residual(M, d)
        if reads:
            total += self.linear(M, d, K) + self.linear(M, V, d) + self.passes(2 * M * K * (2 + 3))  # relu
            total += (
                self.passes(3 * 2 * M * d) + self.passes(2 * M * V * (2 + 3)) + self.passes(2 * M * d * 3)
            )  # gate, sum
        return total

    def attention(self, cfg: config.HybridConfig, M: int) -> float:
        """q, k, v in, out out; backward: these and the gradient of out in, three gradients out. W keys per query."""
        flops = 4 * M * cfg.window_size * cfg.d_model
        moved = 2 * M * cfg.d_model
        return max(flops / self.speed.rate, self.passes(4 * moved)) + max(
            2.5 * flops / self.speed.rate, self.passes(8 * moved)
        )

    def feed_forward(self, cfg: config.HybridConfig, M: int) -> float:
        d, f = cfg.d_model, cfg.ffn_dim
        products = 2 * self.linear(M, d, f) + self.linear(M, f, d)
        return self.norm(M, d) + products + self.passes(2 * M * f * (3 + 6)) + self.residual(M, d)

    def loss(self, cfg: config.HybridConfig, M: int) -> float:
        d, n = cfg.d_model, cfg.vocab_size
        softmax = self.passes(2 * M * n * 2)
        return self.norm(M, d) + self.linear(M, d, n) + softmax

    def embedding(self, cfg: config.HybridConfig, M: int) -> float:
        """Rows in, rows out; backward: gradients in, rows of the table's gradient in and out."""
        return self.passes(4 * M * cfg.d_model * (2 + 3))

    def clip(self, parameters: int) -> float:
        return self.passes(4 * parameters * (1 + 2))

    def optimizer(self, parameters: int) -> float:
        """AdamW: weight, gradient and two moments in; weight and moments out."""
        return self.passes(4 * parameters * (4 + 3))


def model_flops(cfg: config.HybridConfig, parameters: int, tokens: int) -> float:
    """FLOPs that the model needs for a step: 6 per parameter and token (the tied table counts once, as the head), for window
    attention 3 * 4 W d, for the delta rule 3 * 4 K V H per G layer (recall and write) and 3 * 2 K V H per read.

    Recomputation and what the chunked form does on top are not counted.
    """
    state = cfg.head_dim * cfg.value_dim * cfg.n_heads
    pattern = cfg.layer_pattern
    g, s = pattern.count("G"), pattern.count("S")
    reading = sum("G" in pattern[:i] for i, letter in enumerate(pattern) if letter == "S")
    per_token = 6 * parameters + 3 * (s * 4 * cfg.window_size * cfg.d_model + (4 * g + 2 * (g + reading)) * state)
    return per_token * tokens


# ------------------------------------------------------------------------------------------------ the memory operation


class _FlaMemory:
    """A memory of fla's: nothing is shared between reads, so each runs the whole operator again.

    Its own normalisation covers q and k together; here each may want it or not, so it happens before.
    """

    def __init__(self, operator, k, v, beta, g, normalize_k):
        k = core._unit(k).to(k.dtype) if normalize_k else k
        self._operator, self._written, self.state = operator, (k, v, beta, g), None

    def read(self, q, scale=1.0, *, normalize=False):
        k, v, beta, g = self._written
        q = core._unit(q).to(q.dtype) if normalize else q
        out, state = self._operator(q, k, v, g, beta, scale=scale, output_final_state=self.state is None)
        self.state = state if self.state is None else self.state
        return out


def memory_write(name: str) -> Callable | str:
    """What stands in place of `core.delta_write` for --memory-op `name`, or, as a string, why it cannot."""
    if name != "fla":
        named, write = {"ours": "triton", "torch": "torch"}[name], core.delta_write
        try:
            core.explain_impl(named, device="cuda" if torch.cuda.is_available() else "cpu", dtype=torch.bfloat16)
        except ValueError as error:
            return str(error)

        def ours(
            k, v, beta, g, *, q=None, initial_state=None, erase="decayed", normalize_k=False, normalize_q=False,
            chunk_size=64, impl="auto",
        ):  # fmt: skip
            options = dict(initial_state=initial_state, erase=erase, normalize_k=normalize_k, normalize_q=normalize_q)
            return write(k, v, beta, g, q=q, impl=named, chunk_size=chunk_size, **options)

        return ours
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError as error:
        return f"absent: {error}"
    if not torch.cuda.is_available():
        return "needs a CUDA GPU"

    def theirs(
        k, v, beta, g, *, q=None, initial_state=None, erase="decayed", normalize_k=False, normalize_q=False,
        chunk_size=64, impl="auto",
    ):  # fmt: skip
        if erase != "decayed" or initial_state is not None:
            raise ValueError(
                f"erase = {erase!r}: fla recalls from the decayed state, and starts here from an empty one"
            )
        memory = _FlaMemory(chunk_gated_delta_rule, k, v, beta, g, normalize_k)
        if q is not None:
            memory.out = memory.read(q, normalize=normalize_q)
        return memory

    return theirs


@chunked.applied
class _through(torch.autograd.Function):
    """Costs nothing: returns the tensor at `which`, and as gradients of all tensors tensors of their shapes."""

    @staticmethod
    def forward(ctx, which, *tensors):
        ctx.which = which
        ctx.save_for_backward(*tensors)
        return tensors[which].view_as(tensors[which])

    @staticmethod
    def backward(ctx, grad):
        return None, *(grad if i == ctx.which else x for i, x in enumerate(ctx.saved_tensors))


class _FreeMemory:
    """In place of a memory, to time a layer without it: a read is the values."""

    def __init__(self, k, v, beta, g):
        self._written = k, v, beta, g
        self.state = v[:, -1]

    def read(self, q, scale=1.0, *, normalize=False):
        k, v, beta, g = self._written
        return _through(2, q, k, v, beta, g)


def _free_write(
    k, v, beta, g, *, q=None, initial_state=None, erase="decayed", normalize_k=False, normalize_q=False,
    chunk_size=64, impl="auto",
):  # fmt: skip
    memory = _FreeMemory(k, v, beta, g)
    memory.out = None if q is None else memory.read(q)
    return memory


def _free_attention(q, k, v, window, past):
    return _through(0, q, k, v)


@contextlib.contextmanager
def _replaced(module, name: str, value):
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


# ------------------------------------------------------------------------------------------------ the step


class Step:
    """One training step on fixed tokens: `run()` does it, `replay` says how (eager, or a captured CUDA graph)."""

    def __init__(self, cfg: config.HybridConfig, *, batch: int, length: int, device: torch.device, graph: bool):
        generator = torch.Generator().manual_seed(0)
        self.cfg, self.device, self.graph = cfg, device, None
        self.net = model.build(cfg).to(device).train()
        self.tokens = torch.randint(cfg.vocab_size, (batch, length), generator=generator).to(device)
        self.targets = torch.randint(cfg.vocab_size, (batch, length), generator=generator).to(device)
        groups = train._decay_groups(self.net.parameters(), 0.01)
        on_gpu = device.type == "cuda"
        options = dict(fused=True, capturable=graph) if on_gpu else {}
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), **options)

    def autocast(self):
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def forward(self) -> Tensor:
        with self.autocast():
            return self.net(self.tokens, self.targets).loss

    def clip(self):
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0, foreach=True)

    def eager(self):
        self.forward().backward()
        self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def capture(self):
        """Record the whole step as one CUDA graph; `run` replays it. Every shape is fixed from here on."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, fills caches, and makes the optimizer's state
            for _ in range(3):
                self.eager()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.eager()

    def run(self):
        if self.graph is None:
            self.eager()
        else:
            self.graph.replay()

    def optimizer_bytes(self) -> int:
        states = (x for state in self.optimizer.state.values() for x in state.values())
        return sum(x.nbytes for x in states if isinstance(x, Tensor) and x.ndim)

    def peak_bytes(self) -> int:
        """Largest amount allocated during a step that follows others: weights, gradients, optimizer and all."""
        for _ in range(3):
            self.eager()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.eager()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


# ------------------------------------------------------------------------------------------------ parts


@dataclass
class Part:
    """A piece of the step: `call` does its forward and backward on what it met in a real one; `bound` in seconds."""

    name: str
    call: Callable
    bound: Callable[[Bound], float]


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.is_floating_point())


def _both_ways(function: Callable, wanted: Iterable[Tensor], autocast: Callable) -> Callable:
    """A call that does `function()` and its gradients with respect to `wanted`; what comes in is the output itself."""
    wanted = list(wanted)

    def call():
        with autocast():
            out = function()
        outs = out if isinstance(out, tuple) else (out,)
        torch.autograd.grad(outs, wanted, [x.detach() for x in outs], allow_unused=True)

    return call


def _watch(step: Step) -> dict[str, list]:
    """One forward pass, and what it met: inputs of the layers, feed-forward blocks and loss, of attention, of memories."""
    net, seen = step.net, {"layer": [], "ffn": [], "norm": [], "attention": [], "memory": []}
    write, attention = core.delta_write, model.window_attention

    class Watched:
        def __init__(self, memory, queries):
            self.state, self._memory, self._queries = None, memory, queries

        def read(self, q, scale=1.0, *, normalize=False):
            self._queries.append((_leaf(q), normalize))
            out = self._memory.read(q, scale, normalize=normalize)
            self.state = self._memory.state
            return out

    def watched_write(
        k, v, beta, g, *, q=None, initial_state=None, erase="decayed", normalize_k=False, normalize_q=False,
        chunk_size=64, impl="auto",
    ):  # fmt: skip
        options, queries = {"erase": erase, "normalize_k": normalize_k, "chunk_size": chunk_size, "impl": impl}, []
        first = {} if q is None else {"q": _leaf(q), "normalize_q": normalize_q}
        seen["memory"].append(([_leaf(x) for x in (k, v, beta, g)], first, queries, options))
        memory = Watched(write(k, v, beta, g, q=q, normalize_q=normalize_q, **options), queries)
        memory.state, memory.out = memory._memory.state, None if q is None else memory._memory.out
        return memory

    def watched_attention(q, k, v, window, past):
        seen["attention"].append([_leaf(x.transpose(1, 2)) for x in (q, k, v)])  # [B, T, H, D], as the layer makes them
        return attention(q, k, v, window, past)

    with contextlib.ExitStack() as stack:
        for name, modules in (("layer", net.layers), ("ffn", net.ffns), ("norm", [net.norm])):
            for module in modules:
                hook = module.register_forward_pre_hook(lambda _, args, n=name: seen[n].append(_leaf(args[0])))
                stack.callback(hook.remove)
        for module in (*net.layers, *net.ffns):  # what is watched runs as written, not as compiled
            stack.enter_context(_replaced(module, "_compiled_call_impl", None))
        stack.enter_context(_replaced(core, "delta_write", watched_write))
        stack.enter_context(_replaced(model, "window_attention", watched_attention))
        step.forward()
    return seen


def parts(step: Step) -> list[Part]:
    """The parts of a step, each to be timed alone on the tensors that it meets in a real forward pass."""
    net, cfg, M, seen, found = step.net, step.cfg, step.tokens.numel(), _watch(step), []

    def add(name, function, wanted, bound):
        found.append(Part(name, _both_ways(function, wanted, step.autocast), bound))

    def add_memory(x, layer):
        written, first, queries, options = seen["memory"].pop(0)
        through = lambda: layer(x, step.tokens, None, 0, None)[0]  # noqa: E731
        with_free = _replacing(core, "delta_write", _free_write, through)
        add("G projections", with_free, [x, *layer.parameters()], lambda b: b.g_layer(cfg, M))

        def operate():
            memory = core.delta_write(*written, **first, **options)
            later = (memory.read(q, normalize=normalize) for q, normalize in queries)
            return (memory.out, *later) if first else tuple(later)

        read = [*([first["q"]] if first else []), *(q for q, _ in queries)]
        add("memory operation", operate, [*written, *read], lambda b: b.memory(cfg, M, len(read)))
        return _FreeMemory(*written)

    def add_window(x, layer, memory):
        q, k, v = seen["attention"].pop(0)
        through = lambda: layer(x, memory, None, 0, None)[0]  # noqa: E731
        with_free = _replacing(model, "window_attention", _free_attention, through)
        read = () if memory is None else memory._written
        add(
            "S projections", with_free, [x, *read, *layer.parameters()], lambda b: b.s_layer(cfg, M, layer.reads_memory)
        )

        def attend():
            heads_first = (y.transpose(1, 2) for y in (q, k, v))
            return model.window_attention(*heads_first, cfg.window_size, None).transpose(1, 2)

        add("window attention", attend, [q, k, v], lambda b: b.attention(cfg, M))

    def add_feed_forward(x, ffn, norm):
        wanted = [x, *ffn.parameters(), *norm.parameters()]
        add("feed-forward", lambda: ffn(x, norm), wanted, lambda b: b.feed_forward(cfg, M))

    table, x, memory = net.embed.weight, seen["norm"][0], None
    add("embedding", lambda: net.embed(step.tokens), [table], lambda b: b.embedding(cfg, M))
    for i, (letter, layer) in enumerate(zip(cfg.layer_pattern, net.layers, strict=True)):
        if letter == "G":
            memory = add_memory(seen["layer"][i], layer)
        else:
            add_window(seen["layer"][i], layer, memory)
        add_feed_forward(seen["ffn"][i], net.ffns[i], net.norms[i])
    last = lambda: model.cross_entropy(net.norm(x), table, step.targets)  # noqa: E731
    add("final norm, loss", last, [x, net.norm.weight, table], lambda b: b.loss(cfg, M))
    return found + _updates(step)


def _replacing(module, name: str, value, call: Callable) -> Callable:
    def replaced():
        with _replaced(module, name, value):
            return call()

    return replaced


def _updates(step: Step) -> list[Part]:
    """Clipping and the optimizer, on gradients that stay."""
    parameters, count = list(step.net.parameters()), step.net.count_params()

    def given(call):
        def run():
            for p in parameters:
                p.grad = grads[p]
            call()
            for p in parameters:
                p.grad = None

        return run

    grads = {p: torch.full_like(p, 1e-4) for p in parameters}
    clip = Part("clipping", given(step.clip), lambda b: b.clip(count))
    return [clip, Part("AdamW", given(step.optimizer.step), lambda b: b.optimizer(count))]


def norm_part(step: Step) -> Part:
    """One RMSNorm alone, forward and backward: inside the parts above, and so no part of their sum."""
    cfg, norm = step.cfg, nn.RMSNorm(step.cfg.d_model, eps=1e-6).to(step.device)
    x = torch.randn(*step.tokens.shape, cfg.d_model, device=step.device, requires_grad=True)
    call = _both_ways(lambda: F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps), [x, norm.weight], step.autocast)
    moved = 4 * x.numel() * (2 + 3)  # fp32 in and out; backward: x and the gradient in, the gradient out
    return Part("(one RMSNorm alone)", call, lambda b: b.passes(moved))


# ------------------------------------------------------------------------------------------------ command line


def measure(step: Step, *, settings: dict, speed: Speed | None, peak: int, repeats: int) -> list[dict]:
    """Rows for the table and for --out: the whole step, then its parts. Times in ms; speed: None on a CPU."""
    wall = wall_ms(step.run, device=step.device, repeats=repeats)
    tokens = step.tokens.numel()
    whole = {**settings, "part": "step", "wall_ms": wall, "tokens_per_s": tokens / wall * 1e3}
    flops = model_flops(step.cfg, step.net.count_params(), tokens)
    rows = [whole]
    if speed is not None:
        total, kernels = device_ms(step.run)
        whole |= {"device_ms": total, "tflops": flops / 1e12, "mfu": flops / (wall / 1e3) / speed.rate}
        whole |= {"rate_tflops": speed.rate / 1e12, "bandwidth_tb": speed.bandwidth / 1e12}
        whole["kernels"] = dict(sorted(kernels.items(), key=lambda kv: -kv[1])[:25])
        whole |= {"peak_mb": peak / MB, "peak_without_adamw_mb": (peak - step.optimizer_bytes()) / MB}
    grouped: dict[str, dict] = {}
    for part in [*parts(step), norm_part(step)]:
        row = grouped.setdefault(part.name, {**settings, "part": part.name, "times": 0, "ms": 0.0, "bound_ms": 0.0})
        row["times"] += 1
        if speed is None:
            row["ms"] += wall_ms(part.call, device=step.device, repeats=repeats, warmup=1)
        else:
            row["ms"] += device_ms(part.call)[0]
            row["bound_ms"] += 1e3 * part.bound(Bound(speed))
    parts_sum = sum(row["ms"] for name, row in grouped.items() if not name.startswith("("))
    for row in grouped.values():
        if speed is None:
            del row["bound_ms"]  # a bound of another device says nothing
        else:
            row["ratio"] = row["ms"] / row["bound_ms"]
        rows.append(row)
    rows.append({**settings, "part": "other", "times": 1, "ms": whole.get("device_ms", wall) - parts_sum})
    return rows


def show(rows: list[dict]) -> str:
    """The rows as text."""
    whole, lines = rows[0], []
    lines.append(f"step: {whole['wall_ms']:.2f} ms wall, {whole['tokens_per_s']:,.0f} tokens/s")
    if "device_ms" in whole:
        lines[-1] += f", {whole['device_ms']:.2f} ms of kernels"
        lines.append(
            f"model FLOPs {whole['tflops']:.2f} T a step: {whole['mfu']:.1%} of the {whole['rate_tflops']:.0f} TFLOP/s measured; "
            f"copy {whole['bandwidth_tb']:.2f} TB/s"
        )
    if "peak_mb" in whole:
        lines.append(
            f"peak {whole['peak_mb']:,.0f} MB, {whole['peak_without_adamw_mb']:,.0f} MB without AdamW's moments"
        )
    lines.append(f"{'part':22}{'times':>6}{'ms':>10}{'bound':>10}{'ratio':>8}")
    for row in rows[1:]:
        bound = f"{row['bound_ms']:>10.3f}{row['ratio']:>8.2f}" if "bound_ms" in row else ""
        lines.append(f"{row['part']:22}{row['times']:>6}{row['ms']:>10.3f}{bound}")
    if "kernels" in whole:
        lines.append("longest kernels, ms a step:")
        lines += [f"  {ms:8.3f}  {name[:110]}" for name, ms in list(whole["kernels"].items())[:12]]
    return "\n".join(lines)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="seed", help="a preset of config.py (default: seed, 33M parameters)")
    parser.add_argument("--toy", action="store_true", help="a model of 32 channels instead, 2 x 64 tokens")
    parser.add_argument("--batch", type=int, default=8, help="sequences (default 8)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of each (default 2048)")
    choices, best = ("ours", "torch", "fla"), "ours" if torch.cuda.is_available() else "torch"
    parser.add_argument("--memory-op", choices=choices, default=best, help="what runs the delta rule (ours on a GPU)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the layers")
    parser.add_argument("--graph", action="store_true", help="capture the whole step as one CUDA graph")
    parser.add_argument("--repeats", type=int, default=20, help="steps timed (default 20)")
    parser.add_argument("--out", help="append the rows to this file, as JSON lines")
    args = parser.parse_args(given)
    try:
        config.preset(args.preset)
    except ValueError as error:
        parser.error(f"--preset: {error}")
    for name in ("batch", "length", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected at least 1")
    return args


def main(given: list[str] | None = None) -> int:
    """0 where a step was measured, else 1."""
    args = arguments(given)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.graph and device.type != "cuda":
        raise SystemExit("--graph: needs a CUDA GPU")
    cfg = TOY if args.toy else config.preset(args.preset)
    batch, length = (2, 64) if args.toy else (args.batch, args.length)
    settings = {"model": repr(cfg), "batch": batch, "length": length, "memory_op": args.memory_op}
    settings |= {
        "compile": args.compile,
        "graph": args.graph,
        "torch": torch.__version__,
        "device": train.device_name(),
        "revision": runs.git_revision(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    print(", ".join(f"{k} {v}" for k, v in settings.items()))
    write = memory_write(args.memory_op)
    if isinstance(write, str):
        rows = [settings | {"part": "step", "absent": write}]
        print(f"--memory-op {args.memory_op}: {write}")
    else:
        with _replaced(core, "delta_write", write):
            speed = Speed.measure(device) if device.type == "cuda" else None
            step = Step(cfg, batch=batch, length=length, device=device, graph=args.graph)
            if args.compile:
                step.net.compile_layers()
            peak = 0 if speed is None else step.peak_bytes()  # before a graph takes memory of its own
            if args.graph:
                step.capture()
            rows = measure(step, settings=settings, speed=speed, peak=peak, repeats=args.repeats)
        print(show(rows))
    if args.out:
        with open(args.out, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return 1 if isinstance(write, str) else 0


if __name__ == "__main__":
    sys.exit(main())
