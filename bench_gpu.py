"""Speed, memory and exactness of the delta rule on a CUDA GPU, beside flash-linear-attention and FlashQLA.

    python bench_gpu.py                     the table: one process per shape, first calls with empty caches included
    python bench_gpu.py --kernels           ... and where the time goes, kernel by kernel
    python bench_gpu.py --cold              first calls alone, one after the other, each with caches of its own
    python bench_gpu.py --scaling           over T, B and H
    python bench_gpu.py --step              one token at a time, in a CUDA graph, at positions 1 and 100,000
    python bench_gpu.py --errors            errors against float64 over widths, lengths, gates, keys and dtypes

Peers come from requirements-bench.txt; one that is absent or refuses to run is a row that says so. Measured are

wall ms     forward, and forward with the gradients of all five inputs, eager: median and quartiles over calls that take turns
device ms   sum of the durations of everything the GPU ran for one call (kernels, copies, fills) by torch.profiler: median
share       of the memory-bound limit: the time that reading every input and writing every result once would take at the
            bandwidth of a large copy, over device ms. Forward moves q, k, v, beta, g and out; backward the five inputs again,
            d_out and five gradients. Small shapes stay in the L2 cache between calls and can come out better than memory allows
peak MiB    most memory that one forward+backward adds to what was allocated before it; results count, inputs and d_out do not
error       |x - x64| / |x64|, Euclidean norms, x64 the chunked PyTorch path in float64 on the same (rounded) inputs

q, k and v are of --dtype; beta and g are float32, as the models here give them. Timed calls ask peers for out alone; ours
always returns the last state too. fla runs as it comes, but not through FlashQLA, which it would call where that is installed
(K = V = 128), and it tunes itself anew in every process, on the shape measured.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import bench_cpu
import bench_measure
import runs

WORKER = Path(bench_measure.__file__).resolve()
SHAPES = [
    bench_measure.Shape(4, 2048, 8, 64, 128),
    bench_measure.Shape(1, 65536, 8, 64, 128),
    bench_measure.Shape(32, 256, 8, 64, 128),
    bench_measure.Shape(4, 2048, 8, 128, 128),
    bench_measure.Shape(1, 65536, 8, 128, 128),
]


def scaling_shapes() -> list[bench_measure.Shape]:
    """Grids over T, B and H around B1 T2048 H8 and B4 T2048 H8, at K64 V128."""
    over_T = [bench_measure.Shape(1, T, 8, 64, 128) for T in (512, 2048, 8192, 32768, 131072)]
    over_B = [bench_measure.Shape(B, 2048, 8, 64, 128) for B in (1, 4, 16, 64)]
    over_H = [bench_measure.Shape(4, 2048, H, 64, 128) for H in (1, 4, 8, 32)]
    return list(dict.fromkeys(over_T + over_B + over_H))


# ------------------------------------------------------------------------------------------------ processes


def environment(caches: str) -> dict:
    """Environment of a worker: every compiler's cache under `caches`, and fla kept from calling FlashQLA."""
    folders = dict(TRITON_CACHE_DIR="triton", TILELANG_CACHE_DIR="tilelang", CUDA_CACHE_PATH="cuda")
    folders = {name: str(Path(caches, folder)) for name, folder in folders.items()}
    # fla would keep what it tuned on one shape, or while others used the GPU too, for all shapes that come after.
    return dict(os.environ, **folders, FLA_FLASH_QLA="0", FLA_CACHE_RESULTS="0")


class Attempt(NamedTuple):
    """What came of one worker: its rows, what it was trying last, how it ended if it died or hung, what it wrote to stderr."""

    rows: list[dict]
    trying: dict | None
    ending: str
    hung: bool
    said: str

    @property
    def error(self) -> str:
        return f"process: {self.ending}: {(self.said.strip().splitlines()[-1:] or ['no output'])[0][:200]}"


