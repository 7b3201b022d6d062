"""Figures of what bench_gpu.py and bench_step.py measured, drawn from the rows of their results file: notebook 09 shows them.

Every function takes rows as `bench_report.load` returns them and returns a matplotlib figure, or None where nothing of its kind
was measured. An implementation has one colour and one mark throughout.
"""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

import bench_cpu
import bench_report
import plots

COLOURS = {"ours": plots.COLOURS[0], "fla": plots.COLOURS[1], "flashqla": plots.COLOURS[2], "torch": plots.COLOURS[3]}
MARKERS = {"ours": "o", "fla": "s", "flashqla": "^", "torch": "D"}


def _panels(rows: int, columns: int, *, width: float, height: float, **options):
    plots.style()
    size = (width * columns, height * rows)
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)
    plt.close(fig)  # shown by being the value of a cell, not a second time by the inline backend
    return fig, axes


def _plain(axis) -> None:
    """Powers of ten written out (0.1, 1, 10), nothing between them."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _look(name: str) -> dict:
    return dict(color=COLOURS[name], marker=MARKERS[name])


def _legend_below(fig: Figure, handles, *, columns: int = 5) -> None:
    fig.legend(handles=handles, loc="outside lower center", ncols=min(columns, len(handles)))


def errors(rows: list[dict], *, shapes=None) -> Figure | None:
    """Relative error of every output and gradient, one panel per pair of widths, a mark per shape and implementation."""
    found = {}
    for shape, by_impl in bench_report.speed_rows(rows, shapes=shapes).items():
        for name, row in bench_report.ran(by_impl).items():
            if row["errors"]:
                found.setdefault((shape.K, shape.V), {}).setdefault(name, []).append(row)
    if not found:
        return None
    fig, axes = _panels(1, len(found), width=5.0, height=3.4, sharey=True)
    handles = {}
    for ax, ((K, V), by_impl) in zip(axes[0], found.items(), strict=True):
        for i, (name, measured) in enumerate(by_impl.items()):
            shift = 0.16 * (i - (len(by_impl) - 1) / 2)
            for row in measured:
                values = [row["errors"].get(q, math.nan) for q in bench_cpu.NAMES]
                x = np.arange(len(values)) + shift
                (handles[row["label"]],) = ax.plot(x, values, ls="", ms=5, alpha=0.8, label=row["label"], **_look(name))
        ax.set_xticks(range(len(bench_cpu.NAMES)), bench_cpu.NAMES)
        ax.set(title=f"K = {K}, V = {V}", yscale="log")
    axes[0, 0].set_ylabel("relative error against float64")
    _legend_below(fig, list(handles.values()))
    return fig


def times(rows: list[dict], *, shapes=None, dtype: str = "bf16") -> Figure | None:
    """Milliseconds by shape and implementation: device (filled), wall with quartiles (open), the memory-bound limit (tick)."""
    found = {
        s: ran
        for s, by_impl in bench_report.speed_rows(rows, shapes=shapes, dtype=dtype).items()
        if (ran := bench_report.ran(by_impl))
    }
    if not found:
        return None
    lines = [(shape, name, row) for shape, by_impl in found.items() for name, row in by_impl.items()]
    fig, axes = _panels(1, 2, width=5.4, height=0.9 + 0.3 * (len(lines) + len(found)), sharey=True)
    y, ticks, handles = 0.0, [], {}
    for shape, by_impl in found.items():
        start = y
        for name, row in by_impl.items():
            for ax, what in zip(axes[0], bench_report.WHAT, strict=True):
                handles |= _draw_times(ax, y, name, row, what)
            y += 1
        limit = next(iter(by_impl.values()))["limit_ms"]
        for ax, what in zip(axes[0], bench_report.WHAT, strict=True):
            ax.vlines(limit[what], start - 0.4, y - 0.6, color="0.2", lw=1.5)
        ticks.append(((start + y - 1) / 2, str(shape).replace(" K", "\nK")))
        y += 0.8
    for ax, words in zip(axes[0], bench_report.WHAT.values(), strict=True):
        ax.set(xscale="log", xlabel="ms", title=words)
        ax.grid(visible=False, axis="y")
        _plain(ax.xaxis)
    axes[0, 0].set_yticks(*zip(*ticks, strict=True))
    axes[0, 0].invert_yaxis()
    neutral = dict(ls="", marker="o", color="0.4")
    keys = [Line2D([], [], **neutral, label="device"), Line2D([], [], **neutral, mfc="white", label="wall, quartiles")]
    keys.append(Line2D([], [], color="0.2", lw=1.5, label="memory-bound limit"))
    _legend_below(fig, [*handles.values(), *keys], columns=4)
    return fig


def _draw_times(ax, y, name, row, what) -> dict:
    """Marks of one implementation at height y; the handle for the legend by label."""
    look, device = _look(name), row["device_ms"].get(what)
    if what in row["wall_ms"]:
        low, middle, high = row["wall_ms"][what]
        ax.errorbar(middle, y, xerr=[[middle - low], [high - middle]], mfc="white", capsize=2, ms=6, **look)
        if device:
            ax.plot([device, middle], [y, y], color=look["color"], lw=1, zorder=1)
    if device:
        ax.plot(device, y, ms=6, **look)
    return {row["label"]: Line2D([], [], ls="", ms=6, label=row["label"], **look)}


def roofline(tables: dict, *, rate: float, bandwidth: float) -> Figure | None:
    """Every kernel by FLOP per byte and TFLOP/s under the two measured roofs.

    tables: {shape: kernel_table}; a colour per shape, a mark per kernel, a star for all of them. rate in FLOP/s, bandwidth in
    byte/s.
    """
    tables = {shape: table[table["FLOP/byte"] > 0] for shape, table in tables.items()}
    if not any(map(len, tables.values())):
        return None
    fig, axes = _panels(1, 1, width=7.0, height=4.4)
    ax = axes[0, 0]
    every = pd.concat(tables.values())
    x = np.geomspace(every["FLOP/byte"].min() / 3, max(every["FLOP/byte"].max(), rate / bandwidth) * 3, 200)
    ax.plot(x, np.minimum(rate, x * bandwidth) / 1e12, color="0.2", lw=1.5)
    marks = dict(
        zip(dict.fromkeys(every["kernel"].iloc[::-1]), "*osD^vPX<>pHd", strict=False)
    )  # "all kernels" is the last
    for colour, table in zip(plots.COLOURS, tables.values(), strict=False):
        for name, intensity, speed in zip(table["kernel"], table["FLOP/byte"], table["TFLOP/s"], strict=True):
            size = 13 if name == "all kernels" else 7
            ax.plot(intensity, speed, marker=marks.get(name, "."), ms=size, ls="", color=colour, alpha=0.85)
    look = dict(ls="", color="0.3")
    roofs = f"roofs: copy {bandwidth / 1e12:.2f} TB/s,\nmatrix products {rate / 1e12:.0f} TFLOP/s"
    keys = [Line2D([], [], color="0.2", lw=1.5, label=roofs)]
    keys += [Line2D([], [], marker=mark, label=name, **look) for name, mark in marks.items()]
    keys += [Line2D([], [], lw=6, color=c, label=str(s)) for c, s in zip(plots.COLOURS, tables, strict=False)]
    ax.set(xscale="log", yscale="log", xlabel="FLOP of matrix products per byte moved", ylabel="TFLOP/s")
    _plain(ax.xaxis)
    _plain(ax.yaxis)
    ax.legend(handles=keys, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return fig


def scaling(rows: list[dict]) -> Figure | None:
    """Milliseconds over T, B and H, both axes logarithmic: wall with its quartiles as a band, device dashed, limit dotted."""
    found = {axis: lines for axis in bench_report.AXES if (lines := bench_report.scaling_rows(rows, axis))}
    if not found:
        return None
    fig, axes = _panels(2, len(found), width=3.7, height=3.0, sharex="col", sharey="row")
    handles = {}
    for column, (axis, lines) in enumerate(found.items()):
        for ax, what in zip(axes[:, column], bench_report.WHAT, strict=True):
            for name, points in lines.items():
                handles |= _draw_scaling(ax, name, points, what)
            longest = max(lines.values(), key=len)
            limits = [(n, row["limit_ms"][what]) for n, row in longest]
            ax.plot(*zip(*limits, strict=True), color="0.2", ls=":", lw=1.5)
            ax.set(xscale="log", yscale="log")
        sizes = [n for n, _ in longest]
        axes[1, column].set_xticks(sizes, [f"{n // 1024}k" if n >= 1024 else str(n) for n in sizes])
        axes[1, column].minorticks_off()
        fixed = " ".join(f"{name}{size}" for name, size in bench_report.AXES[axis].items())
        axes[1, column].set_xlabel(bench_report.AXIS_NAMES[axis])
        axes[0, column].set_title(fixed, fontsize=10)
    for row, words in enumerate(bench_report.WHAT.values()):
        axes[row, 0].set_ylabel(f"{words} (ms)")
        _plain(axes[row, 0].yaxis)
    grey = dict(color="0.2")
    keys = [Line2D([], [], **grey, label="wall, quartiles"), Line2D([], [], ls="--", **grey, label="device")]
    _legend_below(fig, [*handles.values(), *keys, Line2D([], [], ls=":", **grey, label="memory-bound limit")])
    return fig


def _draw_scaling(ax, name, points, what) -> dict:
    wall = [(n, *row["wall_ms"][what]) for n, row in points if what in row["wall_ms"]]
    device = [(n, row["device_ms"][what]) for n, row in points if what in row["device_ms"]]
    if wall:
        n, low, middle, high = zip(*wall, strict=True)
        ax.plot(n, middle, ms=4, **_look(name))
        ax.fill_between(n, low, high, color=COLOURS[name], alpha=0.25, lw=0)
    if device:
        ax.plot(*zip(*device, strict=True), ls="--", ms=4, mfc="white", **_look(name))
    return {points[0][1]["label"]: Line2D([], [], ms=4, label=points[0][1]["label"], **_look(name))}


def generation(rows: list[dict]) -> Figure | None:
    """Microseconds per token over position, quartiles as whiskers, a panel per batch; dotted: the state read and written once."""
    steps = [row for row in bench_report.latest(rows, "step") if row.get("us")]
    if not steps:
        return None
    sizes = sorted({row["B"] for row in steps})
    bandwidths = [row["bandwidth"] for row in rows if row.get("bandwidth")]
    fig, axes = _panels(1, len(sizes), width=4.2, height=3.2)
    handles = {}
    for ax, B in zip(axes[0], sizes, strict=True):
        for row in (row for row in steps if row["B"] == B):
            positions = [int(at) for at in row["us"]]
            low, middle, high = np.array(list(row["us"].values())).T
            gap = [middle - low, high - middle]
            ax.errorbar(positions, middle, yerr=gap, capsize=3, ms=5, **_look(row["impl"]))
            handles[row["label"]] = Line2D([], [], ms=5, label=row["label"], **_look(row["impl"]))
        if bandwidths:
            least = (
                1e6 * B * 8 * 64 * 128 * 4 * 2 / float(np.median(bandwidths))
            )  # bench_measure.generation: H8 K64 V128
            ax.axhline(least, color="0.2", ls=":", lw=1.5)
        ax.set(xscale="log", xlabel="token", title=f"B {B}, H8 K64 V128", ylabel="µs per token")
        ax.set_ylim(0, None)
    keys = (
        [Line2D([], [], color="0.2", ls=":", label="state in and out once at the speed of a copy")]
        if bandwidths
        else []
    )
    _legend_below(fig, [*handles.values(), *keys])
    return fig


def training(rows: list[dict]) -> Figure | None:
    """Device milliseconds of each part of the training step (bars) beside its bound (tick), and how many times that it takes."""
    step = bench_report.main_step(rows)
    parts = [row for row in step[1:] if not row["part"].startswith("(")]
    if not parts:
        return None
    fig, axes = _panels(1, 1, width=7.0, height=0.9 + 0.36 * len(parts))
    ax, y = axes[0, 0], np.arange(len(parts))
    ms = np.array([row["ms"] for row in parts])
    bars = ax.barh(y, ms, height=0.6, color=plots.COLOURS[0], label="measured")
    for i, row in enumerate(parts):
        words = f"{row['ms']:.2f} ms"
        if "bound_ms" in row:
            ax.vlines(row["bound_ms"], i - 0.38, i + 0.38, color=plots.COLOURS[1], lw=2.5)
            words += f", {row['ratio']:.1f}x its bound"
        ax.text(max(row["ms"], row.get("bound_ms", 0.0), 0.0) + 0.01 * ms.max(), i, words, va="center", fontsize=9)
    ax.set_yticks(y, [f"{row['part']}{f' ({n} times)' if (n := row['times']) > 1 else ''}" for row in parts])
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    whole = step[0]
    settings = ", ".join(name for name in ("compile", "graph") if whole[name]) or "eager"
    title = (
        f"{whole['model']}, {whole['batch']} x {whole['length']:,}, {settings}: {whole['wall_ms']:.1f} ms by the clock"
    )
    ax.set(xlabel="device ms a step", xlim=(min(0.0, ms.min()), 1.35 * ms.max()), title=title)
    ax.legend(handles=[bars, Line2D([], [], color=plots.COLOURS[1], lw=2.5, label="bound")], loc="lower right")
    return fig
