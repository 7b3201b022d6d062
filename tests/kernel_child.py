"""The kernels against the float64 reference, case by case: on a GPU, or as a process of its own in Triton's interpreter.

The interpreter has to be chosen before Triton is imported: `run_in_interpreter` starts a script so, and this file as a script
runs CASES and prints one line of JSON for each, with what it found wrong. Nothing here imports Triton before that.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from test_core import NAMES, draw

import core

# ------------------------------------------------------------------------------------------------ bounds


def bound(name: str, x: torch.Tensor, dtype: torch.dtype, reads: int | None = None) -> float:
    """Largest relative error, |x - exact| / |exact| in Euclidean norms, of the result `name` for inputs of `dtype`.

    Two independent errors. Operands of products are float16 for 16-bit inputs: one eps of float16 for what is read and kept, 2.25
    for gradients, which come out of a longer chain. And a result in the dtype of the inputs is rounded once on the way out: a
    quarter of its eps over many values, up to half for few. In bfloat16: 2.2e-3, for the state 1e-3, for gradients 2.9e-3. The
    write and every read of a memory return d_k and d_g rounded so, and autograd rounds their sums.
    """
    if dtype == torch.float32:
        return 5e-6
    products = torch.finfo(torch.float16).eps * (2.25 if name.startswith("d_") else 1.0)
    rounding = torch.finfo(x.dtype).eps * (0.25 if x.numel() >= 1000 else 0.5)
    if name in ("d_k", "d_g"):
        rounding *= math.sqrt(1 + (reads or 0))
    return math.hypot(products, rounding)


# ------------------------------------------------------------------------------------------------ cases


class Case(NamedTuple):
    """One call and everything about it."""

    sizes: tuple[int, ...]  # B, T, H, K, V
    change: Callable[[dict[str, torch.Tensor]], None] | None = None  # edits what was drawn, in float64
    # None: delta_rule; else delta_write and so many reads, each normalised and scaled otherwise.
    reads: int | None = None
    erase: str = "decayed"
    start: bool = True
    normalize: bool = False
    scale: float = 0.7
    decay: float = 0.1
    cotangents: tuple[float, float] = (1.0, 1.0)  # factors on those of what is read and of the state
    tiles: tuple[int, ...] | None = (16, 2, 16)  # C, R, BV in place of kernels.plan's; None: its own
    groups: int | None = None  # kernels.AT_ONCE
    after: int = 0  # the first token that is compared
    each_head: bool = False  # compared head by head
    noise: tuple[
        str, ...
    ] = ()  # results whose terms cancel or vanish beside others: compared with d_beta if that is larger
    # How much larger than elsewhere errors may be: keys that nearly coincide magnify every rounding.
    magnified: float = 1.0
    replay: bool = False  # also without gradients, to the same bits
    float32_gates: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16)


def shut_some(x):
    """beta = 0 and every kind of closed gate, at tokens of their own and in runs."""
    gen = torch.Generator().manual_seed(3)
    x["beta"][torch.rand(x["beta"].shape, generator=gen) < 0.3] = 0.0
    kind = torch.randint(0, 20, x["g"].shape, generator=gen)
    x["g"][kind == 0] = -math.inf
    x["g"][(kind == 1) | (kind == 2)] = -60.0
    x["g"][kind == 3] = -9.0


def shut_all(x):
    x["beta"].zero_()


def correlate(x):
    """Cosines above 0.8 and full write strength: powers of L grow large before they cancel."""
    x["k"] = F.normalize(x["k"][:, :1] + 0.3 * x["k"], dim=-1)
    x["beta"].fill_(1.0)


def fill_gates(value):
    def change(x):
        x["g"].fill_(value)

    return change


def multiply(values=1.0, state=1.0):
    def change(x):
        x["v"] *= values
        x["initial_state"] *= state

    return change


def multiply_heads(x):
    """Every head in units of its own."""
    x["v"] *= 2.0 ** torch.linspace(-8, 8, x["v"].shape[2], dtype=torch.float64)[:, None]
    x["initial_state"] *= 2.0 ** torch.linspace(-8, 8, x["v"].shape[2], dtype=torch.float64)[:, None, None]


def enlarge_some(x):
    """Values a thousand times larger than the rest, forgotten before the rest goes on."""
    x["v"][:, 18:20] *= 1024.0
    x["g"][:, 20] = -math.inf


def zero(*names):
    def change(x):
        for name in names:
            x[name].zero_()

    return change


def scale_keys(x):
    """Rows of all lengths, zero included, as they reach a layer that normalises."""
    x["k"] *= 2.0 ** torch.randint(-6, 7, x["k"].shape[:3], generator=torch.Generator().manual_seed(4))[..., None]
    x["k"][:, ::7] = 0.0
    x["q"][:, ::5] = 0.0


def ask_elsewhere(first=0):
    """Queries orthogonal to every key from token `first` on: what is read sends nothing back to what those wrote."""

    def change(x):
        half = x["k"].shape[-1] // 2
        x["k"][:, first:, :, half:] = 0.0
        x["q"][..., :half] = 0.0

    return change


def enlarge_queries(x):
    x["q"] *= 3000.0


WHOLE = (16, 8, 16)  # all chunks in one block
F32, F16 = (torch.float32,), (torch.float16,)
CASES = {
    "rule": Case((2, 40, 1, 16, 32), replay=True),
    "rule, raw, no initial state": Case((1, 70, 1, 16, 16), erase="raw", start=False, dtypes=F32),
    "rule, one block": Case((1, 40, 1, 16, 32), tiles=WHOLE, dtypes=F32),
    "rule, one block, raw, no initial state": Case((1, 37, 1, 16, 16), tiles=WHOLE, erase="raw", start=False, replay=True),
    "rule, normalised": Case((1, 40, 1, 16, 16), scale_keys, normalize=True),
    "rule, normalised, raw, one block": Case((1, 40, 1, 16, 16), scale_keys, normalize=True, erase="raw", tiles=WHOLE),
    "rule, larger chunks": Case((1, 150, 1, 16, 16), tiles=(32, 2, 16), erase="raw"),
    "rule, tiles of the plan": Case((1, 300, 1, 24, 72), tiles=None, dtypes=F32),
    "rule, gates in float32": Case((1, 40, 1, 16, 16), float32_gates=True, dtypes=F16),
    "rule, heads in groups": Case((2, 40, 2, 16, 16), groups=1, tiles=(16, 3, 16), dtypes=F32),
    "memory": Case((1, 40, 1, 16, 32), reads=1, replay=True),
    "memory, two reads": Case((2, 40, 1, 16, 16), reads=2, erase="raw"),
    "memory, three reads, normalised": Case((1, 40, 1, 16, 16), scale_keys, reads=3, normalize=True),
    "memory, two reads, one block, no initial state": Case((1, 40, 2, 16, 16), reads=2, start=False, tiles=WHOLE, dtypes=F32),
    "memory, two reads, heads in groups": Case((1, 40, 2, 16, 16), reads=2, groups=1, dtypes=F32),
    "memory, never read": Case((1, 40, 2, 16, 16), reads=0),
    "memory, never read, raw, normalised": Case((1, 40, 1, 16, 16), reads=0, erase="raw", normalize=True, start=False),
    "one token": Case((2, 1, 1, 16, 32)),
    "one token, raw, no initial state": Case((2, 1, 1, 16, 16), erase="raw", start=False, noise=("d_g",), dtypes=F32),
    "one token, two reads": Case((1, 1, 2, 16, 16), reads=2),
    "blocks filled": Case((1, 64, 1, 16, 16), dtypes=F32),
    "blocks filled but for one token": Case((1, 63, 1, 16, 16), erase="raw", dtypes=F32),
    "blocks filled and one token": Case((1, 65, 1, 16, 16), reads=1, dtypes=F32),
    "blocks of one chunk": Case((1, 48, 1, 16, 16), tiles=(16, 1, 16), dtypes=F32),
    "widths 1 and 1": Case((1, 40, 1, 1, 1), dtypes=F32),
    "widths 5 and 7": Case((2, 40, 1, 5, 7), reads=2, dtypes=F32),
    "widths 33 and 17": Case((1, 40, 1, 33, 17), reads=1, normalize=True, dtypes=F32),
    "widths 3 and 50": Case((1, 40, 1, 3, 50), erase="raw", dtypes=F32),
    "widths 100 and 20": Case((1, 20, 1, 100, 20)),
    "no decay": Case((1, 70, 1, 16, 16), fill_gates(0.0), dtypes=F32),
    "slow decay": Case((1, 130, 1, 16, 16), decay=1e-3, tiles=(32, 2, 16)),
    "fast decay": Case((1, 70, 1, 32, 64), decay=4.0, scale=1.0, start=False, tiles=(64, 2, 32), dtypes=F16),
    "fast decay, raw, two reads": Case((1, 70, 1, 32, 32), decay=4.0, erase="raw", reads=2, start=False),
    "fast decay, normalised": Case((1, 70, 1, 32, 32), scale_keys, decay=4.0, normalize=True, start=False, dtypes=F16),
    "fast decay, normalised, two reads": Case((1, 70, 1, 32, 32), scale_keys, decay=4.0, normalize=True, reads=2, start=False),
    "wide keys, normalised, raw, two reads": Case(
        (1, 50, 1, 72, 32), scale_keys, normalize=True, erase="raw", reads=2, cotangents=(0.01, 0.01), tiles=(16, 2, 32)
    ),  # cotangents: gradients of keys of no length are large
    "wide keys, never read": Case((1, 40, 1, 72, 32), reads=0, tiles=(16, 2, 32), dtypes=F16),
    "fast decay, wide keys": Case((1, 70, 1, 72, 64), decay=4.0, scale=1.0, start=False, tiles=(64, 2, 32), dtypes=F16),
    "strong decay": Case((1, 40, 1, 16, 16), fill_gates(-50.0), noise=("d_g", "d_initial_state")),
    "strong decay, raw": Case((1, 40, 1, 16, 16), fill_gates(-50.0), erase="raw", noise=("d_g",), dtypes=F32),
    "shut gates": Case((1, 70, 1, 16, 16), shut_some, reads=1, noise=("d_initial_state",)),
    "shut gates, raw": Case((1, 70, 1, 16, 16), shut_some, erase="raw", noise=("d_initial_state",)),
    "shut gates, one block": Case((1, 70, 1, 16, 16), shut_some, erase="raw", tiles=WHOLE, dtypes=F32),
    "nothing written": Case((1, 40, 1, 16, 16), shut_all),
    "nearly parallel keys": Case((1, 130, 1, 16, 16), correlate, decay=0.0, tiles=(64, 1, 16), magnified=2.0),
    "nearly parallel keys, raw": Case((1, 70, 1, 16, 16), correlate, erase="raw", magnified=2.0, dtypes=F32),
    "large values": Case((1, 40, 1, 16, 16), multiply(2.0**10, 2.0**10), cotangents=(2.0**-9, 2.0**-9), scale=0.01),
    "small values": Case((1, 40, 1, 16, 16), multiply(2.0**-10, 2.0**-10), cotangents=(2.0**9, 2.0**9), reads=1),
    "values of 1e6": Case((1, 40, 1, 16, 16), multiply(1e6, 1e6), cotangents=(1e-6, 1e-6), dtypes=F32),
    "values of 1e-6": Case((1, 40, 1, 16, 16), multiply(1e-6, 1e-6), cotangents=(1e6, 1e6), dtypes=F32),
    "values around 100": Case((1, 64, 1, 16, 16), multiply(100.0, 100.0), cotangents=(0.01, 0.01), dtypes=F16),
    "large state": Case((1, 40, 1, 16, 16), multiply(1.0, 1e6), scale=1e-3, cotangents=(0.1, 1e-4), magnified=2.0, dtypes=F16),
    "small state and values": Case((1, 40, 1, 16, 16), multiply(2.0**-12, 1e-9), scale=1e3, cotangents=(1.0, 1e3), dtypes=F16),
    "a few values of 1000": Case((1, 50, 1, 16, 16), enlarge_some, after=21, dtypes=F16),
    "a few values of 1000, two reads": Case((1, 50, 1, 16, 16), enlarge_some, after=21, reads=2, dtypes=F16),
    "values of zero": Case((1, 40, 1, 16, 16), zero("v"), start=False),
    "values of zero, initial state": Case((1, 40, 1, 16, 16), zero("v"), reads=1, magnified=2.0, dtypes=F16),
    "keys of zero": Case((1, 40, 1, 16, 16), zero("k"), normalize=True, dtypes=F16),
    "heads of different size": Case((1, 40, 3, 16, 16), multiply_heads, each_head=True, dtypes=F16),
    "queries that match no key": Case((1, 40, 1, 16, 16), ask_elsewhere(), reads=1, cotangents=(1.0, 0.0)),
    "queries that match early keys": Case((1, 100, 1, 16, 16), ask_elsewhere(16), reads=1, start=False, cotangents=(1.0, 0.0)),
    "large queries": Case((1, 70, 1, 16, 16), enlarge_queries, tiles=WHOLE, scale=1e-3, cotangents=(1.0, 0.0), dtypes=F16),
    "gradient of what is read": Case((1, 40, 1, 16, 16), cotangents=(1.0, 0.0), reads=1),
    "gradient of the state": Case((1, 40, 1, 16, 16), cotangents=(0.0, 1.0)),
    "small gradients": Case((1, 40, 1, 16, 16), cotangents=(1e-3, 1e-3), reads=2, dtypes=F16),
    "gradients of different size": Case((1, 40, 1, 16, 16), cotangents=(1e-3, 1e2), reads=1, dtypes=F16),
}  # fmt: skip


def inputs(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, torch.Tensor]:
    """Arguments by name, rounded to what the call takes; `read_1` ... are the queries of later reads."""
    x = draw(*case.sizes, decay=case.decay, seed=seed)
    for n in range(1, case.reads or 0):
        x[f"read_{n}"] = draw(*case.sizes, seed=seed + 100 * n)["q"]
    if case.change is not None:
        case.change(x)
    if not case.start:
        del x["initial_state"]
    full = ("initial_state", "beta", "g") if case.float32_gates else ("initial_state",)
    return {name: y.to(device, torch.float32 if name in full else dtype) for name, y in x.items()}


def forward(case: Case, x: dict[str, torch.Tensor], impl: str) -> dict[str, torch.Tensor]:
    """What is read, and the state, by name."""
    q, k, v, beta, g = (x[name] for name in NAMES[:5])
    options = dict(initial_state=x.get("initial_state"), erase=case.erase, impl=impl)
    if case.reads is None:
        return core.delta_rule(q, k, v, beta, g, scale=case.scale, normalize_qk=case.normalize, **options)._asdict()
    memory = core.delta_write(k, v, beta, g, normalize_k=case.normalize, **options)
    given = dict(state=memory.state)
    for n in range(case.reads):
        query, normalize = x[f"read_{n}"] if n else q, case.normalize != (n == 1)
        given[f"out_{n}"] = memory.read(query, case.scale * (n + 1), normalize=normalize)
    return given


def results(case: Case, x: dict[str, torch.Tensor], impl: str) -> dict[str, torch.Tensor]:
    """`forward`, and the gradient of every input."""
    leaves = {name: y.detach().requires_grad_() for name, y in x.items()}
    given = forward(case, leaves, impl)
    gen = torch.Generator().manual_seed(7)
    loss = 0.0
    for name in sorted(given):
        y, factor = given[name], case.cotangents[name == "state"]
        if factor:
            loss = loss + (y.double() * factor * torch.randint(-2, 3, y.shape, generator=gen).to(y.device)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    given = {name: y.detach() for name, y in given.items()}
    return given | {f"d_{name}": y for name, y in zip(leaves, grads, strict=True) if y is not None}


def relative_error(x, exact, whole=None):
    error, whole = ((y.double().norm().item()) for y in (x.double() - exact, exact if whole is None else whole))
    return error / whole if whole else math.inf if error else 0.0


def compare(
    case: Case, x: dict[str, torch.Tensor], given: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]
) -> tuple:
    """Relative errors by name, and what is wrong with the results, as lines: none where all is well."""
    errors, wrong, dtype, gates = {}, [], x["k"].dtype, x["g"]
    for name in sorted(given.keys() | exact.keys()):
        if name not in given:
            wrong.append(f"{name}: missing")
            continue
        # An input that nothing depends on has no gradient in the reference and one of zeros here.
        x = given[name]
        y = exact[name].to(x.device) if name in exact else torch.zeros_like(x, dtype=torch.float64)
        of_state = name in ("state", "d_initial_state")
        full = of_state or (case.float32_gates and name in ("d_beta", "d_g"))
        if x.shape != y.shape or x.dtype != (torch.float32 if full else dtype):
            wrong.append(f"{name}: {x.dtype} {tuple(x.shape)}, expected {tuple(y.shape)}")
            continue
        if not x.isfinite().all():
            wrong.append(f"{name}: {(~x.isfinite()).sum()} of {x.numel()} not finite")
            continue
        limit = bound(name, x, dtype, case.reads) * case.magnified
        if not of_state:
            x, y = x[:, case.after :], y[:, case.after :]
        whole = max(y, exact["d_beta"].to(x.device), key=torch.linalg.vector_norm) if name in case.noise else None
        pairs = [(x, y)]
        if case.each_head:
            pairs = [
                (x.select(1 if of_state else 2, h), y.select(1 if of_state else 2, h)) for h in range(case.sizes[2])
            ]
        errors[name] = max(relative_error(a, b, whole) for a, b in pairs)
        if errors[name] > limit:
            wrong.append(f"{name}: error {errors[name]:.2e}, at most {limit:.2e}")
    if "d_g" in given and given["d_g"][gates == -math.inf].any():
        wrong.append("d_g: not zero where a gate is shut")
    return errors, wrong


def step_problems(K: int, V: int, dtype: torch.dtype, device: str = "cpu") -> list[str]:
    """What is wrong with the kernel of one token: its gates open and shut, its options, large and small states."""
    import kernel_ops

    wrong = []
    for n, (raw, normalize, scale, size) in enumerate(
        ((False, False, 1.0, 1.0), (True, True, 0.1, 1e4), (True, False, 3.0, 1e-4))
    ):
        case = Case((2, 3, 2, K, V), shut_some, decay=1.0)
        x = inputs(case, dtype, device, seed=n)
        state = x.pop("initial_state") * size
        token = [y[:, n].contiguous() for y in x.values()]
        given = kernel_ops.step(*token, state, scale=scale, raw=raw, norm_q=normalize, norm_k=normalize)
        exact = core.delta_step(
            *(y.double() for y in token),
            state=state.double(),
            scale=scale,
            erase=core.ERASE_RULES[raw],
            normalize_qk=normalize,
        )
        for name, a, b in zip(("out", "state"), given, exact, strict=True):
            error = relative_error(a, b)
            limit = 5e-6 if a.dtype == torch.float32 else torch.finfo(dtype).eps / 2
            if a.dtype != (torch.float32 if name == "state" else dtype) or not error <= limit:  # NaN too
                wrong.append(f"{name} of a token, {raw=}, {normalize=}: error {error:.2e}, at most {limit:.2e}")
    return wrong


# ------------------------------------------------------------------------------------------------ in the interpreter


def run_in_interpreter(script: str) -> list[str]:
    """Run a Python file of tests/ as a process in Triton's interpreter and return the lines it prints."""
    here = pathlib.Path(script).resolve()
    path = os.pathsep.join([str(here.parents[1]), str(here.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | dict(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", PYTHONPATH=path)
    child = subprocess.run([sys.executable, str(here)], env=environment, capture_output=True, text=True, timeout=900)
    if child.returncode:
        done = child.stdout.splitlines()[-1:]
        raise RuntimeError(f"{here.name} ended with {child.returncode} after {done}:\n{child.stderr[-5000:]}")
    return child.stdout.splitlines()


def raised_in_interpreter(script: str) -> dict[str, str]:
    """What `print_raised` found in a Python file of tests/ that runs as a process in Triton's interpreter."""
    if not core.HAS_TRITON:
        pytest.skip("Triton is not installed here: it exists for Linux only")
    return json.loads(run_in_interpreter(script)[-1])


def print_raised(cases: dict[str, Callable[[], None]]):
    """Run every case and print what it raised, by name; an empty string where it passed."""
    raised = {}
    for name, case in cases.items():
        try:
            case()
            raised[name] = ""
        except Exception:
            raised[name] = traceback.format_exc()[-4000:]
    print(json.dumps(raised))


PAD = 1024  # values before and after


class Fenced:
    """Inside, memory that is allocated uninitialised holds NaN, and lies between stretches of NaN.

    What a kernel forgets to write, or reads past an end, turns up as NaN in a result; what it writes past an end, in `breached`.
    """

    def __init__(self):
        self.buffers, self.patch, self.empty = [], pytest.MonkeyPatch(), torch.empty

    def place(self, x):
        """A copy of x, row-major, between fences."""
        buffer = torch.full((x.numel() + 2 * PAD,), math.nan, dtype=x.dtype)
        self.buffers.append(buffer)
        strides = self.empty(x.shape, device="meta").stride()
        return self.empty(0, dtype=x.dtype).set_(buffer.untyped_storage(), PAD, x.shape, strides).copy_(x)

    def __enter__(self):
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            self.patch.setattr(owner, name, self.fenced(getattr(owner, name)))
        return self

    def __exit__(self, *error):
        self.patch.undo()

    def fenced(self, allocate):
        def allocate_fenced(*args, **options):
            x = allocate(*args, **options)
            wanted = x.device.type == "cpu" and x.is_floating_point() and x.numel()
            return self.place(x.fill_(math.nan)) if wanted else x

        return allocate_fenced

    def breached(self):
        """How many fences were written to."""
        return sum(not (b[:PAD].isnan().all() and b[-PAD:].isnan().all()) for b in self.buffers)


def with_tiles(plan, C, R, BV):
    """kernels.plan with other sizes of chunks, blocks and groups of columns."""

    def small(T, K, V, dtype, *rest):
        N = -(-T // C)
        columns = dict(BV=BV, VB=-(-V // BV), walk_columns=BV, read_columns=BV, gradient_columns=BV)
        return plan(T, K, V, dtype, *rest)._replace(C=C, N=N, R=min(R, N), NB=-(-N // min(R, N)), **columns)

    return small


def interpret(case: Case, dtype: torch.dtype) -> tuple:
    """`compare` for a case in this process."""
    import kernels

    kept = kernels.plan, kernels.AT_ONCE
    try:
        if case.tiles is not None:
            kernels.plan = with_tiles(kernels.plan, *case.tiles)
        if case.groups is not None:
            kernels.AT_ONCE = case.groups
        x = inputs(case, dtype)
        with Fenced() as fenced:
            placed = {name: fenced.place(y) for name, y in x.items()}
            given = results(case, placed, "triton")
            plain = forward(case, placed, "triton") if case.replay else {}
    finally:
        kernels.plan, kernels.AT_ONCE = kept
    exact = results(case, {name: y.double() for name, y in x.items()}, "reference")
    errors, wrong = compare(case, x, given, exact)
    if fenced.breached():
        wrong.append(f"{fenced.breached()} of {len(fenced.buffers)} tensors were written beyond their ends")
    if not all(torch.equal(y, given[name]) for name, y in plain.items()):
        wrong.append("other bits where no gradients are wanted")
    return errors, wrong


STEPS = {"one step, widths 64 and 128": (64, 128), "one step, widths 5 and 33": (5, 33)}


def names() -> list[tuple[str, torch.dtype]]:
    """Of everything that runs in the interpreter."""
    cases = [(name, dtype) for name, case in CASES.items() for dtype in case.dtypes]
    return cases + [(name, dtype) for name in STEPS for dtype in F32 + F16]


def label(name: str, dtype: torch.dtype) -> str:
    return f"{name}, {str(dtype).removeprefix('torch.')}"


if __name__ == "__main__":
    for case_name, case_dtype in names():
        started = time.perf_counter()
        found_errors = {}
        try:
            if case_name in STEPS:
                with Fenced():
                    found_wrong = step_problems(*STEPS[case_name], case_dtype)
            else:
                found_errors, found_wrong = interpret(CASES[case_name], case_dtype)
        except Exception:
            found_wrong = [traceback.format_exc()[-3000:]]
        seconds = time.perf_counter() - started
        line = dict(case=label(case_name, case_dtype), wrong=found_wrong, errors=found_errors, seconds=seconds)
        print(json.dumps(line), flush=True)
