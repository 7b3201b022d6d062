"""Tables, figures and sentences of the benchmark: what they say is what the rows hold, and nothing more."""

import ast
import json
import math
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

import bench_cpu
import bench_figures
import bench_gpu
import bench_measure
import bench_report
import bench_roofline
import core
from bench_measure import Shape

LONG, WIDE = Shape(1, 65536, 8, 64, 128), Shape(4, 2048, 8, 128, 128)
KERNELS = ("intra", "walk", "walk_back", "gradients", "read_gradients", "summarise", "scan")
SETTING = dict(model="HybridConfig(GS)", batch=8, length=2048, compile=True, graph=True)


def speed_rows(
    shape=LONG, *, ours=1.0, fla=2.5, date="2026-01-02T03:04:05Z", impls=("ours", "torch", "fla", "flashqla")
):
    """Rows as one process of bench_gpu.py leaves them: fla takes `fla` ms on the device where ours takes `ours`."""
    rows = []
    for name in impls:
        ms = {"ours": ours, "torch": 40.0, "fla": fla, "flashqla": 1.5}[name]
        row = dict(
            bench="speed", impl=name, label={"torch": "ours (PyTorch)"}.get(name, name), shape=list(shape), dtype="bf16"
        )
        row |= dict(error=None, bandwidth=3e12, limit_ms={"forward": 0.1, "forward_backward": 0.36}, failed={})
        row["device_ms"] = {"forward": ms / 3, "forward_backward": ms}
        row["wall_ms"] = {what: [1.1 * x, 1.2 * x, 1.4 * x] for what, x in row["device_ms"].items()}
        paired = (
            {} if name in ("ours", "torch") else dict.fromkeys(bench_report.WHAT, [fla / ours, fla / ours - 0.1, 9.0])
        )
        row["wall_ratio"] = paired
        row["share"] = {what: row["limit_ms"][what] / x for what, x in row["device_ms"].items()}
        kernels = {kernel: ms * (7 - i) / 30 for i, kernel in enumerate(KERNELS)}
        if shape.K > 64:
            kernels["gradients_wide"] = kernels.pop("gradients")
        kernels |= {"copy": ms / 30, "Memset (Device)": ms / 30}
        row["kernels"] = {"forward": {"walk": ms / 3}, "forward_backward": kernels}
        row |= dict(peak_mib=500.0 * ms, errors=dict.fromkeys(bench_cpu.NAMES, 1e-3 * ms))
        if name == "flashqla" and shape.K != 128:
            row = dict(bench="speed", impl=name, label=name, shape=list(shape), dtype="bf16", error="ImportError: none")
        rows.append(row | dict(gpu="GPU A", versions={"torch": "2"}, date=date, revision="abc1234"))
    return rows


def training_rows(memory_op="ours", ms=0.5, **setting):
    """Rows as bench_step.py leaves them."""
    base = SETTING | setting | dict(memory_op=memory_op, torch="2", device="GPU A", date="2026-01-02T04:00:00Z")
    whole = dict(part="step", wall_ms=20.0 + ms, tokens_per_s=16384e3 / (20 + ms), device_ms=20.0, mfu=0.35)
    whole |= dict(rate_tflops=700.0, bandwidth_tb=3.0, peak_mb=1400.0, peak_without_adamw_mb=1150.0, tflops=3.3)
    parts = {"memory operation": (ms, 0.1), "final norm, loss": (6.0, 4.4), "AdamW": (0.4, 0.31)}
    rows = [whole] + [
        dict(part=p, times=1 + (p == "AdamW"), ms=x, bound_ms=b, ratio=x / b) for p, (x, b) in parts.items()
    ]
    rows.append(dict(part="(one RMSNorm alone)", times=1, ms=9.0, bound_ms=1.0, ratio=9.0))
    rows.append(dict(part="other", times=1, ms=-0.1))
    return [base | row for row in rows]


