"""Pages: a headline, a few numbers and sections of blocks, as Markdown and as one HTML file that needs nothing else.

The HTML loads nothing (pictures are inside it), holds no script, follows the reader's light or dark setting and fits a
phone: bars are plain boxes, figures are SVG whose colours are the page's, and a wide table scrolls in its own box.
"""

import base64
import html
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

_BARS_SHOWN = 120  # more rows than that are in the table of the JSON beside the page


@dataclass(frozen=True)
class Text:
    """A paragraph; `kind` is ``""``, ``"warning"`` or ``"note"``."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Listing:
    """Short sentences, one a line; `kind` as in `Text`."""

    items: tuple[str, ...]
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of texts under a head; columns whose cells all start like numbers stand right."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Bars:
    """Lying bars: one line a label, one bar a series; values may be missing.

    Attributes:
        labels: From the top.
        series: (name, values) in order; the values of all share one scale from 0.
        told: Text at each bar's end, by series and label.
        unit: What the bars count.
        file: Name of the same as a figure beside the page, for the Markdown, or "".
    """

    labels: tuple[str, ...]
    series: tuple[tuple[str, tuple[float | None, ...]], ...]
    told: tuple[tuple[str, ...], ...]
    unit: str = ""
    file: str = ""


@dataclass(frozen=True)
class Drawing:
    """A figure.

    Attributes:
        caption: What is seen.
        svg: The SVG that matplotlib wrote, for the HTML.
        file: Name of the figure beside the page, for the Markdown.
    """

    caption: str
    svg: str
    file: str


@dataclass(frozen=True)
class Picture:
    """A photograph or contact sheet: PNG bytes for the HTML, a file beside the page for the Markdown."""

    caption: str
    png: bytes
    file: str


@dataclass(frozen=True)
class Code:
    """A command."""

    text: str


@dataclass(frozen=True)
class Claim:
    """A claim beside what was found; `verdict` says in words whether it holds, `holds` the same for the eye."""

    claim: str
    verdict: str
    found: str
    holds: bool | None


Block = Claim | Text | Listing | Table | Bars | Drawing | Picture | Code


@dataclass(frozen=True)
class Section:
    """A headline and what stands under it. Long ones may be `folded`: closed until the reader opens them."""

    title: str
    blocks: tuple[Block, ...]
    folded: bool = False


@dataclass(frozen=True)
class Fact:
    """One of the few numbers at the top: ``top-1 accuracy``, ``89.60 %``, ``−2.13 points``; better, worse or neither."""

    label: str
    value: str
    change: str = ""
    better: bool | None = None


@dataclass(frozen=True)
class Page:
    """A whole page.

    Attributes:
        title: Headline.
        lead: What it is about, in a sentence.
        facts: The few numbers at the top.
        sections: What follows.
        banner: What has to be read before any number, or "".
        mood: Whether the banner is good news (True), bad (False) or neither.
    """

    title: str
    lead: str
    facts: tuple[Fact, ...]
    sections: tuple[Section, ...]
    banner: str = ""
    mood: bool | None = None


def sections(*found: Section | None) -> tuple[Section, ...]:
    """Those sections that there is something to say in."""
    return tuple(section for section in found if section is not None)


def table(records: Sequence[Mapping[str, str]]) -> Table:
    """Records as a table: the head is all their keys in order of appearance, what a record lacks is empty."""
    head = tuple(dict.fromkeys(key for record in records for key in record))
    return Table(head, tuple(tuple(record.get(key, "") for key in head) for record in records))


# ------------------------------------------------------------------------------------------------------------ Markdown


def markdown(page: Page, *, heading: str = "#") -> str:
    """The page as Markdown, ending in a newline; `heading` are the marks of its first heading."""
    parts = [f"{heading} {one_line(page.title)}"]
    if page.banner:
        parts.append(f"**{one_line(page.banner)}**")
    if page.lead:
        parts.append(one_line(page.lead))
    if page.facts:
        rows = tuple((fact.label, fact.value, fact.change) for fact in page.facts)
        parts.append(markdown_table(("", "", "change"), rows))
    for section in page.sections:
        parts.append(f"{heading}# {one_line(section.title)}")
        parts += [text for block in section.blocks if (text := _markdown_block(block))]
    return "\n\n".join(parts) + "\n"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose cells cannot break it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(one_line(text) for text in line) + " |" for line in lines)


def one_line(text: str) -> str:
    """Text that cannot break a table or start a line of its own."""
    return " ".join(str(text).split()).replace("|", "\\|")


def _markdown_block(block: Block) -> str:
    if isinstance(block, Text):
        return one_line(block.text)
    if isinstance(block, Claim):
        return f"**{one_line(block.claim)}** *{one_line(block.verdict)}.* {one_line(block.found)}"
    if isinstance(block, Listing):
        return "\n".join(f"- {one_line(item)}" for item in block.items)
    if isinstance(block, Table):
        return markdown_table(block.head, block.rows)
    if isinstance(block, Bars):
        head = ("", *(name for name, _ in block.series))
        columns = [block.labels, *block.told]
        figure = f"![{one_line(block.unit)}]({block.file})\n\n" if block.file else ""
        return figure + markdown_table(head, tuple(zip(*columns, strict=True)))
    if isinstance(block, Code):
        return f"```\n{block.text}\n```"
    return f"![{one_line(block.caption)}]({block.file})"


# ---------------------------------------------------------------------------------------------------------------- HTML


def to_html(page: Page) -> str:
    """The page as one HTML file without script and without anything to load."""
    numbers = itertools.count()
    body = [f"<h1>{_escaped(page.title)}</h1>"]
    if page.banner:
        mood = {True: " good", False: " bad", None: ""}[page.mood]
        body.append(f'<p class="banner{mood}">{_escaped(page.banner)}</p>')
    if page.lead:
        body.append(f'<p class="lead">{_escaped(page.lead)}</p>')
    if page.facts:
        body.append('<dl class="facts">' + "".join(_fact(fact) for fact in page.facts) + "</dl>")
    for section in page.sections:
        inside = "\n".join(_html_block(block, next(numbers)) for block in section.blocks)
        title = _escaped(section.title)
        if section.folded:
            body.append(f"<details><summary><h2>{title}</h2></summary>\n{inside}\n</details>")
        else:
            body.append(f"<section><h2>{title}</h2>\n{inside}\n</section>")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<link rel="icon" href="data:,">\n<title>{_escaped(page.title)}</title>\n<style>{_STYLE}</style>\n</head>\n'
        "<body>\n<main>\n" + "\n".join(body) + "\n</main>\n</body>\n</html>\n"
    )


def _fact(fact: Fact) -> str:
    mood = {True: " better", False: " worse", None: ""}[fact.better]
    change = f'<dd class="change{mood}">{_escaped(fact.change)}</dd>' if fact.change else ""
    return f"<div><dt>{_escaped(fact.label)}</dt><dd>{_escaped(fact.value)}</dd>{change}</div>"


def _html_block(block: Block, number: int) -> str:
    if isinstance(block, Text):
        return f"<p{_class(block.kind)}>{_escaped(block.text)}</p>"
    if isinstance(block, Claim):
        mood = {True: "better", False: "worse", None: ""}[block.holds]
        return (
            f'<div class="claim"><h3>{_escaped(block.claim)}</h3><p><b class="{mood}">{_escaped(block.verdict)}.</b> '
            f"{_escaped(block.found)}</p></div>"
        )
    if isinstance(block, Listing):
        items = "".join(f"<li>{_escaped(item)}</li>" for item in block.items)
        return f"<ul{_class(block.kind)}>{items}</ul>"
    if isinstance(block, Table):
        return _html_table(block)
    if isinstance(block, Bars):
        return _html_bars(block)
    if isinstance(block, Code):
        return f"<pre><code>{_escaped(block.text)}</code></pre>"
    caption = f"<figcaption>{_escaped(block.caption)}</figcaption>"
    if isinstance(block, Drawing):
        drawn = _inline_svg(block.svg, block.caption, f"f{number}")
        return f'<figure><div class="scroll" tabindex="0">{drawn}</div>{caption}</figure>'
    inside = base64.b64encode(block.png).decode()
    return (
        f'<figure><img class="sheet" alt="{_escaped(block.caption)}" src="data:image/png;base64,{inside}">'
        f"{caption}</figure>"
    )


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def _html_table(table: Table) -> str:
    numeric = [
        all(_NUMBER.match(row[column]) or not row[column] for row in table.rows) for column in range(len(table.head))
    ]
    kinds = [' class="n"' if right else "" for right in numeric]
    head = "".join(f"<th{kind}>{_escaped(text)}</th>" for kind, text in zip(kinds, table.head, strict=True))
    rows = "".join(
        "<tr>" + "".join(f"<td{kind}>{_breakable(text)}</td>" for kind, text in zip(kinds, row, strict=True)) + "</tr>"
        for row in table.rows
    )
    # A box that scrolls can be reached by the keyboard.
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _html_bars(bars: Bars) -> str:
    finite = [value for _, values in bars.series for value in values if value is not None and isfinite(value)]
    largest = max([abs(value) for value in finite] or [0.0]) or 1.0
    key = ""
    if len(bars.series) > 1:
        names = "".join(
            f'<span><i class="c{place}"></i>{_escaped(name)}</span>' for place, (name, _) in enumerate(bars.series)
        )
        key = f'<p class="key">{names}</p>'
    lines = []
    for row, label in enumerate(bars.labels[:_BARS_SHOWN]):
        inside = ""
        for place, (_, values) in enumerate(bars.series):
            value = values[row]
            if value is None or not isfinite(value):
                continue
            width = 100 * max(value, 0.0) / largest
            inside += (
                f'<div class="bar"><i class="c{place}" style="width:{width:.2f}%"></i>'
                f"<b>{_escaped(bars.told[place][row])}</b></div>"
            )
        lines.append(f'<div class="line"><span>{_breakable(label)}</span><div>{inside}</div></div>')
    left = len(bars.labels) - _BARS_SHOWN
    more = f'<p class="note">{left} more are in the files beside this page.</p>' if left > 0 else ""
    unit = f'<p class="note">{_escaped(bars.unit)}</p>' if bars.unit else ""
    return f'{key}<div class="bars">{"".join(lines)}</div>{unit}{more}'


def _inline_svg(svg: str, caption: str, prefix: str) -> str:
    """matplotlib's SVG as part of the page: its colours become the page's, its identifiers its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', svg)
    svg = re.sub(r'(url\(|xlink:href=")#', rf"\1#{prefix}", svg)
    for colour, variable in _SVG_COLOURS:
        svg = re.sub(re.escape(colour), f"var(--{variable})", svg, flags=re.IGNORECASE)
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    width = float(box.group(1)) if box else 480.0
    # At 1.5 a figure's 9 points are read well on a desk; on a phone a wide one scrolls in its own box.
    style = f"max-width:{1.5 * width:.0f}px;min-width:{min(width, 560.0) if width > 480 else 0:.0f}px"
    root = f'<svg role="img" aria-label="{_escaped(caption)}" style="{style}" {box.group() if box else ""}>'
    return re.sub(r"<svg [^>]*>", lambda _: root, svg, count=1)


