"""A memory report as one HTML page that needs nothing else: no libraries, no fonts, no network.

The page reads without JavaScript, which only shows the figures under the pointer on the timeline. Every text that comes
from a model goes through ``_text``.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence

from memopt.memory.report import CATEGORIES, MemoryReport, ModuleNode
from memopt.memory.show import COLOURS, LABELS, Columns, columns, kind, origin, shape, share, spread, unit, where
from memopt.units import format_bytes

MEANING = {
    "parameters": "the weights of the model",
    "buffers": "what the model keeps besides, such as the running means of a batch norm",
    "optimizer_states": "what the optimizer keeps between steps",
    "gradients": "one value for each weight, from backward until the optimizer has used it",
    "activations": "results of forward that backward needs",
    "temporaries": "inputs, outputs, and values only in use for a moment",
}
# The timeline in SVG units: the plot with room for the axes and, above the data, for the names and the peak's label.
WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, ABOVE = 1000, 400, 62, 12, 44, 74
N = ' class="n"'
"""What marks a cell as a number."""

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c2126; --soft: #5c6670; --line: #d9dee3; --panel: #f4f6f8;
  --shade: #00000009; --shade2: #00000016; }
@media (prefers-color-scheme: dark) { :root { --page: #14181c; --ink: #e4e8ec; --soft: #98a3ae; --line: #343c44;
  --panel: #1d2329; --shade: #ffffff0a; --shade2: #ffffff17; } }
body { margin: 0 auto; max-width: 1080px; padding: 24px 20px 60px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 24px; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 18px; margin: 40px 0 0; }
.what { color: var(--soft); margin: 2px 0 14px; } .soft { color: var(--soft); }
.facts { display: flex; flex-wrap: wrap; gap: 12px; margin: 18px 0 0; }
.facts div { background: var(--panel); border-radius: 8px; padding: 10px 16px; flex: 1 1 150px; min-width: 0; }
.facts b { display: block; font-size: 22px; white-space: nowrap; } .facts span { overflow-wrap: anywhere; }
.stack { display: flex; height: 30px; border-radius: 6px; overflow: hidden; margin-bottom: 10px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 13px; }
td, th { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
code { font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
td:first-child, .op { white-space: nowrap; } .says { min-width: 170px; }
i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 8px; }
.chart { position: relative; } svg { display: block; width: 100%; height: auto; font: 13px system-ui, sans-serif; }
svg text { fill: var(--soft); } svg .strong { fill: var(--ink); font-weight: 600; } svg .ink { stroke: var(--ink); }
svg .line { stroke: var(--line); }
#tip { position: absolute; top: 84px; pointer-events: none; background: var(--page); border: 1px solid var(--line);
  border-radius: 6px; padding: 6px 10px; font-size: 13px; white-space: pre; box-shadow: 0 2px 8px #0003; }
.tree details > :not(summary) { margin-left: 18px; }
.tree summary, .leaf { display: grid; grid-template-columns: 14px minmax(0, 1fr) 140px 90px 90px; gap: 0 12px;
  padding: 3px 0; border-bottom: 1px solid var(--line); align-items: center; }
.tree summary { list-style: none; cursor: pointer; } .tree summary::-webkit-details-marker { display: none; }
.tree summary::before { content: "▸"; color: var(--soft); } .tree details[open] > summary::before { content: "▾"; }
.leaf::before { content: ""; } .tree summary:hover { background: var(--panel); }
.bar { height: 10px; } .bar div { height: 100%; min-width: 1px; border-radius: 2px; }
@media (max-width: 600px) { .tree summary, .leaf { grid-template-columns: 14px minmax(0, 1fr) 80px 80px; }
  .bar { display: none; } .tree details > :not(summary) { margin-left: 8px; } }
"""

SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent);
const svg = document.querySelector(".chart svg"), tip = document.getElementById("tip");
const cursor = document.getElementById("cursor");
const size = b => { let u = ["B", "KiB", "MiB", "GiB", "TiB"], i = 0; while (b >= 1024 && i < 4) { b /= 1024; i++; }
  return (i ? b.toFixed(2) : b) + " " + u[i]; };