def attempt(job: dict, env: dict, *, timeout: float) -> Attempt:
    with tempfile.TemporaryDirectory() as folder:
        path, hung = Path(folder, "rows.jsonl"), False
        command = [sys.executable, str(WORKER), json.dumps(dict(job, rows=str(path)))]
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
            ending, said = f"exit status {done.returncode}" if done.returncode else "", done.stderr
        except subprocess.TimeoutExpired as late:
            ending, hung = f"stopped after {timeout:.0f} s", True
            said = late.stderr.decode(errors="replace") if late.stderr else ""
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    written = [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may have been cut off
    tried = [row["trying"] for row in written if "trying" in row]
    rows = [row for row in written if "trying" not in row]
    return Attempt(rows, tried[-1] if tried else None, ending or ("" if rows else "no rows"), hung, said)


def who_failed(rows: list[dict], last: Attempt) -> tuple[list[dict], str | None]:
    """Whose failure ended a worker of a grid, if anyone's, and `rows` up to its row: what others said later in the same case is
    of a device that was lost already."""
    if last.hung or not last.ending or last.trying is None:
        return rows, None
    case = last.trying["case"]
    of_case = [row for row in rows if row["case"] == case]
    if failed := next((row for row in of_case if row["error"]), None):
        return rows[: rows.index(failed) + 1], failed["impl"]
    if any(row["impl"] == last.trying["impl"] for row in of_case):
        return rows, None  # between two attempts
    return [*rows, dict(last.trying, bench="errors", error=last.error)], last.trying["impl"]


def run(job: dict, env: dict, *, timeout: float, verbose: bool = False) -> list[dict]:
    """The rows of a job. A worker that dies or hangs gives a row for each implementation that says so.

    A grid of errors goes on in another process, without the implementation whose failure has ended one.
    """
    last = attempt(job, env, timeout=timeout)
    rows, said = last.rows, last.said
    while job["kind"] == "errors":
        rows, failed = who_failed(rows, last)
        if failed is None:
            break
        done = len({tuple(row["case"].values()) for row in rows})
        job = dict(job, done=done, broken=[*job.get("broken", ()), failed])
        if done == len(bench_measure.cases(*job["widths"], job["dtypes"])):
            last = last._replace(ending="")
            break
        last = attempt(job, env, timeout=timeout)
        rows, said = rows + last.rows, said + last.said
    if last.ending:
        about = {key: job[key] for key in ("shape", "B", "dtype", "widths") if key in job} | dict(bench=job["kind"])
        names = job.get("impls") or [job["impl"]]
        rows += [dict(about, impl=name, label=bench_measure.label(name), error=last.error) for name in names]
    ours = [row for row in rows if row["impl"] == "ours" and (row["error"] or row.get("failed"))]
    if verbose or ours:
        print(said[-6000:], file=sys.stderr, flush=True)
    return rows


def run_all(jobs: list[dict], envs: list[dict], *, parallel: int, report, **options) -> list[dict]:
    """Rows of all jobs, at most `parallel` workers at once; `report(rows)` as each job ends, in order."""
    rows = []
    with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
        for result in pool.map(lambda pair: run(*pair, **options), zip(jobs, envs, strict=True)):
            report(result)
            rows += result
    return rows


def families(jobs: list[dict]) -> list[tuple[str, bench_measure.Shape]]:
    """(implementation, first of the shapes that share most of its compiled kernels) of speed jobs: B and T are arguments."""
    first = {}
    for job in jobs:
        for name in job["impls"]:
            if name != "torch":  # compiles nothing
                shape = job["shape"]
                first.setdefault((name, shape.H, shape.K, shape.V), shape)
    return [(name, shape) for (name, *_), shape in first.items()]


# ------------------------------------------------------------------------------------------------ tables


def print_setting(row: dict):
    print(f"{row['gpu']}; " + ", ".join(f"{name} {version}" for name, version in row["versions"].items()), flush=True)


def print_first(rows: list[dict]):
    for row in rows:
        if row["error"]:
            print(f"  {row['label']:16s}{row['error']}", flush=True)
        else:
            times = f"{row['first_call_s']:7.1f} s, of which import {row['import_s']:.1f} s"
            print(f"  {row['label']:16s}{times}   {bench_measure.Shape(*row['shape'])}", flush=True)


COLUMNS = {"wall ms: forward": 23, "forward+backward": 23, "device ms: forward": 19, "fwd+bwd": 17, "MiB": 9}
COLUMNS |= dict.fromkeys(bench_cpu.NAMES, 9)


def table_row(name: str, *groups: list[str]) -> str:
    """A line of print_speed's table; a group is a list of cells, one that is empty is filled with dashes."""
    widths, line = iter(COLUMNS.values()), f"  {name:16s}"
    for cells, count in zip(groups, (2, 2, 1, len(bench_cpu.NAMES)), strict=True):
        line += "".join(f"{cell:>{next(widths)}s}" for cell in (cells or ["-"] * count))
    return line


def print_speed(rows: list[dict]):
    """One line of figures for each implementation, and below those of a peer what they are in units of ours."""
    print(f"\n{bench_measure.Shape(*rows[0]['shape'])} {rows[0]['dtype']}", end="")
    measured = next((row for row in rows if row.get("limit_ms")), None)
    if measured:
        limits = " and ".join(f"{limit:.3f}" for limit in measured["limit_ms"].values())
        print(f": a copy runs at {measured['bandwidth'] / 1e12:.2f} TB/s, memory-bound limits {limits} ms", end="")
    print("\n" + " " * 18 + "".join(f"{name:>{width}s}" for name, width in COLUMNS.items()))
    ours = next((row for row in rows if row["impl"] == "ours" and not row["error"]), None)
    for row in rows:
        if row["error"]:
            print(f"  {row['label']:16s}{row['error']}")
            continue
        device, peak, error = row["device_ms"], row["peak_mib"], row["errors"]
        wall = [f"{middle:.3f} [{low:.3f}, {high:.3f}]" for low, middle, high in row["wall_ms"].values()]
        spent = [f"{device[what]:.3f} ({row['share'][what]:.0%})" for what in device]
        memory = [f"{peak:.0f}"] if peak else []
        print(table_row(row["label"], wall, spent, memory, [f"{x:.1e}" for x in error.values()]))
        if ours and row["wall_ratio"]:
            wall = [f"{middle:.2f}x [{low:.2f}, {high:.2f}]" for middle, low, high in row["wall_ratio"].values()]
            spent = [f"{device[what] / ours['device_ms'][what]:.2f}x" for what in device if what in ours["device_ms"]]
            memory = [f"{peak / ours['peak_mib']:.2f}x"] if peak and ours["peak_mib"] else []
            worse = [f"{error[name] / ours['errors'][name]:.2f}x" for name in error if ours["errors"].get(name)]
            print(table_row("  / ours", wall, spent, memory, worse))
        for what, why in row["failed"].items():
            print(f"    {what}: {why}")
    sys.stdout.flush()


def print_kernels(rows: list[dict]):
    for row in rows:
        for what, kernels in (row.get("kernels") or {}).items():
            if row["impl"] == "torch":
                continue
            total = sum(kernels.values())
            print(f"  {row['label']} {what.replace('_', '+')}: {total:.3f} ms")
            for name, ms in kernels.items():
                print(f"    {ms:8.4f} ms {ms / total:4.0%}  {name}")
    sys.stdout.flush()


def above(row: dict, peer: dict) -> dict:
    """Ratio to the peer's error of each quantity in which `row` is worse, or not a number."""
    mine, theirs = row["errors"], peer["errors"]
    worse = {
        name: mine[name] / theirs[name] if theirs[name] else float("inf") for name in mine if mine[name] > theirs[name]
    }
    return worse | {name: float("nan") for name, error in mine.items() if error != error}


def refused(rows: list[dict], name: str) -> dict[tuple[str, str], list[str]]:
    """Where in a grid of errors an implementation failed, by row[name] and what it said."""
    found = {}
    for row in rows:
        if row["error"]:
            where = (
                bench_measure.Case(**row["case"])
                if "case" in row
                else "what was left of K{} V{}".format(*row["widths"])
            )
            found.setdefault((row[name], row["error"]), []).append(str(where))
    return found


def print_errors(rows: list[dict]):
    """Largest errors of ours by dtype, every case in which a peer is better, and what refused."""
    by_case = {}
    for row in rows:
        if row.get("errors"):
            by_case.setdefault(bench_measure.Case(**row["case"]), {})[row["impl"]] = row
    print("\nlargest relative error over all cases")
    print(f"  {'':22s}{'cases':>6s}" + "".join(f"{name:>9s}" for name in bench_cpu.NAMES))
    for impl, dtype in itertools.product(bench_measure.IMPLS, bench_measure.DTYPES):
        group = [r[impl]["errors"] for case, r in by_case.items() if case.dtype == dtype and impl in r]
        if group:
            worst = np.array([list(e.values()) for e in group]).max(0)  # a NaN stays a NaN
            print(f"  {impl + ' ' + dtype:22s}{len(group):6d}" + "".join(f"{x:9.1e}" for x in worst))
    for case in (bench_measure.Case(K, V, T=bench_measure.ERROR_TOKENS) for K, V in bench_measure.FULL):
        for impl, row in by_case.get(case, {}).items():
            print(f"  {impl:8s}" + " ".join(f"{name} {x:.2e}" for name, x in row["errors"].items()) + f"   {case}")
    for peer in [name for name, package in bench_measure.IMPLS.items() if package]:
        both = {case: r for case, r in by_case.items() if "ours" in r and peer in r}
        if not both:
            continue
        worse = [(case, name, x) for case, r in both.items() for name, x in above(r["ours"], r[peer]).items()]
        worse.sort(key=lambda item: -item[2] if item[2] == item[2] else -float("inf"))
        count = len(both) * len(bench_cpu.NAMES)
        print(f"\nours above {peer}: {len(worse)} of {count} numbers in {len(both)} cases")
        for case, name, x in worse:
            mine, theirs = both[case]["ours"]["errors"][name], both[case][peer]["errors"][name]
            print(f"  {name:6s}{x:6.2f}x  {mine:.2e} against {theirs:.2e}   {case}")
    for (impl, error), where in refused(rows, "impl").items():
        print(f"  {impl}: {len(where)} x {error}; first at {where[0]}")
    sys.stdout.flush()


def print_step(rows: list[dict]):
    for row in rows:
        if row["error"]:
            print(f"  B{row['B']:<4d}{row['label']:16s}{row['error']}", flush=True)
            continue
        line = "   ".join(
            f"{row['us'][at][1]:.2f} [{row['us'][at][0]:.2f}, {row['us'][at][2]:.2f}]" for at in row["us"]
        )
        print(f"  B{row['B']:<4d}{row['label']:16s}{line}", flush=True)


# ------------------------------------------------------------------------------------------------ the command


def shape_list(text: str) -> list[bench_measure.Shape]:
    """Shapes from "4,2048,8,64,128 1,65536,8,64,128"."""
    try:
        shapes = [bench_measure.Shape(*map(int, part.split(","))) for part in text.split()]
    except (TypeError, ValueError):
        shapes = []
    if not shapes or any(size < 1 for shape in shapes for size in shape):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected B,T,H,K,V of at least 1 each, several separated by spaces"
        )
    return shapes


