"""The comparisons of many systems as one self-contained web page."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from expedite_d2.d2.comparison.figure import PANELS
from expedite_d2.d2.comparison.report import (
    claims,
    comparison_rows,
    describe_build,
    describe_settings,
    headline_metrics,
    metric_title,
    share_kept,
)
from expedite_d2.d2.comparison.scatter import KEPT, System, draw_marker, draw_scatter
from expedite_d2.d2.data.images import image_size
from expedite_d2.d2.evaluation.evaluator import format_number
from expedite_d2.files import replacing

__all__ = ["RUN_FILE", "Evaluated", "read_system", "write_page"]

RUN_FILE = "run.json"

_TEMPLATE = Path(__file__).with_name("report.html")
# Width and height of the plot where there is room, and on a phone.
_PLOTS = {"wide": (860, 430), "narrow": (350, 380)}
_COSTS = ("backbone", "model")
# Where the metric's name alone would not tell the task.
_LABELS = {"segm": "mask AP", "bbox": "box AP"}
_DEPTH_NOTE = (
    "Near is bright, far is dark, on one scale for both; red is where the two depths differ by "
    "more than 5 %."
)
_SEGMENTATION_NOTE = (
    "Red is where the two predictions give a pixel another class or another object."
)


@dataclass(frozen=True)
class Evaluated:
    """A system as its folder tells of it.

    Attributes:
        name: The folder's name.
        run: {"config", "weights", "command"}, as far as known.
        error: Why there is no comparison, or None.
        comparison: What ``comparison.json`` holds; {} where there is an error.
        examples: {"panels": {panel: path}, "differs": share of the pixels} of each image.
    """

    name: str
    run: Mapping[str, str]
    error: str | None
    comparison: Mapping[str, Any]
    examples: Sequence[Mapping[str, Any]]

    @property
    def title(self) -> str:
        """The architecture in words; where it is not known, the folder's name."""
        if self.error is not None:
            return self.name
        architecture = str(self.comparison["model"]).split(",")[0].removeprefix("Expedite")
        return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", architecture) or self.name

    @property
    def backbone(self) -> str:
        """The backbone in words."""
        return str(self.comparison["model"]).partition(",")[2].strip()


def read_system(folder: Path) -> Evaluated:
    """Read what a comparison has left in a folder; whatever is wrong with it becomes its error.

    Args:
        folder: ``OUTPUT_DIR`` of ``compare``; ``run.json`` beside the comparison is optional.
    """
    run: dict[str, Any] = {}
    comparison: dict[str, Any] = {}
    examples: list[dict[str, Any]] = []
    error = None
    try:
        if (folder / RUN_FILE).is_file():
            run = _read_json(folder / RUN_FILE)
        error = run.pop("error", None)
        if error is None:
            comparison = _read_comparison(folder / "comparison.json")
            examples = _read_examples(folder / "examples")
    except (OSError, ValueError) as reason:
        error = str(reason)
        comparison = {}
    return Evaluated(folder.name, run, error, comparison, examples)


def write_page(systems: Sequence[Evaluated], path: Path) -> None:
    """Write the page: one file that needs no other and no network.

    Args:
        systems: In the order of the page.
        path: Where to write; its directory exists.
    """
    done = [system for system in systems if system.error is None]
    page = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        facts="\n".join(_facts(done)),
        rows="\n".join(_table_row(system, number) for number, system in enumerate(systems)),
        plot="\n".join(_plot(systems)),
        sections="\n".join(_section(system, number) for number, system in enumerate(systems)),
    )
    with replacing(path) as partial:
        partial.write_text(page, encoding="utf-8")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {path.name} in {path.parent}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _read_comparison(path: Path) -> dict[str, Any]:
    comparison = _read_json(path)
    try:
        # A page without it shows at once whether all that a page reads is there.
        system = Evaluated(path.parent.name, {}, None, comparison, [])
        for part in (_facts([system]), _table_row(system, 0), _plot([system]), _section(system, 0)):
            "".join(part)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a comparison: {error!r}") from error
    return comparison


