"""What bench_gpu.py and bench_step.py measured, as tables and sentences: notebook 09 shows them (figures: bench_figures.py).

    python bench_gpu.py --out results/bench.jsonl             speed, memory, errors, first calls of ours and of peers
    python bench_gpu.py --scaling --out results/bench.jsonl   ... over T, B and H; likewise --step, --errors, --cold
    python bench_step.py --out results/bench.jsonl            a training step, part by part

    rows = bench_report.load("results/bench.jsonl")           [] where there is no such file
    bench_report.times(rows)                                  a table; empty where nothing of its kind was measured
    bench_report.findings(rows)                               sentences, every number and every comparison from the rows

Runs are appended, so a file may hold one shape twice: the later measurement counts, except that a peer which refused does not
replace one which ran. Rows of one process are paired; a ratio across processes has no interval. What the numbers mean is said in
bench_gpu.py and bench_step.py.
"""

from __future__ import annotations

import collections
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

import bench_cpu
import bench_gpu
import bench_measure
import bench_roofline
import core
import runs

OURS = ("ours", "torch")
PEERS = tuple(name for name, package in bench_measure.IMPLS.items() if package)
WHAT = {"forward": "forward", "forward_backward": "forward+backward"}
SHORT = {"forward": "fwd", "forward_backward": "fwd+bwd"}  # where columns are narrow
FAR = 2.0  # a part that takes this many times its bound is named as a loss


# ------------------------------------------------------------------------------------------------ rows


def load(path: str | Path, *, device: str | None = None) -> list[dict]:
    """Rows of the results file at `path`, oldest first, of one device; [] where there is no file.

    device: the GPU whose rows are wanted. None, or one that the file does not know: the GPU with most rows. ValueError for a line
    that is not a JSON object.
    """
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path.name}, line {number}: expected a JSON object, given {type(row).__name__}")
        rows.append(row)
    rows = arrange(rows)
    known = collections.Counter(row["device"] for row in rows if row["device"])
    chosen = device if device in known else max(known, key=known.get, default=None)
    return [row for row in rows if row["device"] in (chosen, None)]  # None: a process that died before it could say


def arrange(rows: list[dict]) -> list[dict]:
    """The rows with what all of them need: kind, device, versions, revision and date (None where not recorded), and `run`, the
    number of the process that measured them."""
    arranged, run, before, members = [], -1, None, set()
    for given in rows:
        row = dict(given)
        row["kind"] = "training" if "part" in row else row.get("bench") or "speed"
        row["device"] = row.get("device") or row.get("gpu")
        row.setdefault("versions", {"torch": row["torch"]} if "torch" in row else {})
        row.setdefault("revision", None)
        row.setdefault("date", None)
        subject, member = _identity(row)
        now = (row["kind"], subject, row["device"], row["revision"], row["date"])
        if now != before or member in members:
            run, before, members = run + 1, now, set()
        members.add(member)
        arranged.append(row | {"run": run})
    return arranged


SETTINGS = ("model", "batch", "length", "memory_op", "compile", "graph")


def _identity(row: dict) -> tuple:
    """What a row is about, and which member of its process it is: together, what a later row replaces."""
    match row["kind"]:
        case "speed":
            return (tuple(row["shape"]), row.get("dtype", "bf16")), row["impl"]
        case "first":
            shape = row.get("shape")  # a process that died does not say which
            return (row["impl"], tuple(shape[2:]) if shape else None, row.get("at_once")), row["impl"]
        case "step":
            return (row["B"],), row["impl"]
        case "errors":
            case = row.get("case")
            widths = (case["K"], case["V"]) if case else tuple(row["widths"])  # of a process that died
            return (widths,), (row["impl"], tuple(case.values()) if case else None)
        case "training":
            return tuple(row.get(name) for name in SETTINGS), row["part"]
    raise ValueError(f"bench = {row['kind']!r}: expected one of speed, first, step, errors")


def latest(rows: list[dict], kind: str) -> list[dict]:
    """Of every measurement of `kind` the one that counts, in the order in which they were first made."""
    found = {}
    for row in rows:
        if row["kind"] != kind:
            continue
        key = _identity(row)
        refused = row.get("error") and row["impl"] not in OURS
        if not (refused and key in found):
            found[key] = row
    return list(found.values())


