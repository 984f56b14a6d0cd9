"""A translation's findings as files: tables, pictures, and one HTML page that shows them all and needs nothing else."""

from __future__ import annotations

import base64
import csv
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from memopt import files
from memopt.errors import InputError

from . import figures
from .results import Findings, Interval, Row

FIGURES = {
    "image AUROC": "Slices: how often one with a lesion scores higher than one without. 1 is perfect, 0.5 is chance.",
    "pixel AUPRC": "Pixels: precision of the anomaly map, averaged over all values of recall. 1 is perfect; chance is "
    "the share of lesion among the pixels.",
    "pixel AUROC": "Pixels: how often one of a lesion has a higher anomaly than a healthy one. 1 is perfect, 0.5 is "
    "chance. Kind to maps with many false alarms, as most pixels are healthy.",
    "Dice": "Masks: twice the pixels that mask and lesion share, divided by the pixels of both; the mean over slices. "
    "1 is the same, 0 is nothing in common. Where both are empty, as they should be without a lesion, it is 1.",
    "IoU": "Masks: the pixels that mask and lesion share, divided by those in either; the mean over slices. It orders "
    "masks as Dice does, more severely.",
    "precision": "Masks: the share of all their pixels that is lesion.",
    "recall": "Masks: the share of all lesion pixels that they have found.",
}
"""The columns of the table of results, and what they say."""
LARGEST = 6
"""How many patients at most are shown with their largest lesion."""
UNKNOWN = "–"
SIMULATED = "Simulated patients on real anatomy: no result here says anything about patients."

