"""Figures from what analysis and training return. Every function takes tables and returns a matplotlib figure.

Colours are Okabe and Ito's, which every common kind of colour vision tells apart; intervals are always drawn.
"""

from __future__ import annotations

import os
import time

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython import get_ipython
from IPython.display import display
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def style() -> None:
    """One look for every figure; called by each plot, so a notebook needs no set-up."""
    plt.rcParams.update(
        {
            "axes.prop_cycle": plt.cycler(color=COLOURS),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.alpha": 0.25,
            "figure.dpi": 90,
            "savefig.bbox": "tight",
            "font.size": 10,
            "legend.frameon": False,
        }
    )


def _new(columns: int = 1, *, width: float = 5.2, height: float = 3.4, sharex: bool = False):
    style()
    size = (width * columns, height)
    fig, axes = plt.subplots(1, columns, figsize=size, squeeze=False, sharex=sharex, layout="constrained")
    plt.close(fig)  # shown by being the value of a cell, not a second time by the inline backend
    return fig, axes[0]


def _require_columns(table: pd.DataFrame, name: str, columns) -> None:
    """ValueError unless `table` has rows and every one of `columns`."""
    missing = [c for c in columns if c not in table.columns]
    if not len(table) or missing:
        raise ValueError(f"{name}: {len(table)} rows, columns {list(table.columns)}; needs rows and columns {missing}")


def percent(share: float) -> str:
    """A share in per cent with as many digits as a small one needs: 0.42%, 0.002%."""
    return f"{100 * share:.2g}%"


def training(history: pd.DataFrame, *, floor: float | None = None, title: str = "") -> Figure:
    """Loss of every part over steps (nats per scored token), phases shaded, with accuracy checks where there were any.

    history: `Run.history`. floor: the task's irreducible loss, drawn where known (nan: unknown).
    """
    _require_columns(history, "history", ("step", "phase"))
    losses = [c for c in history.columns if c.startswith("loss/") and history[c].notna().any()]
    if not losses:
        raise ValueError(
            f"history: no loss in columns {list(history.columns)}; needs one named 'loss/...' with numbers"
        )
    checked = "accuracy" in history.columns and history["accuracy"].notna().any()
    fig, axes = _new(2 if checked else 1, sharex=True)
    for column in losses:
        part = history[history[column].notna()]
        # A line needs two points; the first one is drawn as a dot.
        dot = "." if len(part) == 1 else None
        axes[0].plot(part["step"], part[column], marker=dot, label=column.removeprefix("loss/"))
    top = history[losses].max().max()
    if floor is not None and np.isfinite(floor):
        top = max(top, floor)
        axes[0].axhline(floor, color="0.4", ls="--", lw=1, label=f"floor {floor:.2f}")
    if np.isfinite(top) and top > 0:  # a little room below, or a floor of 0 would lie under the axis
        axes[0].set_ylim(-0.03 * top, 1.05 * top)
    axes[0].set(xlabel="step", ylabel="loss (nats per scored token)")
    axes[0].legend()
    if checked:
        part = history[history["accuracy"].notna()]
        axes[1].plot(part["step"], part["accuracy"], marker="o", ms=3)
        axes[1].fill_between(part["step"], part["accuracy_low"], part["accuracy_high"], alpha=0.2)
        axes[1].set(xlabel="step", ylabel="accuracy (95% interval)", ylim=(-0.03, 1.03))
        axes[1].yaxis.set_major_formatter(PercentFormatter(1.0))
    for ax in axes:
        _shade_phases(ax, history)
    fig.suptitle(title, fontsize="large")
    return fig


def _shade_phases(ax, history: pd.DataFrame) -> None:
    """Shade every other phase and name them above the axes, in two rows where neighbours could collide."""
    spans = history.groupby("phase", sort=False)["step"].agg(["min", "max"])
    if len(spans) < 2:
        return
    ends = [*spans["min"].iloc[1:], spans["max"].iloc[-1]]  # a phase lasts until the next one logs
    for i, (low, high) in enumerate(zip(spans["min"], ends, strict=True)):
        if i % 2:
            ax.axvspan(low, high, color="0.5", alpha=0.1, lw=0)
    middles = [(low + high) / 2 for low, high in zip(spans["min"], ends, strict=True)]
    names = [f"{name}\n" if len(spans) > 2 and i % 2 else str(name) for i, name in enumerate(spans.index)]
    above = ax.secondary_xaxis("top")
    above.set_xticks(middles, names, fontsize=8, color="0.35")
    above.tick_params(length=0, pad=1)
    above.spines["top"].set_visible(False)


