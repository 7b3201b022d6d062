"""Speed, memory and agreement of the delta rule on a CPU, beside transformers' chunked PyTorch path of Qwen3-Next.

    python bench_cpu.py [--pairs 30] [--threads 2]

Both run in this process on the same tensors, taking turns, so that whatever else the machine does meets both. Printed:
relative errors against the float64 reference, milliseconds (median and interquartile range), the ratio of each pair
(median, with the interval that holds the true median with 95% confidence), and the peak memory of a call.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F

import core

SHAPE = dict(B=2, T=2048, H=8, K=64, V=128)  # where speed is measured
SMALL = dict(B=1, T=512, H=4, K=64, V=128)  # where the token loop in float64 is affordable
NAMES = ("out", "state", "dq", "dk", "dv", "dbeta", "dg")


# ------------------------------------------------------------------------------------------------ measurement


class Ratio(NamedTuple):
    """Median over pairs of slow / fast, and the bounds of its 95% confidence interval."""

    median: float
    low: float
    high: float


def interleave(calls: dict, *, pairs: int, warmup: int = 3, synchronize=lambda: None) -> dict:
    """Milliseconds of every call in `calls` (name: function without arguments), `pairs` each, taking turns.

    `synchronize` runs before each clock reading: `torch.cuda.synchronize` on a GPU. The order within a turn alternates.
    """
    times = {name: [] for name in calls}
    for turn in range(warmup + pairs):
        order = list(calls.items())
        for name, call in order if turn % 2 else reversed(order):
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            if turn >= warmup:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def ratio(slow: list[float], fast: list[float]) -> Ratio:
    """Ratio of paired times. The interval is that of order statistics: it assumes no distribution."""
    ratios = np.sort(np.array(slow) / np.array(fast))
    rank = int(scipy.stats.binom.ppf(0.025, len(ratios), 0.5))
    return Ratio(
        float(np.median(ratios)),
        float(ratios[max(rank - 1, 0)]),
        float(ratios[min(len(ratios) - rank, len(ratios) - 1)]),
    )


def spread(times: list[float]) -> str:
    """Median and interquartile range, in the unit of `times`."""
    low, middle, high = np.percentile(times, (25, 50, 75))
    return f"{middle:.1f} [{low:.1f}, {high:.1f}]"


# ------------------------------------------------------------------------------------------------ what is measured


def inputs(B: int, T: int, H: int, K: int, V: int, *, dtype=torch.float32, device="cpu", seed: int = 0) -> dict:
    """Unit queries and keys, normal values, write strengths in (0, 1), log-decays of about -0.06 (half-life 11 tokens)."""
    gen = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64)  # noqa: E731
    tensors = dict(
        q=F.normalize(draw(B, T, H, K), dim=-1),
        k=F.normalize(draw(B, T, H, K), dim=-1),
        v=draw(B, T, H, V),
        beta=draw(B, T, H).sigmoid(),
        g=F.logsigmoid(draw(B, T, H) + 3),
    )
    return {name: x.to(device, dtype).requires_grad_() for name, x in tensors.items()}


def cotangents(B: int, T: int, H: int, K: int, V: int, *, dtype=torch.float32, device="cpu") -> list:
    """Gradients of a loss with respect to out and state."""
    gen = torch.Generator().manual_seed(1)
    shapes = (B, T, H, V), (B, H, K, V)
    return [torch.randn(*shape, generator=gen, dtype=torch.float64).to(device, dtype) for shape in shapes]


def ours(q, k, v, beta, g, *, impl: str = "torch"):
    """`core.delta_rule` with the scale that the peer applies, K^-0.5."""
    return core.delta_rule(q, k, v, beta, g, scale=k.shape[-1] ** -0.5, impl=impl)


def load_peer():
    """transformers' function with our argument order, or the reason why it is absent (a string)."""
    try:
        import transformers
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule
    except ImportError as error:
        return f"absent: {error}"
    transformers.logging.set_verbosity_error()
    return lambda q, k, v, beta, g: torch_chunk_gated_delta_rule(q, k, v, g, beta, output_final_state=True)


def forward(function, tensors):
    """A call without a graph."""

    def call():
        with torch.no_grad():
            return function(**tensors)

    return call


def forward_backward(function, tensors, grads):
    """A call with a graph and the gradient of every input, which replaces that of the call before."""

    def call():
        return torch.autograd.grad(function(**tensors), list(tensors.values()), grads)

    return call


def results(function, tensors, grads) -> list:
    """out, state and every gradient, in the order of NAMES."""
    outputs = function(**tensors)
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, list(tensors.values()), grads)]