def sources(rows: list[dict]) -> pd.DataFrame:
    """Where the rows come from: one line per kind, revision, day and set of versions."""
    groups = collections.Counter()
    for row in rows:
        versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        date = row["date"][:10] if row["date"] else "not recorded"
        groups[row["kind"], row["device"], row["revision"] or "not recorded", date, versions] += 1
    names = ("kind", "device", "revision", "date", "versions")
    return pd.DataFrame([dict(zip(names, key, strict=True), rows=count) for key, count in groups.items()])


def show(thing, how: str):
    """`thing`, or where it is None or an empty table a printed line that says how to measure it (and None)."""
    if thing is None or (isinstance(thing, pd.DataFrame) and thing.empty):
        print(f"not in the results file; measured on a GPU by: python {how} --out results/bench.jsonl")
        return None
    return thing


def speed_rows(rows: list[dict], *, dtype: str = "bf16", shapes=None) -> dict:
    """{shape: {impl: row}} of the speed rows that count, ours first."""
    found = {}
    for row in latest(rows, "speed"):
        shape = bench_measure.Shape(*row["shape"])
        if row.get("dtype", "bf16") == dtype and (shapes is None or shape in shapes):
            found.setdefault(shape, {})[row["impl"]] = row
    order = [shape for shape in shapes if shape in found] if shapes else sorted(found, key=lambda s: (s.K, s.V, s))
    return {s: {name: found[s][name] for name in bench_measure.IMPLS if name in found[s]} for s in order}


def ran(by_impl: dict) -> dict:
    """The rows of one shape without those that refused."""
    return {name: row for name, row in by_impl.items() if not row["error"]}


# ------------------------------------------------------------------------------------------------ tables


def _range(quartiles) -> str:
    low, middle, high = quartiles
    return f"{middle:.3g} [{low:.3g}, {high:.3g}]"


def _number(x, form: str = ".3g") -> str:
    return "" if x is None or x != x else f"{x:{form}}"


def times(rows: list[dict], *, dtype: str = "bf16", shapes=None, absent: bool = True) -> pd.DataFrame:
    """One line per shape and implementation: wall ms (median [quartiles]), device ms and share of the memory-bound limit (forward
    / forward+backward), peak MiB, revision and day. A peer that refused or, with `absent`, has no row is a line that says so."""
    lines = []
    for shape, by_impl in speed_rows(rows, dtype=dtype, shapes=shapes).items():
        for name in bench_measure.IMPLS:
            row = by_impl.get(name)
            able = name != "flashqla" or shape.K == shape.V == 128  # FlashQLA has no other widths
            if row is None and not (absent and able and name != "torch"):  # nobody misses the PyTorch path
                continue
            line = {"shape": str(shape), "implementation": row["label"] if row else name}
            measured = row is not None and not row["error"]
            for key, words in SHORT.items():
                line[f"{words}, wall ms"] = _range(row["wall_ms"][key]) if measured and key in row["wall_ms"] else ""
            device = [_number(row["device_ms"].get(key)) for key in WHAT] if measured else []
            shares = [_number(row["share"].get(key), ".0%") for key in WHAT] if measured else []
            line |= {"device ms": " / ".join(filter(None, device)), "of limit": " / ".join(filter(None, shares))}
            line["peak MiB"] = _number(row["peak_mib"], ".0f") if measured else ""
            line["measured"] = " ".join(filter(None, (row["revision"], (row["date"] or "")[:10]))) if row else ""
            line["note"] = "not measured" if row is None else row["error"] or "; ".join(row["failed"].values())
            lines.append(line)
    return pd.DataFrame(lines)


class Comparison(NamedTuple):
    """A peer at one shape in units of ours: above 1 the peer takes more.

    wall: by "forward" and "forward_backward" (median, low, high) of pairs, or, measured in another process, (ratio of medians,
    nan, nan). device: ratios likewise. peak: of memory, nan where not measured. errors: by quantity.
    """

    shape: bench_measure.Shape
    impl: str
    label: str
    wall: dict
    device: dict
    peak: float
    errors: dict