def _read_examples(folder: Path) -> list[dict[str, Any]]:
    """The images whose pictures are all there; a comparison without pictures is one, too."""
    path = folder / "examples.json"
    if not path.is_file():
        return []
    found = []
    try:
        for entry in _read_json(path):
            panels = {panel: folder / Path(entry["panels"][panel]).name for panel in PANELS}
            if all(_is_picture(panel) for panel in panels.values()):
                found.append({"panels": panels, "differs": float(entry["differs"])})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} does not list examples: {error!r}") from error
    return found


def _is_picture(path: Path) -> bool:
    try:
        image_size(path)
    except (ValueError, OSError):
        return False
    return True


def _facts(systems: Sequence[Evaluated]) -> Iterator[str]:
    """What the measurements have in common: every value that occurs, once."""
    for label, values in (
        ("images", [f"{s.comparison['images']} of {s.comparison['dataset']}" for s in systems]),
        ("device", [s.comparison["device"] for s in systems]),
        ("dtype", [s.comparison["dtype"] for s in systems]),
        ("torch", [s.comparison["torch"] for s in systems]),
        ("extension", [describe_build(s.comparison) for s in systems]),
    ):
        if values:
            words = "; ".join(dict.fromkeys(map(str, values)))
            yield f"<div><dt>{label}</dt><dd>{escape(words)}</dd></div>"


def _table_row(system: Evaluated, number: int) -> str:
    title = f'<a href="#system{number}">{escape(system.title)}</a>'
    if system.error is not None:
        return (
            f'<tr class="failed"><th scope="row">{title}</th>'
            f'<td colspan="5">not evaluated: {escape(system.error)}</td></tr>'
        )
    baseline, expedited, ratio = (
        system.comparison[key] for key in ("baseline", "expedited", "ratio")
    )
    cells = []
    for part in _COSTS:
        change = _change(baseline["gflops"][part], expedited["gflops"][part])
        share = ratio[f"gflops_{part}"]
        saved = "–" if share is None else f"{100 * (share - 1):+.1f} %".replace("-", "−")
        cells.append((f"{part} GFLOPs", f"{change} <small>{saved}</small>"))
    for part in _COSTS:
        change = _change(*(side["latency_ms"][part]["median"] for side in (baseline, expedited)))
        speedup = ratio[f"speedup_{part}"]
        speed = "–" if speedup is None else f"{speedup:.2f}× as fast"
        cells.append((f"{part} latency, ms", f"{change} <small>{speed}</small>"))
    shown = "".join(f'<td data-label="{label}">{cell}</td>' for label, cell in cells)
    backbone = f"<small>{escape(system.backbone)}</small>"
    return (
        f'<tr><th scope="row">{title} {backbone}</th>'
        f'<td data-label="accuracy">{_accuracies(system.comparison)}</td>{shown}</tr>'
    )


def _accuracies(comparison: Mapping[str, Any]) -> str:
    items = []
    for task, name in headline_metrics(comparison):
        values = [
            comparison[side]["metrics"].get(task, {}).get(name)
            for side in ("baseline", "expedited")
        ]
        kept = share_kept(comparison, task, name)
        verdict = "" if kept is None else "enough" if kept >= KEPT else "less"
        items.append(
            f"<li><span>{escape(metric_title(task))}</span> <span>{_change(*values)}</span> "
            f'<b class="{verdict}">{_percentage(kept)}</b></li>'
        )
    return f'<ul class="accuracies">{"".join(items)}</ul>' if items else "–"


def _plot(systems: Sequence[Evaluated]) -> Iterator[str]:
    """The plot, once for each width, and what its marks mean."""
    points = []
    names = []
    for number, system in enumerate(systems):
        speedup = None if system.error else system.comparison["ratio"]["speedup_model"]
        if not speedup:
            continue
        shares = [
            (_LABELS.get(task, name), share_kept(system.comparison, task, name))
            for task, name in headline_metrics(system.comparison)
        ]
        kept = [(name, share) for name, share in shares if share is not None]
        points.append(System(number, 1 / speedup, kept))
        names.append(system.title)
    if not points:
        yield "<p>No system was evaluated.</p>"
        return
    for kind, (width, height) in _PLOTS.items():
        drawn = draw_scatter(points, width, height, "accuracy kept against model latency")
        yield f'<div class="plot {kind}">{drawn}</div>'
    keys = (
        f'<li><svg viewBox="-10 -10 20 20" aria-hidden="true">{draw_marker(point.style, 0, 0)}'
        f"</svg> {escape(name)}</li>"
        for point, name in zip(points, names, strict=True)
    )
    yield f'<ul class="legend">{"".join(keys)}</ul>'