def other_rows():
    """First calls, one-token steps and errors."""
    common = dict(gpu="GPU A", versions={"torch": "2"}, error=None)
    first = dict(bench="first", impl="ours", label="ours", shape=list(LONG), import_s=3.0, first_call_s=9.5)
    steps = [
        dict(bench="step", impl=impl, label=impl, B=B, us={"1": [x, x + 0.1, x + 0.2], "100000": [x, x + 0.1, x + 0.3]})
        for B in (1, 64)
        for impl, x in (("ours", 4.0 + B / 10), ("fla", 7.0 + B / 5))
    ]
    refused = dict(bench="step", impl="torch", label="ours (PyTorch)", B=64, us={}, error="RuntimeError: no graph")
    case = bench_measure.Case(64, 128)
    errors = [
        dict(bench="errors", impl=impl, label=impl, case=case._asdict(), errors=dict.fromkeys(bench_cpu.NAMES, x))
        for impl, x in (("ours", 1e-3), ("fla", 2e-3))
    ]
    return [common | row for row in (first, *steps, refused, *errors)]


def scaling_rows():
    rows = []
    for shape in bench_gpu.scaling_shapes():
        rows += speed_rows(shape, ours=shape.B * shape.T * shape.H / 2e6 + 0.05, fla=3.0, impls=("ours", "fla"))
    return rows


def everything():
    rows = scaling_rows() + speed_rows() + speed_rows(WIDE, ours=0.5, fla=1.3) + other_rows()
    return bench_report.arrange(rows + training_rows() + training_rows("fla", 1.5))


SHAPES = [LONG, WIDE]


# ------------------------------------------------------------------------------------------------ rows


def test_a_missing_file_is_no_error_and_says_how_to_measure(tmp_path, capsys):
    rows = bench_report.load(tmp_path / "none.jsonl")
    assert rows == []
    for table in (bench_report.times, bench_report.ratios, bench_report.exactness, bench_report.error_grid):
        assert bench_report.show(table(rows), "bench_gpu.py") is None
    tables = bench_report.first_calls, bench_report.generation, bench_report.training, bench_report.sources
    assert all(table(rows).empty for table in tables)
    figures = bench_figures.errors, bench_figures.times, bench_figures.scaling, bench_figures.generation
    assert all(figure(rows) is None for figure in (*figures, bench_figures.training))
    assert bench_figures.roofline({}, rate=1.0, bandwidth=1.0) is None
    assert capsys.readouterr().out.count("python bench_gpu.py --out results/bench.jsonl") == 4
    assert bench_report.findings(rows) == ["Nothing of a GPU is in the results file, so nothing is said of one."]
    assert bench_report.losses(rows)[0].startswith("Not in the results file: speed, the grid of errors, first calls")


def test_load_keeps_one_device(tmp_path):
    path = tmp_path / "rows.jsonl"
    dead = dict(bench="speed", impl="ours", label="ours", shape=list(LONG), dtype="bf16", error="process: died")
    rows = [*speed_rows(), dict(speed_rows()[0], gpu="GPU B"), dead]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert {row["device"] for row in bench_report.load(path)} == {"GPU A", None}
    assert [row["device"] for row in bench_report.load(path, device="GPU B")] == ["GPU B", None]
    assert len(bench_report.load(path, device="GPU C")) == len(bench_report.load(path)) == 5
    path.write_text(json.dumps(rows[0]) + "\n{torn")
    with pytest.raises(ValueError, match="rows.jsonl, line 2: not JSON"):
        bench_report.load(path)
    path.write_text("3\n")
    with pytest.raises(ValueError, match="line 1: expected a JSON object, given int"):
        bench_report.load(path)


def test_later_rows_count_but_a_refusal_replaces_no_peer():
    again = speed_rows(ours=0.8, impls=("ours",), date="2026-02-01T00:00:00Z")
    refused = dict(speed_rows(impls=("fla",))[0], error="ImportError: No module named 'fla'")
    rows = bench_report.arrange(speed_rows() + again + [refused])
    by_impl = bench_report.speed_rows(rows)[LONG]
    assert by_impl["ours"]["device_ms"]["forward_backward"] == 0.8 and by_impl["fla"]["error"] is None
    broken = bench_report.arrange(speed_rows() + [dict(speed_rows(impls=("ours",))[0], error="RuntimeError: no")])
    assert bench_report.speed_rows(broken)[LONG]["ours"]["error"] == "RuntimeError: no"
    assert bench_report.comparisons(broken) == []


