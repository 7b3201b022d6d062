"""Executed notebooks as HTML pages that need no network: what report.py writes.

nbconvert's own pages fetch MathJax, require.js, Mermaid and the widget code from public servers when they are opened.
Here formulas become pictures (matplotlib's mathtext), widgets become the text and figures that they last showed, and
the rest is left out.
"""

from __future__ import annotations

import base64
import html
import io
import logging
import re
from pathlib import Path

import matplotlib.mathtext
import nbformat
from jinja2 import pass_context
from matplotlib.font_manager import FontProperties
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

VIEW = "application/vnd.jupyter.widget-view+json"
STATE = "application/vnd.jupyter.widget-state+json"

# The lab template without the four blocks that load scripts from elsewhere.
TEMPLATE = """
{%- extends 'index.html.j2' -%}
{%- block html_head_js -%}{%- endblock html_head_js -%}
{%- block jupyter_widgets -%}{%- endblock jupyter_widgets -%}
{%- block html_head_js_mathjax -%}{%- endblock html_head_js_mathjax -%}
{%- block html_head_js_mermaidjs -%}{%- endblock html_head_js_mermaidjs -%}
"""

INDEX = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>GroundThink report</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 3rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ text-align: left; padding: .45rem .8rem; border-bottom: 1px solid #ddd; vertical-align: top }}
td.number {{ text-align: right; white-space: nowrap }} .failed {{ color: #b00020 }}
</style></head><body><h1>GroundThink report</h1>
<p>{summary}</p>
<table><tr><th>notebook</th><th>status</th><th>seconds</th><th>profile</th></tr>
{rows}
</table></body></html>
"""


def title(notebook: nbformat.NotebookNode, fallback: str) -> str:
    """The first heading of the notebook, without its marks, or `fallback` where there is none."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = re.search(r"^#+[ \t]+(.+?)[ \t#]*$", cell.source, re.MULTILINE)
            if heading:
                return heading.group(1)
    return fallback


# ------------------------------------------------------------------------------------------------ widgets


def freeze_widgets(notebook: nbformat.NotebookNode) -> None:
    """Replace every widget of an executed notebook, in place, by the text and outputs that it last showed.

    A widget whose state was closed (a progress bar that clears itself) leaves nothing.
    """
    models = notebook.metadata.pop("widgets", {}).get(STATE, {}).get("state", {})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [frozen for output in cell.outputs for frozen in _freeze(output, models)]


def _freeze(output, models: dict) -> list:
    view = output.get("data", {}).get(VIEW)
    if view is None:
        return [output]
    words: list[str] = []
    outputs: list = []
    _collect(view["model_id"], models, words, outputs)
    text = [nbformat.v4.new_output("display_data", data={"text/plain": " ".join(words)})] if words else []
    return text + [frozen for inner in outputs for frozen in _freeze(nbformat.from_dict(inner), models)]


def _collect(model_id: str, models: dict, words: list[str], outputs: list) -> None:
    """Walk a widget and its children, gathering what they say and the cell outputs that they hold."""
    model = models.get(model_id)
    if model is None:
        return
    kind, state = model["model_name"], model["state"]
    outputs += state.get("outputs", []) if kind == "OutputModel" else []
    value = state.get("value")
    if kind.startswith(("HTML", "Label")):
        words += html.unescape(re.sub(r"<[^>]*>", "", str(value))).replace("\xa0", " ").split()
    elif value is not None and "Progress" not in kind:  # the bar of a progress bar; its figures stand beside it
        words += [word for word in (state.get("description"), str(value)) if word]
    for child in state.get("children", []):
        _collect(child.removeprefix("IPY_MODEL_"), models, words, outputs)


# ------------------------------------------------------------------------------------------------ pages


class _Renderer(IPythonRenderer):
    """Markdown to HTML with formulas as pictures; one that mathtext cannot set is shown as its source."""

    def link(self, text, url, title=None):
        """Notebooks beside this one: to their pages, which lie in one folder."""
        return super().link(text, re.sub(r"^(?!\w+:|/)([\w./-]+)\.ipynb(?=#|$)", r"\1.html", url), title)

    def inline_math(self, body):
        return _formula(body, block=False)

    def block_math(self, body):
        return f'<p style="text-align: center">{_formula(body, block=True)}</p>'

    def latex_environment(self, name, body):
        return f"<pre>{html.escape(body.strip())}</pre>"


def _formula(source: str, *, block: bool) -> str:
    source = " ".join(source.split())
    picture = io.BytesIO()
    font = FontProperties(size=13 if block else 11)
    try:
        depth = matplotlib.mathtext.math_to_image(f"${source}$", picture, prop=font, dpi=72, format="svg")
    except ValueError:
        return f"<code>{html.escape(source)}</code>"
    data = base64.b64encode(picture.getvalue()).decode("ascii")
    style = f"display: inline; vertical-align: -{depth:.1f}pt"
    return f'<img style="{style}" alt="{html.escape(source)}" src="data:image/svg+xml;base64,{data}">'


class _Exporter(HTMLExporter):
    @pass_context
    def markdown2html(self, context, source):
        renderer = _Renderer(
            escape=False,
            embed_images=True,
            exclude_anchor_links=True,
            attachments=context.get("cell", {}).get("attachments", {}),
            path=context["resources"]["metadata"]["path"],
        )
        return MarkdownWithMath(renderer=renderer).render(source)


def notebook_page(notebook: nbformat.NotebookNode, *, name: str, folder: Path) -> str:
    """One notebook as a self-contained page; pictures that its Markdown names relative to `folder` are embedded."""
    exporter = _Exporter(raw_template=TEMPLATE)
    exporter.log.setLevel(logging.ERROR)  # else one line per figure without alternative text
    resources = {"metadata": {"name": title(notebook, name), "path": str(folder)}}
    page, _ = exporter.from_notebook_node(notebook, resources=resources)
    return page


def index_page(rows: list[tuple[str, str, str, float]], *, profile: str, made: str = "") -> str:
    """The page that lists the notebooks: one row per (file name, title, error or "", seconds). made: when, where, from what."""
    lines = []
    for name, heading, error, seconds in rows:
        status = f'<span class="failed">failed: {html.escape(error)}</span>' if error else "ran to the end"
        link = f'<a href="{html.escape(name)}.html">{html.escape(heading)}</a><br><small>{html.escape(name)}</small>'
        cells = f'<td>{link}</td><td>{status}</td><td class="number">{seconds:.1f}</td><td>{html.escape(profile)}</td>'
        lines.append(f"<tr>{cells}</tr>")
    failed = sum(bool(error) for _, _, error, _ in rows)
    summary = f"{len(rows) - failed} of {len(rows)} notebooks ran to the end in {sum(row[3] for row in rows):.0f} s."
    return INDEX.format(summary=f"{summary} {html.escape(made)}".strip(), rows="\n".join(lines))