def comparisons(rows: list[dict], *, dtype: str = "bf16", shapes=None) -> list[Comparison]:
    """Every peer that ran beside ours."""
    found = []
    for shape, by_impl in speed_rows(rows, dtype=dtype, shapes=shapes).items():
        by_impl = ran(by_impl)
        ours = by_impl.get("ours")
        for name in PEERS if ours else ():
            if (row := by_impl.get(name)) is None:
                continue
            wall, device = {}, {}
            for what in WHAT:
                if row["run"] == ours["run"] and what in row["wall_ratio"]:
                    wall[what] = tuple(row["wall_ratio"][what])
                elif what in row["wall_ms"] and what in ours["wall_ms"]:
                    wall[what] = (row["wall_ms"][what][1] / ours["wall_ms"][what][1], math.nan, math.nan)
                if what in row["device_ms"] and what in ours["device_ms"]:
                    device[what] = row["device_ms"][what] / ours["device_ms"][what]
            peak = row["peak_mib"] / ours["peak_mib"] if row["peak_mib"] and ours["peak_mib"] else math.nan
            errors = {q: e / ours["errors"][q] for q, e in row["errors"].items() if ours["errors"].get(q)}
            found.append(Comparison(shape, name, row["label"], wall, device, peak, errors))
    return found


def _paired(ratio) -> str:
    median, low, high = ratio
    return f"{median:.2f}x [{low:.2f}, {high:.2f}]" if low == low else f"{median:.2f}x (another process)"


def ratios(rows: list[dict], *, dtype: str = "bf16", shapes=None) -> pd.DataFrame:
    """`comparisons` as a table: what a peer takes in units of ours."""
    lines = []
    for c in comparisons(rows, dtype=dtype, shapes=shapes):
        line = {"shape": str(c.shape), "peer": c.label}
        line |= {f"{words}, wall": _paired(c.wall[key]) if key in c.wall else "" for key, words in SHORT.items()}
        line |= {f"{words}, device": f"{c.device[key]:.2f}x" if key in c.device else "" for key, words in SHORT.items()}
        lines.append(line | {"peak memory": f"{c.peak:.2f}x" if c.peak == c.peak else ""})
    return pd.DataFrame(lines)


def scientific(table: pd.DataFrame) -> pd.DataFrame:
    """The table with its errors as text of two digits."""
    errors = [name for name in bench_cpu.NAMES if name in table]
    return table.assign(**{name: table[name].map(lambda x: _number(x, ".1e")) for name in errors})


def exactness(rows: list[dict], *, dtype: str = "bf16", shapes=None) -> pd.DataFrame:
    """Relative error against float64 of every output and gradient, by shape (its first tokens) and implementation."""
    lines = []
    for shape, by_impl in speed_rows(rows, dtype=dtype, shapes=shapes).items():
        short = shape._replace(T=min(shape.T, bench_measure.ERROR_TOKENS))
        for row in ran(by_impl).values():
            if row["errors"]:
                lines.append({"shape": str(short), "implementation": row["label"], **row["errors"]})
    return pd.DataFrame(lines)


def error_grid(rows: list[dict]) -> pd.DataFrame:
    """Over the grid of bench_gpu.py --errors: cases, largest error of every quantity, how often ours is above fla's, and cases
    in which an implementation failed."""
    groups, ours, fla, failed = {}, {}, {}, collections.Counter()
    for row in latest(rows, "errors"):
        if row["error"] and row.get("case"):
            failed[row["label"], row["case"]["dtype"]] += 1
        if row.get("errors"):
            groups.setdefault((row["label"], row["case"]["dtype"]), []).append(row["errors"])
            {"ours": ours, "fla": fla}.get(row["impl"], {})[tuple(row["case"].values())] = row["errors"]
    both = [(ours[case], fla[case]) for case in ours if case in fla]
    above = sum(not mine[q] <= theirs[q] for mine, theirs in both for q in theirs)
    lines = []
    for (label, dtype), found in groups.items():
        worst = {q: float(np.max([e[q] for e in found])) for q in bench_cpu.NAMES}  # a NaN stays a NaN
        line = {"implementation": label, "dtype": dtype, "cases": len(found), **worst}
        compared = label == bench_measure.label("ours") and dtype == "bf16" and both
        line["above fla"] = f"{above} of {len(both) * len(bench_cpu.NAMES)}" if compared else ""
        lines.append(line | {"failed": failed.pop((label, dtype), 0)})
    lines += [
        {"implementation": label, "dtype": dtype, "cases": 0, "failed": n} for (label, dtype), n in failed.items()
    ]
    return pd.DataFrame(lines)


