"""report.py and report_html.py: notebooks run in this interpreter, failures are told, pages need no network."""

import json
import os
import re
import sys
import time

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager

import report
import report_html

code, markdown = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell

GOOD = [
    markdown(
        "# A *good* one\n\nInline $S_t = e^{g_t} S_{t-1}$,\n\n$$o_t = \\frac{1}{2} S_t^\\top q_t$$\n\nand $\\nope$."
    ),
    code("import os, sys\n\nimport config\n\nprint(config.profile(), sys.executable, os.path.basename(os.getcwd()))"),
    code("import matplotlib.pyplot as plt\n\nplt.plot([1, 3, 2])\nplt.show()"),
    code(
        "from tqdm.auto import tqdm\n\nfor _ in tqdm(range(7), desc='kept'):\n    pass\n"
        "for _ in tqdm(range(5), desc='cleared', leave=False):\n    pass"
    ),
    code("import sys\n\nfor i in range(1000):\n    print(f'\\rstep {i}', end='', flush=True)"),
    code("import ipywidgets\n\nipywidgets.interact(lambda a: print('a is', a), a=(0, 10));"),
]

RAISES = "from tqdm.auto import tqdm\n\nfor _ in tqdm(range(3), desc='before'):\n    pass\nraise KeyError('planted')"


