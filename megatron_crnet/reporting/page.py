"""A report's sections as one page of HTML, and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from textwrap import indent

import pandas as pd

from megatron_crnet.reporting.pictures import DARK, LIGHT, Picture, colours, svg
from megatron_crnet.utils.tables import table

CSS = """
:root { color-scheme: light dark; --text: #1b1f24; --back: #ffffff; --soft: #59636e; --line: #d5dae0; --box: #f4f6f8;
  LIGHT }
@media screen and (prefers-color-scheme: dark) { :root { --text: #e6e9ed; --back: #14181d; --soft: #a3adb8;
  --line: #3a424c; --box: #1d232a; DARK } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); margin: 0 auto;
  padding: 1rem; max-width: 66rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0.5rem 0; } h2 { font-size: 1.25rem; margin: 2.2rem 0 0.4rem; }
nav ul { display: flex; flex-wrap: wrap; gap: 0.2rem 1rem; padding: 0; list-style: none; }
a { color: var(--c0); } section > p { max-width: 48rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: 0.6rem; border: 1px solid var(--line); border-radius: 6px; max-width: 36rem; }
figcaption { font-size: 0.9rem; } figcaption b { display: block; }
figure svg { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; margin: 0.6rem 0; }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { border-bottom: 1px solid var(--line); padding: 0.25rem 0 0.25rem 1rem; text-align: right;
  vertical-align: top; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal; }
:is(th, td):first-child { padding-left: 0; }
table:not(.text0) :is(th, td):first-child { min-width: 9rem; white-space: normal; }
table.words :is(th, td) { text-align: left; white-space: normal; min-width: 6rem; }
@media (max-width: 30rem) { table:not(.text0) :is(th, td):first-child { min-width: 5.5rem; } }
table.text1 :is(th, td):first-child, table.text2 :is(th, td):nth-child(-n + 2),
table.text4 :is(th, td):nth-child(-n + 4) { text-align: left; }
.title { font-weight: 600; font-size: 0.95rem; margin: 1.2rem 0 0; }
pre { background: var(--box); padding: 0.6rem; white-space: pre-wrap; font-size: 0.8rem; }
@media print { :root { color-scheme: light; font-size: 11px; } nav { display: none; }
  body { font-size: 11px; max-width: none; padding: 0; }
  figure, tr { break-inside: avoid; } h2, .title, section > p { break-after: avoid; } section > p { max-width: none; }
  .charts { grid-template-columns: 1fr 1fr; } .scroll { overflow: visible; } pre { font-size: 8px; }
  table { font-size: 8.5px; } table:not(.words) :is(th, td) { padding-left: 0.5rem; white-space: normal; }
  table :is(th, td):first-child { padding-left: 0; min-width: 6rem; } * { print-color-adjust: exact; } }
"""


@dataclass(frozen=True)
class Table:
    """Rows of text by column, or a frame of them, and above them what they are of.

    Attributes:
        text: how many of the first columns are words; the others are numbers.
    """

    rows: pd.DataFrame | Sequence[Mapping[str, str]]
    text: int = 1
    title: str = ""

    def html(self) -> str:
        """With its title, in a box that scrolls sideways."""
        frame = pd.DataFrame(self.rows)
        words = "words" if self.text >= len(frame.columns) else f"text{self.text}"
        with pd.option_context("display.max_colwidth", None):
            content = frame.to_html(index=False, border=0, escape=True, classes=words, justify="unset")
        title = f'<p class="title">{escape(self.title)}</p>' if self.title else ""
        return f'{title}<div class="scroll" tabindex="0">{content}</div>'

    def markdown(self) -> str:
        """The same."""
        frame = pd.DataFrame(self.rows).map(_plain).rename(columns=_plain)
        title = f"**{_plain(self.title)}**\n\n" if self.title else ""
        return title + table([*frame.columns], frame.to_numpy().tolist(), self.text)


@dataclass
class Section:
    """One question of a report; left out of it where nothing answers it.

    Attributes:
        text: how to read it.
        notes: lines below its tables.
        code: commands.
    """

    title: str
    text: str
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing below its text."""
        return not (self.pictures or self.tables or self.notes or self.code)

    def html(self, number: int) -> str:
        """The section."""
        figures = "".join(_figure(picture) for picture in self.pictures)
        parts = [f'<section id="s{number}"><h2>{escape(self.title)}</h2><p>{escape(self.text)}</p>']
        parts += [f'<div class="charts">{figures}</div>'] if figures else []
        parts += [table.html() for table in self.tables]
        parts += ["<ul>" + "".join(f"<li>{escape(note)}</li>" for note in self.notes) + "</ul>"] if self.notes else []
        parts += [f"<pre>{escape(chr(10).join(self.code))}</pre>"] if self.code else []
        return "".join(parts) + "</section>\n"

    def markdown(self) -> str:
        """The same without pictures, whose figures are in the tables."""
        parts = [f"## {self.title}", self.text, *(table.markdown() for table in self.tables)]
        parts += ["\n".join(f"- {_plain(note)}" for note in self.notes), indent("\n".join(self.code), "    ")]
        return "\n\n".join(part for part in parts if part)


def html_page(title: str, introduction: str, sections: Sequence[Section]) -> str:
    """The whole page; it loads nothing and runs no script."""
    links = "".join(f'<li><a href="#s{i}">{escape(section.title)}</a></li>' for i, section in enumerate(sections))
    css = CSS.replace("LIGHT", colours(LIGHT)).replace("DARK", colours(DARK))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{css}</style></head>\n<body>"
        f"<header><h1>{escape(title)}</h1><p>{escape(introduction)}</p>"
        f'<nav aria-label="sections"><ul>{links}</ul></nav></header>\n'
        f"<main>{''.join(section.html(i) for i, section in enumerate(sections))}</main></body></html>\n"
    )


def markdown_page(title: str, introduction: str, sections: Sequence[Section]) -> str:
    """The same in Markdown."""
    return "\n\n".join([f"# {title}", introduction, *(section.markdown() for section in sections)]) + "\n"


def _figure(picture: Picture) -> str:
    try:
        drawn = svg(picture)
    except ValueError:  # no point of it is a number
        return ""
    caption = f"<figcaption><b>{escape(picture.title)}</b>{escape(picture.caption)}</figcaption>"
    return f"<figure>{caption}{drawn}</figure>"


def _plain(text: str) -> str:
    return " ".join(str(text).split()).replace("<", "&lt;")