def first_rows(rows: list[dict]) -> list[dict]:
    """First calls that count: of each implementation and widths those beside the fewest other processes, which take its time."""
    found = {}
    for row in sorted(latest(rows, "first"), key=lambda row: row.get("at_once") or 0):
        found.setdefault((row["impl"], tuple(row.get("shape") or ())[3:]), row)
    order = list(bench_measure.IMPLS)
    return sorted(found.values(), key=lambda row: (order.index(row["impl"]), row.get("shape") or []))


def first_calls(rows: list[dict]) -> pd.DataFrame:
    """Seconds from the import of an implementation to its first gradients, caches of compiled kernels empty, and how many
    processes were doing so at once."""
    lines = []
    for row in first_rows(rows):
        shape = row.get("shape")
        line = {"implementation": row["label"], "shape": str(bench_measure.Shape(*shape)) if shape else ""}
        line |= {"seconds": row.get("first_call_s"), "of which import": row.get("import_s")}
        line |= {"at once": row.get("at_once")}
        lines.append(line | {"note": row["error"] or row.get("later") or ""})
    return pd.DataFrame(lines)


def generation(rows: list[dict]) -> pd.DataFrame:
    """Microseconds per token (median [quartiles]) at the first tokens and after 100,000, in a CUDA graph."""
    lines = []
    for row in latest(rows, "step"):
        line = {"B": row["B"], "implementation": row["label"]}
        line |= {f"token {int(at):,}, µs": _range(row["us"][at]) for at in row.get("us", {})}
        lines.append(line | {"note": row["error"] or ""})
    return pd.DataFrame(lines).fillna("") if lines else pd.DataFrame()


def training_steps(rows: list[dict]) -> list[list[dict]]:
    """The last run of bench_step.py for each of its settings: rows of the whole step and of its parts."""
    last = {}
    for row in rows:
        if row["kind"] == "training":
            last.setdefault(_identity(row)[0], collections.OrderedDict()).setdefault(row["run"], []).append(row)
    return [list(runs.values())[-1] for runs in last.values()]


def training(rows: list[dict]) -> pd.DataFrame:
    """One line per setting of the training step: tokens per second, ms, share of the matrix product's rate, peak memory."""
    lines = []
    for step in training_steps(rows):
        whole = next((row for row in step if row["part"] == "step"), {})
        line = {name: step[0].get(name) for name in SETTINGS[1:]}
        line |= {"tokens/s": _number(whole.get("tokens_per_s"), ",.0f"), "wall ms": _number(whole.get("wall_ms"))}
        line |= {"device ms": _number(whole.get("device_ms")), "share of matmul rate": _number(whole.get("mfu"), ".1%")}
        memory = next((row["ms"] for row in step if row["part"] == "memory operation"), None)
        line |= {"memory operation, ms": _number(memory), "peak MB": _number(whole.get("peak_mb"), ",.0f")}
        line |= {"without AdamW, MB": _number(whole.get("peak_without_adamw_mb"), ",.0f")}
        line |= {"revision": step[0]["revision"] or "", "date": (step[0]["date"] or "")[:10]}
        lines.append(line | {"note": whole.get("absent", "")})
    return pd.DataFrame(lines)


def main_step(rows: list[dict]) -> list[dict]:
    """Rows of the training step that the figure and the sentences are about: the fastest with our memory at 8 x 2,048, else at
    any size; [] where none was measured."""
    able = [s for s in training_steps(rows) if s[0].get("memory_op") == "ours" and "wall_ms" in s[0]]
    able = [s for s in able if (s[0]["batch"], s[0]["length"]) == (8, 2048)] or able
    return max(able, key=lambda step: step[0]["tokens_per_s"], default=[])


# ------------------------------------------------------------------------------------------------ kernels beside their roofs


def matmul_rate(rows: list[dict]) -> float | None:
    """FLOP/s of the 8,192-cubed bf16 product, median over the training steps measured; None where there is none."""
    found = [step[0]["rate_tflops"] for step in training_steps(rows) if "rate_tflops" in step[0]]
    return 1e12 * float(np.median(found)) if found else None


