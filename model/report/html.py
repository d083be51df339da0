"""Small pieces of HTML: escaping, tables, figures, the page around them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from string import Template
from typing import Any

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>$title</title>
<style>
:root { color-scheme: light; --ink: #1d2733; --soft: #5b6672; --line: #dfe3e8; --tint: #f5f7f9; --accent: #2b6cb0; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; margin: 3rem 0 .6rem; padding-top: .7rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2rem 0 .4rem; }
p { margin: .4rem 0 .9rem; max-width: 44rem; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
a { color: var(--accent); }
nav { margin: 1rem 0 0; font-size: .93rem; display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: .8rem; margin: 1.4rem 0; }
.tile { background: var(--tint); border-radius: .5rem; padding: .75rem .9rem; }
.tile b { display: block; font-size: 1.3rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .83rem; }
figure { margin: 0; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); gap: 1.4rem 1.6rem;
  align-items: start; margin: 1rem 0 1.4rem; }
figure img { width: 100%; height: auto; display: block; }
/* A shadow on the side where a table goes on; white, scrolled with the table, hides it at the end. */
.scroll { overflow-x: auto; margin: .8rem 0 1.2rem; background: no-repeat #fff;
  background-size: 2rem 100%, 2rem 100%, .7rem 100%, .7rem 100%; background-position: 0 0, 100% 0, 0 0, 100% 0;
  background-attachment: local, local, scroll, scroll;
  background-image: linear-gradient(90deg, #fff 40%, #fff0), linear-gradient(-90deg, #fff 40%, #fff0),
  linear-gradient(90deg, #0003, #0000), linear-gradient(-90deg, #0003, #0000); }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; min-width: 50%; }
th, td { padding: .32rem .8rem .32rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
td.n, th.n { text-align: right; }
td.n { white-space: nowrap; }
td:first-child { white-space: nowrap; }
tr.on td { background: #fff7e6; }
.good { color: #1b6e3c; font-weight: 600; }
.bad { color: #b3261e; font-weight: 600; }
details { margin: .6rem 0; }
summary { cursor: pointer; font-weight: 600; }
summary h2 { display: inline; border: 0; padding: 0; }
.run { border-top: 1px solid var(--line); padding-top: .7rem; }
code, .text { font: .86rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { overflow-wrap: anywhere; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.75; border: 1px solid var(--line);
  border-radius: .5rem; padding: .9rem 1rem; }
.text span { border-radius: .15rem; }
.key { display: inline-flex; gap: .3rem; align-items: center; margin-right: 1rem; }
.key i { width: 1.3rem; height: .9rem; border-radius: .15rem; display: inline-block; border: 1px solid var(--line); }
@media print { main { max-width: none; padding: 0; } h2 { break-after: avoid; } figure { break-inside: avoid; } }
</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
""")


class Markup(str):
    """A string that is HTML already; everything else is escaped where it is put in."""


def page(title: str, body: Iterable[str]) -> str:
    """The whole document. It loads nothing: a policy in it forbids every request."""
    return _PAGE.substitute(title=escape(title), body="\n".join(body))


def text(value: Any) -> str:
    """A value as HTML: escaped, or as it is if it is Markup."""
    return value if isinstance(value, Markup) else escape(str(value))


def tag(name: str, content: Any, **attributes: str) -> Markup:
    """<name class="...">content</name>; `class_` stands for class."""
    written = "".join(f' {key.rstrip("_")}="{escape(value)}"' for key, value in attributes.items())
    return Markup(f"<{name}{written}>{text(content)}</{name}>")


def join(parts: Iterable[Any], separator: str = "") -> Markup:
    return Markup(separator.join(text(part) for part in parts))


def table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], *, numbers: Sequence[int] = (), marked: Sequence[int] = ()
) -> Markup:
    """A table; columns in `numbers` are set to the right, rows in `marked` have a tint."""
    kinds = [' class="n"' if i in numbers else "" for i in range(len(columns))]
    head = "".join(f"<th{kind}>{text(name)}</th>" for name, kind in zip(columns, kinds, strict=True))
    body = "".join(
        ('<tr class="on">' if i in marked else "<tr>")
        + "".join(f"<td{kind}>{text(cell)}</td>" for cell, kind in zip(row, kinds, strict=True))
        + "</tr>\n"
        for i, row in enumerate(rows)
    )
    return Markup(f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>')


def tiles(facts: Iterable[tuple[str, str]]) -> Markup:
    """Large figures with a word below each."""
    return tag("div", join(Markup(f'<div class="tile"><b>{text(v)}</b><span>{text(k)}</span></div>') for k, v in facts),
               class_="tiles")  # fmt: skip


def figure(uri: str, description: str, caption: Any = "") -> Markup:
    """A picture; the description stands for it where it is not seen."""
    below = tag("figcaption", caption) if caption else ""
    return Markup(f'<figure><img src="{uri}" alt="{escape(description)}">{below}</figure>')


def pictures(*figures: str) -> Markup:
    """Figures side by side where there is room."""
    return tag("div", join(figures), class_="pictures")


def details(summary: Any, content: Any, **attributes: str) -> Markup:
    """Content that is shown when its summary is chosen, or when a link leads into it."""
    return tag("details", join([tag("summary", summary), content]), **attributes)