def _whiskers(table: pd.DataFrame, name: str) -> np.ndarray:
    """Lengths [2, rows] of an interval low to high below and above a column, none below 0 by rounding."""
    return np.stack([table[name] - table["low"], table["high"] - table[name]]).clip(min=0)


def _in_doublings(ax, values) -> None:
    """A logarithmic x axis with a tick at every value."""
    values = sorted(set(values))
    ax.set_xscale("log", base=2)
    ax.set_xticks(values, [f"{v:g}" if isinstance(v, float) else f"{v:,}" for v in values])
    ax.minorticks_off()


def accuracies(
    table: pd.DataFrame,
    x: str,
    *,
    xlabel: str,
    chance: float | None = None,
    log: bool = False,
    by: str | None = None,
    mark: tuple[float, str] | None = None,
    lines: bool = True,
) -> Figure:
    """Accuracy with its interval against a number: length, distance, needles. `by` gives one line per value of a column.

    table: columns x, accuracy, low, high. mark: (x, text) draws a vertical line, such as the training length. lines: connect
    the points of a group, from left to right. More groups than colours differ in marker and stroke besides.
    """
    _require_columns(table, "table", [x, "accuracy", "low", "high", *([by] if by else [])])
    groups = [("", table)] if by is None else list(table.groupby(by, sort=False))
    many = len(groups) > 4
    fig, (ax,) = _new(width=9.0 if many else 5.2)
    for i, (name, part) in enumerate(groups):
        part, again = part.sort_values(x), i // len(COLOURS)
        stroke, marker = (("-", "o"), ("--", "s"), (":", "^"))[again % 3]
        drawn = dict(color=COLOURS[i % len(COLOURS)], marker=marker, ls=stroke if lines else "", ms=4, capsize=3)
        ax.errorbar(part[x], part["accuracy"], yerr=_whiskers(part, "accuracy"), label=str(name) or None, **drawn)
    if chance is not None:
        ax.axhline(chance, color="0.4", ls="--", lw=1, label=f"chance {percent(chance)}")
    if mark is not None:
        ax.axvline(mark[0], color="0.6", ls=":", lw=1.2, label=mark[1])
    if log:
        _in_doublings(ax, table[x])
    ax.set(xlabel=xlabel, ylabel="accuracy (95% interval)", ylim=(-0.03, 1.05))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    if many:
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside the lines, which may be anywhere
    elif ax.get_legend_handles_labels()[0]:
        ax.legend()
    return fig