def kernel_tables(rows: list[dict], shapes, *, rate: float | None, dtype: str = "bf16") -> dict:
    """{shape: kernel_table} of ours; {} without Triton, whose plan the formulas need, or without a measured `rate`."""
    found = speed_rows(rows, dtype=dtype, shapes=shapes)
    rows = {shape: ran(by_impl).get("ours") for shape, by_impl in found.items()}
    if rate is None or not core.HAS_TRITON:
        return {}
    able = {shape: row for shape, row in rows.items() if row and row["kernels"].get("forward_backward")}
    return {
        shape: bench_roofline.kernel_table(row, bench_roofline.plan_of(shape, dtype), rate=rate)
        for shape, row in able.items()
    }


def kernel_lines(tables: dict) -> pd.DataFrame:
    """`kernel_tables` as one table of text, a line per shape and kernel; what has no formula stays empty."""
    forms = {"ms": ".3f", "share of time": ".0%", "GFLOP": ".1f", "MB": ",.0f", "FLOP/byte": ".0f"}
    forms |= {"TFLOP/s": ".0f", "TB/s": ".2f", "of roof": ".0%"}
    found = [table.assign(shape=str(shape)) for shape, table in tables.items()]
    if not found:
        return pd.DataFrame()
    every = pd.concat(found, ignore_index=True)
    every = every.assign(**{n: [_number(x, form) for x in every[n]] for n, form in forms.items()})
    return every[["shape", "kernel", *forms]]


# ------------------------------------------------------------------------------------------------ on this machine


def live(shape: bench_measure.Shape, *, impls=("ours", "torch"), dtype: str = "bf16", pairs: int = 30) -> list[dict]:
    """Rows as `load` returns them, measured now, in this process, on this machine's GPU."""
    job = dict(shape=shape, impls=list(impls), dtype=dtype, pairs=pairs, steps=5)
    here = dict(gpu=runs.device_name(), versions=bench_measure.versions(), revision=runs.git_revision())
    here |= dict(date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), bench="speed")
    return arrange([row | here for row in bench_measure.speed(job)])


def cpu_errors(shape: dict) -> pd.DataFrame:
    """Errors on a CPU in float32 against the float64 token loop: ours, transformers', and two planted mistakes that must show.

    ok: a right implementation is below 1e-5 everywhere, a wrong one above 1e-4 in out. An absent peer is a line that says so.
    """

    def older(q, k, v, beta, g):  # a decay that is 1% too strong
        return bench_cpu.ours(q, k, v, beta, 1.01 * g)

    def weaker(q, k, v, beta, g):  # writes that are 1% too weak
        return bench_cpu.ours(q, k, v, 0.99 * beta, g)

    lines, peer = [], bench_cpu.load_peer()
    functions = {"ours (PyTorch)": bench_cpu.ours, "transformers": peer}
    for name, function in {**functions, "planted: decay 1% off": older, "planted: writes 1% off": weaker}.items():
        if isinstance(function, str):
            lines.append({"implementation": name, "ok": True, "note": function})
            continue
        errors = bench_cpu.errors(function, shape=shape)
        planted = name.startswith("planted")
        right = errors["out"] > 1e-4 if planted else max(errors.values()) < 1e-5
        lines.append({"implementation": name, **errors, "ok": right, "note": "must be seen" if planted else ""})
    return pd.DataFrame(lines)


def cpu_times(shape: dict, *, pairs: int) -> pd.DataFrame:
    """Wall milliseconds on a CPU in float32, taking turns: ours (PyTorch), transformers', and ours under another name.

    `x ours`: median of pairs [95% interval], also as numbers. Ours beside itself shows what noise alone makes of a ratio.
    """
    peer, tensors, grads = bench_cpu.load_peer(), bench_cpu.inputs(**shape), bench_cpu.cotangents(**shape)
    functions = {"ours (PyTorch)": bench_cpu.ours, "ours, the same, again": bench_cpu.ours, "transformers": peer}
    lines = []
    for what in WHAT.values():
        make = bench_cpu.forward if what == "forward" else lambda f, t: bench_cpu.forward_backward(f, t, grads)
        calls = {name: make(f, tensors) for name, f in functions.items() if callable(f)}
        measured = bench_cpu.interleave(calls, pairs=pairs)
        for name, function in functions.items():
            line = {"what": what, "implementation": name, "note": "" if callable(function) else function}
            if name in measured:
                ratio = bench_cpu.ratio(measured[name], measured["ours (PyTorch)"])
                line |= {"wall ms": _range(bench_measure.quartiles(measured[name])), "x ours": _paired(ratio)}
                line |= ratio._asdict()
            lines.append(line)
    return pd.DataFrame(lines)