svg.addEventListener("pointerleave", () => { tip.hidden = true; cursor.setAttribute("visibility", "hidden"); });
svg.addEventListener("pointermove", event => {
  const box = svg.getBoundingClientRect(), scale = box.width / data.width, count = data.edges.length - 1;
  const part = ((event.clientX - box.left) / scale - data.left) / (data.width - data.left - data.right);
  const i = Math.max(0, Math.min(count - 1, Math.floor(part * count)));
  const first = Math.ceil(data.edges[i]), last = Math.ceil(data.edges[i + 1]) - 1;
  const phase = (data.phases.find(p => first >= p[1] && first < p[2]) || [""])[0];
  const rows = Object.entries(data.bytes).map(([name, values]) => [name, values[i]]);
  const total = rows.reduce((sum, row) => sum + row[1], 0);
  tip.textContent = (last > first ? `operations ${first} to ${last}` : `operation ${first}`) + `, ${phase}\\n` +
    `${size(total)} in all` + rows.filter(row => row[1]).reverse().map(row => `\\n${size(row[1])} ${row[0]}`).join("");
  tip.hidden = false;
  const x = data.left + (i + 0.5) / count * (data.width - data.left - data.right);
  cursor.setAttribute("x1", x); cursor.setAttribute("x2", x); cursor.setAttribute("visibility", "visible");
  const right = x * scale + 14 + tip.offsetWidth > box.width;
  tip.style.left = x * scale + (right ? -14 - tip.offsetWidth : 14) + "px";
});
"""


def render(report: MemoryReport) -> str:
    """The whole page."""
    title = f"{_text(report.model)}: memory in {'a training step' if report.train else 'inference'}"
    body = [
        f"<h1>{title}</h1>",
        f'<p class="what">{_text(kind(report))}, {_text(origin(report))} · inputs: {_text(report.inputs)} · '
        f"passes: {_text(', '.join(report.passes) or 'none')}</p>",
        _facts(report),
        _peak(report),
        _timeline(report),
        _modules(report),
        _tensors(report),
        _skips(report),
        _assumptions(report),
        f'<p class="what">Profiled in {report.seconds:.1f} s. 1 GiB is 1024 MiB, 1 MiB is 1024 × 1024 bytes.</p>',
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + f"\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _text(value: str) -> str:
    return html.escape(value)


def _section(heading: str, what: str, content: str) -> str:
    return f'<section>\n<h2>{heading}</h2>\n<p class="what">{what}</p>\n{content}\n</section>'


def _table(names: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int]) -> str:
    """A table of HTML cells; ``numbers`` are the columns set to the right."""

    def row(tag: str, cells: Sequence[str]) -> str:
        mark = (N if i in numbers else "" for i in range(len(cells)))
        return "<tr>" + "".join(f"<{tag}{m}>{cell}</{tag}>" for m, cell in zip(mark, cells, strict=True)) + "</tr>"

    lines = [row("td", cells) for cells in rows]
    head = f"<thead>{row('th', names)}</thead>"
    return f'<div class="wide"><table>{head}<tbody>\n' + "\n".join(lines) + "\n</tbody></table></div>"


def _facts(report: MemoryReport) -> str:
    facts = [(format_bytes(report.peak), f"at the peak, {where(report)}")]
    facts.append((format_bytes(sum(report.start_by_category.values())), "before the step"))
    if report.train:
        facts.append((format_bytes(report.kept), "kept for backward at the end of forward"))
    facts += [
        (format_bytes(size), f"at most on {tier}, off the device") for tier, size in report.off_device.items() if size
    ]
    return '<div class="facts">' + "".join(f"<div><b>{f}</b><span>{_text(t)}</span></div>" for f, t in facts) + "</div>"


def _peak(report: MemoryReport) -> str:
    present = [(name, size) for name in CATEGORIES if (size := report.peak_by_category.get(name, 0))]
    stack = "".join(
        f'<div style="background:{COLOURS[name]};flex:{size} 0 0" title="{LABELS[name]}: {format_bytes(size)}"></div>'
        for name, size in present
    )
    rows = [
        (
            f'<i style="background:{COLOURS[name]}"></i>{LABELS[name]}',
            format_bytes(size),
            share(size, report.peak),
            format_bytes(report.start_by_category.get(name, 0)),
            f'<div class="says">{MEANING[name]}</div>',
        )
        for name, size in present
    ]
    table = _table(("category", "at the peak", "share", "before the step", "what it is"), rows, (1, 2, 3))
    what = "What the memory holds at the moment when the most is in use. The device must have room for the sum."
    return _section("At the peak", what, f'<div class="stack">{stack}</div>\n{table}')


def _timeline(report: MemoryReport) -> str:
    shown = columns(report, 800)
    data = {
        "left": LEFT,
        "right": RIGHT,
        "width": WIDTH,
        "edges": [round(edge, 3) for edge in shown.edges],
        "bytes": {LABELS[name]: values for name, values in shown.bytes.items()},
        "phases": report.timeline.phases,
    }
    # A phase's name is the only text in it; "<" could end the script element.
    packed = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    what = (
        "Memory in use from the first operation of the step to the last, by category. "
        "Point at it for the figures; the dot marks the peak."
    )
    chart = f'<div class="chart">{_svg(report, shown)}<div id="tip" hidden></div></div>'
    return _section("Over the step", what, f'{chart}\n<script type="application/json" id="data">{packed}</script>')


def _svg(report: MemoryReport, shown: Columns) -> str:
    size, name = unit(report.peak)
    first, end = shown.edges[0], shown.edges[-1]
    floor = HEIGHT - BOTTOM

    def x(op: float) -> float:
        return round(LEFT + (op - first) / (end - first) * (WIDTH - LEFT - RIGHT), 1)

    def y(amount: float) -> float:
        return round(floor - amount / max(1, report.peak) * (floor - ABOVE), 1)

    def text(at: float, height: float, words: str, anchor: str = "middle", extra: str = "") -> str:
        return f'<text x="{at}" y="{height}" text-anchor="{anchor}"{extra}>{_text(words)}</text>'

    label = f"Live bytes over the operations of the step; the peak is {format_bytes(report.peak)}"
    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">']
    phases = report.timeline.phases
    centres = spread(
        [x((start + stop) / 2) for _, start, stop in phases],
        [8 * len(p) + 16 for p, _, _ in phases],
        LEFT,
        WIDTH - RIGHT,
    )
    for i, ((phase, start, stop), centre) in enumerate(zip(phases, centres, strict=True)):
        shade = ("--shade", "--shade2")[i % 2]
        wide = round(x(stop) - x(start), 1)
        out.append(f'<rect x="{x(start)}" y="8" width="{wide}" height="{floor - 8}" fill="var({shade})"/>')
        out.append(text(centre, 24, phase))
    for tick in _ticks(report.peak / size):
        out.append(f'<line class="line" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick * size)}" y2="{y(tick * size)}"/>')
        out.append(text(LEFT - 8, y(tick * size) + 4, f"{tick:g}", "end"))
    below = [0] * (len(shown.edges) - 1)
    for category, values in shown.bytes.items():
        above = [b + v for b, v in zip(below, values, strict=True)]
        steps = [(e, v) for i, v in enumerate(above) for e in shown.edges[i : i + 2]]
        steps += [(e, v) for i, v in reversed(list(enumerate(below))) for e in (shown.edges[i + 1], shown.edges[i])]
        points = " ".join(f"{x(e):g},{y(v):g}" for e, v in steps)
        out.append(f'<polygon fill="{COLOURS[category]}" points="{points}"><title>{LABELS[category]}</title></polygon>')
        below = above
    for op in _ticks(end - first):
        out.append(text(x(first + op), floor + 17, f"{first + op:g}"))
    at = x((shown.edges[shown.peak] + shown.edges[shown.peak + 1]) / 2)
    third = int(3 * (at - LEFT) / (WIDTH - LEFT - RIGHT))
    anchor = ("start", "middle", "end")[third]
    out += [
        text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "operation"),
        text(
            16, (ABOVE + floor) / 2, f"live bytes ({name})", extra=f' transform="rotate(-90 16 {(ABOVE + floor) / 2})"'
        ),
        f'<line class="ink" x1="{at}" x2="{at}" y1="{ABOVE}" y2="{floor}" stroke-dasharray="4 3"/>',
        f'<circle cx="{at}" cy="{ABOVE}" r="4.5" fill="var(--ink)"/>',
        text(at, ABOVE - 28, f"peak {format_bytes(report.peak)}", anchor, ' class="strong"'),
        text(at, ABOVE - 11, where(report, 80), anchor),
        f'<line id="cursor" class="ink" y1="{ABOVE}" y2="{floor}" x1="0" x2="0" visibility="hidden"/>',
        "</svg>",
    ]
    return "\n".join(out)


def _ticks(most: float) -> list[float]:
    """Round numbers from 0 to at most ``most``, four to nine of them."""
    if most <= 0:
        return [0.0]
    power = 10.0 ** (len(f"{most:.12f}".split(".")[0]) - 1)
    while most / power < 1:
        power /= 10
    step = next(s for s in (5 * power, 2 * power, power, power / 2, power / 5) if most / s >= 4)
    return [step * i for i in range(int(most / step) + 1)]


def _modules(report: MemoryReport) -> str:
    tree = report.modules
    what = (
        "What each module made in forward that backward still needs, and the size of its weights, its parts included."
    )
    if not report.kept:
        what = "Nothing is kept for backward. The bars show the size of each module's weights, its parts included."
    whole = max(1, report.kept or tree.parameters)
    colour = COLOURS["activations" if report.kept else "parameters"]

    def row(name: str, amount: int, kept: int, weights: str) -> str:
        # Without min-width, so that nothing shows for nothing.
        size = f"width:{100 * amount / whole:.2f}%" if amount else "width:0;min-width:0"
        return (
            f'<span>{name}</span><div class="bar"><div style="{size};background:{colour}"></div></div>'
            f'<span class="n">{_size(kept)}</span><span class="n">{weights}</span>'
        )

    def show(node: ModuleNode) -> str:
        part = node.kept if report.kept else node.parameters
        name = f'<code title="{_text(node.path)}">{_text(node.path.rpartition(".")[2] or report.model)}</code>'
        if node.path:
            name += f' <span class="soft">{_text(node.type)}</span>'
        line = row(name, part, node.kept, _size(node.parameters))
        if not node.children:
            return f'<div class="leaf">{line}</div>'
        inner = [show(child) for child in node.children]
        if node.own:
            own = row('<span class="soft">outside its parts</span>', node.own, node.own, "")
            inner.insert(0, f'<div class="leaf">{own}</div>')
        opened = " open" if node is tree or part >= whole / 4 else ""
        return "\n".join([f"<details{opened}><summary>{line}</summary>", *inner, "</details>"])

    head = f"<span>module</span><span></span><span{N}>kept</span><span{N}>weights</span>"
    return _section("By module", what, f'<div class="tree"><div class="leaf soft">{head}</div>\n{show(tree)}\n</div>')


def _size(size: int) -> str:
    return format_bytes(size) if size else '<span class="soft">–</span>'


def _code(text: str) -> str:
    return f"<code>{_text(text)}</code>"


def _tensors(report: MemoryReport) -> str:
    if not report.largest:
        return ""
    rows = [
        (
            format_bytes(t.bytes),
            f'<span class="n">{shape(t.shape)}</span>',
            _text(t.dtype),
            f'<span class="op"><i style="background:{COLOURS[t.category]}"></i>{LABELS[t.category]}</span>',
            _code(t.module or report.model),
            f'<span class="op">{_code(t.op)}</span>' if t.op else "there before the step",
        )
        for t in report.largest
    ]
    names = ("size", "shape", "dtype", "category", "module", "made by")
    what = "The largest single tensors in memory at the peak, with the module and the operation that made them."
    return _section("Largest tensors at the peak", what, _table(names, rows, (0,)))


def _skips(report: MemoryReport) -> str:
    if not report.skips:
        return ""
    rows = [
        (
            format_bytes(s.bytes),
            f'<span class="n">{shape(s.shape)}</span>',
            _text(s.dtype),
            str(s.waits),
            _code(s.module or report.model),
            _code(s.used_by or report.model),
            "yes" if s.kept else "no",
        )
        for s in report.skips
    ]
    names = ("size", "shape", "dtype", "between", "made in", "used by", "kept")
    what = (
        "Tensors that wait in memory while many other modules run, until one uses them again. <b>Between</b>: how many "
        "modules run meanwhile. <b>Kept</b>: whether backward needs the tensor too."
    )
    return _section("Skip connections", what, _table(names, rows, (0, 3)))


def _assumptions(report: MemoryReport) -> str:
    if not report.assumptions:
        return ""
    lines = "".join(f"<li>{_text(line)}</li>" for line in report.assumptions)
    return _section("Assumptions", "What these figures take for granted.", f"<ul>{lines}</ul>")
