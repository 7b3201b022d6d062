"""The GPU benchmark as far as it goes without a GPU: inputs, errors, grids, counts, tables, workers that die."""

import concurrent.futures
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench_cpu
import bench_gpu
import bench_measure
import core
from bench_measure import Case, Shape

SMALL = Shape(2, 70, 3, 16, 32)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(bench_measure, "DEVICE", "cpu")


def test_inputs_are_what_their_settings_say(on_cpu):
    x = bench_measure.inputs(SMALL)
    assert all(x[name].dtype == torch.bfloat16 for name in "qkv") and x["beta"].dtype == x["g"].dtype == torch.float32
    assert all(tensor.is_leaf and tensor.requires_grad for tensor in x.values())
    assert (x["k"].float().norm(dim=-1) - 1).abs().max() < 1e-2
    again = bench_measure.inputs(SMALL)
    assert all(torch.equal(x[name], again[name]) for name in x)
    means = [bench_measure.inputs(SMALL, decay=decay)["g"].mean() for decay in ("fast", "usual", "slow", "none")]
    assert means == sorted(means) and means[0] < -1.5 and -0.05 < means[1] < -0.02 and means[3] == 0
    shut = bench_measure.inputs(SMALL, gates="shut")["beta"]
    assert (shut[:, :, 0] == 0).all() and 0.6 < (shut[:, :, 1:] == 0).float().mean() < 0.9
    k = bench_measure.inputs(SMALL, keys="correlated", dtype=torch.float32)["k"][0, :, 0]
    assert 0.8 < (k @ k.T).mean() < 0.98


def test_bytes_moved():
    # 65,536 tokens and heads; each reads 2 x 64 + 128 numbers of 2 bytes and two gates of 4, and writes 128 of 2 bytes;
    # backward reads the first again with 128 of d_out, and writes 2 x 64 + 128 and two gates.
    forward = 65536 * (256 * 2 + 8 + 128 * 2)
    backward = 65536 * (256 * 2 + 8 + 128 * 2 + 256 * 2 + 8)
    moved = bench_measure.moved_bytes(Shape(4, 2048, 8, 64, 128), torch.bfloat16)
    assert moved == {"forward": forward, "forward_backward": forward + backward}


def test_errors_see_rounding_and_see_a_mistake(on_cpu):
    tensors, grads = bench_measure.inputs(SMALL), bench_measure.cotangents(SMALL)
    reference = bench_measure.exact(tensors, grads, scale=0.25)
    right = bench_measure.load("torch")
    found = bench_measure.errors(right, tensors, grads, reference, scale=0.25)
    assert tuple(found) == bench_cpu.NAMES
    assert 1e-3 < found["out"] < 2e-3  # out is rounded to bfloat16; the arithmetic is in float32
    assert all(found[name] < 1e-5 for name in ("state", "dbeta", "dg"))
    wrong = lambda q, k, v, beta, g, *, scale, last: right(q, k, v, beta, 1.01 * g, scale=scale, last=last)  # noqa: E731
    assert bench_measure.errors(wrong, tensors, grads, reference, scale=0.25)["state"] > 1e-4
    zero, three = torch.zeros(2, dtype=torch.float64), torch.tensor([3.0, 4.0])
    assert bench_measure.relative(three, zero) == 5.0


def test_the_grid_covers_what_it_should():
    sizes = {16, 50, 64, 100, 128, 256}
    assert {K for K, _ in bench_measure.WIDTHS} == {V for _, V in bench_measure.WIDTHS} == sizes
    assert len(set(bench_measure.WIDTHS)) == len(bench_measure.WIDTHS)
    for K, V in bench_measure.WIDTHS:
        cases = bench_measure.cases(K, V)
        assert len(set(cases)) == len(cases) and all((case.K, case.V) == (K, V) for case in cases)
        assert {case.T for case in cases} == set(bench_measure.LENGTHS)
        settings = {(case.decay, case.keys, case.gates) for case in cases if case.dtype == "bf16"}
        assert settings == set(itertools.product(bench_measure.DECAYS, bench_measure.KEYS, bench_measure.GATES))
        assert {case.dtype for case in cases} == set(bench_measure.DTYPES)
        assert {case.scale for case in cases} == set(bench_measure.SCALES)
        assert bench_measure.cases(K, V, ["fp16"]) == [case for case in cases if case.dtype == "fp16"]