STYLE = """
:root { color-scheme: light; --ink: #1c2126; --soft: #5c6670; --line: #d9dee3; --panel: #f4f6f8; }
body { margin: 0 auto; max-width: 1100px; padding: 24px 20px 60px; background: #fff; color: var(--ink);
  font: 15px/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 24px; line-height: 1.25; margin: 0; } h2 { font-size: 19px; margin: 44px 0 4px; }
p { max-width: 78ch; } .what { color: var(--soft); margin: 4px 0 16px; }
.banner { background: #fff1cc; border-left: 6px solid #d98b00; padding: 12px 16px; font-weight: 600; max-width: none; }
.facts { display: flex; flex-wrap: wrap; gap: 12px; margin: 20px 0 0; }
.facts div { background: var(--panel); border-radius: 8px; padding: 10px 16px; flex: 1 1 180px; }
.facts b { display: block; font-size: 22px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: normal; }
thead th { color: var(--soft); font-size: 13px; } tbody th { font-weight: 600; min-width: 110px; }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.n span { display: block; font-size: 12px; color: var(--soft); }
.settings th { width: 30%; } .settings th, .settings td { overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: 110px minmax(0, 1fr); gap: 5px 14px; margin: 18px 0; font-size: 14px; }
dt { font-weight: 600; } dd { margin: 0; }
figure { margin: 20px 0 34px; } figcaption { font-size: 14px; max-width: 90ch; margin-top: 6px; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
@media (max-width: 600px) { body { padding: 16px 12px 40px; } dl { display: block; } dd { margin: 0 0 8px; }
  img { min-width: 620px; } }
@media print { body { max-width: none; padding: 0; font-size: 10.5pt; } .wide { overflow: visible; }
  table { font-size: 8pt; } thead th { font-size: 7pt; white-space: normal; } tbody th { min-width: 0; }
  .n span { font-size: 6.5pt; } th, td { padding-right: 5px; } img { min-width: 0; max-height: 20cm; }
  figure, tr, .facts, dl { break-inside: avoid; } h2, thead { break-after: avoid; }
  .banner, .facts div { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


def write_report(findings: Findings, folder: Path) -> Path:
    """Write `metrics.csv`, `metrics.md`, `slices.csv`, `figures/*.png` and `report.html`; returns that page's path.

    The same findings give the same files. Pictures of slices from an earlier report in this folder are replaced.

    Raises:
        InputError: there are no slices, or the folder cannot be written to.
    """
    if not len(findings.slices):
        raise InputError(f"the split {findings.slices.split} has no slices: there is nothing to report")
    pictures = folder / "figures"
    try:
        pictures.mkdir(parents=True, exist_ok=True)
        for old in [*pictures.glob("slice-[0-9][0-9].png")]:
            old.unlink()
    except OSError as error:
        raise InputError(f"cannot write {pictures}: {error.strerror}") from None
    files.write(folder / "metrics.csv", _metrics_csv(findings.rows))
    files.write(folder / "metrics.md", markdown_table(findings.rows))
    files.write(folder / "slices.csv", _slices_csv(findings))
    chosen = choose(findings)
    typical = next(iter(chosen))
    figures.save(figures.roc_pr(findings), pictures / "roc_pr.png")
    figures.save(figures.scores(findings), pictures / "scores.png")
    figures.save(figures.all_curves(findings), pictures / "curves.png")
    figures.save(figures.curves(findings, typical), pictures / "slice_curves.png")
    for number, index in enumerate(chosen, 1):
        figures.save(figures.panel(findings, index), pictures / f"slice-{number:02}.png")
    page = folder / "report.html"
    files.write(page, _page(findings, chosen, typical, pictures))
    return page


def choose(findings: Findings) -> dict[int, list[str]]:
    """The slices to show, each with the reasons for it.

    Those with a lesion: the median, best and worst Dice, the larger lesion first where it is the same, and the largest
    lesion of up to LARGEST patients, evenly spread over their list. Those without: the median and the highest score.
    """
    data, found = findings.slices, [figures.overlap(findings, i) for i in range(len(findings.slices))]
    dice, size = np.array([known.dice for known in found]), np.array([known.truth for known in found])
    chosen: dict[int, list[str]] = {}
    ill, well = np.flatnonzero(data.labels), np.flatnonzero(~data.labels)
    if len(ill):
        by_dice = ill[np.lexsort((-size[ill], dice[ill]))]
        best = ill[np.lexsort((-size[ill], -dice[ill]))[0]]
        for index, reason in ((by_dice[(len(ill) - 1) // 2], "Median"), (best, "Best"), (by_dice[0], "Worst")):
            chosen.setdefault(int(index), []).append(f"{reason} Dice of all slices with a lesion")
    patients = np.unique(data.patient[ill])
    for patient in patients[np.unique(np.linspace(0, len(patients) - 1, min(LARGEST, len(patients))).astype(int))]:
        of_patient = ill[data.patient[ill] == patient]
        chosen.setdefault(int(of_patient[size[of_patient].argmax()]), []).append("Largest lesion of its patient")
    if len(well):
        by_score = well[np.argsort(findings.ours.scores[well], kind="stable")]
        for index, reason in ((by_score[(len(well) - 1) // 2], "Median"), (by_score[-1], "Highest")):
            chosen.setdefault(int(index), []).append(f"{reason} score of all slices without lesion")
    return chosen


def markdown_table(rows: Sequence[Row]) -> str:
    """The rows' figures as a table, `0.912 [0.880, 0.940]` each."""
    lines = [["method", "slices", *_names(rows)], ["---", "---", *["---:"] * len(_names(rows))]]
    lines += [[row.method, row.subset, *(" ".join(_cell(row, name)) for name in _names(rows))] for row in rows]

    def plain(cell: str) -> str:
        return " ".join(html.escape(cell, quote=False).replace("|", "\\|").split())

    return "".join(f"| {' | '.join(map(plain, line))} |\n" for line in lines)


def _names(rows: Iterable[Row]) -> list[str]:
    """The columns: those that belong there, then whatever else rows have."""
    return list(dict.fromkeys([*FIGURES, *(name for row in rows for name in row.figures)]))


def _cell(row: Row, name: str) -> tuple[str, ...]:
    """The figure and its interval, as far as they are known."""
    value, low, high = row.figures.get(name, Interval(math.nan, math.nan, math.nan))
    if math.isnan(value):
        return (UNKNOWN,)
    return (f"{value:.3f}",) if math.isnan(low) or math.isnan(high) else (f"{value:.3f}", f"[{low:.3f}, {high:.3f}]")