def write(path, *cells):
    nbformat.write(nbformat.v4.new_notebook(cells=list(cells)), path)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A run over a good notebook, one that raises and one whose kernel dies: exit status, source and output folder."""
    folder = tmp_path_factory.mktemp("ran")
    source, out = folder / "notebooks", folder / "reports"
    source.mkdir()
    write(source / "00_good.ipynb", *GOOD)
    stale = code("print('never')", outputs=[nbformat.v4.new_output("stream", text="stale\n")], execution_count=2)
    write(source / "01_raises.ipynb", markdown("no heading"), code(RAISES), stale)
    write(source / "02_dies.ipynb", code("import os\n\nos._exit(1)"))
    write(source / "scratch.ipynb", code("1 / 0"))
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    status = report.main(["--profile", "smoke", "--notebooks", str(source), "--out", str(out)])
    assert before == {path.name: path.read_bytes() for path in source.iterdir()}, "the notebooks were written to"
    return status, source, out


def test_a_failure_is_told_and_the_others_still_run(ran):
    status, _, out = ran
    assert status == 1
    assert sorted(path.name for path in out.glob("*.html")) == [
        "00_good.html",
        "01_raises.html",
        "02_dies.html",
        "index.html",
    ]
    index = (out / "index.html").read_text()
    assert "1 of 3 notebooks ran to the end" in index
    assert re.search(r'href="00_good.html">A \*good\* one</a>.*ran to the end', index)
    assert "failed: code cell 1 of 2: KeyError: &#x27;planted&#x27;" in index
    assert "failed: code cell 1 of 1: DeadKernelError: Kernel died" in index
    page = (out / "01_raises.html").read_text()
    assert "before: 100% 3/3" in page and "Traceback" in page and "stale" not in page
    assert "DeadKernelError" in (out / "02_dies.html").read_text()


def test_runs_in_this_interpreter_in_the_notebooks_folder(ran):
    _, source, out = ran
    cell = nbformat.read(out / "00_good.ipynb", as_version=4).cells[1]
    assert cell.outputs[0].text == f"smoke {sys.executable} {source.name}\n"


def test_a_kernel_registered_under_the_same_name_is_not_used(tmp_path, monkeypatch):
    spec = tmp_path / "kernels" / "python3"
    spec.mkdir(parents=True)
    argv = ["/nowhere/python", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "other", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    assert KernelSpecManager().get_kernel_spec("python3").argv == argv  # what Jupyter by itself would start
    write(tmp_path / "00_x.ipynb", code("import sys\n\nprint(sys.executable)"))
    result = report.run_notebook(tmp_path / "00_x.ipynb", "smoke")
    assert result.error == ""
    assert result.notebook.cells[0].outputs[0].text.strip() == sys.executable


def test_pages_load_nothing(ran):
    _, _, out = ran
    for path in out.glob("*.html"):
        page = path.read_text()
        assert not re.search(r"<script|<link|<iframe|@import|url\(['\"]?http", page), path.name
        sources = re.findall(r"<(?:img|source|video)\b[^>]*?\ssrc=\"([^\"]{0,40})", page)
        assert all(source.startswith("data:") for source in sources), (path.name, sources)
    page = (out / "00_good.html").read_text()
    assert page.count('src="data:image/png;base64,') == 1  # the figure
    assert page.count('src="data:image/svg+xml;base64,') == 2  # the two formulas that mathtext can set
    assert "<code>\\nope</code>" in page


def test_bars_and_widgets_leave_their_last_state(ran):
    _, _, out = ran
    notebook = nbformat.read(out / "00_good.ipynb", as_version=4)
    bars, steps, slider = notebook.cells[3:6]
    assert len(bars.outputs) == 1
    assert bars.outputs[0].data["text/plain"].startswith("kept: 100% 7/7 [")
    assert [output.text for output in steps.outputs] == ["step 999"]
    assert [output.get("text") or output.data["text/plain"] for output in slider.outputs] == ["a 5", "a is 5\n"]
    assert "widgets" not in notebook.metadata
    assert (out / "00_good.html").stat().st_size < 500_000


# ------------------------------------------------------------------------------------------------ without a kernel


def test_profile_is_the_argument_then_the_variable_then_the_machine(monkeypatch):
    monkeypatch.setenv("WORKBOOK_PROFILE", "full")
    assert report.choose_profile("smoke") == "smoke"
    assert report.choose_profile() == "full"
    monkeypatch.setenv("WORKBOOK_PROFILE", "ful")
    with pytest.raises(ValueError, match="WORKBOOK_PROFILE = 'ful'"):
        report.choose_profile()
    monkeypatch.delenv("WORKBOOK_PROFILE")
    for cuda, profile in ((True, "full"), (False, "smoke")):
        monkeypatch.setattr("torch.cuda.is_available", lambda cuda=cuda: cuda)
        assert report.choose_profile() == profile


def test_names_choose_notebooks(tmp_path):
    for name in ("00_a", "02_b", "02_c", "scratch"):
        write(tmp_path / f"{name}.ipynb")

    def names(*chosen):
        return [path.stem for path in report.find_notebooks(tmp_path, list(chosen))]

    assert names() == ["00_a", "02_b", "02_c"]
    assert names("02") == ["02_b", "02_c"]
    assert names("02_c", "00", "notebooks/00_a.ipynb") == ["00_a", "02_c"]
    with pytest.raises(ValueError, match="'07' fits none of 00_a, 02_b, 02_c"):
        names("00", "07")
    with pytest.raises(ValueError, match="no file named like NN_topic.ipynb"):
        report.find_notebooks(tmp_path / "empty", [])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--profile", "medium"], "invalid choice: 'medium'"),
        (["--profile", "smoke", "07"], "'07' fits none"),
        (["--profile", "smoke", "--save"], "only the outputs of the full profile"),
    ],
)
def test_wrong_arguments_end_with_status_2(tmp_path, capsys, arguments, words):
    write(tmp_path / "00_a.ipynb")
    with pytest.raises(SystemExit) as caught:
        report.main(["--notebooks", str(tmp_path), "--out", str(tmp_path / "out"), *arguments])
    assert caught.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_save_keeps_full_outputs_only_when_all_passed(tmp_path):
    write(tmp_path / "00_a.ipynb", code("print('kept')"))
    write(tmp_path / "01_b.ipynb", code("1 / 0"))
    common = ["--profile", "full", "--save", "--notebooks", str(tmp_path), "--out", str(tmp_path / "out")]
    assert report.main(common) == 1
    assert nbformat.read(tmp_path / "00_a.ipynb", as_version=4).cells[0].outputs == []
    assert report.main([*common, "00"]) == 0
    assert nbformat.read(tmp_path / "00_a.ipynb", as_version=4).cells[0].outputs[0].text == "kept\n"


@pytest.mark.parametrize(
    ("source", "title"), [("# One #\n## Two", "One"), ("text\n\n## Two", "Two"), ("#no", "fallback"), ("", "fallback")]
)
def test_title_is_the_first_heading(source, title):
    assert report_html.title(nbformat.v4.new_notebook(cells=[code("# no"), markdown(source)]), "fallback") == title


def test_pictures_of_markdown_are_embedded(tmp_path):
    (tmp_path / "dot.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    notebook = nbformat.v4.new_notebook(cells=[markdown("# T\n\n![dot](dot.svg)")])
    page = report_html.notebook_page(notebook, name="x", folder=tmp_path)
    assert "data:image/svg+xml;base64,PHN2" in page and "<title>T</title>" in page


def test_a_flood_of_output_is_not_lost(tmp_path, monkeypatch):
    """On a busy machine messages come faster than they are taken: none may be dropped, the last least of all."""
    process = report.Client.process_message

    def slowly(self, *args):
        time.sleep(0.001)
        return process(self, *args)

    monkeypatch.setattr(report.Client, "process_message", slowly)
    flood = "from IPython.display import display\n\nfor i in range(4000):\n    display(f'{i:4000}')"
    write(tmp_path / "00_flood.ipynb", code(flood), code("print('after it')"))
    result = report.run_notebook(tmp_path / "00_flood.ipynb", "smoke")
    first, last = result.notebook.cells
    assert result.error == "" and [int(x["data"]["text/plain"].strip("'")) for x in first.outputs] == list(range(4000))
    assert last.outputs[0]["text"] == "after it\n"


def test_links_between_notebooks_lead_to_pages(tmp_path):
    text = "[next](02_hybrid_niah.ipynb), [far](https://example.org/a.ipynb), [part](01_x.ipynb#here), [log](../LOG.md)"
    page = report_html.notebook_page(nbformat.v4.new_notebook(cells=[markdown(text)]), name="n", folder=tmp_path)
    found = set(re.findall(r'<a href="([^"#]+(?:#here)?)"', page))
    assert found >= {"02_hybrid_niah.html", "https://example.org/a.ipynb", "01_x.html#here", "../LOG.md"}


def test_the_index_says_where_it_comes_from(ran):
    index = (ran[2] / "index.html").read_text()
    assert re.search(r"Revision [\w+]+, .+, \d{4}-\d\d-\d\d \d\d:\d\d\.", index)


def test_texts_named_from_here_are_found_from_the_notebooks(tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORKBOOK_CORPUS", "texts")
    monkeypatch.setenv("WORKBOOK_TOKENIZER", "bytes")
    env = report.kernel_env("smoke", tmp_path / "notebooks")
    assert env["WORKBOOK_CORPUS"] == os.path.join("..", "texts") and env["WORKBOOK_TOKENIZER"] == "bytes"
