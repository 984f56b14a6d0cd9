"""The files and the page that a translation's findings become, from findings made up here."""

import csv
import dataclasses
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from sklearn.metrics import average_precision_score, roc_auc_score

from examples.hae_v2 import figures
from examples.hae_v2.report import FIGURES, SIMULATED, choose, markdown_table, write_report
from examples.hae_v2.results import Curves, Findings, Interval, Method, Row, Slices
from memopt.errors import InputError

from .test_memory_show import Page

NAN = float("nan")
PATIENTS = ("<b>&", 'a|b, "c"\n', "x $\\frac$ = 1")
UNKNOWN = Interval(NAN, NAN, NAN)


def findings(per_patient=6, size=16, lesions=True, healthy=True, **changes) -> Findings:
    """Three patients with slices that alternate between a bright square and none."""
    rng = np.random.default_rng(0)
    count = 3 * per_patient
    patient = np.repeat(np.arange(3), per_patient)
    truth = np.zeros((count, size, size), bool)
    for i in range(count):
        if lesions and (not healthy or i % 2):
            y, x, side = rng.integers(2, size // 2, 3) // (1, 1, 2) + (0, 0, 1)
            truth[i, y : y + side, x : x + side] = True
    foreground = np.zeros_like(truth)
    foreground[:, 1:-1, 1:-1] = True
    images = rng.uniform(-1, 1, (count, 4, size, size)) / 3 + truth[:, None] / 2
    labels = truth.any(axis=(1, 2))

    def method(name, noise):
        maps = (truth + noise * rng.random(truth.shape)).astype(np.float32)
        scores = (labels + noise * rng.random(count)).astype(np.float32)
        called = scores > 1
        return Method(name, scores, maps, called, (maps > 1.2) & called[:, None, None])

    t = np.arange(0, 600, 30)
    seen = rng.random((3, count, len(t), 2)).astype(np.float32) * np.sin(t / 200)[:, None].astype(np.float32)
    rows = (
        Row("ours <i>", "all slices", {name: Interval(0.912 - i / 10, 0.88 - i / 10, 0.94 - i / 10) for i, name in
                                       enumerate(FIGURES)}),
        Row("ours <i>", "unhealthy slices", {"image AUROC": UNKNOWN, "Dice": Interval(0.5, NAN, NAN)}),
        Row("a | b", "all slices", {"new figure": Interval(1 / 3, 0.25, 2 / 3)}),
    )  # fmt: skip
    values = {
        "slices": Slices(
            "test", PATIENTS, patient, np.tile(np.arange(40, 40 + per_patient), 3), images.astype(np.float16), truth,
            foreground,
        ),
        "methods": (method("ours <i>", 1.5), method("b $x_$", 3)),
        "curves": Curves(t, ("flair", "t2"), *seen, seen[0].argmax(axis=1)),
        "rows": rows,
        "threshold": 1.0,
        "about": {"data": "simulated patients <3>", "ends": (1, 2), "versions": {"torch": "2 & more"}},
    }  # fmt: skip
    return Findings(**{**values, **changes})


def only(found: Findings, index: int) -> Findings:
    """One slice of them."""
    keep = [index]
    cut = {name: getattr(found.slices, name)[keep] for name in ("patient", "slices", "images", "truth", "foreground")}
    seen = {name: getattr(found.curves, name)[keep] for name in ("difference", "healthy", "null", "end")}
    methods = [
        dataclasses.replace(m, **{name: getattr(m, name)[keep] for name in ("scores", "maps", "unhealthy", "masks")})
        for m in found.methods
    ]
    return dataclasses.replace(
        found,
        slices=dataclasses.replace(found.slices, **cut),
        curves=dataclasses.replace(found.curves, **seen),
        methods=tuple(methods),
    )


def ours(found: Findings, **changes) -> Findings:
    """With another first method."""
    return dataclasses.replace(found, methods=(dataclasses.replace(found.ours, **changes), *found.methods[1:]))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The findings, and the folder with their report."""
    found, folder = findings(), tmp_path_factory.mktemp("report") / "deep" / "out"
    assert write_report(found, folder) == folder / "report.html"
    return found, folder


def table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def words(figure) -> str:
    """All that a figure says."""
    figure.draw_without_rendering()
    return "\n".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


class TestFiles:
    def test_which(self, made):
        found, folder = made
        panels = [f"slice-{number:02}.png" for number in range(1, len(choose(found)) + 1)]
        assert sorted(file.name for file in folder.iterdir()) == [
            "figures", "metrics.csv", "metrics.md", "report.html", "slices.csv"
        ]  # fmt: skip
        pictures = {file.name: file.read_bytes() for file in (folder / "figures").iterdir()}
        assert sorted(pictures) == ["curves.png", "roc_pr.png", "scores.png", *panels, "slice_curves.png"]
        assert all(data.startswith(b"\x89PNG") for data in pictures.values())

    def test_the_same_findings_give_the_same_files(self, made, tmp_path):
        _, folder = made
        (tmp_path / "figures").mkdir()
        (tmp_path / "figures" / "slice-99.png").write_bytes(b"of an earlier report")
        (tmp_path / "figures" / "mine.png").write_bytes(b"")
        write_report(findings(), tmp_path)
        (tmp_path / "figures" / "mine.png").unlink()
        names = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
        assert names == sorted(file.relative_to(tmp_path) for file in tmp_path.rglob("*") if file.is_file())
        for name in names:
            assert (folder / name).read_bytes() == (tmp_path / name).read_bytes(), name

    def test_metrics(self, made):
        found, folder = made
        read = iter(table(folder / "metrics.csv"))
        for row in found.rows:
            for name, figure in row.figures.items():
                line = next(read)
                assert (line["method"], line["subset"], line["figure"]) == (row.method, row.subset, name)
                for key, value in figure._asdict().items():
                    assert line[key] == "" if np.isnan(value) else float(line[key]) == value
        assert next(read, None) is None

    def test_slices(self, made):
        found, folder = made
        data, m, seen = found.slices, found.ours, found.curves
        read = table(folder / "slices.csv")
        assert [line["patient"] for line in read] == [PATIENTS[i] for i in data.patient]
        assert [int(line["slice"]) for line in read] == data.slices.tolist()
        assert [line["label"] == "unhealthy" for line in read] == data.labels.tolist()
        assert [line["verdict"] == "unhealthy" for line in read] == m.unhealthy.tolist()
        assert np.array_equal(np.array([line["score"] for line in read], np.float32), m.scores)
        peaks = seen.difference.max(axis=1).mean(axis=1)
        assert np.array_equal(np.array([line["max M"] for line in read], np.float32), peaks)
        for k, name in enumerate(seen.modalities):
            assert [int(line[f"end {name}"]) for line in read] == seen.timesteps[seen.end[:, k]].tolist()
        for line, truth, mask, brain in zip(read, data.truth, m.masks, data.foreground, strict=True):
            t, p = set(np.flatnonzero(truth & brain)), set(np.flatnonzero(mask & brain))
            assert (int(line["truth pixels"]), int(line["mask pixels"])) == (len(t), len(p))
            assert float(line["Dice"]) == (2 * len(t & p) / (len(t) + len(p)) if t | p else 1)
            assert float(line["IoU"]) == (len(t & p) / len(t | p) if t | p else 1)
        assert any(0 < float(line["Dice"]) < 1 for line in read)

    def test_what_is_not_known_is_empty(self, tmp_path):
        found = only(findings(), 0)
        write_report(ours(found, scores=np.full(1, NAN, np.float32)), tmp_path)
        line = table(tmp_path / "slices.csv")[0]
        assert line["score"] == ""
        assert line["max M"] != ""

    def test_markdown(self, made):
        found, folder = made
        text = (folder / "metrics.md").read_text()
        assert text == markdown_table(found.rows)
        head, rule, *lines = text.splitlines()
        assert head == f"| method | slices | {' | '.join(FIGURES)} | new figure |"
        assert set(rule) <= set("|-: ")
        assert lines == [
            "| ours &lt;i&gt; | all slices | 0.912 [0.880, 0.940] | 0.812 [0.780, 0.840] | 0.712 [0.680, 0.740] | "
            "0.612 [0.580, 0.640] | 0.512 [0.480, 0.540] | 0.412 [0.380, 0.440] | 0.312 [0.280, 0.340] | – |",
            "| ours &lt;i&gt; | unhealthy slices | – | – | – | 0.500 | – | – | – | – |",
            "| a \\| b | all slices | – | – | – | – | – | – | – | 0.333 [0.250, 0.667] |",
        ]

    def test_no_slices(self, tmp_path):
        found = findings(per_patient=0)
        with pytest.raises(InputError, match="the split test has no slices"):
            write_report(found, tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_a_file_in_the_way(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match=r"cannot write .*figures: Not a directory"):
            write_report(findings(), tmp_path / "file")


class TestChoice:
    def test_rules(self):
        found = findings()
        chosen = choose(found)
        dice = np.array([figures.overlap(found, i).dice for i in range(len(found.slices))])
        size = (found.slices.truth & found.slices.foreground).sum(axis=(1, 2))
        ill, well = np.flatnonzero(found.slices.labels), np.flatnonzero(~found.slices.labels)
        at = {reason: index for index, reasons in chosen.items() for reason in reasons}
        assert dice[at["Best Dice of all slices with a lesion"]] == dice[ill].max()
        assert dice[at["Worst Dice of all slices with a lesion"]] == dice[ill].min()
        assert dice[at["Median Dice of all slices with a lesion"]] == np.median(dice[ill])
        assert found.ours.scores[at["Highest score of all slices without lesion"]] == found.ours.scores[well].max()
        largest = {i for i, reasons in chosen.items() if "Largest lesion of its patient" in reasons}
        assert sorted(size[list(largest)]) == sorted(size[found.slices.patient == p].max() for p in range(3))

    def test_many_patients(self):
        found = findings(per_patient=20)
        owner = np.arange(60) // 2
        data = dataclasses.replace(found.slices, patient=owner, patients=tuple(f"p{i}" for i in range(30)))
        chosen = choose(dataclasses.replace(found, slices=data))
        largest = [owner[i] for i, reasons in chosen.items() if "Largest lesion of its patient" in reasons]
        assert len(largest) == 6
        assert {0, 29} <= set(largest)
        assert 8 <= len(chosen) <= 11

    @pytest.mark.parametrize("kind", ["lesions", "healthy"])
    def test_one_class(self, kind):
        chosen = choose(findings(**{kind: False}))
        without = {"without" in reason for reasons in chosen.values() for reason in reasons}
        assert without == {kind == "lesions"}


class TestFigures:
    def test_curves_of_all_methods(self):
        found = findings()
        data = found.slices
        said = words(figures.roc_pr(found))
        inside = data.foreground[data.labels]
        for m in found.methods:
            assert f"{m.name}: AUROC {roc_auc_score(data.labels, m.scores):.3f}" in said
            area = average_precision_score(data.truth[data.labels][inside], m.maps[data.labels][inside])
            assert f"{m.name}: AUPRC {area:.3f}" in said
        assert f"chance: AUPRC {data.truth[data.labels][inside].mean():.3f}" in said

    def test_long_curves_are_thinned(self):
        x = np.linspace(0, 1, 100_000) ** 4
        y = np.sqrt(x)
        thin_x, thin_y = figures._thin(x, y)
        assert len(thin_x) <= figures.POINTS
        assert (thin_x[0], thin_y[0], thin_x[-1], thin_y[-1]) == (0, 0, 1, 1)
        assert np.hypot(np.diff(thin_x), np.diff(thin_y)).max() < 0.002
        short = np.arange(5.0)
        assert figures._thin(short, short) == (short, short)

    @pytest.mark.parametrize(("kind", "which"), [("lesions", "no"), ("healthy", "every")])
    def test_one_class(self, kind, which):
        found = findings(**{kind: False})
        said = words(figures.roc_pr(found))
        assert f"no ROC: {which} slice\nhas a lesion" in said
        assert ("no curve: no lesion in any slice" in said) == (kind == "lesions")
        there = {"lesions": {"healthy (18 slices)"}, "healthy": {"unhealthy (18 slices)"}}[kind]
        for figure in (figures.scores(found), figures.all_curves(found)):
            assert {line for line in words(figure).splitlines() if line.endswith("slices)")} == there

    def test_panel(self):
        found = findings(size=32)
        index = int(np.flatnonzero(found.slices.labels & found.ours.unhealthy)[0])
        figure = figures.panel(found, index)
        known = figures.overlap(found, index)
        assert words(figure).count("FLAIR") == 1
        assert figure.get_suptitle() == (
            f"<b>&, slice {found.slices.slices[index]}: lesion of {known.truth} pixels\ncalled unhealthy (score "
            f"{found.ours.scores[index]:.3g}, threshold 1); Dice {known.dice:.2f}"
        )
        pictures = [image for axis in figure.axes for image in axis.get_images()]
        assert {image.get_interpolation() for image in pictures} == {"nearest"}
        assert np.array_equal(pictures[0].get_array(), found.slices.images[index, 0].astype(np.float32))
        truth, mask = found.slices.truth[index], found.ours.masks[index]
        together = [image.get_array()[..., 3] > 0 for image in figure.axes[7].get_images()[1:]]
        for drawn, pixels in zip(together, (truth & mask, truth & ~mask, mask & ~truth), strict=True):
            assert np.array_equal(drawn, pixels)
            assert pixels.any()
        assert "mean squared error" in words(figure)
        for axis in figure.axes:
            assert not len(axis.get_yticks()) or axis.get_xlabel() == "mean squared error"

    def test_outline_runs_along_the_edges_of_pixels(self):
        from matplotlib.figure import Figure

        pixels = np.zeros((4, 6), bool)
        pixels[0, 5] = pixels[2, 3] = True
        axis = Figure().subplots()
        figures._outline(axis, pixels, "red")
        drawn = {frozenset(map(tuple, line)) for line in axis.collections[0].get_segments()}
        assert drawn == {
            frozenset([(x + a, y + b), (x + c, y + d)])
            for x, y in ((5, 0), (3, 2))
            for a, b, c, d in np.array([[-1, -1, 1, -1], [-1, 1, 1, 1], [-1, -1, -1, 1], [1, -1, 1, 1]]) / 2
        }

    @pytest.mark.parametrize("value", [0.0, 0.7, NAN])
    def test_a_constant_map(self, value):
        found = findings()
        found = ours(found, maps=np.full_like(found.ours.maps, value), masks=np.zeros_like(found.ours.masks))
        assert "predicted mask: empty" in words(figures.panel(found, 1))
        assert ("ours <i>: maps are not finite" in words(figures.roc_pr(found))) == np.isnan(value)

    @pytest.mark.parametrize("threshold", [1.0, NAN, np.inf])
    @pytest.mark.parametrize("values", ["equal", "zero", "wide", "some NaN", "NaN"])
    def test_scores(self, values, threshold):
        found = findings(threshold=threshold)
        scores = np.ones_like(found.ours.scores)
        if values == "zero":
            scores[:] = 0
        elif values == "wide":
            scores = np.geomspace(1e-6, 1e-1, len(scores)).astype(np.float32)
        elif "NaN" in values:
            scores[: 3 if "some" in values else None] = NAN
        figure = figures.scores(ours(found, scores=scores))
        said = words(figure)
        assert ("no finite score" in said) == (values == "NaN")
        assert ("3 scores are not finite" in said) == (values == "some NaN")
        assert ("threshold 1" in said) == (threshold == 1 and values != "NaN")
        assert (figure.axes[0].get_xscale() == "log") == (values == "wide")
        if values in ("equal", "zero"):
            assert [bars.get_path().vertices[:, 1].max() for bars in figure.axes[0].patches] == [9, 9]

    def test_end_steps(self):
        found = findings()
        figure = figures.curves(found, 3)
        t = found.curves.timesteps[found.curves.end[3]]
        assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
            f"FLAIR: largest at t = {t[0]}", f"T2: largest at t = {t[1]}"
        ]  # fmt: skip
        markers = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
        peaks = found.curves.difference[3].max(axis=0)
        assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in markers] == list(zip(t, peaks, strict=True))

    def test_curves_that_are_not_finite(self):
        found = findings()
        seen = {name: np.full_like(getattr(found.curves, name), NAN) for name in ("difference", "healthy", "null")}
        found = dataclasses.replace(found, curves=dataclasses.replace(found.curves, **seen))
        assert "no finite values" in words(figures.all_curves(found))
        figures.curves(found, 0).draw_without_rendering()


class TestPage:
    def test_whole_and_alone(self, made):
        found, folder = made
        text = (folder / "report.html").read_text()
        page = Page(text)
        assert text.startswith("<!DOCTYPE html>")
        for outside in ("http:", "https:", "url(", "@import"):
            assert outside not in text
        assert "script" not in page.tags
        assert "link" not in page.tags
        assert page.tags.count("b") == 3 + len(choose(found))  # the facts and the captions: none of a patient's name
        assert "i" not in page.tags
        sources = [value for _, name, value in page.attributes if name in ("src", "href")]
        assert len(sources) == 4 + len(choose(found))
        assert all(source.startswith("data:image/png;base64,") for source in sources)
        alts = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
        assert len(alts) == len(set(alts)) == len(sources)

    def test_what_it_says(self, made):
        found, folder = made
        said = Page((folder / "report.html").read_text()).words()
        labels, called = found.slices.labels, found.ours.unhealthy
        assert SIMULATED in said
        assert f"{called[labels].sum()} of 9 slices with a lesion were called unhealthy" in said
        assert f"{called[~labels].sum()} of 9 slices without lesion were called unhealthy" in said
        for text in (*FIGURES, *FIGURES.values(), "ours <i>", "a | b", "0.912 [0.880, 0.940]", "0.333 [0.250, 0.667]"):
            assert text in said
        for index in choose(found):
            assert f"{' '.join(figures.where(found, index).split())}: {figures.verdict(found, index)}" in said
        assert said.index("simulated patients <3>") < said.index("ends 1, 2") < said.index("versions torch: 2 & more")

    @pytest.mark.parametrize("data", ["BraTS 2021 <validation>", None])
    def test_no_banner_for_patients(self, tmp_path, data):
        found = only(findings(about={"data": data} if data else {}), 1)
        said = Page(write_report(found, tmp_path).read_text()).words()
        assert SIMULATED not in said
        assert "1 slices, 1 with a lesion and 0 without" in said
        assert (data or "Settings") in said

    def test_one_healthy_slice_and_no_rows(self, tmp_path):
        found = dataclasses.replace(only(findings(), 0), rows=())
        said = Page(write_report(found, tmp_path).read_text()).words()
        assert "Median score of all slices without lesion; Highest score of all slices without lesion." in said
        assert (tmp_path / "metrics.csv").read_text() == "method,subset,figure,value,low,high\n"


CHROMIUM = shutil.which("chromium")
PROBE = """<script>addEventListener("load", () => {
  const found = document.createElement("pre");
  found.id = "probe";
  found.textContent = JSON.stringify({
    images: [...document.images].map(i => [i.complete, i.naturalWidth, i.naturalHeight]),
    cells: [...document.querySelectorAll("table.results tr")].map(r => [...r.cells].map(c => c.textContent)),
    fetched: performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:")),
    width: innerWidth, needed: document.documentElement.scrollWidth,
  });
  document.body.append(found);
});</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium to open the page with")
class TestBrowser:
    def browse(self, folder, page, *options):
        """What chromium prints; no name is ever resolved, and so nothing can be fetched."""
        command = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
            "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}", *options, page.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @pytest.mark.parametrize("width", [1200, 500])  # the narrowest window that chromium opens without a picture
    def test_it_shows_everything(self, made, tmp_path, width):
        found, folder = made
        probed = tmp_path / "probed.html"
        probed.write_text((folder / "report.html").read_text().replace("</body>", f"{PROBE}</body>"))
        dom = self.browse(tmp_path, probed, f"--window-size={width},1000", "--dump-dom")
        match = re.search(r'<pre id="probe">(.*?)</pre>', dom, re.DOTALL)
        assert match, dom[-2000:]
        seen = json.loads(html.unescape(match[1]))
        assert len(seen["images"]) == 4 + len(choose(found))
        assert all(done and w >= 700 and h >= 400 for done, w, h in seen["images"])
        assert seen["fetched"] == []
        assert seen["width"] == width
        assert seen["needed"] <= width  # only tables and pictures scroll sideways, within the page
        head, *lines = seen["cells"]
        assert head == ["method", "slices", *FIGURES, "new figure"]
        expected = [line.strip("| ").split(" | ") for line in markdown_table(found.rows).splitlines()[2:]]
        assert lines == [[html.unescape(cell).replace("\\|", "|") for cell in cells] for cells in expected]

    @pytest.mark.parametrize("width", [1200, 400])
    def test_screenshot(self, made, tmp_path, width):
        picture = tmp_path / "shot.png"
        self.browse(tmp_path, made[1] / "report.html", f"--window-size={width},4000", f"--screenshot={picture}")
        pixels = imread(picture)[..., :3]
        assert pixels.shape == (4000, width, 3)
        rows = (pixels < 0.9).any(axis=(1, 2))
        for part in np.split(rows, 8):  # text or pictures all the way down
            assert part.mean() > 0.2
        assert (pixels > 0.9).all(axis=2).mean() > 0.3