def _csv(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """NaN is an empty cell."""
    out = StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([["" if cell != cell else str(cell) for cell in line] for line in lines])
    return out.getvalue()


def _metrics_csv(rows: Iterable[Row]) -> str:
    lines = [[row.method, row.subset, name, *figure] for row in rows for name, figure in row.figures.items()]
    return _csv(["method", "subset", "figure", "value", "low", "high"], lines)


def _slices_csv(findings: Findings) -> str:
    """Max M is the largest M_t, averaged over modalities; pixels are those of the brain; ends are timesteps."""
    data, ours, seen = findings.slices, findings.ours, findings.curves
    peaks = seen.difference.max(axis=1).mean(axis=1)
    words = ("healthy", "unhealthy")
    head = ["patient", "slice", "label", "verdict", "score", "max M", *(f"end {name}" for name in seen.modalities)]
    lines = []
    for i, label in enumerate(data.labels):
        name, verdict = data.patients[data.patient[i]], words[int(ours.unhealthy[i])]
        ends = seen.timesteps[seen.end[i]]
        known = figures.overlap(findings, i)
        lines.append([name, data.slices[i], words[int(label)], verdict, ours.scores[i], peaks[i], *ends, *known])
    return _csv([*head, "truth pixels", "mask pixels", "Dice", "IoU"], lines)


def _page(findings: Findings, chosen: Mapping[int, Sequence[str]], typical: int, pictures: Path) -> str:
    title = "Anomaly segmentation of brain MRI without pixel labels"
    body = [
        f"<h1>{title}</h1>",
        _what(findings),
        _results(findings, pictures),
        _curves(findings, typical, pictures),
        _slices(findings, chosen, pictures),
        _settings(findings),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _picture(file: Path, alt: str, caption: str) -> str:
    """A figure with its picture inside; the caption is HTML."""
    data = base64.b64encode(file.read_bytes()).decode()
    image = f'<img src="data:image/png;base64,{data}" alt="{_text(alt)}">'
    return f'<figure><div class="wide">{image}</div>\n<figcaption>{caption}</figcaption></figure>'


def _what(findings: Findings) -> str:
    data, called = findings.slices, findings.ours.unhealthy
    labels = data.labels
    ill, well = int(labels.sum()), int((~labels).sum())
    banner = f'<p class="banner" role="note">{SIMULATED}</p>\n' if _simulated(findings) else ""
    facts = [
        (f"{len(data)}", f"slices, {ill} with a lesion and {well} without"),
        (f"{int(called[labels].sum())} of {ill}", "slices with a lesion were called unhealthy"),
        (f"{int(called[~labels].sum())} of {well}", "slices without lesion were called unhealthy, too"),
    ]
    boxes = "".join(f"<div><b>{_text(figure)}</b>{_text(what)}</div>" for figure, what in facts)
    return (
        f'<p class="what">Split “{_text(data.split)}”: {len(data)} axial slices of {len(data.patients)} patients</p>\n'
        f"{banner}<p>A diffusion model has learned what slices with and without a lesion look like. In training it was "
        "told of each slice only whether there is a lesion, never where. Here each slice gets noisier step by "
        "step, and at every step the model predicts the clean image twice, once as that of a healthy brain and once "
        "with no such hint. How far the two part is the slice’s score, "
        "which says whether it is called unhealthy; where the healthy prediction departs from the slice is the anomaly "
        "map, the highest part of which is the mask of the lesion.</p>\n"
        f'<div class="facts">{boxes}</div>'
    )


def _simulated(findings: Findings) -> bool:
    return "simulated" in str(findings.about.get("data", "")).lower()


def _results(findings: Findings, pictures: Path) -> str:
    names = _names(findings.rows)
    heads = "".join(f'<th scope="col" class="n">{_text(name)}</th>' for name in names)
    lines = []
    for row in findings.rows:
        cells = []
        for name in names:
            value, *interval = _cell(row, name)
            cells.append(f'<td class="n">{value}' + "".join(f" <span>{ends}</span>" for ends in interval) + "</td>")
        lines.append(f'<tr><th scope="row">{_text(row.method)}</th><td>{_text(row.subset)}</td>{"".join(cells)}</tr>')
    meaning = "".join(f"<dt>{_text(name)}</dt><dd>{_text(what)}</dd>" for name, what in FIGURES.items())
    return (
        "<section>\n<h2>Results</h2>\n"
        "<p>Each figure stands above its 95% bootstrap interval: the range to expect if other patients like these "
        f"had been drawn. “{UNKNOWN}” means not defined or not computed. Pixels outside the brain count nowhere.</p>\n"
        '<div class="wide"><table class="results"><thead><tr><th scope="col">method</th><th scope="col">slices</th>'
        f"{heads}</tr></thead><tbody>\n" + "\n".join(lines) + "\n</tbody></table></div>\n"
        f"<dl><dt>slices</dt><dd>Which count: all of them, or only those that have a lesion.</dd>{meaning}</dl>\n"
        + _picture(
            pictures / "roc_pr.png",
            "Left: ROC curves of the slices’ scores, one for each method. Right: precision against recall of the "
            "anomaly maps’ pixels.",
            "Left: lesions found among slices that have one, against false alarms among those that have none, as the "
            "threshold falls. Right: the same for pixels of slices with a lesion, as precision and recall. The further "
            "a curve runs above the dotted line of chance, the better.",
        )
        + "\n"
        + _picture(
            pictures / "scores.png",
            "Histogram of the scores of slices with and without a lesion, and the threshold.",
            f"Scores of {_text(findings.ours.name)}. The better the two colours are apart, the fewer mistakes any "
            "threshold makes; unhealthy slices left of it are missed, healthy ones right of it are false alarms.",
        )
        + "\n</section>"
    )


def _curves(findings: Findings, typical: int, pictures: Path) -> str:
    names = ", ".join(figures.NAMES.get(name, name) for name in findings.curves.modalities)
    slice_name = figures.where(findings, typical)
    return (
        "<section>\n<h2>What the model sees on the way</h2>\n"
        f"<p>M<sub>t</sub> measures how far the healthy prediction is from the one without a hint at timestep t, for "
        f"each modality that counts ({_text(names)}). It is small while there is little noise, as both can see the "
        "lesion, and small again when the noise hides everything. In between, the noise hides the lesion but not the "
        "brain around it: the step where M<sub>t</sub> is largest is the last one to enter the anomaly map.</p>\n"
        + _picture(
            pictures / "curves.png",
            "M_t against the timestep for slices with and without a lesion: means and middle halves, by modality.",
            "The curve of slices with a lesion should rise clearly above that of the others. Where both bands lie on "
            "each other, the model does not use what it was told, and its maps mean little.",
        )
        + "\n"
        + _picture(
            pictures / "slice_curves.png",
            f"M_t, MSE_h and MSE_0 against the timestep for {slice_name}.",
            f"The first of the slices below ({_text(slice_name)}). Above: M<sub>t</sub>, its largest value marked. "
            "Below: how far each prediction is from the slice itself. In a healthy slice the solid and the dotted line "
            "of a colour run alike.",
        )
        + "\n</section>"
    )


def _slices(findings: Findings, chosen: Mapping[int, Sequence[str]], pictures: Path) -> str:
    parts = [
        "<section>\n<h2>Slices</h2>\n<p>Chosen by rule, not by hand: of the slices with a lesion those with the "
        "median, the best and the worst Dice (the larger lesion where it is the same), and the largest lesion of each "
        f"patient, of up to {LARGEST} patients; of those without the ones with the median and the highest score. The "
        "patient’s right is on the left, the forehead at the top. The colours of all anomaly maps mean the same; "
        "values beyond the end of the scale, one pixel in a thousand, have its last colour. Pixels outside the brain "
        "are drawn but do not count.</p>"
    ]
    for number, (index, reasons) in enumerate(chosen.items(), 1):
        name, known = figures.where(findings, index), figures.overlap(findings, index)
        alt = (
            f"{name}: four modalities, the outlined lesion ({known.truth} pixels), the anomaly map, the mask "
            f"({known.mask} pixels), and lesion and mask laid over each other."
        )
        caption = (
            f"<b>{_text('; '.join(reasons))}.</b> {_text(name)}: {_text(figures.verdict(findings, index))}. "
            f"Lesion: {known.truth} pixels, mask: {known.mask}. Dice {known.dice:.2f}, IoU {known.iou:.2f}."
        )
        parts.append(_picture(pictures / f"slice-{number:02}.png", alt, caption))
    return "\n".join(parts) + "\n</section>"


def _settings(findings: Findings) -> str:
    lines = [
        f'<tr><th scope="row">{_text(name)}</th><td>{_text(_say(value))}</td></tr>'
        for name, value in findings.about.items()
    ]
    return (
        "<section>\n<h2>Settings</h2>\n<p>What determined these results. The figures of the table are in "
        "<code>metrics.csv</code>, those of every slice in <code>slices.csv</code>, the pictures in "
        '<code>figures/</code>, all beside this page.</p>\n<div class="wide"><table class="settings"><tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>\n</section>"
    )


def _say(value: object) -> str:
    """A setting as people write it."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_say(part)}" for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_say, value))
    return str(value)
