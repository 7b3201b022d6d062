"""Plots: what is drawn is what the tables hold, axes are labelled, nothing warns, live curves keep quiet when headless."""

import dataclasses
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

import analysis
import config
import data
import model
import plots
import probes
import report


def draw(figure):
    """Render; any warning is an error. No figure may stay open: a notebook would show it twice."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FigureCanvasAgg(figure).draw()  # a closed figure is left with a canvas that draws nothing
    assert not plt.get_fignums()
    return figure.axes


def history(phases=("retrieval", "gym"), steps=8, accuracy=True):
    """Rows as `train.fit` logs them: a loss per part, an accuracy now and then."""
    rows = []
    for i in range(steps * len(phases)):
        name = phases[i // steps]
        row = {"step": 5 * i, "phase": name, "lr": 1e-3, f"loss/{name}": 5.0 / (1 + i % steps)}
        if accuracy and i % 4 == 3:
            row |= {"accuracy": i / 20, "accuracy_low": i / 20 - 0.1, "accuracy_high": i / 20 + 0.05}
        rows.append(row)
    return pd.DataFrame(rows)


def rates(x, *counts, total=1000):
    """A table of rates as `analysis` returns them."""
    return pd.DataFrame([{x: 128 * 2**i, **analysis.Rate(c, total).row()} for i, c in enumerate(counts)])


def inside(figure):
    """Every visible text of the figure lies within what is saved, and no two of them overlap."""
    renderer = figure.canvas.get_renderer()
    frame = figure.get_tightbbox(renderer).padded(0.02)
    boxes = []
    texts = [figure._suptitle] if figure._suptitle else []
    for ax in figure.axes:
        texts += [ax.title, ax.xaxis.label, ax.yaxis.label]
        for child in ax.child_axes:
            texts += [t.label2 for t in child.xaxis.get_major_ticks()]
    for text in texts:
        if text.get_text().strip() and text.get_visible():
            box = text.get_window_extent(renderer)
            assert frame.x0 <= box.x0 / figure.dpi and box.x1 / figure.dpi <= frame.x1, text.get_text()
            assert frame.y0 <= box.y0 / figure.dpi and box.y1 / figure.dpi <= frame.y1, text.get_text()
            boxes.append((text.get_text(), box))
    for i, (a, box) in enumerate(boxes):
        for b, other in boxes[:i]:
            assert not box.padded(-1).overlaps(other), (a, b)


# ------------------------------------------------------------------------------------------------ training


def test_training_draws_losses_phases_and_accuracy_with_its_interval():
    table = history()
    figure = plots.training(table, floor=0.25, title="curriculum")
    left, right = draw(figure)
    assert left.get_xlabel() == right.get_xlabel() == "step"
    assert left.get_ylabel() == "loss (nats per scored token)" and "95% interval" in right.get_ylabel()
    lines = {line.get_label(): line for line in left.lines}
    assert set(lines) == {"retrieval", "gym", "floor 0.25"}
    for name in ("retrieval", "gym"):
        part = table[table["phase"] == name]
        assert lines[name].get_xdata().tolist() == part["step"].tolist()
        assert lines[name].get_ydata().tolist() == part[f"loss/{name}"].tolist()
    checks = table.dropna(subset="accuracy")
    assert right.lines[0].get_ydata().tolist() == checks["accuracy"].tolist()
    band = right.collections[0].get_paths()[0].vertices
    assert set(checks["accuracy_low"]) | set(checks["accuracy_high"]) <= set(band[:, 1])
    assert left.get_xlim() == right.get_xlim()
    assert len(left.patches) == 1  # the second phase is shaded
    assert [t.get_text() for t in left.child_axes[0].get_xticklabels()] == ["retrieval", "gym"]
    assert figure._suptitle.get_text() == "curriculum"
    inside(figure)


def test_training_shows_a_floor_of_zero_above_the_axis():
    (ax,) = draw(plots.training(history(("one",), accuracy=False), floor=0.0))
    assert ax.get_ylim()[0] < 0 and not ax.child_axes
    (ax,) = draw(plots.training(history(("one",), accuracy=False), floor=9.0))
    assert ax.get_ylim()[1] > 9
    (ax,) = draw(plots.training(history(("one",), accuracy=False), floor=float("nan")))
    assert [line.get_label() for line in ax.lines] == ["one"]


def test_training_draws_the_first_row_and_many_phases():
    (ax,) = draw(plots.training(history().head(1), floor=0.0))
    assert [line.get_marker() for line in ax.lines] == [".", "None"]  # a line through one point shows nothing
    phases = ("short", "a phase with a long name", "third", "the last phase of all")
    figure = plots.training(history(phases, steps=3), title="many phases")
    assert len(draw(figure)[0].patches) == 2
    inside(figure)


def test_training_draws_losses_of_zero():
    (ax,) = draw(plots.training(pd.DataFrame({"step": [1, 2], "phase": "a", "loss/a": [0.0, 0.0]})))
    assert ax.lines[0].get_ydata().tolist() == [0, 0]


def test_training_refuses_a_history_without_losses():
    for table in (pd.DataFrame(), history().head(0), pd.DataFrame({"step": [1], "phase": ["a"], "lr": [0.1]})):
        with pytest.raises(ValueError, match="history"):
            plots.training(table)


# ------------------------------------------------------------------------------------------------ accuracies


def test_accuracies_draw_points_intervals_chance_and_mark():
    table = rates("seq_len", 1000, 990, 620)
    figure = plots.accuracies(
        table, "seq_len", xlabel="sequence length (tokens)", chance=1 / 240, log=True, mark=(128, "training length")
    )
    (ax,) = draw(figure)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("sequence length (tokens)", "accuracy (95% interval)")
    (bars,) = [c for c in ax.containers if type(c).__name__ == "ErrorbarContainer"]
    segments = np.array(bars.lines[2][0].get_segments())
    assert segments[:, 0, 1] == pytest.approx(table["low"]) and segments[:, 1, 1] == pytest.approx(table["high"])
    assert bars.lines[0].get_ydata().tolist() == table["accuracy"].tolist()
    assert [t.get_text() for t in ax.get_xticklabels()] == ["128", "256", "512"]
    labels = [t.get_text() for t in ax.get_legend().get_texts()]
    assert sorted(labels) == ["chance 0.42%", "training length"]
    low, high = ax.get_ylim()
    assert low < 0 and high > 1  # neither 0% nor 100% is cut
    inside(figure)


def test_accuracies_draw_one_line_per_group():
    table = pd.concat([rates("n", 1000, 900).assign(gates="hard"), rates("n", 500, 100).assign(gates="sigmoid")])
    (ax,) = draw(plots.accuracies(table, "n", xlabel="needles", by="gates"))
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["hard", "sigmoid"]
    assert len({to_hex(c.lines[0].get_color()) for c in ax.containers}) == 2
    (ax,) = draw(plots.accuracies(rates("n", 1000), "n", xlabel="needles"))
    assert ax.get_legend() is None
    for bad in (rates("n", 1).head(0), rates("n", 1).drop(columns="low")):
        with pytest.raises(ValueError, match="table"):
            plots.accuracies(bad, "n", xlabel="needles")


def test_accuracies_of_many_groups_can_be_told_apart_whatever_the_order_of_the_rows():
    table = pd.concat([rates("n", 900, 500, 100).assign(arm=f"arm {i}") for i in range(9)])
    figure = plots.accuracies(table.iloc[::-1], "n", xlabel="needles", by="arm")
    (ax,) = draw(figure)
    lines = [c.lines[0] for c in ax.containers]
    assert len({(to_hex(line.get_color()), line.get_marker(), line.get_linestyle()) for line in lines}) == 9
    for line in lines:
        assert line.get_xdata().tolist() == sorted(line.get_xdata()) and line.get_ydata().tolist() == [0.9, 0.5, 0.1]
    assert ax.get_legend().get_window_extent().x0 >= ax.get_window_extent().x1 - 1  # beside the lines, over none
    inside(figure)


def test_bars_draw_values_and_whiskers():
    table = pd.DataFrame([{"arm": n, **analysis.Rate(c, 1000).row()} for n, c in (("present", 1000), ("removed", 5))])
    figure = plots.bars(table, "arm", chance=1 / 240, title="five needles")
    (ax,) = draw(figure)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["present", "removed"]
    assert ax.get_xlabel() == "accuracy (95% interval)"
    assert [p.get_width() for p in ax.patches] == [1.0, 0.005]
    assert {t.get_text() for t in ax.texts} == {"100.0%", "0.5%"}
    whiskers = np.array(ax.collections[0].get_segments())
    assert whiskers[:, 0, 0] == pytest.approx(table["low"]) and whiskers[:, 1, 0] == pytest.approx(table["high"])
    frame = ax.get_window_extent()
    assert all(t.get_window_extent().x1 <= frame.x1 for t in ax.texts)
    assert ax.get_legend().get_window_extent().x0 >= frame.x1 - 1  # beside the bars, over none
    inside(figure)
    with pytest.raises(ValueError, match="table"):
        plots.bars(table.drop(columns="high"), "arm")


# ------------------------------------------------------------------------------------------------ the inside


def test_state_gates_and_similarity_show_a_model():
    cfg = config.HybridConfig(
        d_model=16, n_heads=2, head_dim=8, value_dim=4, vocab_size=64, window_size=4, init_std=0.1
    )
    tokens = torch.randint(0, 64, (2, 20), generator=analysis.fresh(0))
    record = analysis.records(model.build(cfg), tokens)[0]
    figure = plots.state(record["state"])
    axes = draw(figure)
    assert [ax.get_title() for ax in axes[:2]] == ["state, head 0", "state, head 1"]
    assert (axes[0].get_xlabel(), axes[0].get_ylabel()) == ("value dimension", "key dimension")
    assert np.array_equal(axes[1].images[0].get_array(), record["state"][0, 1].numpy())
    assert axes[0].images[0].get_clim() == axes[1].images[0].get_clim()  # one colour scale for all heads
    inside(figure)
    assert len(draw(plots.state(record["state"], limit=1))) == 2
    draw(plots.state(torch.zeros(1, 1, 3, 3)))
    with pytest.raises(ValueError, match="memory"):
        plots.state(record["state"][0])

    figure = plots.gates(record, marks=(3, 9), title="G layer")
    left, right = draw(figure)
    assert left.get_xlabel() == right.get_xlabel() == "token"
    assert (left.get_ylabel(), right.get_ylabel()) == ("write strength beta", "share kept per token, e^g")
    for h in range(2):
        assert left.lines[h].get_ydata() == pytest.approx(record["beta"][0, :, h].numpy())
        assert right.lines[h].get_ydata() == pytest.approx(record["log_decay"][0, :, h].exp().numpy())
    assert [t.get_text() for t in left.get_legend().get_texts()] == ["head 0", "head 1", "marker"]
    inside(figure)

    keys = record["keys"][0, :5, 0]
    figure = plots.similarity(keys @ keys.T, [f"token {i}" for i in range(5)])
    ax, bar = draw(figure)
    assert ax.images[0].get_clim() == (-1, 1) and bar.get_ylabel() == "cosine"
    assert [t.get_text() for t in ax.get_yticklabels()] == [f"token {i}" for i in range(5)]
    with pytest.raises(ValueError, match="matrix"):
        plots.similarity(keys @ keys.T, ["a"])


# ------------------------------------------------------------------------------------------------ probes


def surviving(*survival):
    """A table as `probes.gradient_survival` returns it, from log10 shares."""
    table = pd.DataFrame({"distance": [0, 4, 64, 1000][: len(survival)], "survival": survival})
    table["gradient"] = table["survival"] + 0.7
    table = table.assign(least=table["gradient"] - 0.3, most=table["gradient"] + 0.2)
    return table.assign(kept=-0.1 * table["distance"], decay=-0.1 * table["distance"])


def test_survival_draws_gradients_rows_and_decay():
    table = surviving(0.0, -0.5, -6.5, -101.0)
    figure = plots.survival(table, title="untrained")
    (ax,) = draw(figure)
    (bars,) = [c for c in ax.containers if type(c).__name__ == "ErrorbarContainer"]
    assert bars.lines[0].get_ydata().tolist() == table["survival"].tolist()
    segments = np.array(bars.lines[2][0].get_segments())
    assert segments[:, 0, 1] == pytest.approx(table["survival"] - 0.3)
    assert segments[:, 1, 1] == pytest.approx(table["survival"] + 0.2)
    assert table["decay"].tolist() in [line.get_ydata().tolist() for line in ax.lines]
    assert {t.get_text() for t in ax.get_legend().get_texts()} == {"gradient", "decay alone"}
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "4", "64", "1,000"]
    assert "log10" in ax.get_ylabel() and ax.get_ylim()[0] < -101
    inside(figure)


def test_survival_draws_groups_and_leaves_gradients_of_zero_out():
    gone = surviving(0.0, -2.0, -np.inf)
    gone.loc[1, "least"] = -np.inf  # one row without any
    both = pd.concat([gone.assign(decays="fast"), surviving(0.0, -0.1, -0.2).assign(decays="slow")])
    (ax,) = draw(plots.survival(both, by="decays"))
    fast, slow = (c.lines[0].get_ydata().tolist() for c in ax.containers)
    assert fast == [0, -2] and slow == [0, -0.1, -0.2]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["decay alone", "fast", "slow"]
    assert len({to_hex(c.lines[0].get_color()) for c in ax.containers}) == 2
    draw(plots.survival(surviving(0.0).assign(decay=np.nan)))  # a model without memory, one distance
    with pytest.raises(ValueError, match="least"):
        plots.survival(gone.drop(columns="least"))


def test_confusion_draws_every_answer_once():
    columns = ["asked", "right", "needle 0", "needle 1", "marker", "haystack", "elsewhere", "trials"]
    rows = [[0, 60, 60, 20, 5, 10, 5, 100], [1, 30, 10, 30, 0, 6, 4, 50], ["all", 90, 70, 50, 5, 16, 9, 150]]
    figure = plots.confusion(pd.DataFrame(rows, columns=columns), title="two needles")
    (ax,) = draw(figure)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["needle 0", "needle 1", "all"]
    widths = np.array([[p.get_width() for p in c] for c in ax.containers]).T
    assert widths[0] == pytest.approx([0.6, 0.2, 0.05, 0.1, 0.05])
    assert widths[1] == pytest.approx([0.6, 0.2, 0, 0.12, 0.08])
    assert widths.sum(1) == pytest.approx([1, 1, 1])
    assert [t.get_text() for t in ax.get_legend().get_texts()] == list(plots.ORIGINS)
    assert len({to_hex(c[0].get_facecolor()) for c in ax.containers}) == 5
    inside(figure)
    with pytest.raises(ValueError, match="elsewhere"):
        plots.confusion(pd.DataFrame(rows, columns=columns).drop(columns="elsewhere"))


def test_probes_are_drawn_as_they_come():
    cfg = config.HybridConfig(
        d_model=16, n_heads=2, head_dim=8, value_dim=4, vocab_size=64, window_size=4, init_std=0.1
    )
    task = data.MultiNeedle(seq_len=32, vocab_size=64, n_needles=2, n_markers=4)
    net = model.build(cfg)
    (ax,) = draw(plots.confusion(probes.confusion(net, task, trials=20)))
    assert [t.get_text() for t in ax.get_yticklabels()] == ["needle 0", "needle 1", "all", "guess"]
    (ax,) = draw(plots.survival(probes.gradient_survival(net, task, [1, 8], rows=2)))
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "8"]


# ------------------------------------------------------------------------------------------------ live


class Screen:
    """Stands for the front end: counts what is displayed and what is redrawn in place."""

    def __init__(self):
        self.shown, self.updated = [], []

    def display(self, figure, *, display_id):
        self.shown.append(figure)
        return self

    def update(self, figure):
        self.updated.append(figure)


@pytest.fixture
def screen(monkeypatch):
    screen = Screen()
    monkeypatch.setattr(plots, "display", screen.display)
    monkeypatch.setattr(plots, "get_ipython", lambda: object())
    monkeypatch.delenv("WORKBOOK_HEADLESS", raising=False)
    return screen


def feed(curve, rows):
    rows = rows.to_dict("records")
    for i in range(1, len(rows) + 1):
        curve(rows[:i])


@pytest.mark.parametrize("why", ["WORKBOOK_HEADLESS", "no kernel"])
def test_live_curve_draws_once_when_headless(screen, monkeypatch, why):
    if why == "no kernel":
        monkeypatch.setattr(plots, "get_ipython", lambda: None)
    else:
        monkeypatch.setenv("WORKBOOK_HEADLESS", "1")
    curve = plots.LiveCurve(every=0.0)
    feed(curve, history())
    assert not screen.shown
    curve.finish()
    assert (len(screen.shown), len(screen.updated)) == (1, 0)
    assert len(screen.shown[0].axes[0].lines[0].get_xdata()) == 8


def test_live_curve_redraws_in_place(screen, monkeypatch):
    clock = iter(range(0, 10_000, 100))
    monkeypatch.setattr(plots.time, "monotonic", lambda: next(clock))
    curve = plots.LiveCurve(every=50.0, floor=0.0, title="live")
    feed(curve, history().head(3))
    assert len(screen.shown) == 1
    curve.finish()
    assert len(screen.shown) == 1 and screen.updated
    assert screen.updated[-1]._suptitle.get_text() == "live"


def test_live_curve_takes_a_tenth_of_the_time(screen, monkeypatch):
    """Drawing that takes a second is done every eleven, whatever `every` says."""
    now = [0.0]
    monkeypatch.setattr(plots.time, "monotonic", lambda: now[0])

    def slow(table, *, floor, title):
        now[0] += 1.0
        return "figure"

    monkeypatch.setattr(plots, "training", slow)
    curve = plots.LiveCurve(every=2.0)
    while now[0] < 110:
        curve([{"step": 1}])
        now[0] += 0.5
    assert 9 <= len(screen.shown) + len(screen.updated) <= 11


def test_live_curve_without_rows_draws_nothing(screen):
    plots.LiveCurve().finish()
    assert not screen.shown


def test_reports_run_their_kernels_headless():
    assert report.kernel_env("smoke")["WORKBOOK_HEADLESS"] == "1"


def test_errors_draw_the_exact_and_the_measured():
    table = pd.DataFrame(
        dict(writes=[1, 4, 16], exact=[0.0, 0.2, 0.5], measured=[0.0, 0.21, 0.49], notes=[0.0, 0.19, 0.5])
    )
    table = table.assign(low=table["measured"] - 0.01, high=table["measured"] + 0.01)
    (ax,) = plots.errors(table, "writes", xlabel="writes", also="notes", log=True).axes
    lines = [line.get_ydata().tolist() for line in ax.get_lines()]
    assert table["exact"].tolist() in lines and table["notes"].tolist() in lines
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {"exact", "measured", "notes"}
    both = pd.concat([table.assign(memory="a"), table.assign(memory="b")])
    (ax,) = plots.errors(both, "writes", xlabel="writes", by="memory").axes
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    with pytest.raises(ValueError, match="notes"):
        plots.errors(table.drop(columns="notes"), "writes", xlabel="writes", also="notes")


def test_by_position_draws_a_band_per_variant():
    net = model.build(dataclasses.replace(config.preset("smoke"), vocab_size=64))
    rows = data.Bigrams(seq_len=32, vocab_size=64).sample(4, analysis.fresh(0))
    (ax,) = draw(plots.by_position(analysis.loss_by_position(net, rows, [0, 8, 16, 32]), mark=(16, "window")))
    assert ax.get_lines()[0].get_xdata().tolist() == [8, 16, 32] and len(ax.collections) == 1
    table = analysis.ablation(net, rows, [0, 8, 16, 32])
    table = table[(table["position"] != "all") & (table["variant"] != "whole")]
    figure = plots.by_position(table, value="added", by="variant", ylabel="added loss", mark=(16, "window"))
    (ax,) = draw(figure)
    assert len(ax.collections) == len(analysis.ABLATIONS)
    drawn = [line.get_ydata() for line in ax.get_lines()[: len(analysis.ABLATIONS)]]
    np.testing.assert_allclose(np.concatenate(drawn), table["added"].astype(float))
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(table["added low"][:4].min())
    inside(figure)
    with pytest.raises(ValueError, match="added low"):
        plots.by_position(table.drop(columns="added low"), value="added")


def test_trade_off_draws_both_intervals():
    line = lambda gate, weight, x, y, half=1.0: {  # noqa: E731
        **dict(gate=gate, weight=weight, accuracy=y, low=y - 0.01 * half, high=y + 0.01 * half),
        **{"excess, %": x, "excess low": x - half, "excess high": x + half},
    }
    table = pd.DataFrame(
        [line("soft", 0.0, 0.0, 0.1), line("soft", 0.5, 2.0, 0.9), line("shut", 0.5, 1.0, 0.95, np.nan)]
    )
    figure = plots.trade_off(table, chance=0.01, allowed=2.0)
    (ax,) = draw(figure)
    assert len(ax.containers) == 2 and len(ax.containers[0].lines[2]) == 2  # bars across and up
    across = ax.containers[0].lines[2][0].get_segments()
    assert [segment[:, 0].tolist() for segment in across] == [[-1, 1], [1, 3]]
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["soft", "shut", "language alone", "weight 0.5", "chance 1%", "+2%"]
    inside(figure)
    with pytest.raises(ValueError, match="excess low"):
        plots.trade_off(table.drop(columns="excess low"))
