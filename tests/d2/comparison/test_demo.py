from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from expedite_d2.__main__ import main
from expedite_d2.d2.comparison import demo
from expedite_d2.d2.comparison.examples import Example, Seen, TokenGroups, write_examples
from expedite_d2.d2.comparison.report import Measurement, Subject, build_comparison, to_json
from expedite_d2.d2.comparison.report_page import RUN_FILE, read_system, write_page
from expedite_d2.d2.comparison.scatter import Point, draw_scatter
from expedite_d2.d2.visualize import DepthMap

NASTY = "<script>alert('1')</script> & \"quoted\""
VOID = {"meta", "img", "br", "line", "circle", "polygon"}
CONFIGS = [config for config in demo.CONFIGS if "mask2former" in config or "dpt" in config]
NAMES = ["mask2former_swin_mini", "dpt_vit_mini"]
KINDS = ("tokens", "prediction", "difference")

Metrics = dict[str, dict[str, Any]]
PANOPTIC: Metrics = {"panoptic_seg": {"PQ": 50.0, "SQ": 60.0}, "sem_seg": {"mIoU": 70.0}}


def fabricate(
    folder: Path,
    baseline: Metrics = PANOPTIC,
    expedited: Metrics = PANOPTIC,
    model: str = "ExpeditedMask2Former, Swin 48",
    device: str = "a processor",
    milliseconds: float = 80.0,
    examples: int = 2,
    further: Sequence[str] = (),
) -> None:
    """What a comparison leaves in its folder."""
    build = {"cuda": None, "archs": [], "compiler": "g++ 13", "torch": "2.8.0"}
    subject = Subject(model, "tiny_val", 3, device, "float32", "2.8.0", build)
    cluster = {"at": 6, "grid": [6, 6], "temperature": 0.0}
    settings = {"steps": [{"cluster": cluster}], "reconstruction": "residual"}
    runs = {}
    for name in ("baseline", "expedited", *further):
        plain = name == "baseline"
        cost, time = (20.0, 100.0) if plain else (10.0, milliseconds)
        runs[name] = Measurement(
            baseline if plain else expedited,
            {"backbone": [cost], "model": [30.0]},
            {"backbone": [time], "model": [time]},
            None,
            None if plain else settings,
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.json").write_text(to_json(build_comparison(subject, runs)))
    seen = example("expedited", *further)
    write_examples([seen] * examples, None, folder / "examples")


def example(*settings: str) -> Example:
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    depths = [DepthMap(np.full((24, 32), metres, np.float32)) for metres in (2.0, 3.0)]
    groups = TokenGroups(np.arange(12).reshape(3, 4) // 2, (3, 4))
    seen = [Seen(name, "cluster", groups, depths[1]) for name in settings or ("expedited",)]
    return Example(image, depths[0], seen)


def panels(number: int, *further: str) -> set[str]:
    """The files of an example's pictures."""
    own = [f"{name}_{kind}" for name in ("expedited", *further) for kind in KINDS]
    return {f"{number}_{name}.jpg" for name in ("baseline", *own, *["input"] * bool(further))}


class Page(HTMLParser):
    """Reads a page; fails where an element is not closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def attributes(self, tag: str, name: str) -> list[str]:
        return [found[name] or "" for kind, found in self.elements if kind == tag and name in found]


def page_of(folder: Path, names: Sequence[str]) -> Page:
    write_page([read_system(folder / name) for name in names], folder / "report.html")
    return Page(folder / "report.html")


def test_page_needs_no_other_file_and_no_network(tmp_path: Path) -> None:
    fabricate(tmp_path / "a")
    page = page_of(tmp_path, ["a"])
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "base"}
    images = page.attributes("img", "src")
    assert len(images) == 2 * 4
    assert all(source.startswith("data:image/jpeg;base64,") for source in images)
    assert all(page.attributes("img", "alt")) and all(page.attributes("svg", "viewbox"))
    anchors = [link for link in page.attributes("a", "href")]
    ids = {found["id"] for _, found in page.elements if "id" in found}
    assert {link.removeprefix("#") for link in anchors} <= ids
    text = (tmp_path / "report.html").read_text()
    assert "url(" not in text and "@import" not in text and "://" not in text


def test_page_shows_every_system(tmp_path: Path) -> None:
    worse = {"panoptic_seg": {"PQ": 49.5, "SQ": 60.0}, "sem_seg": {"mIoU": 63.0}}
    fabricate(tmp_path / "a", expedited=worse)
    fabricate(tmp_path / "b", model="ExpeditedPanopticFPN, Swin 48", device="another")
    page = page_of(tmp_path, ["a", "b"])
    assert "panoptic PQ 50.00 → 49.50 99.0 %" in page.text
    assert "semantic mIoU 70.00 → 63.00 90.0 %" in page.text
    assert "20.00 → 10.00 −50.0 %" in page.text and "1.25× as fast" in page.text
    assert (
        "Panoptic FPN Swin 48" in page.text
        and "Expedited" not in page.text
        and "a processor; another" in page.text
    )
    verdicts = page.attributes("b", "class")
    assert verdicts == ["enough", "less", "enough", "enough"]


def test_page_shows_every_setting(tmp_path: Path) -> None:
    fabricate(tmp_path / "a", further=["half"])
    fabricate(tmp_path / "b")
    page = page_of(tmp_path, ["a", "b"])
    rows = [kind for kind, found in page.elements if kind == "th" and found.get("scope") == "row"]
    # Three of the table of systems, and two tables of four costs and three metrics.
    assert len(rows) == 3 + 2 * (4 + 3) and "half: alpha 6, clusters 6x6" in page.text
    assert len(page.attributes("img", "src")) == 2 * 8 + 2 * 4
    marks = [found["class"] for _, found in page.elements if "mark" in (found.get("class") or "")]
    # Two metrics of each setting in both plots, then the legend.
    assert [m for m in marks if "outline" in (m or "")] == ["mark outline s0"] * 5
    assert len(marks) == 2 * 2 * 3 + 3
    assert "PQ, half" not in page.text and "outlined: half" in page.text
    assert "half: 50 % fewer backbone GFLOPs" in page.text
    fabricate(tmp_path / "b", further=["quarter"])
    page = page_of(tmp_path, ["a", "b"])
    assert "PQ, half" in page.text and "outlined: half, quarter" in page.text


def test_page_of_an_error_metric_keeps_less_where_it_grows(tmp_path: Path) -> None:
    fabricate(tmp_path / "grown", {"depth": {"RMSE": 0.400}}, {"depth": {"RMSE": 0.410}})
    fabricate(tmp_path / "shrunk", {"depth": {"RMSE": 0.400}}, {"depth": {"RMSE": 0.396}})
    page = page_of(tmp_path, ["grown", "shrunk"])
    assert "depth RMSE, m 0.400 → 0.410 97.5 %" in page.text
    assert "depth RMSE, m 0.400 → 0.396 101.0 %" in page.text
    assert page.attributes("b", "class") == ["less", "enough"]
    assert "Near is bright" in page.text


def test_page_of_what_was_not_measured_has_dashes(tmp_path: Path) -> None:
    nothing: Metrics = {"segm": {"AP": None}, "bbox": {"AP": 10.0}}
    fabricate(tmp_path / "a", nothing, {"segm": {"AP": None}, "bbox": {"AP": None}}, examples=0)
    page = page_of(tmp_path, ["a"])
    assert "box AP 10.00 → - –" in page.text and "mask AP 10" not in page.text
    assert "This comparison has no pictures." in page.text


def test_page_escapes_what_it_was_given(tmp_path: Path) -> None:
    fabricate(tmp_path / "a", model=f"Expedite{NASTY}, {NASTY}", device=NASTY)
    words = {"config": NASTY, "weights": NASTY, "command": NASTY}
    (tmp_path / "a" / RUN_FILE).write_text(json.dumps(words))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / RUN_FILE).write_text(json.dumps({"error": NASTY}))
    page = page_of(tmp_path, ["a", "b"])
    assert "script" not in {tag for tag, _ in page.elements}
    assert page.text.count(NASTY) >= 6


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.unlink(), "no comparison.json in"),
        (lambda path: path.write_text(path.read_text()[:100]), "is not JSON"),
        (lambda path: path.write_text('{"model": "x"}'), "is not a comparison"),
        (lambda path: path.write_text("[]"), "is not a comparison"),
        (lambda path: (path.parent / RUN_FILE).write_text('{"error": "no memory"}'), "no memory"),
    ],
)
def test_page_of_a_half_made_folder_tells_why_and_shows_the_others(
    tmp_path: Path, spoil: Callable[[Path], Any], reason: str
) -> None:
    for name in "abc":
        fabricate(tmp_path / name)
    spoil(tmp_path / "b" / "comparison.json")
    page = page_of(tmp_path, ["a", "b", "c"])
    assert page.text.count("not evaluated:") == 1 and reason in page.text
    assert len(page.attributes("img", "src")) == 2 * 2 * 4


def test_page_leaves_out_examples_without_their_pictures(tmp_path: Path) -> None:
    fabricate(tmp_path / "a")
    (tmp_path / "a" / "examples" / "1_baseline.jpg").unlink()
    assert len(page_of(tmp_path, ["a"]).attributes("img", "src")) == 4


@pytest.mark.parametrize("content", [b"", b"no picture", b"\xff\xd8\xff\xe0", b"GIF89a"])
def test_page_leaves_out_examples_with_broken_pictures(tmp_path: Path, content: bytes) -> None:
    fabricate(tmp_path / "a")
    (tmp_path / "a" / "examples" / "1_baseline.jpg").write_bytes(content)
    assert len(page_of(tmp_path, ["a"]).attributes("img", "src")) == 4


def test_page_warns_of_random_weights(tmp_path: Path) -> None:
    fabricate(tmp_path / "a")
    (tmp_path / "a" / RUN_FILE).write_text('{"weights": "", "error": null}')
    assert "Random weights" in page_of(tmp_path, ["a"]).text


def test_page_without_any_comparison(tmp_path: Path) -> None:
    assert "No system was evaluated." in page_of(tmp_path, ["a"]).text


def test_examples_of_an_earlier_run_go_and_other_files_stay(tmp_path: Path) -> None:
    write_examples([example("expedited", "half"), example()], None, tmp_path)
    assert set(os.listdir(tmp_path)) == panels(1, "half") | panels(2) | {"examples.json"}
    (tmp_path / "mine.jpg").touch()
    write_examples([example()], None, tmp_path)
    assert set(os.listdir(tmp_path)) == panels(1) | {"mine.jpg", "examples.json"}


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EACCES, errno.ENAMETOOLONG])
def test_an_example_that_cannot_be_written_costs_only_itself(
    tmp_path: Path, reason: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save = Image.Image.save

    def failing(image: Image.Image, path: Path, **options: Any) -> None:
        if path.name == "1_expedited_prediction.jpg":
            raise OSError(reason, os.strerror(reason))
        save(image, path, **options)

    monkeypatch.setattr(Image.Image, "save", failing)
    write_examples([example(), example()], None, tmp_path)
    assert f"1_expedited_prediction.jpg cannot be written: {os.strerror(reason)}" in caplog.text
    assert set(os.listdir(tmp_path)) == panels(2) | {"examples.json"}
    (listed,) = json.loads((tmp_path / "examples.json").read_text())
    assert {panel["file"] for panel in listed["panels"]} == panels(2)


def test_examples_that_have_no_place_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "examples").write_text("a file")
    write_examples([example()], None, tmp_path / "examples")
    assert "examples cannot be made: File exists" in caplog.text


@pytest.mark.parametrize("latency", [0.01, 0.8, 1.0, 1.04, 7.0])
@pytest.mark.parametrize("share", [-0.5, 0.3, 0.99, 1.0, 3.0])
def test_scatter_stays_within_its_frame(latency: float, share: float) -> None:
    drawn = draw_scatter([Point(9, latency, [("PQ", share), ("AP", 1.0)])], 400, 300, "a name")
    for axis, limit in (("x", 400), ("y", 300)):
        places = [float(v) for v in re.findall(rf' c?{axis}[12]?="([-0-9.]+)"', drawn)]
        assert places and 0 <= min(places) and max(places) <= limit


@pytest.mark.parametrize("count", [4, 8])
def test_scatter_labels_do_not_cover_each_other(count: int) -> None:
    close = [Point(n, 0.9 + n / 1000, [("mIoU", 0.99)]) for n in range(count)]
    drawn = draw_scatter(close, 860, 430, "a name")
    found = re.findall(r'class="label s\d" x="([0-9.]+)" y="([0-9.]+)"', drawn)
    places = [(float(x), float(y)) for x, y in found]
    assert len(places) == count
    for n, (x, y) in enumerate(places):
        assert all(abs(x - a) > 30 or abs(y - b) > 12 for a, b in places[:n])


def test_demo_runs_every_system_and_reports_the_one_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []

    def pretend(run: Any) -> None:
        ran.append(run.folder.name)
        if "dpt" in run.config:
            run.record("no memory left")
        else:
            fabricate(run.folder)
            run.record(None)

    monkeypatch.setattr(demo, "_run_apart", pretend)
    with pytest.raises(SystemExit) as ended:
        main(["demo", *CONFIGS, "--output", str(tmp_path), "--opts", "MODEL.WEIGHTS", ""])
    assert ended.value.code == 2 and sorted(ran) == sorted(NAMES)
    printed = capsys.readouterr()
    assert "== 1 of 2: mask2former_swin_mini ==" in printed.out
    assert f"1 of 2 systems evaluated: {tmp_path / 'report.html'}" in printed.out
    assert printed.err == "error: dpt_vit_mini: no memory left\n"
    run = json.loads((tmp_path / NAMES[0] / RUN_FILE).read_text())
    assert run["weights"] == "" and run["error"] is None
    assert run["command"].startswith("python train_net.py --eval-only --compare --config-file")
    assert run["command"].endswith(f"MODEL.WEIGHTS '' OUTPUT_DIR {tmp_path / NAMES[0]}")
    assert Page(tmp_path / "report.html").text.count("no memory left") == 2


@pytest.mark.parametrize("half", [True, False])
def test_demo_compares_also_with_the_half_that_lies_beside(
    half: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [tmp_path / f"net{end}.yaml" for end in ("_expedited", *["_half"] * half)]
    for path in configs:
        path.write_text("MODEL: {EXPEDITE: {ENABLED: True}}")
    compared = []

    def pretend(cfg: Any, further: dict[str, Any], command: str) -> None:
        compared.append((list(further), command))
        fabricate(Path(cfg.OUTPUT_DIR), further=list(further))

    monkeypatch.setattr(demo, "compare", pretend)
    monkeypatch.setattr(demo, "_run_apart", demo._compare)
    main(["demo", str(configs[0]), "--output", str(tmp_path / "out")])
    ((names, command),) = compared
    assert names == ["half"] * half
    assert (f"--compare-with {tmp_path / 'net_half.yaml'} " in command) is half


def test_demo_does_not_show_an_earlier_comparison_for_one_that_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fabricate(tmp_path / NAMES[0])
    monkeypatch.setattr(demo, "_run_apart", lambda run: None)
    with pytest.raises(SystemExit):
        main(["demo", CONFIGS[0], "--output", str(tmp_path)])
    assert "did not come to its end" in Page(tmp_path / "report.html").text


def test_demo_report_only_evaluates_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(demo, "_run_apart")
    for name in NAMES:
        fabricate(tmp_path / name)
    main(["demo", *CONFIGS, "--output", str(tmp_path), "--report-only"])
    assert "2 of 2 systems evaluated" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--report-only", "--output", "nowhere"], "nowhere does not exist"),
        (["no.yaml"], "no.yaml not found"),
        ([CONFIGS[0], CONFIGS[0]], "got two configs for mask2former_swin_mini"),
        ([CONFIGS[0], "--opts", "MODEL.NO_SUCH_KEY", "1"], "NO_SUCH_KEY"),
    ],
)
def test_demo_names_bad_arguments_in_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["demo", *arguments])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not os.listdir(tmp_path)


@pytest.mark.slow
def test_demo_process_that_fails_leaves_its_reason(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["demo", CONFIGS[0], "--output", str(tmp_path), "--opts", "DATASETS.TEST", "('x',)"])
    assert ended.value.code == 2
    run = json.loads((tmp_path / NAMES[0] / RUN_FILE).read_text())
    assert "'x'" in run["error"]
    assert "not evaluated" in Page(tmp_path / "report.html").text