def test_ratios_are_paired_within_a_process_only():
    (paired,) = bench_report.comparisons(bench_report.arrange(speed_rows()))
    assert paired.wall["forward"] == (2.5, 2.4, 9.0) and paired.device["forward_backward"] == 2.5
    assert paired.peak == 2.5 and paired.errors["dk"] == pytest.approx(2.5)
    again = speed_rows(ours=2.0, impls=("ours",), date="2026-02-01T00:00:00Z")
    (apart,) = bench_report.comparisons(bench_report.arrange(speed_rows() + again))
    assert apart.wall["forward"][0] == pytest.approx(1.25) and math.isnan(apart.wall["forward"][1])
    assert "(another process)" in bench_report.ratios(bench_report.arrange(speed_rows() + again)).iloc[0].to_string()
    # Without dates two runs of one member still are two processes.
    unmarked = [dict(row, date=None) for row in speed_rows() + speed_rows(impls=("ours",))]
    assert len({row["run"] for row in bench_report.arrange(unmarked)}) == 2


# ------------------------------------------------------------------------------------------------ tables


def test_times_say_what_is_absent_and_where_rows_come_from():
    table = bench_report.times(bench_report.arrange(speed_rows() + speed_rows(WIDE, impls=("ours",))))
    assert list(table["implementation"])[:4] == ["ours", "ours (PyTorch)", "fla", "flashqla"]
    assert list(table["note"]) == ["", "", "", "ImportError: none", "", "not measured", "not measured"]
    alone = bench_report.arrange(speed_rows(impls=("ours",)))
    assert len(bench_report.times(alone)) == 2 and len(bench_report.times(alone, absent=False)) == 1
    first = table.iloc[0]
    assert first["fwd+bwd, wall ms"] == "1.2 [1.1, 1.4]" and first["device ms"] == "0.333 / 1"
    assert first["of limit"] == "30% / 36%" and first["peak MiB"] == "500" and first["measured"] == "abc1234 2026-01-02"
    source = bench_report.sources(bench_report.arrange(speed_rows() + [dict(r, date=None) for r in speed_rows()]))
    assert list(source["date"]) == ["2026-01-02", "not recorded"] and list(source["rows"]) == [4, 4]


def test_the_other_tables():
    rows = everything()
    assert list(bench_report.exactness(rows, shapes=[LONG])["shape"].unique()) == ["B1 T512 H8 K64 V128"]
    grid = bench_report.error_grid(rows)
    assert list(grid["above fla"]) == ["0 of 7", ""] and list(grid["out"]) == [1e-3, 2e-3]
    assert bench_report.scientific(grid)["dg"].tolist() == ["1.0e-03", "2.0e-03"]
    assert bench_report.first_calls(rows)["seconds"].tolist() == [9.5]
    steps = bench_report.generation(rows)
    assert steps["token 1, µs"].iloc[0] == "4.2 [4.1, 4.3]" and "token 100,000, µs" in steps
    assert steps["note"].iloc[-1] == "RuntimeError: no graph"
    training = bench_report.training(rows)
    assert list(training["memory operation, ms"]) == ["0.5", "1.5"] and training["tokens/s"][0] == "799,220"
    absent = SETTING | dict(part="step", memory_op="fla", absent="absent: No module named 'fla'")
    assert bench_report.training(bench_report.arrange([absent]))["note"][0].startswith("absent")
    newer = bench_report.arrange(training_rows() + training_rows(ms=0.4))
    assert bench_report.training(newer)["memory operation, ms"].tolist() == ["0.4"]


# ------------------------------------------------------------------------------------------------ work of the kernels

TRITON = pytest.mark.skipif(not core.HAS_TRITON, reason="the plan of the kernels needs Triton")


# Matrix products in the code of each kernel, those of the functions it calls included: what `kernel_work` was written for.
PRODUCTS = {"intra": 11, "summarise": 3, "scan": 1, "walk": 6, "read": 3}
# `read_gradients` forms k q^T twice in its code and once when compiled.
PRODUCTS |= {"read_gradients": 9, "walk_back": 4, "gradients": 10, "gradients_wide": 8}


