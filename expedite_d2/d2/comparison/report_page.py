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

from expedite_d2.d2.comparison.report import (
    Setting,
    comparison_rows,
    describe_build,
    headline,
    headline_metrics,
    metric_title,
    settings_of,
)
from expedite_d2.d2.comparison.scatter import KEPT, Point, draw_marker, draw_scatter
from expedite_d2.d2.comparison.settings import describe_settings, summarize_settings
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
    "Near is bright, far is dark, on one scale for all; red is where a depth differs from the "
    "baseline's by more than 5 %."
)
_SEGMENTATION_NOTE = (
    "Red is where a prediction gives a pixel another class or another object than the baseline's."
)


@dataclass(frozen=True)
class Evaluated:
    """A system as its folder tells of it.

    Attributes:
        name: The folder's name.
        run: {"config", "weights", "command"}, as far as known.
        error: Why there is no comparison, or None.
        comparison: What ``comparison.json`` holds; {} where there is an error.
        examples: Of each image its pictures, four to a row: path and caption.
    """

    name: str
    run: Mapping[str, str]
    error: str | None
    comparison: Mapping[str, Any]
    examples: Sequence[Sequence[tuple[Path, str]]]

    @property
    def title(self) -> str:
        """The architecture in words; where it is not known, the folder's name."""
        if self.error is not None:
            return self.name
        architecture = str(self.comparison["model"]).split(",")[0].removeprefix("Expedited")
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
    examples: list[list[tuple[Path, str]]] = []
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
        rows="\n".join(
            row for number, system in enumerate(systems) for row in _table_rows(system, number)
        ),
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
        for part in (_facts([system]), _table_rows(system, 0), _plot([system])):
            "".join(part)
        _section(system, 0)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a comparison: {error!r}") from error
    return comparison


def _read_examples(folder: Path) -> list[list[tuple[Path, str]]]:
    """The images whose pictures are all there; a comparison without pictures is one, too."""
    path = folder / "examples.json"
    if not path.is_file():
        return []
    found = []
    try:
        for entry in _read_json(path):
            panels = [
                (folder / Path(panel["file"]).name, str(panel["caption"]))
                for panel in entry["panels"]
            ]
            if all(_is_picture(picture) for picture, _ in panels):
                found.append(panels)
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


def _table_rows(system: Evaluated, number: int) -> Iterator[str]:
    """A row for each setting of the system."""
    title = f'<a href="#system{number}">{escape(system.title)}</a>'
    if system.error is not None:
        yield (
            f'<tr class="failed"><th scope="row">{title}</th>'
            f'<td colspan="5">not evaluated: {escape(system.error)}</td></tr>'
        )
        return
    for setting in settings_of(system.comparison):
        summary = summarize_settings(setting.expedited["settings"])
        notes = (system.backbone, f"{setting.name}: {summary}")
        heading = " ".join([title, *(f"<small>{escape(note)}</small>" for note in notes)])
        cells = "".join(
            f'<td data-label="{label}">{cell}</td>'
            for label, cell in _costs(system.comparison["baseline"], setting)
        )
        accuracies = f'<td data-label="accuracy">{_accuracies(system.comparison, setting)}</td>'
        yield f'<tr><th scope="row">{heading}</th>{accuracies}{cells}</tr>'


def _costs(baseline: Mapping[str, Any], setting: Setting) -> Iterator[tuple[str, str]]:
    for part in _COSTS:
        change = _change(*(side["gflops"][part] for side in (baseline, setting.expedited)))
        share = setting.ratio[f"gflops_{part}"]
        saved = "–" if share is None else f"{100 * (share - 1):+.1f} %".replace("-", "−")
        yield f"{part} GFLOPs", f"{change} <small>{saved}</small>"
    for part in _COSTS:
        sides = (side["latency_ms"][part]["median"] for side in (baseline, setting.expedited))
        speedup = setting.ratio[f"speedup_{part}"]
        speed = "–" if speedup is None else f"{speedup:.2f}× as fast"
        yield f"{part} latency, ms", f"{_change(*sides)} <small>{speed}</small>"


def _accuracies(comparison: Mapping[str, Any], setting: Setting) -> str:
    items = []
    for task, name in headline_metrics(comparison):
        values = [
            side["metrics"].get(task, {}).get(name)
            for side in (comparison["baseline"], setting.expedited)
        ]
        kept = setting.kept(task, name)
        verdict = "" if kept is None else "enough" if kept >= KEPT else "less"
        items.append(
            f"<li><span>{escape(metric_title(task))}</span> <span>{_change(*values)}</span> "
            f'<b class="{verdict}">{_percentage(kept)}</b></li>'
        )
    return f'<ul class="accuracies">{"".join(items)}</ul>' if items else "–"


