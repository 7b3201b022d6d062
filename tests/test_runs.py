"""Runs on disk: what a folder holds, what is refused and then kept as it was, weights, provenance."""

import dataclasses
import json
import shutil

import pytest
import test_train as t
import torch

import model
import runs
import train

# ------------------------------------------------------------------------------------------------ run folders


def test_run_folder_holds_everything(tmp_path):
    run = t.fit(run_dir=tmp_path / "r", results=tmp_path / "runs.jsonl", name="test")
    names = {p.name for p in (tmp_path / "r").iterdir()}
    assert names == {"config.json", "metrics.jsonl", "weights.safetensors", "state.pt"}
    line = json.loads((tmp_path / "runs.jsonl").read_text())
    for key in ("config_hash", "code_hash", "torch", "device", "seconds", "parameters", "passed", "model", "last"):
        assert key in line
    assert line["model"]["d_model"] == 16 and line["parameters"] == run.model.count_params()
    net = runs.load_weights(model.build(t.CFG, seed=9), tmp_path / "r")
    assert t.equal(net.state_dict(), t.weights(run))


def change_state(**entries):
    """Spoil state.pt by replacing or adding entries."""

    def spoil(folder):
        torch.save({**torch.load(folder / "state.pt"), **entries}, folder / "state.pt")

    return spoil


def foreign_model(folder):
    other = model.build(dataclasses.replace(t.CFG, d_model=32))
    state = torch.load(folder / "state.pt")
    torch.save({**state, "model": other.state_dict()}, folder / "state.pt")


def foreign_moments(folder):
    state = torch.load(folder / "state.pt")
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    torch.save(state, folder / "state.pt")


def damage_row(row, text):
    def spoil(folder):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        lines[row] = text
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    return spoil


BAD_FOLDERS = {
    "occupied": (lambda d: None, "already holds a run"),
    "garbage": (lambda d: (d / "state.pt").write_bytes(b"not a state"), "cannot be read"),
    "truncated": (lambda d: (d / "state.pt").write_bytes((d / "state.pt").read_bytes()[:500]), "cannot be read"),
    "state of another model": (foreign_model, "belongs to another"),
    "moments of another model": (foreign_moments, "optimizer.exp_avg"),
    "optimizer of one group": (change_state(optimizer={"state": {}, "param_groups": [{"params": []}]}), "optimizer"),
    "optimizer of another kind": (change_state(optimizer=[1]), "optimizer"),
    "foreign dictionary": (lambda d: torch.save({"weights": 1}, d / "state.pt"), "belongs to another"),
    "tensor": (lambda d: torch.save(torch.zeros(3), d / "state.pt"), "Tensor"),
    "model is no dictionary": (change_state(model=torch.zeros(3)), "belongs to another"),
    "step is no number": (change_state(step="four"), "step"),
    "state deleted": (lambda d: (d / "state.pt").unlink(), "state.pt is missing"),
    "row in the middle cut": (damage_row(1, '{"step": 3, "phas'), "line 2 of .*damaged"),
    "row is no object": (damage_row(0, "[1]"), "line 1 of .*damaged"),
    "row without step": (damage_row(0, "{}"), "line 1 of .*damaged"),
    "config cut": (lambda d: (d / "config.json").write_text("{"), "damaged"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), "damaged"),
    "config foreign": (lambda d: (d / "config.json").write_text("{}"), "another configuration"),
    "folder foreign": (lambda d: (d / "config.json").unlink(), "other files"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "r"
    t.fit(run_dir=path)
    # A row that a resumed run would cut: it must outlive a refusal too.
    with open(path / "metrics.jsonl", "a") as f:
        f.write('{"step": 99}\n')
    return path


@pytest.mark.parametrize("spoil, word", BAD_FOLDERS.values(), ids=BAD_FOLDERS.keys())
def test_bad_run_folders_are_refused_and_kept(tmp_path, finished, spoil, word):
    shutil.copytree(finished, tmp_path / "r")
    spoil(tmp_path / "r")
    before = {p.name: p.read_bytes() for p in (tmp_path / "r").iterdir()}
    with pytest.raises(ValueError, match=word):
        t.fit(run_dir=tmp_path / "r", resume=word != "already holds a run")
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "r").iterdir()}


def test_last_row_may_be_cut(tmp_path, finished):
    shutil.copytree(finished, tmp_path / "r")
    damage_row(-1, '{"step": 99, "pha')(tmp_path / "r")
    assert t.fit(run_dir=tmp_path / "r", resume=True).history["step"].tolist() == [1, 3, 5]


def test_bad_run_dirs_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        t.fit(run_dir=tmp_path / "file")
    with pytest.raises(ValueError, match="run_dir"):
        t.fit(resume=True)


def test_foreign_weights_are_refused_and_the_model_kept(tmp_path):
    t.fit(run_dir=tmp_path / "r")
    other = model.build(dataclasses.replace(t.CFG, d_model=32))
    before = {n: t.clone() for n, t in other.state_dict().items()}
    with pytest.raises(ValueError, match="another model"):
        runs.load_weights(other, tmp_path / "r")
    assert t.equal(before, other.state_dict())
    (tmp_path / "bad.safetensors").write_bytes(b"\x08")
    with pytest.raises(ValueError, match="not a readable"):
        runs.load_weights(other, tmp_path / "bad.safetensors")
    with pytest.raises(OSError, match="no weights"):
        runs.load_weights(other, tmp_path / "nothing")


def test_provenance_names_everything():
    text = train.provenance(seconds=3.0)
    for word in ("profile      smoke", "revision", "torch", "device", "seconds      3", "model.py", "config.py"):
        assert word in text