@pytest.fixture(scope="module")
def functions():
    """The functions of the kernels' modules by name, parsed; no name stands for two."""
    found = {}
    for name in ("kernels", "kernels_forward", "kernels_backward", "kernels_pieces"):
        nodes = ast.parse(Path(core.__file__).with_name(f"{name}.py").read_text()).body
        found |= {(name, node.name): node for node in nodes if isinstance(node, ast.FunctionDef)}
    return found


def mentioned(key, functions):
    """Those of the functions that one of them names, directly or through a module, as often as it does."""
    module = key[0]
    for node in ast.walk(functions[key]):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            where = {"pieces": "kernels_pieces"}.get(node.value.id, node.value.id), node.attr
        else:
            where = module, getattr(node, "id", None)
        if where in functions and where != key:
            yield where


def launched(key, functions):
    """Names of the kernels that a launcher, or what it calls in its own module, mentions."""
    for other in mentioned(key, functions):
        if other == ("kernels", "_what_follows"):  # compiled along, not launched
            continue
        if other[0] == "kernels":
            yield from launched(other, functions)
        else:
            yield other


def products(key, functions):
    """Calls of tl.dot in a kernel and in the functions it calls."""
    calls = [node.func for node in ast.walk(functions[key]) if isinstance(node, ast.Call)]
    own = sum(isinstance(f, ast.Attribute) and f.attr == "dot" for f in calls)
    return own + sum(products(other, functions) for other in mentioned(key, functions))


@TRITON
def test_the_formulas_cover_the_kernels_as_they_are(functions):
    kernels = {key for name in ("write", "write_backward") for key in launched(("kernels", name), functions)}
    # `size` runs where the last state or later reads send gradients back, and here they do not.
    found = {name for _, name in kernels} - {"size"}
    wide = LONG._replace(K=128, V=128)  # two kernels of their own
    assert found - {"gradients"} == set(bench_roofline.kernel_work(wide, bench_roofline.plan_of(wide)))
    found -= {"read", "gradients_wide"}
    assert found == set(bench_roofline.kernel_work(LONG, bench_roofline.plan_of(LONG)))
    short = LONG._replace(T=64)
    assert set(bench_roofline.kernel_work(short, bench_roofline.plan_of(short))) == found - {"summarise", "scan"}
    counts = {key[1]: products(key, functions) for key in kernels if key[1] in PRODUCTS}
    assert counts == PRODUCTS, "the kernels compute something else now: bring bench_roofline.kernel_work up to date"


@TRITON
def test_work_by_hand():
    shape = Shape(2, 64, 3, 32, 16)  # one chunk of 64 tokens in each of 6 heads
    plan = bench_roofline.plan_of(shape)._replace(C=64, R=1, N=1, NB=1)
    work = bench_roofline.kernel_work(shape, plan)
    # k S, q S and k^T new_v; X R and P new_v; q k^T.
    assert work["walk"].flops == 6 * 2 * (3 * 64 * 32 * 16 + 2 * 64 * 64 * 16 + 64 * 64 * 32)
    read = 2 * 64 * 32 * 2 + 64 * 16 * 2 + 64 * 64 * 2 + 7 * 64 * 4  # q, k, v, X, seven vectors
    written = 64 * 16 * 2 + 32 * 16 * 2 + 32 * 16 * 4  # out, the state on entry, the last state
    assert work["walk"].bytes == 6 * (read + written)
    # k k^T; on 4 diagonal blocks a transpose and 3 levels of three products of 16; three of 2 pairs of 16, two of a pair of 32.
    blocks = 4 * 10 * 2 * 16**3 + 2 * 3 * 2 * 16**3 + 2 * 2 * 32**3
    assert work["intra"].flops == 6 * (2 * 64 * 64 * 32 + blocks)
    twice = bench_roofline.kernel_work(shape._replace(B=4), plan)
    assert all(twice[name] == (2 * w.flops, 2 * w.bytes) for name, w in work.items())
    more = bench_roofline.kernel_work(shape, plan, dtype="fp32")
    trace = dict(gradients=6 * 2 * 32 * 32 * 16)  # in 16 bit a product S dS^T, of which the diagonal counts
    assert all(w.bytes < more[n].bytes and w.flops == more[n].flops + trace.get(n, 0) for n, w in work.items())
    # Two blocks of one chunk: a map of K x K and a state of K x V each; the chain applies one to the other, there and back.
    blocks = bench_roofline.kernel_work(shape._replace(T=128), plan._replace(N=2, NB=2))
    assert blocks["scan"] == (2 * 12 * 2 * 32 * 32 * 16, 2 * 12 * (32 * 32 * 2 + 2 * 32 * 16 * 4))
    # Backward the second block is summarised and both are walked; forward the first one, and the maps of both.
    assert blocks["walk_back"].flops == 3 * work["walk_back"].flops
    of_state, of_map = 2 * 2 * 64 * 32 * 16 + 2 * 64 * 64 * 16, 2 * 2 * 64 * 32 * 32 + 2 * 64 * 64 * 32
    assert blocks["summarise"].flops == 6 * (of_state + 2 * of_map)