def test_a_peer_that_refuses_is_a_row_and_is_left_alone(on_cpu, monkeypatch):
    asked, load = [], bench_measure.load

    def absent(name):
        if name == "fla":
            asked.append(name)
            raise ImportError("No module named 'fla'")
        return load(name)

    monkeypatch.setattr(bench_measure, "load", absent)
    short = [Case(16, 16, T=T) for T in (1, 2, 3, 4)] + [Case(16, 16, T=2, dtype="fp32")]
    monkeypatch.setattr(bench_measure, "cases", lambda K, V, dtypes: [case for case in short if case.dtype in dtypes])
    job = dict(impls=["torch", "fla"], widths=(16, 16), dtypes=["bf16", "fp32"])
    rows = [row for row in bench_measure.error_grid(job) if "impl" in row]
    fla = [row for row in rows if row["impl"] == "fla"]
    assert len(fla) == 4 and len(asked) == 2  # bf16 only; not tried a third time
    assert fla[0]["error"] == "ImportError: No module named 'fla'" and "not tried" in fla[3]["error"]
    assert sum(row["error"] is None and row["errors"]["out"] < 1e-2 for row in rows) == 5


def test_device_work_counts_kernels_and_copies_alone():
    cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA

    def event(name, us, device_type=cuda, note=False):
        duration = SimpleNamespace(elapsed_us=lambda: us)
        return SimpleNamespace(name=name, device_type=device_type, is_user_annotation=note, time_range=duration)

    events = [
        event("kernel", 30.0),
        event("Memset (Device)", 2.0),
        event("kernel", 10.0),
        event("aten::mul", 99.0, cpu),
    ]
    events += [event("Context Sync", 500.0), event("ProfilerStep#1", 700.0, note=True)]
    assert bench_measure.activities(events) == pytest.approx({"kernel": 0.04, "Memset (Device)": 0.002})
    with torch.profiler.profile() as profile:
        torch.ones(3).sum()
    assert len(profile.events()) and bench_measure.activities(profile.events()) == {}


def test_rows_keep_the_longest_kernels_and_the_sum_of_the_rest():
    kernels = {f"kernel {n}": float(n) for n in range(30)}
    found = bench_measure.longest(kernels, most=3)
    assert list(found) == ["kernel 29", "kernel 28", "kernel 27", "27 others"]
    assert sum(found.values()) == sum(kernels.values())
    same = {"a" * 100 + "x": 2.0, "a" * 100 + "y": 1.0}  # told apart by their ends alone
    assert bench_measure.longest(same) == {"a" * 100: 3.0}
    assert json.loads(bench_measure.brief(dict(ms=[0.123456789], n=3, text="1.123456789", none=None))) == dict(
        ms=[0.123457], n=3, text="1.123456789", none=None
    )


@pytest.fixture
def measured(on_cpu, monkeypatch, tmp_path):
    """Rows of one shape: the PyTorch path under two names, timers that need a GPU replaced, and a peer that refuses."""
    load = bench_measure.load

    def stand_in(name):
        if name == "flashqla":
            raise AssertionError
        return load("torch")

    milliseconds = itertools.count(1)
    monkeypatch.setattr(bench_measure, "load", stand_in)
    monkeypatch.setattr(bench_measure, "copy_bandwidth", lambda: 3e12)
    monkeypatch.setattr(bench_measure, "peak_mib", lambda call: 100.0 * len(call()))
    monkeypatch.setattr(
        bench_measure, "device_work", lambda call, steps: (ms := float(next(milliseconds)), {"kernel": ms})
    )
    job = dict(shape=SMALL, impls=["ours", "torch", "fla", "flashqla"], dtype="bf16", pairs=3, steps=2)
    job["turn"] = str(tmp_path / "turn")
    rows = [dict(row, gpu="GPU", versions={"torch": "2"}) for row in bench_measure.speed(job)]
    return json.loads(json.dumps(rows))  # as they come back from a worker


def test_one_process_measures_at_a_time(tmp_path):
    path = str(tmp_path / "turn")
    turn = bench_measure.wait_for_turn(path)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        other = pool.submit(bench_measure.wait_for_turn, path)
        with pytest.raises(concurrent.futures.TimeoutError):
            other.result(timeout=0.3)
        turn.close()
        other.result(timeout=60).close()