def again(live_rows: list[dict], rows: list[dict]) -> pd.DataFrame:
    """Medians of a live run over those in the file, where both have the shape: whether the file still holds on this machine."""
    lines = []
    for shape, by_impl in speed_rows(live_rows).items():
        stored = ran(speed_rows(rows).get(shape, {}))
        for name, row in ran(by_impl).items():
            for key, words in WHAT.items() if name in stored else ():
                old = stored[name]
                for unit, pick in (
                    ("wall", lambda r, k: r["wall_ms"][k][1]),
                    ("device", lambda r, k: r["device_ms"][k]),
                ):
                    line = {"shape": str(shape), "implementation": row["label"], "what": f"{words}, {unit}"}
                    line["now / file"] = pick(row, key) / pick(old, key)
                    lines.append(line | {"revision of the file": old["revision"] or "not recorded"})
    return pd.DataFrame(lines)


# ------------------------------------------------------------------------------------------------ sentences


def _span(values, unit: str = "x") -> str:
    values = sorted(values)
    low, high = f"{values[0]:.2f}{unit}", f"{values[-1]:.2f}{unit}"
    return low if low == high else f"{low} to {high}"


def _beats(c: Comparison, what: str) -> bool:
    """Whether the peer took less time than ours at this shape, on the device or, beyond its interval, by the clock."""
    wall = c.wall.get(what, (math.nan,) * 3)
    slower_by_clock = wall[2] < 1 if wall[2] == wall[2] else wall[0] < 1
    return slower_by_clock or c.device.get(what, math.inf) < 1


def findings(rows: list[dict], *, shapes=None, rate: float | None = None) -> list[str]:
    """What the rows show, one Markdown sentence group per subject that was measured. Numbers and verbs come from the rows."""
    said = [*_said_of_errors(rows, shapes), *_said_of_speed(rows, shapes), *_said_of_limits(rows, shapes, rate)]
    said += [*_said_of_scaling(rows), *_said_of_generation(rows), *_said_of_training(rows)]
    return said or ["Nothing of a GPU is in the results file, so nothing is said of one."]


def cpu_findings(table: pd.DataFrame) -> str:
    """What `cpu_times` shows, as a sentence: faster, slower or no difference, as the interval says."""
    said = []
    for line in table[table["note"] == ""].itertuples():
        if line.implementation != "ours (PyTorch)":
            verdict = "slower" if line.low > 1 else "faster" if line.high < 1 else "no difference shown"
            ratio = _paired((line.median, line.low, line.high))
            said.append(f"{line.implementation} takes {ratio} of ours {line.what}: {verdict}")
    return "**On this CPU**, float32, PyTorch path, 95% intervals: " + "; ".join(said) + "."


def _said_of_errors(rows, shapes):
    def worst(impl, quantity):
        found = [ran(r)[impl]["errors"] for r in speed_rows(rows, shapes=shapes).values() if impl in ran(r)]
        return max((e[quantity] for e in found if quantity in e), default=math.nan)

    mine = {q: worst("ours", q) for q in bench_cpu.NAMES}
    if mine["out"] == mine["out"]:
        gradients = max(mine[q] for q in bench_cpu.NAMES[2:])
        text = (
            f"**Exactness.** Largest relative errors of ours in bf16: out {mine['out']:.1e}, state {mine['state']:.1e}"
        )
        text += f", gradients {gradients:.1e}."
        for peer in PEERS:
            pairs = [c.errors for c in comparisons(rows, shapes=shapes) if c.impl == peer and c.errors]
            numbers = [ratio for errors in pairs for ratio in errors.values()]
            if numbers:
                better = sum(ratio >= 1 for ratio in numbers)
                text += f" Of {len(numbers)} numbers beside {peer}'s, ours is at most as large in {better}"
                text += f" ({peer}'s are {_span(numbers)} ours)."
        yield text