def _section(system: Evaluated, number: int) -> str:
    anchor = f"system{number}"
    heading = f'<section id="{anchor}"><h2>{escape(system.title)}</h2>'
    if system.error is not None:
        return f'{heading}<p class="failed">Not evaluated: {escape(system.error)}</p></section>'
    comparison = system.comparison
    pictures = "".join(
        _example(example, f"{anchor}-{index}", system.title)
        for index, example in enumerate(system.examples, start=1)
    )
    note = _DEPTH_NOTE if "depth" in comparison["baseline"]["metrics"] else _SEGMENTATION_NOTE
    shown = f'<p class="note">{note} Choose a picture to enlarge it.</p>{pictures}'
    weights = system.run.get("weights")
    warning = (
        '<p class="failed">Random weights: these accuracies say nothing.</p>'
        if weights == ""
        else ""
    )
    return f"""{heading}
<p class="claims">{escape(", ".join(claims(comparison)))}</p>
{warning}
<div class="columns">
<dl class="settings">{"".join(_settings(system))}</dl>
<div class="bars">{"".join(_bars(comparison))}</div>
</div>
{shown if pictures else '<p class="note">This comparison has no pictures.</p>'}
{_all_metrics(comparison)}
{_command(system)}
</section>"""


def _settings(system: Evaluated) -> Iterator[str]:
    words = dict(describe_settings(system.comparison))
    words["clusters"] = words["clusters"].replace(" ", " × ")
    if float(words["temperature"]) == 0.0:
        words["temperature"] = "automatic"
    rows = [("backbone", system.backbone), *words.items()]
    rows += [(key, system.run[key]) for key in ("config", "weights") if system.run.get(key)]
    for label, value in rows:
        yield f"<div><dt>{escape(label)}</dt><dd>{escape(str(value))}</dd></div>"


def _bars(comparison: Mapping[str, Any]) -> Iterator[str]:
    """What remains of the baseline's multiply-adds and latency."""
    baseline, expedited = comparison["baseline"], comparison["expedited"]
    for word, read in (
        ("GFLOPs", lambda side, part: side["gflops"][part]),
        ("latency, ms", lambda side, part: side["latency_ms"][part]["median"]),
    ):
        for part in _COSTS:
            before, after = (read(side, part) for side in (baseline, expedited))
            if not before or after is None:
                continue
            share = 100 * after / before
            yield (
                f'<div class="bar"><p><span>{part} {word}</span> '
                f"<span>{_change(before, after)}</span></p>"
                f'<div><div style="width: {min(share, 100):.1f}%">{share:.0f} %</div></div></div>'
            )


def _all_metrics(comparison: Mapping[str, Any]) -> str:
    head, *rows = comparison_rows(comparison)
    titles = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        '<details><summary>All metrics</summary><div class="scroll"><table class="plain">'
        f"<thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div></details>"
    )


def _command(system: Evaluated) -> str:
    command = system.run.get("command")
    if not command:
        return ""
    return (
        "<details><summary>Command for this system alone</summary>"
        f"<pre><code>{escape(command)}</code></pre></details>"
    )


def _example(example: Mapping[str, Any], anchor: str, title: str) -> str:
    """The pictures of one image; each can fill the window, by its anchor alone."""
    figures = []
    for panel, path in example["panels"].items():
        caption = PANELS[panel]
        if panel == "difference":
            caption += f": {100 * example['differs']:.1f} % of the pixels"
        height, width = image_size(path)
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        own = f"{anchor}-{panel}"
        figures.append(
            f'<figure id="{own}"><a href="#{own}"><img src="data:image/jpeg;base64,{data}" '
            f'alt="{escape(title)}: {escape(caption)}" width="{width}" height="{height}" '
            f'loading="lazy"></a><figcaption>{escape(caption)}</figcaption>'
            f'<a class="close" href="#{anchor}">close</a></figure>'
        )
    return f'<div class="example" id="{anchor}">{"".join(figures)}</div>'


def _change(before: float | None, after: float | None) -> str:
    return f'<span class="change">{format_number(before, 4)} → {format_number(after, 4)}</span>'


def _percentage(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"