def test_rows_and_table_of_one_shape(measured, capsys):
    by_name = {row["impl"]: row for row in measured}
    assert by_name["flashqla"]["error"] == "AssertionError: raise AssertionError"
    ours, fla = by_name["ours"], by_name["fla"]
    assert ours["error"] is None and ours["failed"] == {} and ours["peak_mib"] == 500
    assert set(ours["wall_ms"]) == set(fla["wall_ratio"]) == set(bench_measure.WHAT) and not ours["wall_ratio"]
    assert ours["share"]["forward"] == pytest.approx(ours["limit_ms"]["forward"] / ours["device_ms"]["forward"])
    bench_gpu.print_speed(measured)
    bench_gpu.print_kernels(measured)
    bench_gpu.print_setting(measured[0])
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[1].startswith("B2 T70 H3 K16 V32 bf16: a copy runs at 3.00 TB/s")
    assert [line.split()[0] for line in lines[3:8]] == [
        "ours",
        "ours",
        fla["label"].split()[0],
        "/",
        bench_measure.label("flashqla").split()[0],
    ]
    assert f"{fla['device_ms']['forward'] / ours['device_ms']['forward']:.2f}x" in lines[6]
    assert "ours forward+backward: " in text


def test_failed_stages_leave_the_rest_of_the_row(measured, capsys):
    ours = measured[0]
    ours.update(device_ms={}, share={}, peak_mib=None, failed={"device ms, forward": "RuntimeError: nothing seen"})
    bench_gpu.print_speed(measured)
    text = capsys.readouterr().out
    assert "device ms, forward: RuntimeError: nothing seen" in text and f"{ours['errors']['out']:.1e}" in text


def test_errors_above_a_peer_are_listed(capsys):
    small, large = dict.fromkeys(bench_cpu.NAMES, 1e-3), dict.fromkeys(bench_cpu.NAMES, 2e-3)
    case = Case(64, 128, T=512)
    rows = [
        dict(impl="ours", error=None, case=case._asdict(), errors=small | {"dk": 3e-3, "dg": math.nan}),
        dict(impl="fla", error=None, case=case._asdict(), errors=large),
        dict(impl="fla", error="ValueError: no", case=case._replace(K=50)._asdict()),
    ]
    assert bench_gpu.above(rows[0], rows[1]) == pytest.approx({"dk": 1.5, "dg": math.nan}, nan_ok=True)
    bench_gpu.print_errors(rows)
    text = capsys.readouterr().out
    assert "ours above fla: 2 of 7 numbers in 1 cases" in text and "1.50x  3.00e-03 against 2.00e-03" in text
    assert "fla: 1 x ValueError: no; first at K50 V128 T512" in text


def test_a_worker_that_dies_or_hangs_is_a_row(tmp_path, monkeypatch, capsys):
    script = tmp_path / "worker.py"
    monkeypatch.setattr(bench_gpu, "WORKER", script)
    job = dict(kind="speed", impls=["ours", "fla"], shape=SMALL, dtype="bf16")
    env = bench_gpu.environment(str(tmp_path))
    script.write_text("import sys; sys.exit('out of luck')")
    rows = bench_gpu.run(job, env, timeout=60)
    assert [row["error"] for row in rows] == ["process: exit status 1: out of luck"] * 2
    bench_gpu.print_speed(rows)
    assert "out of luck" in capsys.readouterr().out
    script.write_text("import time; time.sleep(60)")
    assert "stopped after 1 s" in bench_gpu.run(job, env, timeout=1)[0]["error"]
    script.write_text(
        "import json, os, sys; job = json.loads(sys.argv[1]); open(job['rows'], 'w').write("
        "json.dumps(dict(impl='ours', error=None, cache=os.environ['TRITON_CACHE_DIR'])) + chr(10))"
    )
    assert bench_gpu.run(job, env, timeout=60)[0]["cache"] == str(tmp_path / "triton")


GRID_WORKER = """
import json, os, sys, time
import bench_measure

load, inputs, lost = bench_measure.load, bench_measure.inputs, []


def unless_lost(function):
    def run(*args, **options):
        if lost:
            raise RuntimeError("device lost")
        return function(*args, **options)

    return run


def stand_in(name):
    def peer(**given):
        if given["q"].shape[1] == 3:
            END
        return load("torch")(**given)

    return unless_lost(load(name) if name == "torch" else peer)


bench_measure.DEVICE, bench_measure.load, bench_measure.inputs = "cpu", stand_in, unless_lost(inputs)
bench_measure.cases = lambda K, V, dtypes: [bench_measure.Case(K, V, T=T) for T in (1, 2, 3, 4, 5)]
bench_measure.main(json.loads(sys.argv[1]))
"""