def _plot(systems: Sequence[Evaluated]) -> Iterator[str]:
    """The plot, once for each width, and what its marks mean."""
    points: list[Point] = []
    names: dict[int, str] = {}
    compared = [[] if s.error else settings_of(s.comparison) for s in systems]
    outlined = dict.fromkeys(setting.name for found in compared for setting in found[1:])
    for number, settings in enumerate(compared):
        for place, setting in enumerate(settings):
            speedup = setting.ratio["speedup_model"]
            if not speedup:
                continue
            # The key tells what outlines are, unless they are several things.
            suffix = f", {setting.name}" if place and len(outlined) > 1 else ""
            kept = [
                (f"{_LABELS.get(task, name)}{suffix}", share)
                for task, name in headline_metrics(systems[number].comparison)
                if (share := setting.kept(task, name)) is not None
            ]
            points.append(Point(number, 1 / speedup, kept, further=place > 0))
            names[number] = systems[number].title
    if not points:
        yield "<p>No system was evaluated.</p>"
        return
    for kind, (width, height) in _PLOTS.items():
        drawn = draw_scatter(points, width, height, "accuracy kept against model latency")
        yield f'<div class="plot {kind}">{drawn}</div>'
    keys = [(draw_marker(number, 0, 0), name) for number, name in names.items()]
    if outlined:
        keys.append((draw_marker(0, 0, 0, outline=True), f"outlined: {', '.join(outlined)}"))
    listed = (
        f'<li><svg viewBox="-10 -10 20 20" aria-hidden="true">{mark}</svg> {escape(name)}</li>'
        for mark, name in keys
    )
    yield f'<ul class="legend">{"".join(listed)}</ul>'


def _section(system: Evaluated, number: int) -> str:
    anchor = f"system{number}"
    heading = f'<section id="{anchor}"><h2>{escape(system.title)}</h2>'
    if system.error is not None:
        return f'{heading}<p class="failed">Not evaluated: {escape(system.error)}</p></section>'
    comparison = system.comparison
    reached = "".join(
        f'<p class="claims">{escape(headline(comparison, setting))}</p>'
        for setting in settings_of(comparison)
    )
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
{reached}
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
    rows = [("backbone", system.backbone)]
    for setting in settings_of(system.comparison):
        described = describe_settings(setting.expedited["settings"])
        rows.append((setting.name, ", ".join(" ".join(pair) for pair in described)))
    rows += [(key, system.run[key]) for key in ("config", "weights") if system.run.get(key)]
    for label, value in rows:
        yield f"<div><dt>{escape(label)}</dt><dd>{escape(str(value))}</dd></div>"


def _bars(comparison: Mapping[str, Any]) -> Iterator[str]:
    """What remains of the baseline's multiply-adds and latency, a bar for each setting."""
    baseline, settings = comparison["baseline"], settings_of(comparison)
    for word, read in (
        ("GFLOPs", lambda side, part: side["gflops"][part]),
        ("latency, ms", lambda side, part: side["latency_ms"][part]["median"]),
    ):
        for part in _COSTS:
            before = read(baseline, part)
            after = [read(setting.expedited, part) for setting in settings]
            if not before or None in after:
                continue
            bars = ""
            for setting, value in zip(settings, after, strict=True):
                share = 100 * value / before
                label = f"{setting.name} {share:.0f} %" if len(settings) > 1 else f"{share:.0f} %"
                bars += (
                    f'<div><div style="width: {min(share, 100):.1f}%">{escape(label)}</div></div>'
                )
            yield (
                f'<div class="bar"><p><span>{part} {word}</span> '
                f"<span>{_change(before, *after)}</span></p>{bars}</div>"
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


def _example(panels: Sequence[tuple[Path, str]], anchor: str, title: str) -> str:
    """The pictures of one image; each can fill the window, by its anchor alone."""
    figures = []
    for number, (path, caption) in enumerate(panels, start=1):
        height, width = image_size(path)
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        own = f"{anchor}-{number}"
        figures.append(
            f'<figure id="{own}"><a href="#{own}"><img src="data:image/jpeg;base64,{data}" '
            f'alt="{escape(title)}: {escape(caption)}" width="{width}" height="{height}" '
            f'loading="lazy"></a><figcaption>{escape(caption)}</figcaption>'
            f'<a class="close" href="#{anchor}">close</a></figure>'
        )
    return f'<div class="example" id="{anchor}">{"".join(figures)}</div>'


def _change(before: float | None, *after: float | None) -> str:
    values = ", ".join(format_number(value, 4) for value in after)
    return f'<span class="change">{format_number(before, 4)} → {values}</span>'


def _percentage(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"