def errors(function, *, shape: dict = SMALL, dtype=torch.float32, device="cpu") -> dict:
    """Relative error of every output and gradient against the token loop in float64: |x - ref| / |ref|, Euclidean norms."""
    exact = inputs(**shape, dtype=torch.float64)
    reference = results(lambda **x: ours(**x, impl="reference"), exact, cotangents(**shape, dtype=torch.float64))
    given = results(
        function, inputs(**shape, dtype=dtype, device=device), cotangents(**shape, dtype=dtype, device=device)
    )
    pairs = zip(NAMES, given, reference, strict=True)
    return {name: ((x.detach().cpu().double() - r).norm() / r.norm()).item() for name, x, r in pairs}


# ------------------------------------------------------------------------------------------------ peak memory


def _high_water() -> float:
    """Largest resident size of this process so far, MiB. Linux hands its ru_maxrss down to children, hence /proc there."""
    try:
        with open("/proc/self/status") as status:
            return next(float(line.split()[1]) / 2**10 for line in status if line.startswith("VmHWM"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if platform.system() == "Darwin" else 10)


def peak_here(which: str, what: str, threads: int) -> float:
    """MiB by which the largest resident size of this process grows during one call. For a process of its own."""
    torch.set_num_threads(threads)
    function = ours if which == "ours" else load_peer()

    def call(B, T, H, K, V):
        # Constants, made without temporaries: memory that is free already would hide what the call takes.
        fill = lambda value, *shape: torch.full((B, T, H, *shape), value, requires_grad=True)  # noqa: E731
        tensors = dict(q=fill(0.1, K), k=fill(0.1, K), v=fill(1.0, V), beta=fill(0.5), g=fill(-0.1))
        grads = [torch.ones(B, T, H, V), torch.ones(B, H, K, V)]
        run = forward(function, tensors) if what == "forward" else forward_backward(function, tensors, grads)
        before = _high_water()
        _results = run()  # kept: its tensors belong to the peak
        return _high_water() - before

    call(**dict(SHAPE, T=64))  # the libraries' own buffers
    return call(**SHAPE)


def peak(which: str, what: str, threads: int) -> float:
    """`peak_here` in a fresh process."""
    command = [sys.executable, __file__, "--peak", which, what, "--threads", str(threads)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------------ the table


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=24, help="measured pairs per row")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name, least in (("pairs", 6), ("threads", 1)):  # 6: below, no order statistic bounds a median with 95%
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)}: expected at least {least}")
    if args.peak:
        print(json.dumps(peak_here(*args.peak, args.threads)))
        return
    torch.set_num_threads(args.threads)
    peer = load_peer()
    here = not isinstance(peer, str)
    versions = f"torch {torch.__version__}"
    if here:
        import transformers

        versions += f", transformers {transformers.__version__}"
    print(f"gated delta rule on a CPU, float32, {args.threads} threads; Python {platform.python_version()}, {versions}")
    print(f"{core.explain_impl('auto', device='cpu')}\n")

    print(f"relative error against the float64 token loop, {SMALL}")
    print(f"{'':14s}" + "".join(f"{name:>9s}" for name in NAMES))
    for name, function in (("ours", ours), ("transformers", peer)):
        row = "".join(f"{e:9.1e}" for e in errors(function).values()) if callable(function) else f"  {function}"
        print(f"{name:14s}{row}")

    print(f"\nmilliseconds, median [quartiles] of {args.pairs} pairs, {SHAPE}")
    print(f"{'':26s}{'ours':>24s}  {'transformers':>24s}   ratio [95%]          peak MiB, ours / transformers")
    tensors, grads = inputs(**SHAPE), cotangents(**SHAPE)
    calls = {"ours": ours, "transformers": peer} if here else {"ours": ours}
    rows = {
        "forward": lambda f: forward(f, tensors),
        "forward+backward": lambda f: forward_backward(f, tensors, grads),
    }
    for what, make in rows.items():
        times = interleave({name: make(function) for name, function in calls.items()}, pairs=args.pairs)
        peaks = " / ".join(f"{peak(name, what, args.threads):.0f}" for name in calls)
        if here:
            r = ratio(times["transformers"], times["ours"])
            line = f"{spread(times['transformers']):>24s}   {r.median:.2f}x [{r.low:.2f}, {r.high:.2f}]   {peaks}"
        else:
            line = f"   transformers {peer}   {peaks}"
        print(f"{what:26s}{spread(times['ours']):>24s}  {line}", flush=True)


if __name__ == "__main__":
    main()