@pytest.fixture
def grid(tmp_path, monkeypatch):
    """Errors by implementation and length of a grid whose peer comes to an end at length 3, in the way given."""
    script = tmp_path / "worker.py"
    monkeypatch.setattr(bench_gpu, "WORKER", script)
    env = dict(bench_gpu.environment(str(tmp_path)), PYTHONPATH=str(Path(bench_gpu.__file__).parent))

    def run(end, *impls, timeout=120):
        script.write_text(GRID_WORKER.replace("END", end))
        rows = bench_gpu.run(dict(kind="errors", impls=impls, widths=(16, 16), dtypes=["bf16"]), env, timeout=timeout)
        return {(row["impl"], row["case"]["T"] if "case" in row else row["widths"]): row["error"] for row in rows}

    return run


@pytest.mark.parametrize(
    "end, error",
    [
        ("lost.append(True); raise RuntimeError('illegal access')", "RuntimeError: illegal access"),
        ("os.abort()", "process: exit status -6: no output"),
    ],
)
@pytest.mark.parametrize("impls", [("fla", "torch"), ("torch", "fla")])
def test_a_grid_goes_on_without_the_implementation_that_took_its_process_down(grid, end, error, impls):
    found = grid(end, *impls)
    assert [found["fla", T] is None for T in (1, 2)] == [True, True] and found["fla", 3].startswith(error)
    assert all("not tried" in found["fla", T] for T in (4, 5))
    # At 3 the device was lost already where the peer came first.
    assert {T for name, T in found if name == "torch"} == {1, 2, 4, 5} | ({3} if impls[0] == "torch" else set())
    assert all(found["torch", T] is None for name, T in found if name == "torch")


def test_a_grid_that_hangs_blames_nobody(grid):
    found = grid("time.sleep(600)", "torch", "fla", timeout=12)
    assert found["torch", 3] is None and ("fla", 3) not in found
    assert found["fla", (16, 16)].startswith("process: stopped after 12 s") and ("torch", 4) not in found


def test_plans():
    plan = lambda *words: bench_gpu.plan(bench_gpu.parse(words))  # noqa: E731
    first, speed = plan()
    assert [job["shape"] for job in speed] == bench_gpu.SHAPES
    assert [("flashqla" in job["impls"]) for job in speed] == [job["shape"].K == 128 for job in speed]
    families = [(job["impl"], job["shape"].K) for job in first]
    assert sorted(families) == [("fla", 64), ("fla", 128), ("flashqla", 128), ("ours", 64), ("ours", 128)]
    assert plan("--cold", "--only", "ours") == ([dict(job, all=False) for job in plan("--only", "ours")[0]], [])
    assert plan("--only", "flashqla", "--shapes", "1,64,1,64,64")[1][0]["impls"] == [
        "flashqla"
    ]  # it says that it cannot
    assert len(plan("--errors")[0]) == len(bench_measure.WIDTHS) and [job["B"] for job in plan("--step")[1]] == [1, 64]
    assert [job["widths"] for job in plan("--errors", "--widths", "100,16 64,128")[0]] == [(100, 16), (64, 128)]
    assert [job["dtypes"] for job in plan("--errors", "--widths", "64,128", "--dtype", "fp32")[0]] == [["fp32"]]
    for axis in "BTH":
        assert len({getattr(shape, axis) for shape in bench_gpu.scaling_shapes()}) >= 4


def test_one_token_steps(on_cpu):
    token = [x.detach()[:, 0] for x in bench_measure.inputs(Shape(2, 1, 3, 16, 32)).values()]
    state = torch.randn(2, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    out, new = bench_measure.load_step("torch")(*token, state)
    expected = core.delta_step(*token, state, scale=0.25)
    torch.testing.assert_close((out, new), tuple(expected))
    with pytest.raises(RuntimeError, match="would not run a kernel here"):
        bench_measure.load_step("ours")


@pytest.mark.parametrize(
    "words",
    [
        ("--shapes", "4,2048,8"),
        ("--shapes", "0,1,1,1,1"),
        ("--only", "ours,none"),
        ("--widths", "64,128 3,3"),
        ("--widths", ""),
        ("--pairs", "0"),
        ("--cold", "--step"),
    ],
)
def test_bad_arguments_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        bench_gpu.parse(words)
    assert words[0] in capsys.readouterr().err