@TRITON
def test_kernels_beside_their_roofs():
    row = bench_report.arrange(speed_rows())[0]
    table = bench_roofline.kernel_table(row, bench_roofline.plan_of(LONG), rate=700e12).set_index("kernel")
    assert table.index[0] == "intra" and table.index[-1] == "all kernels"
    work = bench_roofline.kernel_work(LONG, bench_roofline.plan_of(LONG))["walk"]
    walk = table.loc["walk"]
    assert walk["TFLOP/s"] == pytest.approx(work.flops / 1e12 / (walk["ms"] / 1e3))
    assert walk["of roof"] == pytest.approx(max(work.flops / 700e12, work.bytes / 3e12) / (walk["ms"] / 1e3))
    assert walk["FLOP/byte"] == pytest.approx(work.flops / work.bytes)
    whole, parts = table.iloc[-1], table.iloc[:-1]
    assert whole["ms"] == pytest.approx(1.0) and whole["MB"] == pytest.approx(parts["MB"].sum())
    assert whole["of roof"] == pytest.approx((parts["of roof"] * parts["ms"]).sum() / whole["ms"])
    assert math.isnan(table.loc["Memset (Device)", "GFLOP"])
    assert bench_report.kernel_tables(everything(), SHAPES, rate=None) == {}
    lines = bench_report.kernel_lines(bench_report.kernel_tables(everything(), SHAPES, rate=700e12))
    assert lines["shape"].nunique() == 2 and lines["ms"][0] == "0.233" and lines["share of time"][0] == "23%"
    assert lines.set_index("kernel")["GFLOP"]["copy"].tolist() == ["", ""]
    assert bench_report.kernel_lines({}).empty
    assert bench_report.matmul_rate(everything()) == 700e12 and bench_report.matmul_rate([]) is None


# ------------------------------------------------------------------------------------------------ sentences


def test_findings_carry_the_numbers():
    said = "\n".join(bench_report.findings(everything(), shapes=SHAPES, rate=700e12))
    assert "out 1.0e-03, state 1.0e-03, gradients 1.0e-03" in said
    assert "Of 14 numbers beside fla's, ours is at most as large in 14 (fla's are 2.50x to 2.60x ours)" in said
    assert "**Beside fla**, 2 shapes, what it takes in units of ours: forward 2.50x to 2.60x on the device" in said
    assert "**Beside flashqla**, 1 shape" in said and "First call**, caches empty: ours 9.50 s" in said
    assert "B1 T65536 H8 K64 V128: 36%" in said
    assert "in the tokens T from 32,768 to 131,072: T^0.83; in the batch B from 4 to 64: B^0.70" in said
    assert "B 1 4.2 µs per token at the first, 4.2 after 100,000 (+0.0%; quartile ranges overlap)" in said
    assert "799,220 tokens/s, 35.0% of the matrix products' rate, peak 1,400 MB" in said
    assert "takes 0.50 ms, fla's in its place 1.50 (3.00x), and the whole step with fla's 1.05x" in said
    if core.HAS_TRITON:
        assert "`intra` takes longest, 23% of the time" in said