def _said_of_speed(rows, shapes):
    for peer in PEERS:
        found = [c for c in comparisons(rows, shapes=shapes) if c.impl == peer]
        if not found:
            continue
        text = (
            f"**Beside {found[0].label}**, {len(found)} shape{'s' * (len(found) > 1)}, what it takes in units of ours:"
        )
        for what, words in WHAT.items():
            device = [c.device[what] for c in found if what in c.device]
            wall = [c.wall[what][0] for c in found if what in c.wall]
            spans = [f"{_span(device)} on the device"] * bool(device) + [f"{_span(wall)} by the clock"] * bool(wall)
            text += f" {words} {' and '.join(spans) or 'not measured'};"
        peaks = [c.peak for c in found if c.peak == c.peak]
        yield (text + f" peak memory {_span(peaks)};" if peaks else text)[:-1] + "."
    calls = first_calls(rows)
    if len(calls) and calls["seconds"].notna().any():
        spans = calls.dropna(subset="seconds").groupby("implementation", sort=False)["seconds"]
        yield "**First call**, caches empty: " + "; ".join(f"{n} {_span(s, ' s')}" for n, s in spans) + "."


def _said_of_limits(rows, shapes, rate):
    found = {s: ran(r).get("ours") for s, r in speed_rows(rows, shapes=shapes).items()}
    shares = {s: row["share"] for s, row in found.items() if row and row["share"].get("forward_backward")}
    if not shares:
        return
    parts = [f"{s}: {share['forward_backward']:.0%}" for s, share in shares.items()]
    text = "**What the memory allows.** Share of the memory-bound limit, forward+backward: " + "; ".join(parts) + "."
    for shape, table in kernel_tables(rows, list(shares)[:2], rate=rate).items():  # the first two stand for the rest
        longest, whole = table.iloc[0], table.iloc[-1]
        copied = whole["TB/s"] * 1e12 / found[shape]["bandwidth"]
        text += f" At {shape} our kernels move {copied:.0%} of what a copy would in their time, and reach"
        text += f" {whole['of roof']:.0%} of their roofs; `{longest['kernel']}` takes longest,"
        text += f" {longest['share of time']:.0%} of the time{_of_roof(longest)}."
    yield text


def _of_roof(line) -> str:
    return f", at {line['of roof']:.0%} of its roof" if line["of roof"] == line["of roof"] else ""


# Along each axis of bench_gpu.py --scaling, the sizes that stay.
WIDTHS = dict(K=64, V=128)
AXES = {"T": dict(B=1, H=8, **WIDTHS), "B": dict(T=2048, H=8, **WIDTHS), "H": dict(B=4, T=2048, **WIDTHS)}
AXIS_NAMES = {"T": "tokens T", "B": "batch B", "H": "heads H"}


def scaling_rows(rows: list[dict], axis: str) -> dict:
    """{impl: [(size, row), ...]} along axis "T", "B" or "H": every shape that was measured at the other sizes of bench_gpu.py
    --scaling."""
    fits = lambda shape: all(getattr(shape, name) == size for name, size in AXES[axis].items())  # noqa: E731
    found = {}
    for shape, by_impl in speed_rows(rows).items():
        peers = {name: row for name, row in ran(by_impl).items() if fits(shape) and name != "torch"}
        for name, row in peers.items():
            found.setdefault(name, []).append((getattr(shape, axis), row))
    return {name: sorted(line, key=lambda p: p[0]) for name, line in found.items() if len(line) > 1}


def _said_of_scaling(rows):
    said = []
    for axis, words in AXIS_NAMES.items():
        points = [(n, row["device_ms"].get("forward_backward")) for n, row in scaling_rows(rows, axis).get("ours", ())]
        points = [(n, ms) for n, ms in points if ms][-3:]  # the large end: below it the device is not full
        if len(points) == 3:
            slope = np.polyfit(*np.log([[n for n, _ in points], [ms for _, ms in points]]), 1)[0]
            said.append(f"{words} from {points[0][0]:,} to {points[-1][0]:,}: {axis}^{slope:.2f}")
    if said:
        yield "**Scaling.** Our device time of forward+backward grows as, in the " + "; in the ".join(said) + "."


def _said_of_generation(rows):
    said = []
    for row in latest(rows, "step"):
        if row["impl"] == "ours" and {"1", "100000"} <= row.get("us", {}).keys():
            early, late = row["us"]["1"], row["us"]["100000"]
            apart = early[2] < late[0] or late[2] < early[0]
            change = late[1] / early[1] - 1
            words = "quartile ranges apart" if apart else "quartile ranges overlap"
            said.append(
                f"B {row['B']} {early[1]:.1f} µs per token at the first, {late[1]:.1f} after 100,000 ({change:+.1%}; {words})"
            )
    if said:
        yield "**Generation.** " + "; ".join(said) + "."


