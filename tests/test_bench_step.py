"""bench_step.py at toy size: every part is found, timed and summed; bounds grow with what they count."""

import json

import pytest
import torch

import bench_measure
import bench_step
import config
import core

CPU = torch.device("cpu")
SPEED = bench_step.Speed(rate=790e12, bandwidth=3.0e12)


def test_dry_run_writes_every_part(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out, write = tmp_path / "rows.jsonl", core.delta_write
    bench_step.main(["--toy", "--memory-op", "torch", "--repeats", "1", "--out", str(out)])
    rows = {row["part"]: row for row in map(json.loads, out.read_text().splitlines())}
    names = [
        "step",
        "embedding",
        "G projections",
        "memory operation",
        "feed-forward",
        "S projections",
        "window attention",
    ]
    assert list(rows) == [*names, "final norm, loss", "clipping", "AdamW", "(one RMSNorm alone)", "other"]
    timed = [row["ms"] for name, row in rows.items() if name not in ("step", "other", "(one RMSNorm alone)")]
    assert all(ms > 0 for ms in timed) and rows["feed-forward"]["times"] == 2
    assert rows["other"]["ms"] == pytest.approx(rows["step"]["wall_ms"] - sum(timed))
    assert "bound_ms" not in rows["AdamW"] and "tokens/s" in capsys.readouterr().out
    assert core.delta_write is write


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
@pytest.mark.parametrize("name", ["fla", "ours"])
def test_a_memory_operation_that_cannot_run_is_a_line(name, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    bench_step.main(["--toy", "--memory-op", name, "--out", str(out)])
    (row,) = map(json.loads, out.read_text().splitlines())
    assert row["part"] == "step" and row["absent"] and f"--memory-op {name}: " in capsys.readouterr().out


def test_parts_leave_the_model_as_it_was():
    step = bench_step.Step(bench_step.TOY, batch=2, length=32, device=CPU, graph=False)
    before = [p.detach().clone() for p in step.net.parameters()]
    found = {part.name: part for part in bench_step.parts(step)}
    for name, part in found.items():
        if name != "AdamW":  # which moves the weights
            part.call()
    assert all(torch.equal(a, b) for a, b in zip(before, step.net.parameters(), strict=True))
    assert all(p.grad is None for p in step.net.parameters())


def test_flops_and_bounds_of_the_33m_model():
    cfg, tokens = config.preset("seed"), 8 * 2048
    by_hand = 6 * 33_217_560 + 3 * (4 * 64 * 512 + (4 + 2 + 2) * 64 * 128 * 8)
    assert bench_step.model_flops(cfg, 33_217_560, tokens) == by_hand * tokens
    bound = bench_step.Bound(SPEED)
    # The head: 3 products of 0.84 TFLOP each, and the logits in and out once more for the softmax.
    assert 1e3 * bound.loss(cfg, tokens) == pytest.approx(3 * 0.843 / 0.79 + 2 * 1.647 / 3.0, rel=0.05)
    assert 1e3 * bound.optimizer(33_217_560) == pytest.approx(0.31, abs=0.01)
    assert bound.memory(cfg, 2 * tokens, 2) == pytest.approx(2 * bound.memory(cfg, tokens, 2))
    moved = bench_measure.moved_bytes(bench_measure.Shape(8, 2048, 8, 64, 128), torch.bfloat16)["forward_backward"]
    assert bound.memory(cfg, tokens, 1) == pytest.approx(moved / SPEED.bandwidth)