def _escaped(text: str) -> str:
    return html.escape(str(text))


def _breakable(text: str) -> str:
    """Long names may break behind a dot, an underscore or a slash, so that they fit a phone."""
    return re.sub(r"([._/])(?=[A-Za-z])", r"\1<wbr>", _escaped(text))


_NUMBER = re.compile(r"^[−+±-]?\d|^–$")  # a dash stands where a number could not be had

_SVG_COLOURS = (
    ("#ffffff", "paper"), ("#000000", "ink"), ("#555555", "quiet"), ("#dddddd", "line"), ("#0072b2", "c0"),
    ("#d55e00", "c1"), ("#009e73", "c2"), ("#cc79a7", "c3"), ("#e69f00", "c4"), ("#56b4e9", "c5"), ("#8c6d1f", "c6"),
)  # fmt: skip

# Okabe and Ito's colours by day; by night the dark ones are lifted so that lines keep 3:1 against the page.
_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1a1c1f;--quiet:#5b6168;--line:#dfe2e6;--soft:#f4f5f7;--c0:#0072b2;
--c1:#d55e00;--c2:#009e73;--c3:#b85c93;--c4:#b97f00;--c5:#2f8fc7;--c6:#8c6d1f;--good:#00734f;--bad:#b23c00;--warn:#fff3dc}
@media (prefers-color-scheme:dark){:root{--paper:#15171a;--ink:#e6e8ea;--quiet:#a2a9b1;--line:#343a41;--soft:#1e2226;
--c0:#5ab4e8;--c1:#ff8a3d;--c2:#3ccb9f;--c3:#e3a0c6;--c4:#f0b840;--c5:#8fcdf2;--c6:#cbb06a;--good:#4fd1a5;--bad:#ff9a6b;
--warn:#3a2e14}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:68rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.6rem;line-height:1.25;margin:.2rem 0 .4rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.2rem 0 .6rem;line-height:1.3}
.lead{color:var(--quiet);margin:.2rem 0 1.2rem;overflow-wrap:anywhere}
.banner{border-left:6px solid var(--line);background:var(--soft);border-radius:.4rem;padding:.7rem 1rem;font-size:1.15rem;
font-weight:600;max-width:none}.banner.good{border-color:var(--good)}.banner.bad{border-color:var(--bad);background:var(--warn)}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.5rem,1fr));gap:.6rem;margin:1rem 0}
.facts>div{background:var(--soft);border-radius:.5rem;padding:.6rem .8rem}
dt{color:var(--quiet);font-size:.82rem}dd{margin:0;font-size:1.25rem;font-weight:600;font-variant-numeric:tabular-nums}
dd.change{font-size:.82rem;font-weight:400;color:var(--quiet)}.better,dd.better{color:var(--good)}.worse,dd.worse{color:var(--bad)}
.claim{border-left:4px solid var(--line);padding-left:.9rem;margin:1rem 0}.claim h3{font-size:1rem;margin:0}
.claim p{margin:.2rem 0}
.scroll{overflow-x:auto;margin:.6rem 0;background:linear-gradient(to right,var(--paper) 1.5rem,transparent),
linear-gradient(to left,var(--paper) 1.5rem,transparent) 100% 0,linear-gradient(to right,var(--line),transparent .7rem),
linear-gradient(to left,var(--line),transparent .7rem) 100% 0;background-repeat:no-repeat;background-size:3rem 100%,3rem 100%,
.7rem 100%,.7rem 100%;background-attachment:local,local,scroll,scroll}
table{border-collapse:collapse;font-size:.9rem;min-width:50%}
th,td{text-align:left;padding:.32rem .7rem .32rem 0;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--quiet);font-weight:500;vertical-align:bottom}.n{text-align:right;font-variant-numeric:tabular-nums}td.n{white-space:nowrap}
td:first-child:not(.n){min-width:6rem}
p,li{overflow-wrap:anywhere;max-width:46rem}ul{padding-left:1.2rem}li{margin:.3rem 0}
.note{color:var(--quiet);font-size:.85rem}
ul.warning,p.warning{background:var(--warn);border-left:4px solid var(--c4);padding:.6rem .8rem .6rem 1.6rem;
border-radius:.3rem}
pre{background:var(--soft);padding:.8rem;border-radius:.4rem;white-space:pre-wrap;overflow-wrap:anywhere;font-size:.85rem}
figure{margin:1rem 0}figure svg{display:block;width:100%;height:auto}figure svg text{fill:var(--ink);font-family:system-ui,sans-serif!important}
figcaption{color:var(--quiet);font-size:.85rem;margin-top:.3rem}
img.sheet{max-width:100%;width:36rem;height:auto;image-rendering:pixelated;border-radius:.3rem}
.key{display:flex;flex-wrap:wrap;gap:.2rem 1rem;font-size:.85rem;margin:.4rem 0}
.key i{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.4em}
.bars{display:grid;gap:.25rem;font-size:.82rem}
.line{display:grid;grid-template-columns:minmax(6rem,14rem) 1fr;gap:.6rem;align-items:center}
.line>span{overflow-wrap:anywhere;color:var(--quiet);line-height:1.2}
.bar{display:flex;align-items:center;gap:.4rem;height:1.05em;padding-right:7.5em}
.bar i{display:block;height:.72em;min-width:1px;border-radius:0 2px 2px 0;flex:none}
.bar b{font-weight:400;white-space:nowrap;font-variant-numeric:tabular-nums}
.c0{background:var(--c0)}.c1{background:var(--c1)}.c2{background:var(--c2)}.c3{background:var(--c3)}
.c4{background:var(--c4)}.c5{background:var(--c5)}.c6{background:var(--c6)}
details{border-top:1px solid var(--line);margin-top:1.6rem}summary{cursor:pointer}
summary h2{display:inline-block;margin:.8rem 0 .4rem}
@media (max-width:34rem){main{padding:1rem .8rem 3rem}td:not(.n){min-width:9rem}.line{grid-template-columns:6.2rem minmax(0,1fr)}.bar{padding-right:7.5em}
.facts{grid-template-columns:1fr 1fr}}
@media print{details>*{display:block}.scroll{overflow:visible}}
""".replace("\n", "")