def _said_of_training(rows):
    step = main_step(rows)
    if not step:
        return
    whole = step[0]
    alike = [s for s in training_steps(rows) if all(s[0][n] == whole[n] for n in SETTINGS if n != "memory_op")]
    fla = next((s for s in alike if s[0]["memory_op"] == "fla" and "wall_ms" in s[0]), [])
    text = f"**A training step** of {whole['model']}, {whole['batch']} x {whole['length']:,} tokens:"
    text += f" {whole['tokens_per_s']:,.0f} tokens/s"
    text += f", {whole['mfu']:.1%} of the matrix products' rate" if "mfu" in whole else ""
    text += f", peak {whole['peak_mb']:,.0f} MB" if "peak_mb" in whole else ""
    part = lambda rows: next((r["ms"] for r in rows if r["part"] == "memory operation"), None)  # noqa: E731
    if (mine := part(step)) and (theirs := part(fla)):
        text += f". The memory operation takes {mine:.2f} ms, fla's in its place {theirs:.2f} ({theirs / mine:.2f}x)"
        text += f", and the whole step with fla's {fla[0]['wall_ms'] / whole['wall_ms']:.2f}x"
    yield text + "."


def losses(rows: list[dict], *, shapes=None, rate: float | None = None) -> list[str]:
    """Where ours is behind: peers that are faster, smaller or more exact, kernels and parts far from their bound, what failed."""
    said = []
    for c in comparisons(rows, shapes=shapes):
        for what, words in WHAT.items():
            if _beats(c, what):
                clock = f"{_paired(c.wall[what])} by the clock" if what in c.wall else ""
                device = f"{c.device[what]:.2f}x on the device" if what in c.device else ""
                times = ", ".join(filter(None, (device, clock)))
                said.append(f"{c.label} takes less for {words} at {c.shape}: {times}.")
        if c.peak < 1:
            said.append(f"{c.label} needs less memory at {c.shape}: {c.peak:.2f}x.")
        if worse := {q: ratio for q, ratio in c.errors.items() if ratio < 1}:
            numbers = ", ".join(f"{q} {ratio:.2f}x" for q, ratio in worse.items())
            said.append(f"{c.label} is more exact at {c.shape}: {numbers} of our error.")
    for shape, table in kernel_tables(rows, shapes, rate=rate).items():
        slow = table.iloc[:-1][table["of roof"].iloc[:-1] < 1 / FAR]
        if len(slow):
            names = ", ".join(f"`{k}` {share:.0%}" for k, share in zip(slow["kernel"], slow["of roof"], strict=True))
            said.append(f"Kernels below {1 / FAR:.0%} of their roof at {shape}: {names}.")
    far = [row for row in main_step(rows) if row.get("ratio", 0) > FAR and not row["part"].startswith("(")]
    if far:
        named = ", ".join(f"{r['part']} {r['ratio']:.1f}x ({r['ms']:.2f} ms)" for r in far)
        said.append(f"Parts of the training step further than {FAR:g}x from their bound: {named}.")
    for row in latest(rows, "speed") + latest(rows, "step"):
        where = str(bench_measure.Shape(*row["shape"])) if "shape" in row else f"one token, B {row['B']}"
        if row["error"] or row.get("failed"):
            why = row["error"] or "; ".join(row["failed"].values())
            said.append(f"{row['label']} at {where}: {why}")
    for (label, why), where in bench_gpu.refused(latest(rows, "errors"), "label").items():
        said.append(f"{label} in the grid of errors, {len(where)} x {why}; first at {where[0]}.")
    for row in first_rows(rows):
        if row["error"]:
            said.append(f"{row['label']}, first call: {row['error']}")
    kinds = {row["kind"] for row in rows}
    names = {"speed": "speed", "errors": "the grid of errors", "first": "first calls", "step": "generation"}
    names |= {"training": "the training step"}
    if missing := [name for kind, name in names.items() if kind not in kinds]:
        said.append(f"Not in the results file: {', '.join(missing)}.")
    return list(dict.fromkeys(said))
