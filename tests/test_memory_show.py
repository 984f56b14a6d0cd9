"""Reports made by hand: the summary, the picture, the page, the JSON form."""

import dataclasses
import json
import math
import random
import time
from html.parser import HTMLParser

import pytest
from rich.console import Console

from memopt import InputError
from memopt.memory import show
from memopt.memory.html import render
from memopt.memory.report import CATEGORIES, MemoryReport, ModuleNode, Skip, TensorInfo, Timeline
from memopt.units import format_bytes

MIB = 1 << 20
EVIL = 'output_blocks.7.0.<script>alert("1")</script>&$x^2$[red]'


def node(path, type_, own, parameters, children=()):
    kept = own + sum(child.kept for child in children)
    return ModuleNode(path, type_, kept, own, parameters + sum(c.parameters for c in children), tuple(children))


def modules(scale):
    """A UNet's tree that holds ``scale`` MiB per convolution, halved by each level."""

    def level(path, size):
        convs = [
            node(f"{path}.0.in_layers.{i}", t, s, 3 * MIB) for i, t, s in [(0, "GroupNorm", size), (2, "Conv2d", size)]
        ]
        block = node(f"{path}.0", "ResBlock", size // 2, 0, [node(f"{path}.0.in_layers", "Sequential", 0, 0, convs)])
        return node(path, "TimestepEmbedSequential", 0, 0, [block])

    downs = [level(f"input_blocks.{i}", scale * MIB >> i // 3) for i in range(12)]
    ups = [level(f"output_blocks.{i}", scale * MIB >> (11 - i) // 3) for i in range(12)]
    ups[7] = node("output_blocks.7", "TimestepEmbedSequential", 0, 0, [node(EVIL, "Evil<b>", scale * MIB, MIB)])
    return node(
        "",
        "HAEUNetModelV2",
        scale * MIB // 4,
        0,
        [
            node("input_blocks", "ModuleList", 0, 0, downs),
            node("middle_block", "Sequential", 0, 0, [level("middle_block.0", scale * MIB >> 4)]),
            node("output_blocks", "ModuleList", 0, 0, ups),
        ],
    )


def report(n=1500, train=True, scale=90, **changes) -> MemoryReport:
    """A plausible training step (or inference) with n changes, each an allocation or a release."""
    rng = random.Random(n)
    tree = modules(scale if train else 0)
    start = dict.fromkeys(CATEGORIES, 0) | {
        "parameters": 600 * MIB * scale // 90,
        "buffers": 2 * MIB,
        "optimizer_states": 1200 * MIB * scale // 90 if train else 0,
        "temporaries": 30 * MIB,
    }
    ends = (int(n * 0.36), int(n * 0.93), n) if train else (n, n, n)
    rows = {name: [] for name in CATEGORIES}
    for i in range(n):
        now = dict(start)
        at = i / max(1, ends[0]) if i < ends[0] else 1 - (i - ends[0]) / max(1, ends[1] - ends[0])
        at = max(0.0, at)
        if train:
            now["activations"] = int(tree.kept * (1.5 * at - 0.5 * at * at))
            if i >= ends[0]:
                now["gradients"] = int(start["parameters"] * (1 - at))
        wave = 0.5 + 0.5 * math.sin(at * 9) ** 2
        now["temporaries"] += int(rng.random() ** 3 * 4 * scale * MIB * wave)
        for name in CATEGORIES:
            rows[name].append(now[name])
    total = [sum(column) for column in zip(*rows.values(), strict=True)]
    peak = max(total, default=0)
    point = total.index(peak) if total else 0
    at_peak = {name: rows[name][point] for name in CATEGORIES if total}
    phases = (("forward", 0, ends[0]), ("backward", ends[0], ends[1]), ("optimizer", ends[1], n))
    tensor = TensorInfo(
        180 * MIB, (8, 192, 128, 240), "float32", "activations", "aten.native_group_norm", EVIL, "forward"
    )
    weights = TensorInfo(36 * MIB, (1024, 9216), "bfloat16", "optimizer_states", "", "middle_block.0.attn.qkv", "start")
    return dataclasses.replace(
        MemoryReport(
            model="HAEUNetModelV2",
            train=train,
            device="cuda",
            real=False,
            inputs="x float32 [8, 4, 240, 240], t int64 [8], y int64 [8]",
            passes=("amp", "checkpoint"),
            rounding=512,
            peak=peak,
            peak_point=point,
            peak_phase=next(name for name, first, end in phases if first <= point < end or not n),
            peak_op="aten.convolution_backward" if train else "aten.convolution",
            peak_module="output_blocks.8.0.in_layers.2",
            peak_by_category=at_peak,
            start_by_category=start,
            kept=tree.kept,
            off_device={"cpu": 700 * MIB, "disk": 0},
            largest=(*(dataclasses.replace(tensor, bytes=(180 - 9 * i) * MIB) for i in range(9)), weights),
            modules=tree,
            skips=tuple(
                Skip(
                    (90 - 9 * i) * MIB,
                    (8, 192 << i // 3, 240 >> i // 3, 240 >> i // 3),
                    "float32",
                    "aten.convolution",
                    f"input_blocks.{i}.0.out_layers.3",
                    f"output_blocks.{11 - i}.0.in_layers.0",
                    120 - 10 * i,
                    40 * i,
                    40 * i + 2,
                    n - 40 * i,
                    train,
                )
                for i in range(9)
            ),
            timeline=Timeline(
                ops=tuple(range(n)),
                bytes={name: tuple(rows[name]) for name in CATEGORIES},
                total=tuple(total),
                phases=phases if train else phases[:1],
            ),
            assumptions=("cuBLAS has a workspace of 8 MiB", "autograd sums gradients in place"),
            seconds=2.3,
        ),
        **changes,
    )


def lines_of(text, start, end):
    """The lines between two that begin so."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(start))
    last = next((i for i in range(first, len(lines)) if lines[i].startswith(end)), len(lines))
    return lines[first + 1 : last]


class TestSummary:
    def test_figures(self):
        r = report()
        text = show.summary(r)
        head = " ".join(text.split("\n\n")[0].split())
        assert head == (
            "HAEUNetModelV2: training step on cuda, computed on fake tensors; inputs: x float32 [8, 4, 240, 240], "
            "t int64 [8], y int64 [8]; passes: amp, checkpoint"
        )
        assert (
            f"Peak {format_bytes(r.peak)} in backward, at aten.convolution_backward in output_blocks.8.0.in_layers.2"
            in text
        )
        for name, size in r.peak_by_category.items():
            line = next(line for line in text.splitlines() if line.startswith(name.replace("_", " ")))
            assert format_bytes(size) in line
            assert f"{100 * size / r.peak:.1f}%" in line
        assert "Off the device, at most: 700.00 MiB on cpu\n" in text
        assert f"Kept for backward: {format_bytes(r.kept)}" in text
        assert "cuBLAS has a workspace of 8 MiB" in text

    def test_order_of_sections(self):
        text = show.summary(report())
        marks = ["Peak", "at the peak  ", "Off the device", "Kept", "Largest", "Skip", "Assumptions"]
        places = [text.index(mark) for mark in marks]
        assert places == sorted(places)

    @pytest.mark.parametrize("width", [80, 100, 120])
    def test_width(self, width):
        text = show.summary(report(), width)
        assert max(map(len, text.splitlines())) <= width
        assert "\x1b" not in text
        for i in range(8):  # even in 80 columns a path keeps its number
            assert f".{11 - i}.0.in_layers.0" in text

    def test_bars_are_proportional(self):
        r = report()
        bars = {
            name: line.count("█")
            for line in show.summary(r).splitlines()
            for name in r.peak_by_category
            if line.startswith(name.replace("_", " "))
        }
        assert bars["activations"] == pytest.approx(2 * bars["optimizer_states"], abs=1)
        assert bars["buffers"] == 0

    def test_tree(self):
        r = report()
        lines = lines_of(show.summary(r), "Kept for backward", "Largest")
        rows = [line for line in lines[1:] if line]
        assert len(rows) == 12
        assert rows[0].endswith("HAEUNetModelV2")
        # Parents before children, in the order of definition, chains of one child in one line.
        names = [" ".join(row.split()[-2:]) for row in rows[1:]]
        assert names[:3] == ["input_blocks (ModuleList)", "0.0 (ResBlock)", "in_layers (Sequential)"]
        assert "output_blocks (ModuleList)" in names

    def test_tree_shows_what_a_module_made_itself_and_no_trifles(self):
        parts = [node("small", "Linear", 1 * MIB, 0), node("big", "Linear", 60 * MIB, 0)]
        text = show.summary(report(modules=node("", "M", 39 * MIB, 0, parts), kept=100 * MIB))
        rows = [line.split() for line in lines_of(text, "Kept for backward", "Largest")[2:] if line]
        assert [row[0] for row in rows] == ["39.00", "60.00"]
        assert rows[0][-3:] == ["(outside", "its", "children)"]

    def test_inference_leaves_out_what_is_zero(self):
        text = show.summary(report(train=False, off_device={"cpu": 0}, skips=(), assumptions=(), passes=()))
        for word in ("Kept", "Off the device", "Skip", "Assumptions", "gradients", "optimizer states"):
            assert word not in text
        assert "inference on cuda" in text
        assert "passes: none" in text

    def test_nothing_at_all(self):
        r = report(0, train=False, scale=0, peak_phase="start", peak_by_category={}, largest=(), skips=())
        assert "Peak 0 B before the step" in show.summary(r)
        assert "<svg" in render(r)
        assert show._figure(r)

    def test_str_and_print(self, capsys):
        r = report()
        assert str(r) == show.summary(r)
        console = Console(width=90, force_terminal=True, color_system="truecolor", record=True)
        show.print_summary(r, console)
        assert "\x1b[38;2;230;159;0m" in capsys.readouterr().out  # the colour of activations
        assert max(map(len, console.export_text().splitlines())) <= 90


def test_shorten():
    assert show.shorten("abc", 3) == "abc"
    for width in range(1, 20):
        short = show.shorten("output_blocks.11.0.in_layers.0", width)
        assert len(short) == width
        assert "…" in short


class TestColumns:
    """Bringing a timeline down to the columns of a picture."""

    def test_keeps_the_peak_and_adds_up(self):
        r = report(10_007)
        shown = show.columns(r, 100)
        totals = [sum(column) for column in zip(*shown.bytes.values(), strict=True)]
        assert len(totals) == 100
        assert max(totals) == totals[shown.peak] == r.peak
        assert shown.edges[shown.peak] <= r.timeline.ops[r.peak_point] < shown.edges[shown.peak + 1]
        for i, total in enumerate(totals):
            first, end = (math.ceil(edge) for edge in shown.edges[i : i + 2])
            assert total == max(r.timeline.total[first:end])

    def test_one_column_per_operation_with_several_changes_or_none(self):
        zeros = dict.fromkeys(CATEGORIES, (0, 0, 0))
        line = Timeline(
            ops=(1, 1, 4),
            bytes={**zeros, "temporaries": (9, 5, 7)},
            total=(9, 5, 7),
            phases=(("forward", 0, 6),),
        )
        start = dict.fromkeys(CATEGORIES, 0) | {"temporaries": 3}
        shown = show.columns(report(5, timeline=line, start_by_category=start, peak=9, peak_point=0), 800)
        assert shown.bytes == {"temporaries": [3, 9, 5, 5, 7, 7]}
        assert shown.edges == (0, 1, 2, 3, 4, 5, 6)
        assert shown.peak == 1


class TestPlot:
    def test_png(self, tmp_path):
        file = tmp_path / "timeline.png"
        report().plot(file)
        data = file.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert 10_000 < len(data) < 300_000
        assert list(tmp_path.iterdir()) == [file]

    @pytest.mark.parametrize(("scale", "unit"), [(90, "GiB"), (1, "MiB")])
    def test_what_it_says(self, scale, unit):
        r = report(scale=scale)
        figure = show._figure(r)
        axes = figure.axes[0]
        assert axes.get_xlabel() == "operation"
        assert axes.get_ylabel() == f"live bytes ({unit})"
        assert "HAEUNetModelV2: training step on cuda" in axes.get_title()
        assert "x float32 [8, 4, 240, 240]" in axes.get_title()
        texts = [text.get_text() for text in axes.texts]
        assert texts[:3] == ["forward", "backward", "optimizer"]
        assert texts[3].startswith(f"peak {format_bytes(r.peak)}\nin backward, at aten.convolution_backward in ")
        legend = [text.get_text() for text in figure.legends[0].get_texts()]
        assert legend == [f"{format_bytes(r.peak_by_category[n])}  {n.replace('_', ' ')}" for n in CATEGORIES[::-1]]

    @pytest.mark.parametrize("point", [0, 3, 40, 60, 96, 99])
    def test_no_text_overlaps(self, point):
        r = report(100)
        total = [size // 2 for size in r.timeline.total]
        total[point] = r.peak
        line = dataclasses.replace(
            r.timeline,
            total=tuple(total),
            bytes={**dict.fromkeys(CATEGORIES, (0,) * 100), "activations": tuple(total)},
            phases=(("forward", 0, 2), ("backward", 2, 98), ("optimizer", 98, 100)),
        )
        figure = show._figure(dataclasses.replace(r, timeline=line, peak_point=point, peak_module=EVIL))
        figure.draw_without_rendering()
        axes = figure.axes[0]
        frame = axes.get_window_extent()
        boxes = [text.get_window_extent() for text in axes.texts]
        for i, box in enumerate(boxes):
            assert frame.x0 <= box.x0 < box.x1 <= frame.x1
            assert frame.y0 <= box.y0 < box.y1 <= frame.y1
            assert not any(box.overlaps(other) for other in boxes[:i])

    def test_names_that_look_like_mathematics(self, tmp_path):
        report(50, model="A$_{", inputs="x $\\frac$", peak_module=EVIL).plot(tmp_path / "x.png")

    def test_many_points_are_fast(self, tmp_path):
        r = report(100_000)
        begin = time.perf_counter()
        r.plot(tmp_path / "x.png")
        assert time.perf_counter() - begin < 5
        r.save_html(tmp_path / "x.html")
        assert (tmp_path / "x.html").stat().st_size < 1_000_000

    def test_inference(self, tmp_path):
        r = report(train=False)
        r.plot(tmp_path / "x.png")
        labels = " ".join(text.get_text() for text in show._figure(r).legends[0].get_texts())
        assert "parameters" in labels
        assert "activations" not in labels

    def test_no_such_folder(self, tmp_path):
        with pytest.raises(InputError, match=r"cannot write .*none/x.png: No such file"):
            report(20).plot(tmp_path / "none" / "x.png")


VOID = {"meta", "input", "br", "hr", "img", "link"}


class Page(HTMLParser):
    """Checks that tags are balanced and collects what a test looks at."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.tags, self.attributes = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" not in self.open and "style" not in self.open:
            self.text.append(data)

    def words(self):
        return " ".join(" ".join(self.text).split())


class TestHtml:
    def test_balanced_and_alone(self, tmp_path):
        r = report(model="Evil</script><b>", inputs='"<i>&', assumptions=("a < b & c",))
        r.save_html(tmp_path / "x.html")
        text = (tmp_path / "x.html").read_text(encoding="utf-8")
        page = Page(text)
        assert text.startswith("<!DOCTYPE html>")
        assert "http://" not in text
        assert "https://" not in text
        assert "url(" not in text
        assert not any(name in ("src", "href") for _, name, _ in page.attributes)
        assert page.tags.count("script") == 2  # the data and the code: none of those in names
        assert "b" in page.tags
        assert "Evil</script><b>: memory in a training step" in page.words()
        assert "a < b & c" in page.words()

    def test_every_module_is_there(self):
        r = report()
        page = Page(render(r))
        titles = [value for tag, name, value in page.attributes if (tag, name) == ("code", "title")]
        assert titles == [module.path for _, module in r.modules.walk()]
        assert EVIL in titles
        assert page.tags.count("details") == sum(bool(module.children) for _, module in r.modules.walk())

    def test_figures(self):
        r = report()
        words = Page(render(r)).words()
        for size in [r.peak, r.kept, *r.peak_by_category.values(), *(t.bytes for t in (*r.largest, *r.skips))]:
            assert format_bytes(size) in words
        for skip in r.skips:
            assert skip.module in words
            assert skip.used_by in words
        assert f"peak {format_bytes(r.peak)} in backward, at aten.convolution_backward" in words
        assert "live bytes (GiB)" in words

    def test_timeline_data(self):
        r = report(5000)
        text = render(r)
        packed = text.partition('id="data">')[2].partition("</script>")[0]
        data = json.loads(packed)
        totals = [sum(column) for column in zip(*data["bytes"].values(), strict=True)]
        assert len(totals) == len(data["edges"]) - 1 == 800
        assert max(totals) == r.peak
        assert data["phases"] == [list(phase) for phase in r.timeline.phases]

    def test_inference(self):
        words = Page(render(report(train=False, off_device={}))).words()
        assert "memory in inference" in words
        assert "Nothing is kept for backward" in words
        assert "off the device" not in words

    def test_empty_sections_are_left_out(self):
        words = Page(render(report(skips=(), largest=(), assumptions=()))).words()
        for heading in ("Skip connections", "Largest tensors", "Assumptions"):
            assert heading not in words


class TestJson:
    @pytest.mark.parametrize("train", [True, False])
    def test_round_trip(self, tmp_path, train):
        r = report(300, train=train)
        r.save_json(tmp_path / "r.json")
        assert MemoryReport.load(tmp_path / "r.json") == r
        assert json.loads((tmp_path / "r.json").read_text())["schema"] == 1

    def test_unwritable(self, tmp_path):
        for save in (report(20).save_json, report(20).save_html):
            with pytest.raises(InputError, match=r"cannot write .*none/x: No such file"):
                save(tmp_path / "none" / "x")

    @pytest.mark.parametrize("text", [None, "", "{", "[]", "3", "{}", '"schema"'])
    def test_not_a_report(self, tmp_path, text):
        if text is not None:
            (tmp_path / "r.json").write_text(text)
        with pytest.raises(InputError, match=r"r\.json is not a memory report"):
            MemoryReport.load(tmp_path / "r.json")

    def test_other_schema(self, tmp_path):
        (tmp_path / "r.json").write_text('{"schema": 99}')
        with pytest.raises(InputError, match=r"r\.json has report schema 99; this memopt reads schema 1"):
            MemoryReport.load(tmp_path / "r.json")

    @pytest.mark.parametrize("key", [f.name for f in dataclasses.fields(MemoryReport)])
    def test_missing_key(self, tmp_path, key):
        data = report(20).to_dict()
        del data[key]
        (tmp_path / "r.json").write_text(json.dumps(data))
        with pytest.raises(InputError, match=r"r\.json is not a whole memory report: .*" + key):
            MemoryReport.load(tmp_path / "r.json")

    @pytest.mark.parametrize(
        ("key", "value"),
        [("phases", [["forward", 0]]), ("phases", 3), ("ops", None), ("bytes", [1])],
    )
    def test_damaged_timeline(self, tmp_path, key, value):
        data = report(20).to_dict()
        data["timeline"][key] = value
        (tmp_path / "r.json").write_text(json.dumps(data))
        with pytest.raises(InputError, match="is not a whole memory report"):
            MemoryReport.load(tmp_path / "r.json")