def test_losses_name_what_is_behind_and_nothing_else():
    good = bench_report.losses(everything(), shapes=SHAPES)
    assert good == [
        "Parts of the training step further than 2x from their bound: memory operation 5.0x (0.50 ms).",
        "flashqla at B1 T65536 H8 K64 V128: ImportError: none",
        "ours (PyTorch) at one token, B 64: RuntimeError: no graph",
    ]
    slow = bench_report.losses(bench_report.arrange(speed_rows(ours=3.0)))
    assert slow[0].startswith(
        "fla takes less for forward at B1 T65536 H8 K64 V128: 0.83x on the device, 0.83x [0.73, 9.00]"
    )
    assert "fla needs less memory at B1 T65536 H8 K64 V128: 0.83x." in slow
    assert any(line.startswith("fla is more exact at") and "dk 0.83x" in line for line in slow)
    assert slow[-1] == "Not in the results file: the grid of errors, first calls, generation, the training step."


def test_drift_of_the_step_is_seen():
    rows = other_rows()
    for row in rows:
        if row["bench"] == "step" and row["impl"] == "ours":
            row["us"]["100000"] = [2 * x for x in row["us"]["1"]]
    said = "\n".join(bench_report.findings(bench_report.arrange(rows)))
    assert "(+100.0%; quartile ranges apart)" in said


# ------------------------------------------------------------------------------------------------ figures