def errors(
    table: pd.DataFrame,
    x: str,
    *,
    xlabel: str,
    ylabel: str = "error, root mean square",
    by: str | None = None,
    also: str | None = None,
    log: bool = False,
) -> Figure:
    """Measured errors with their intervals as points, the exact ones as lines. `by` gives a colour to each value of a column.

    table: columns x, exact, measured, low, high (`interference.beside`), and `also`: another theory, dashed.
    """
    _require_columns(table, "table", [x, "exact", "measured", "low", "high", *filter(None, (by, also))])
    fig, (ax,) = _new(width=5.2 if by is None else 7.2)
    groups = [("", table)] if by is None else list(table.groupby(by, sort=False))
    for colour, (name, part) in zip(COLOURS * len(groups), groups, strict=False):
        gap = _whiskers(part, "measured")
        ax.plot(part[x], part["exact"], color=colour, lw=1.2, label=None if name else "exact")
        points = dict(color=colour, ls="", marker="o", ms=4, capsize=3)
        ax.errorbar(part[x], part["measured"], yerr=gap, label=f"{name}" or "measured", **points)
        if also is not None:
            ax.plot(part[x], part[also], color="0.4", ls="--", lw=1, label=also if part is groups[0][1] else None)
    if log:
        _in_doublings(ax, table[x])
    ax.set(xlabel=xlabel, ylabel=ylabel, ylim=(-0.03 * ax.get_ylim()[1], None))
    if by is None:
        ax.legend()
    else:
        ax.legend(title=by, loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside the lines, which may be anywhere
    return fig


def by_position(
    table: pd.DataFrame,
    *,
    value: str = "loss",
    by: str | None = None,
    ylabel: str = "loss (nats per token)",
    mark: tuple[float, str] | None = None,
) -> Figure:
    """A loss, or what was added to one, by position in the row: a point at the end of each bucket, its interval as a band.

    table: `analysis.loss_by_position`, or `analysis.ablation` without its lines of all positions; value: "loss" with its columns
    low and high, or "added" with "added low" and "added high". mark: (tokens, text) draws a vertical line, such as the window.
    """
    ends = ("low", "high") if value == "loss" else (f"{value} low", f"{value} high")
    _require_columns(table, "table", ("until", value, *ends, *([by] if by else [])))
    fig, (ax,) = _new(width=5.2 if by is None else 7.2)
    groups = [("", table)] if by is None else list(table.groupby(by, sort=False))
    for colour, (name, part) in zip(COLOURS * len(groups), groups, strict=False):
        seen = part["until"].astype(int) + 1
        ax.plot(seen, part[value], color=colour, marker="o", ms=4, lw=1.4, label=str(name) or None)
        ax.fill_between(seen, *(part[end].astype(float) for end in ends), color=colour, alpha=0.18, lw=0)
    if value != "loss":
        ax.axhline(0, color="0.4", lw=1, ls="--")
    if mark is not None:
        ax.axvline(mark[0], color="0.6", ls=":", lw=1.2, label=mark[1])
    _in_doublings(ax, table["until"].astype(int) + 1)
    ax.tick_params(axis="x", labelrotation=45 if table["until"].nunique() > 7 else 0)
    ax.set(xlabel="position in the row, up to (tokens)", ylabel=f"{ylabel}, 95% interval")
    if by is not None:
        ax.legend(title=by, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    elif mark is not None:
        ax.legend()
    return fig


MARKERS = "osD^vPX*"


def trade_off(
    table: pd.DataFrame, *, chance: float | None = None, allowed: float | None = None, title: str = ""
) -> Figure:
    """What needles cost a language model against how many come back: a colour per gate, a marker per weight, both intervals.

    table: `recall.trade_off`; a single seed has no interval, and none is drawn. allowed: a vertical line at so many per cent.
    """
    columns = ("gate", "weight", "excess, %", "excess low", "excess high", "accuracy", "low", "high")
    _require_columns(table, "table", columns)
    fig, (ax,) = _new(width=7.4, height=3.8)
    weights = sorted(set(table["weight"]))
    for colour, (_, part) in zip(COLOURS * len(table), table.groupby("gate", sort=False), strict=False):
        ends = dict(zip(("excess low", "excess high"), ("low", "high"), strict=True))
        across = part[["excess, %", *ends]].rename(columns=ends)
        gaps = dict(xerr=_whiskers(across, "excess, %"), yerr=_whiskers(part, "accuracy"))
        gaps = {name: np.nan_to_num(gap) for name, gap in gaps.items()}
        ax.errorbar(part["excess, %"], part["accuracy"], **gaps, color=colour, lw=0.8, capsize=2, alpha=0.8)
        for x, y, weight in part[["excess, %", "accuracy", "weight"]].itertuples(index=False):
            marker = MARKERS[weights.index(weight) % len(MARKERS)]
            ax.plot(x, y, ls="", marker=marker, ms=7, color=colour, mec="white", mew=0.7, zorder=3)
    for colour, gate in zip(COLOURS * len(table), table["gate"].unique(), strict=False):
        ax.plot([], [], color=colour, lw=2, label=gate)
    for i, weight in enumerate(weights):
        name = f"weight {weight:g}" if weight else "language alone"
        ax.plot([], [], ls="", marker=MARKERS[i % len(MARKERS)], color="0.35", ms=6, label=name)
    if chance is not None:
        ax.axhline(chance, color="0.4", ls="--", lw=1, label=f"chance {percent(chance)}")
    if allowed is not None:
        ax.axvline(allowed, color="0.6", ls=":", lw=1.2, label=f"{allowed:+g}%")
    ax.set(xlabel="language loss beyond that of language alone, % (paired by seed)", title=title)
    ax.set(ylabel="accuracy (95% interval)", ylim=(-0.03, 1.05))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return fig


def bars(
    table: pd.DataFrame, label: str, *, chance: float | None = None, chance_name: str = "chance", title: str = ""
) -> Figure:
    """One bar per row of a table with columns `label`, accuracy, low, high; the interval as a whisker.

    chance: a line, under `chance_name` where it is another bar to pass than chance.
    """
    _require_columns(table, "table", (label, "accuracy", "low", "high"))
    longest = table[label].astype(str).str.len().max()
    fig, (ax,) = _new(width=6.0 + 0.075 * max(0, longest - 20), height=0.9 + 0.42 * max(2, len(table)))
    y = np.arange(len(table))
    gap = _whiskers(table, "accuracy")
    ax.barh(y, table["accuracy"], xerr=gap, capsize=3, height=0.6, color=COLOURS[0], ecolor="0.2")
    if chance is not None:
        ax.axvline(chance, color=COLOURS[1], ls="--", lw=1.2, label=f"{chance_name} {percent(chance)}")
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside the bars, which may be full
    for i, (value, high) in enumerate(zip(table["accuracy"], table["high"], strict=True)):
        ax.text(max(value, high) + 0.02, i, f"{value:.1%}", va="center", fontsize=9)
    ax.set_yticks(y, table[label])
    ax.invert_yaxis()
    ax.set(xlabel="accuracy (95% interval)", xlim=(0, 1.25), xticks=np.linspace(0, 1, 6), title=title)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    return fig


def survival(table: pd.DataFrame, *, by: str | None = None, title: str = "") -> Figure:
    """Gradient that reaches the value against its distance, as log10 of the share at the shortest one: points with a bar from the
    smallest row to the largest, and dashed what decay alone would leave. `by` gives a colour to each value of a column.

    table: `probes.gradient_survival`, whose columns distance, gradient, least, most, survival and decay are drawn.
    """
    columns = ["distance", "gradient", "least", "most", "survival", "decay"]
    _require_columns(table, "table", columns + ([by] if by else []))
    fig, (ax,) = _new()
    groups = [("", table)] if by is None else list(table.groupby(by, sort=False))
    for colour, (name, part) in zip(COLOURS * len(groups), groups, strict=False):
        part = part[np.isfinite(part["survival"])]  # of a gradient of exactly 0 there is no point to draw
        ends = (
            part[["least", "most"]].sub(part["gradient"] - part["survival"], axis=0).set_axis(["low", "high"], axis=1)
        )
        ends["low"] = ends["low"].where(np.isfinite(ends["low"]), part["survival"])
        gap = _whiskers(ends.assign(survival=part["survival"]), "survival")
        points = dict(color=colour, lw=1.2, marker="o", ms=4, capsize=3)
        ax.errorbar(part["distance"], part["survival"], yerr=gap, label=f"{name}" or "gradient", **points)
        ax.plot(part["distance"], part["decay"], color=colour, ls="--", lw=1)
    ax.plot([], [], color="0.4", ls="--", lw=1, label="decay alone")
    ax.set_xscale("symlog", base=2, linthresh=1)  # a value may stand right before its cue, at distance 0
    distances = sorted(set(table["distance"]))
    ax.set_xticks(distances, [f"{d:,}" for d in distances], rotation=45 if len(distances) > 9 else 0)
    ax.minorticks_off()
    ax.set(xlabel="tokens between value and cue", ylabel="gradient at the value, log10", title=title)
    ax.legend(title=by)
    return fig


ORIGINS = ("the value asked for", "another value", "marker", "haystack", "elsewhere")


def confusion(table: pd.DataFrame, *, title: str = "") -> Figure:
    """Where answers come from: one bar per row of `probes.confusion`, its trials split by origin.

    Other values are drawn as one part; which of them it is, the table says.
    """
    _require_columns(table, "table", ("asked", "right", "marker", "haystack", "elsewhere", "trials"))
    fig, (ax,) = _new(width=6.4, height=0.9 + 0.34 * max(2, len(table)))
    parts = [table["right"], *(table[name] for name in ("marker", "haystack", "elsewhere"))]
    parts.insert(1, table["trials"] - sum(parts))
    y, left = np.arange(len(table)), np.zeros(len(table))
    for colour, name, part in zip((COLOURS[2], *COLOURS[1::-1], "0.6", "0.85"), ORIGINS, parts, strict=True):
        share = (part / table["trials"]).to_numpy()
        ax.barh(y, share, left=left, height=0.7, color=colour, label=name)
        left = left + share
    ax.set_yticks(y, [f"needle {a}" if isinstance(a, int) else a for a in table["asked"]])
    ax.invert_yaxis()
    ax.grid(False)
    ax.set(xlabel="share of answers", xlim=(0, 1), title=title)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    return fig


def state(memory, *, title: str = "state", limit: int = 4) -> Figure:
    """Heat map of the memory of the first sequence: one panel per head (at most `limit`), keys down, values across.

    memory: tensor [B, H, K, V].
    """
    if memory.ndim != 4:
        raise ValueError(f"memory: needs [B, H, K, V], was given {list(memory.shape)}")
    S = memory[0, :limit].detach().float().cpu().numpy()
    largest = float(np.abs(S).max()) or 1.0
    fig, axes = _new(len(S), width=2.9, height=2.6)
    for h, ax in enumerate(axes):
        image = ax.imshow(S[h], cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
        ax.grid(False)
        ax.set(title=f"{title}, head {h}", xlabel="value dimension", ylabel="key dimension" if h == 0 else "")
    fig.colorbar(image, ax=list(axes), shrink=0.85, label="weight")
    return fig


def similarity(matrix, labels, *, title: str = "cosine similarity of keys") -> Figure:
    """Square heat map with one label per row, for keys or reads. matrix [n, n], values in [-1, 1]."""
    n = len(labels)
    if np.shape(matrix) != (n, n):
        raise ValueError(f"matrix: needs one row and column for each of {n} labels, was given {list(np.shape(matrix))}")
    fig, (ax,) = _new(width=2.4 + 0.28 * n, height=1.6 + 0.26 * n)
    image = ax.imshow(np.asarray(matrix), cmap="RdBu_r", vmin=-1, vmax=1)
    ax.grid(False)
    ax.set_xticks(range(n), labels, rotation=60, ha="right")
    ax.set_yticks(range(n), labels)
    ax.set_title(title)
    fig.colorbar(image, ax=ax, shrink=0.8, label="cosine")
    return fig


def gates(record: dict, *, marks=(), title: str = "") -> Figure:
    """Write strength and decay by token for the first sequence of a G layer's diagnostics, one line per head.

    marks: positions to point out, such as markers.
    """
    beta = record["beta"][0].float().cpu().numpy()
    decay = record["log_decay"][0].float().exp().cpu().numpy()
    fig, axes = _new(2, height=2.8)
    for ax, values, name in zip(axes, (beta, decay), ("write strength beta", "share kept per token, e^g"), strict=True):
        for h in range(values.shape[1]):
            ax.plot(values[:, h], lw=1, label=f"head {h}")
        for i, m in enumerate(marks):
            ax.axvline(m, color="0.35", lw=0.8, ls=":", label="marker" if i == 0 else None)
        ax.set(xlabel="token", ylabel=name, ylim=(-0.03, 1.05))
    axes[0].legend(fontsize=8, ncols=2)
    axes[0].set_title(title)
    return fig


class LiveCurve:
    """Hand to `train.fit(on_log=...)`: the training figure, redrawn in place while the run goes on.

    Without an interactive front end (WORKBOOK_HEADLESS set, or no notebook kernel) nothing is drawn until `finish`.
    Drawing takes at most about a tenth of the time.
    """

    def __init__(self, *, every: float = 2.0, floor: float | None = None, title: str = ""):
        """every: least seconds between two drawings."""
        self.every, self.floor, self.title = every, floor, title
        self.rows: list[dict] = []
        self._next, self._handle = 0.0, None
        self.live = get_ipython() is not None and not os.environ.get("WORKBOOK_HEADLESS")

    def __call__(self, rows: list[dict]) -> None:
        self.rows = rows
        start = time.monotonic()
        if self.live and start >= self._next:
            self._show()
            now = time.monotonic()
            self._next = now + max(self.every, 10 * (now - start))

    def _show(self) -> None:
        figure = training(pd.DataFrame(self.rows), floor=self.floor, title=self.title)
        if self._handle is None:
            self._handle = display(figure, display_id=True)
        else:
            self._handle.update(figure)

    def finish(self) -> None:
        """Leave one clean figure of the whole run in the cell."""
        if self.rows:
            self._show()
