"""Writes a report's sections as one self-contained HTML page, and as Markdown with the same tables."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from megatron_crnet.charts import DASHES, HATCHES, SERIES, Chart, marker
from megatron_crnet.report_parts import Section, Table

LIGHT = ("#0b62b4", "#b8480e", "#0a7a4b", "#8a3a9e", "#8a6d00", "#c2185b", "#00778a", "#555f6b")
DARK = ("#6cb6ff", "#ff9d57", "#5fd39a", "#d699ff", "#e8c547", "#ff7eb0", "#4fd3e6", "#b4bec9")
"""Okabe and Ito's order of hues, each at least 4.5:1 against its background."""

STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --back: #ffffff; --soft: #59636e; --line: #d5dae0; --box: #f4f6f8;
  --warn: #8a4b00; LIGHT }
@media (prefers-color-scheme: dark) { :root { --text: #e6e9ed; --back: #14181d; --soft: #a3adb8; --line: #3a424c;
  --box: #1d232a; --warn: #ffb86b; DARK } }
@media print { :root { --text: #000; --back: #fff; --soft: #333; --line: #bbb; --box: #fff; --warn: #5a3000; LIGHT }
  figure, tr, h2, p { break-inside: avoid; } h2, section > p { break-after: avoid; } nav { display: none; }
  .scroll { overflow: visible !important; } table { font-size: 10px !important; }
  td { min-width: 0 !important; white-space: normal !important; }
  body { font-size: 12px; } .charts { grid-template-columns: 1fr 1fr !important; }
  * { print-color-adjust: exact; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); margin: 0 auto;
  padding: 1rem; max-width: 62rem; }
h1 { font-size: 1.6rem; margin: 0.5rem 0; } h2 { font-size: 1.25rem; margin: 2.2rem 0 0.4rem; }
nav ul { display: flex; flex-wrap: wrap; gap: 0.2rem 1rem; padding: 0; list-style: none; }
a { color: var(--c0); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: 0.8rem; border: 1px solid var(--line); border-radius: 6px; max-width: 36rem; }
figcaption { font-size: 0.9rem; } figcaption b { display: block; }
figure svg { display: block; width: 100%; height: auto; color: var(--text); }
.legend { display: flex; flex-wrap: wrap; gap: 0 1rem; padding: 0; margin: 0.3rem 0 0; list-style: none;
  font-size: 0.85rem; }
.legend svg { display: inline-block; width: 34px; height: 14px; vertical-align: -2px; margin-right: 0.3rem; }
.scroll { overflow-x: auto; margin: 0.8rem 0; }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: 0.25rem 0.7rem 0.25rem 0; text-align: left;
  vertical-align: top; }
.title { font-weight: 600; font-size: 0.95rem; margin: 1.4rem 0 0; break-after: avoid; }
td { min-width: 11rem; } td.short { min-width: 0; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
.absent { border-left: 4px solid var(--warn); background: var(--box); padding: 0.4rem 0.8rem; margin: 0.8rem 0; }
.absent p { margin: 0.2rem 0; overflow-wrap: anywhere; }
pre { background: var(--box); padding: 0.6rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 0.85rem; }
svg text { fill: currentColor; font: 12px system-ui, sans-serif; } svg text.tick { font-size: 11px; }
svg polyline { fill: none; stroke-width: 2; } svg .grid { stroke: var(--line); fill: none; }
svg .faint { stroke: var(--soft); stroke-width: 1.5; }
svg .hatch { stroke: var(--back); stroke-width: 1.6; fill: none; }
svg path.hollow { fill: var(--back); stroke-width: 1.8; } .hidden { position: absolute; }
@media (max-width: 30rem) { figure { padding: 0.4rem; }
  svg text { font-size: 14px; } svg text.tick { font-size: 13px; } }
"""


def html_page(title: str, introduction: str, sections: Sequence[Section]) -> str:
    """The whole page; it loads nothing and runs no script."""
    links = "".join(f'<li><a href="#s{i}">{escape(section.title)}</a></li>' for i, section in enumerate(sections))
    body = "".join(_section(i, section) for i, section in enumerate(sections))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_style()}</style></head>\n<body>{HATCHES}"
        f"<header><h1>{escape(title)}</h1><p>{escape(introduction)}</p>"
        f'<nav aria-label="sections"><ul>{links}</ul></nav></header>\n<main>{body}</main></body></html>\n'
    )


def _style() -> str:
    def colours(found: Sequence[str]) -> str:
        return " ".join(f"--c{i}: {colour};" for i, colour in enumerate(found))

    rules = "".join(
        f"svg .s{i} {{ stroke: var(--c{i}); }} svg .f{i} {{ fill: var(--c{i}); }} "
        f"svg .m{i} {{ fill: var(--c{i}); stroke: var(--c{i}); }}\n"
        for i in range(SERIES)
    )
    hollow = "svg path.hollow { fill: var(--back); }\n"  # after the colours, which would fill it
    return STYLE.replace("LIGHT", colours(LIGHT)).replace("DARK", colours(DARK)) + rules + hollow


def _section(number: int, section: Section) -> str:
    parts = [f'<section id="s{number}"><h2>{escape(section.title)}</h2><p>{escape(section.text)}</p>']
    if section.charts:
        parts.append('<div class="charts">' + "".join(map(_figure, section.charts)) + "</div>")
    parts += [_table(table) for table in section.tables]
    if section.absent:
        lines = "".join(f"<p>{escape(line)}</p>" for line in section.absent)
        parts.append(f'<div class="absent" role="note"><p><b>Absent or left out</b></p>{lines}</div>')
    if section.code:
        parts.append(f"<pre>{escape(chr(10).join(section.code))}</pre>")
    return "".join(parts) + "</section>\n"


def _figure(chart: Chart) -> str:
    keys = "".join(f"<li>{_swatch(index, kind)}{escape(name)}</li>" for index, name, kind in chart.legend)
    caption = f"<figcaption><b>{escape(chart.title)}</b>{escape(chart.caption)}</figcaption>"
    return f'<figure>{caption}{chart.svg}<ul class="legend">{keys}</ul></figure>'


def _swatch(index: int, kind: str) -> str:
    if kind == "fill":
        shape = 'x="1" y="1" width="32" height="12"'
        hatch = f'<rect fill="url(#hatch{index % 4})" {shape}/>' if index % 4 else ""
        content = f'<rect class="f{index}" {shape}/>{hatch}'
    else:
        style = "faint" if kind == "faint" else f"s{index}"
        way = f'<polyline class="{style}" stroke-dasharray="{DASHES[index]}" points="0,7 34,7"/>'
        content = ("" if kind == "mark" else way) + ("" if kind == "faint" else marker(index, 17, 7))
    return f'<svg viewBox="0 0 34 14" aria-hidden="true">{content}</svg>'


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.header)
    rows = "".join("<tr>" + "".join(map(_table_cell, row)) + "</tr>" for row in table.rows)
    # above what is moved sideways, not in it
    title = f'<p class="title">{escape(table.title)}</p>' if table.title else ""
    content = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'{title}<div class="scroll" tabindex="0">{content}</div>'


def _table_cell(text: str) -> str:
    # what is short stays on one line, and a table that is too wide for a phone is moved sideways
    return f"<td{' class=short' if len(text) <= 32 else ''}>{escape(text)}</td>"


def markdown_page(title: str, introduction: str, sections: Sequence[Section]) -> str:
    """The same without pictures, whose figures are in the tables."""
    parts = [f"# {title}", introduction]
    for section in sections:
        parts += [f"## {section.title}", section.text]
        parts += [_markdown_table(table) for table in section.tables]
        if section.absent:
            parts.append("Absent or left out:\n\n" + "\n".join(f"- {_cell(line)}" for line in section.absent))
        if section.code:
            parts.append("\n".join("    " + line for text in section.code for line in text.splitlines()))
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    title = f"**{_cell(table.title)}**\n\n" if table.title else ""
    return title + "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
