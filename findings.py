"""Sentences made from the tables of studies: what their intervals carry, and no more.

    findings.word(low, high, seeds, "better", "worse", least=5)     # better | worse | no difference shown | no verdict ...
    findings.price(curves, least=3)                                 # what needles cost a language model, arm by arm

Notebooks show a table and put its sentence below; a table without rows gives a sentence that claims nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

import analysis
import recall


def word(low: float, high: float, seeds: int, more: str, less: str, *, least: int) -> str:
    """`more` or `less` where the interval (low, high) of a difference leaves out 0; no verdict from fewer than `least` seeds."""
    if seeds < least:
        return f"no verdict from {seeds:.0f} of {least} seeds"
    if high - low < 1e-9 and low != 0:
        return "the same in every seed, so without an interval"
    return more if low > 0 else less if high < 0 else "no difference shown"


def over_seeds(values: Iterable[float], form: str = ".2f") -> str:
    """Mean of one number per seed with its 95% interval: `3.09 [2.17, 4.00] over 5 seeds`."""
    values = list(values)
    if len(values) == 1:
        return f"{values[0]:{form}}, one seed"
    mean, low, high = analysis.mean_interval(values)
    return f"{mean:{form}} [{low:{form}}, {high:{form}}] over {len(values)} seeds"


def rate(r) -> str:
    """Accuracy of a line of `recall.summary` with its interval, in per cent."""
    return f"{r['accuracy']:.1%} [{100 * r['low']:.1f}, {100 * r['high']:.1f}]"


def excess(r) -> str:
    """How far a loss lies beyond another, of a line of `recall.losses` or `recall.trade_off`."""
    return f"{r['excess, %']:+.2f}% [{r['excess low']:+.2f}, {r['excess high']:+.2f}]"


def price(curves: dict[str, pd.DataFrame], *, least: int, right: float = 0.99, allowed: float = 2.0) -> str:
    """What needles cost a language model: `recall.trade_off` by test, of which every one has to give back `right` in every seed,
    at a loss at most `allowed` per cent higher (upper end)."""
    tables = [table[table["weight"] > 0].reset_index(drop=True) for table in curves.values()]
    if not tables or not len(tables[0]):
        return "*Price*: the file holds no rows; nothing is claimed."
    first = tables[0]
    sound = pd.concat([table["enough"] for table in tables], axis=1).all(axis=1)
    kept = sound & pd.concat([table["worst"] >= right for table in tables], axis=1).all(axis=1)
    dearer, cheaper = (first["excess low"] > 0) & sound, (first["excess high"] < 0) & sound
    cheap = kept & (first["excess high"] <= allowed)
    lines = [
        f"*Price*: {sound.sum()} of {len(first)} arms with needles have {least} seeds. Beside needles the language loss is shown "
        f"to be higher than alone in {dearer.sum()} of them, lower in {cheaper.sum()}. Every seed gives back {right:.0%} of the "
        f"needles, {' and '.join(curves)}, in {kept.sum()}; in {cheap.sum()} of those the loss is at most {allowed:g}% higher "
        "(upper end)."
    ]
    for i, r in first.iterrows():
        asked = ", ".join(
            f"{rate(table.loc[i])} {test} ({table.loc[i, 'worst']:.1%} in the worst of {r['seeds']} seeds)"
            for test, table in zip(curves, tables, strict=True)
        )
        lines.append(
            f"{r['gate'].capitalize()}, weight {r['weight']:g}: loss {r['loss']:.3f} against {r['alone']:.3f} nats "
            f"({excess(r)}), needles {asked}."
        )
    return " ".join(lines)


def distance(distant: pd.DataFrame, rivals: pd.DataFrame, *, least: int, right: float = 0.99) -> str:
    """What is left at a greater length: lines of `recall.lost`, and of `recall.differences` between them at that length."""
    if not len(distant):
        return "*Further away*: the file holds no rows; nothing is claimed."
    test, sound = distant["test"].iloc[0], distant[distant["seeds"] >= least]
    kept = (sound["worst"] >= right).sum()
    lines = [f"*{test}*: of {len(sound)} arms with {least} seeds {kept} still give back {right:.0%} in every seed."]
    for r in distant.to_dict("records"):
        ends = r["lost low"], r["lost high"]
        said = word(*ends, r["seeds"], "needles are lost on the way", "more come back than near", least=least)
        points = f"{r['lost']:+.1f} points lost [{ends[0]:+.1f}, {ends[1]:+.1f}]"
        lines.append(f"{r['arm'].capitalize()}: {rate(r)}, {points}: {said}.")
    for r in rivals[rivals["test"] == test].itertuples() if len(rivals) else ():
        said = word(r.low, r.high, r.seeds, f"more than {r.than}", f"less than {r.than}", least=least)
        points = f"{r.difference:+.1f} points [{r.low:+.1f}, {r.high:+.1f}]"
        lines.append(f"{r.arm.capitalize()}, beside {r.than}: {points}: **{said}**.")
    return " ".join(lines)


def shut(rows: pd.DataFrame, gate: str, *, weight: float, least: int) -> str:
    """How often the gates of two arms of `language` write nothing on text, alone and beside needles, paired by seed."""
    models = rows.drop_duplicates(["arm", "seed"]) if len(rows) else rows
    by_arm = models.pivot_table(index="seed", columns="arm", values="shut") if len(models) else models
    alone, beside = f"{gate}, language alone", f"{gate}, weight {weight:g}"
    if not {alone, beside} <= set(by_arm):
        return f"*{gate.capitalize()}*: the file does not hold both arms; nothing is claimed."
    first, then = by_arm[alone].dropna(), by_arm[beside].dropna()
    strength = recall.inside(models.dropna(subset="beta"))["write strength"]
    line = f"*{gate.capitalize()}*, share of the tokens of held-out text at which they write nothing: after language alone "
    line += f"{over_seeds(first, '.2%')} (mean strength {strength[alone]:.3f}), beside needles at weight {weight:g} "
    line += f"{over_seeds(then, '.2%')} ({strength[beside]:.3f})"
    points = (100 * (then - first)).dropna()
    if len(points) < 2:
        return line + "."
    mean, low, high = analysis.mean_interval(points)
    said = word(
        low, high, len(points), "needles keep them shut more often", "needles keep them open more often", least=least
    )
    return line + f": {mean:+.2f} points [{low:+.2f}, {high:+.2f}]: **{said}**."


def orders(losses: pd.DataFrame, right: pd.DataFrame, *, than: str, least: int) -> str:
    """Loss (`recall.losses`) and needles (`recall.summary` of one test) of every order of training, beside arm `than`."""
    if not len(losses):
        return "*Order*: the file holds no rows, or one seed; nothing is claimed."
    right, lines = right.set_index("arm"), []
    for r in losses.to_dict("records"):
        line = f"{r['arm']}: {r['loss']:.3f} nats, {rate(right.loc[r['arm']])} of the needles in text"
        if r["arm"] != than:
            said = word(r["excess low"], r["excess high"], r["seeds"], "worse for text", "better for text", least=least)
            line += f", loss {excess(r)}: {said}"
        lines.append(line)
    return f"*Order* ({losses['seeds'].min()} seeds, intervals of each arm alone): " + "; ".join(lines) + "."


def worth(losses: pd.DataFrame, *, than: str, least: int) -> str:
    """Arms with a memory beside arm `than`, which has none: lines of `recall.losses`."""
    if than not in set(losses.get("arm", ())):
        return "*A model without a memory*: the file does not hold it; nothing is claimed."
    by_arm, lines = losses.set_index("arm"), []
    for arm, r in by_arm.drop(than).iterrows():
        said = word(
            r["excess low"], r["excess high"], r["seeds"], "worse than without", "better than without", least=least
        )
        lines.append(f"{arm.split(',')[0]} {r['loss']:.3f} nats, {excess(r)} over {r['seeds']:.0f} seeds: **{said}**")
    none = by_arm.loc[than]
    smaller = 1 - none["parameters"] / by_arm["parameters"].max()
    said = f"*A model without a memory* ({smaller:.1%} fewer parameters) stands at {none['loss']:.3f} nats; "
    return said + "; ".join(lines) + "."