def draw(figure):
    """Render; any warning is an error. No figure may stay open: a notebook would show it twice."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FigureCanvasAgg(figure).draw()
    assert not plt.get_fignums()
    return figure.axes


def test_figures_draw_what_the_rows_hold():
    rows = everything()
    assert [ax.get_title() for ax in draw(bench_figures.errors(rows, shapes=SHAPES))] == [
        "K = 64, V = 128",
        "K = 128, V = 128",
    ]
    forward, both = draw(bench_figures.times(rows, shapes=SHAPES))
    filled = [
        line
        for line in both.lines
        if line.get_marker() in set("osD^") and to_hex(line.get_markerfacecolor()) != "#ffffff"
    ]
    assert sorted(line.get_xdata()[0] for line in filled) == [0.5, 1.0, 1.3, 1.5, 2.5, 40.0, 40.0]
    axes = draw(bench_figures.scaling(rows))
    assert len(axes) == 6 and all(ax.get_xscale() == ax.get_yscale() == "log" for ax in axes)
    assert [len(ax.collections) for ax in axes] == [2] * 6  # a band of quartiles for each of the two
    steps = draw(bench_figures.generation(rows))
    assert [ax.get_title() for ax in steps] == ["B 1, H8 K64 V128", "B 64, H8 K64 V128"]
    (ax,) = draw(bench_figures.training(rows))
    texts = [text.get_text() for text in ax.texts]
    assert texts == ["0.50 ms, 5.0x its bound", "6.00 ms, 1.4x its bound", "0.40 ms, 1.3x its bound", "-0.10 ms"]
    assert [bar.get_width() for bar in ax.patches] == [0.5, 6.0, 0.4, -0.1]


@TRITON
def test_the_roofline_holds_every_kernel_with_a_formula():
    tables = bench_report.kernel_tables(everything(), SHAPES, rate=700e12)
    (ax,) = draw(bench_figures.roofline(tables, rate=700e12, bandwidth=3e12))
    points = [line.get_xydata()[0].tolist() for line in ax.lines if len(line.get_xdata()) == 1]
    expected = [
        [row["FLOP/byte"], row["TFLOP/s"]] for t in tables.values() for _, row in t.iterrows() if row["FLOP/byte"] > 0
    ]
    assert points == expected and len(points) == 2 * (len(KERNELS) + 1)


# ------------------------------------------------------------------------------------------------ this machine


def test_errors_on_this_cpu_see_planted_mistakes(monkeypatch):
    monkeypatch.setattr(bench_cpu, "load_peer", lambda: "absent: No module named 'transformers'")
    table = bench_report.cpu_errors(dict(B=1, T=70, H=2, K=16, V=16))
    assert table["ok"].all() and table["note"].tolist()[1] == "absent: No module named 'transformers'"
    assert table["out"][0] < 1e-5 and (table["out"][2:] > 1e-4).all()
    monkeypatch.setattr(bench_cpu, "load_peer", lambda: lambda **x: core.delta_rule(**x, scale=0.9))
    assert bench_report.cpu_errors(dict(B=1, T=70, H=2, K=16, V=16))["ok"].tolist() == [True, False, True, True]


def test_times_on_this_cpu_and_what_is_said_of_them(monkeypatch):
    monkeypatch.setattr(bench_cpu, "load_peer", lambda: "absent: none")
    table = bench_report.cpu_times(dict(B=1, T=64, H=1, K=16, V=16), pairs=3)
    assert len(table) == 6 and table["note"].tolist() == ["", "", "absent: none"] * 2
    ran = table[table["note"] == ""]
    assert (ran["median"] > 0).all() and (ran["low"] <= ran["high"]).all() and ran["median"].tolist()[0] == 1.0
    said = bench_report.cpu_findings(table)
    assert "transformers" not in said and said.startswith("**On this CPU**") and "the same, again" in said
    table.loc[2, ["note", "median", "low", "high"]] = ["", 1.7, 1.6, 1.8]
    table.loc[5, ["note", "median", "low", "high"]] = ["", 1.02, 0.9, 1.1]
    said = bench_report.cpu_findings(table)
    assert "transformers takes 1.70x [1.60, 1.80] of ours forward: slower" in said
    assert "1.02x [0.90, 1.10] of ours forward+backward: no difference shown" in said


def test_the_file_beside_a_live_run():
    live = bench_report.arrange(speed_rows(ours=1.1, impls=("ours",), date="2026-02-01T00:00:00Z"))
    table = bench_report.again(live, bench_report.arrange(speed_rows()))
    assert table["now / file"].tolist() == pytest.approx([1.1] * 4) and table["revision of the file"][0] == "abc1234"
    assert bench_report.again(live, []).empty


def test_live_rows(monkeypatch):
    """Without a GPU: the PyTorch path under both names, its work on a device made up."""
    load = bench_measure.load
    monkeypatch.setattr(bench_measure, "DEVICE", "cpu")
    monkeypatch.setattr(bench_measure, "load", lambda name: load("torch"))
    monkeypatch.setattr(bench_measure, "copy_bandwidth", lambda: 3e12)
    monkeypatch.setattr(bench_measure, "peak_mib", lambda call: 100.0)
    monkeypatch.setattr(bench_measure, "device_work", lambda call, steps: (1.0, {"kernel": 1.0}))
    rows = bench_report.live(Shape(1, 128, 2, 64, 64), pairs=3)
    assert [row["impl"] for row in rows] == ["ours", "torch"] and {row["run"] for row in rows} == {0}
    assert isinstance(bench_report.times(rows), pd.DataFrame) and all(row["errors"]["out"] < 1e-2 for row in rows)
    assert (bench_report.again(rows, rows)["now / file"] == 1).all()


@pytest.mark.gpu
def test_live_rows_on_the_gpu():
    rows = bench_report.live(Shape(1, 128, 2, 64, 64), pairs=3)
    assert [row["impl"] for row in rows] == ["ours", "torch"] and {row["run"] for row in rows} == {0}
    assert isinstance(bench_report.times(rows), pd.DataFrame) and rows[0]["device"] == torch.cuda.get_device_name(0)


def test_failures_of_ours_are_said():
    case = bench_measure.Case(64, 128, T=65)._asdict()
    common = dict(impl="ours", label="ours", gpu="GPU", versions={}, revision="r", date="2026-01-01T00:00:00Z")
    rows = [
        dict(common, bench="errors", case=case, error="RuntimeError: illegal access"),
        dict(common, bench="errors", widths=[16, 16], error="process: stopped after 9 s: no output"),
        dict(common, bench="first", error="process: exit status 1: no output"),
    ]
    rows = bench_report.arrange(rows)
    said = " ".join(bench_report.losses(rows, shapes=[]))
    assert "illegal access; first at K64 V128 T65" in said and "stopped after 9 s" in said and "K16 V16" in said
    assert "first call: process: exit status 1" in said
    table = bench_report.error_grid(rows).set_index(["implementation", "dtype"])
    assert table.loc[("ours", "bf16"), "failed"] == 1 and table.loc[("ours", "bf16"), "cases"] == 0