def width_list(text: str) -> list[tuple[int, int]]:
    """Pairs K, V of the grid of errors from "100,16 256,256"."""
    known = {f"{K},{V}": (K, V) for K, V in bench_measure.WIDTHS}
    unknown = [part for part in text.split() if part not in known]
    if unknown or not text.split():
        raise argparse.ArgumentTypeError(f"{(unknown or [text])[0]!r}: choose from {' '.join(known)}")
    return [known[part] for part in text.split()]


def impl_list(text: str) -> list[str]:
    """Names of implementations from "ours,fla"."""
    names = text.split(",")
    if unknown := [name for name in names if name not in bench_measure.IMPLS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: choose from {', '.join(bench_measure.IMPLS)}")
    return names


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--cold", action="store_true", help="first calls, each with caches of its own")
    modes.add_argument("--scaling", action="store_true", help="grids over T, B and H")
    modes.add_argument("--step", action="store_true", help="one token at a time, B 1 and 64")
    modes.add_argument("--errors", action="store_true", help="the full grid of errors")
    parser.add_argument("--shapes", type=shape_list, help='"B,T,H,K,V B,T,H,K,V ..."')
    parser.add_argument(
        "--widths", type=width_list, default=bench_measure.WIDTHS, help='K,V of --errors: "100,16 64,128"'
    )
    parser.add_argument("--only", type=impl_list, help=f"implementations, of {','.join(bench_measure.IMPLS)}")
    parser.add_argument("--dtype", choices=bench_measure.DTYPES, help="bf16; of --errors: all")
    parser.add_argument("--pairs", type=int, help="measured calls of each implementation (30; 10 with --quick)")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--kernels", action="store_true", help="print the kernels of each implementation")
    parser.add_argument("--jobs", type=int, help="processes at once where only compilation or errors count")
    parser.add_argument("--cache", help="folder for compiled kernels (a new one, so that first calls are cold)")
    parser.add_argument("--timeout", type=float, default=500, help="seconds for one process")
    parser.add_argument("--out", help="file to append one JSON line per row to")
    parser.add_argument("--verbose", action="store_true", help="print what the processes wrote to stderr")
    args = parser.parse_args(arguments)
    for name in ("pairs", "jobs"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} {value}: expected at least 1")
    args.pairs = args.pairs or (10 if args.quick or args.scaling else 30)
    args.jobs = args.jobs or (1 if args.cold else max(1, (os.cpu_count() or 1) - 2))
    return args


def plan(args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """Jobs that may run side by side (first calls, errors), then those that need the GPU to themselves."""
    if args.errors:
        impls = args.only or ["ours", "fla"]
        dtypes = [args.dtype] if args.dtype else list(bench_measure.DTYPES)
        jobs = [dict(kind="errors", impls=impls, widths=widths, dtypes=dtypes) for widths in args.widths]
        return jobs, []
    if args.step:
        impls = args.only or ["ours", "torch", "fla"]
        return [], [
            dict(kind="step", impls=impls, dtype=args.dtype or "bf16", B=B, pairs=max(args.pairs, 30)) for B in (1, 64)
        ]
    shapes = args.shapes or (scaling_shapes() if args.scaling else SHAPES)
    impls = args.only or (["ours", "fla"] if args.scaling else list(bench_measure.IMPLS))
    dtype = args.dtype or "bf16"
    options = dict(kind="speed", dtype=dtype, pairs=args.pairs, steps=3 if args.quick or args.scaling else 5)
    jobs = []
    for shape in shapes:
        able = [name for name in impls if args.only or name != "flashqla" or shape.K == shape.V == 128]
        jobs.append(dict(options, shape=shape, impls=able))  # FlashQLA has no other widths; it may be asked to say so
    first = [dict(kind="first", impl=name, shape=shape) for name, shape in families(jobs)]
    first = [dict(job, dtype=dtype, all=not args.cold, at_once=min(args.jobs, len(first))) for job in first]
    return first, [] if args.cold else jobs


def report_for(args: argparse.Namespace, kind: str):
    """The function that prints, and appends to --out, the rows of a finished job of `kind`."""

    def report(rows):
        if args.out:
            stamp = dict(revision=runs.git_revision(), date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
            with open(args.out, "a") as out:
                out.writelines(json.dumps(row | stamp) + "\n" for row in rows)
        {"first": print_first, "speed": print_speed, "step": print_step, "errors": lambda rows: None}[kind](rows)
        if kind == "speed" and args.kernels:
            print_kernels(rows)

    return report


def main():
    args = parse()
    if not torch.cuda.is_available():
        sys.exit("bench_gpu.py needs a CUDA GPU; bench_cpu.py measures the delta rule on a CPU")
    start = time.perf_counter()
    side_by_side, alone = plan(args)
    options = dict(timeout=args.timeout, verbose=args.verbose)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        shared = environment(args.cache or folder)
        if side_by_side:
            kind = side_by_side[0]["kind"]
            at_once = min(args.jobs, len(side_by_side))
            title = {"first": "seconds from import to the first gradients", "errors": "errors against float64"}[kind]
            print(f"{title}; {at_once} processes at once", flush=True)
            envs = [environment(f"{folder}/{i}") if args.cold else shared for i in range(len(side_by_side))]
            rows += run_all(side_by_side, envs, parallel=at_once, report=report_for(args, kind), **options)
            if kind == "errors":
                print_errors(rows)
        if args.step:
            print(
                "microseconds per token in a CUDA graph, median [quartiles]: from position 1; after 100,000", flush=True
            )
        if alone:
            report = report_for(args, alone[0]["kind"])
            alone = [dict(job, turn=str(Path(args.cache or folder, "turn"))) for job in alone]
            at_once = 1 if args.step else 2  # one imports its peers while the other measures
            rows += run_all(alone, [shared] * len(alone), parallel=at_once, report=report, **options)
    print_setting(next((row for row in rows if "gpu" in row), dict(gpu="no process came back", versions={})))
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
