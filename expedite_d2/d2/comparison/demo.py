"""Every family of systems on the embedded scenes, and one page that shows them all.

    expedite-d2 demo [--output DIR] [--report-only] [CONFIG ...] [--opts KEY VALUE ...]

Each system is compared with its baseline, and a system of X_expedited.yaml also with the settings
of X_half.yaml where that lies beside it, in a process of its own and writes to a folder of its
own, so that one that fails does not take the others along. The page, ``report.html``, is made from
what lies in the folders.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import shlex
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from expedite_d2.d2.comparison.compare import compare
from expedite_d2.d2.comparison.report_page import RUN_FILE, read_system, write_page
from expedite_d2.d2.comparison.settings import further_configs
from expedite_d2.d2.config import PROJECT, WEIGHTS_PREFIX, find_config, load_config
from expedite_d2.d2.engine.defaults import default_setup
from expedite_d2.d2.logger import setup_logger
from expedite_d2.errors import UNFORESEEN, sentence_of
from expedite_d2.files import replacing

__all__ = ["CONFIGS", "main"]

CONFIGS = (
    "configs/scenes/panoptic/mask2former_swin_mini_expedited.yaml",
    "configs/scenes/semantic/segmenter_vit_mini_expedited.yaml",
    "configs/scenes/depth/dpt_vit_mini_expedited.yaml",
    "configs/scenes/instance/htc_swin_mini_expedited.yaml",
    "configs/scenes/panoptic/panoptic_fpn_swin_mini_expedited.yaml",
)

_FAILED = 2  # exit code of a comparison that has written down its error


@dataclass(frozen=True)
class _SystemRun:
    """One system to compare.

    Attributes:
        config: Its config file.
        further: Config files of its further settings.
        folder: Where its comparison is written.
        opts: Settings that override the config, KEY VALUE in turn.
        weights: What the config says of them.
    """

    config: str
    further: tuple[str, ...]
    folder: Path
    opts: tuple[str, ...]
    weights: str

    def command(self) -> str:
        """What does the same for this system alone."""
        words = ["python", "train_net.py", "--eval-only", "--compare", "--config-file", self.config]
        words += [word for file in self.further for word in ("--compare-with", file)]
        return shlex.join([*words, *self.opts, "OUTPUT_DIR", str(self.folder)])

    def record(self, error: str | None) -> None:
        """Write down how the comparison is made, and why there is none if so."""
        weights = Path(self.weights)
        shipped = weights.parent == PROJECT / "weights"
        run = {
            "config": self.config,
            "weights": WEIGHTS_PREFIX + weights.name if shipped else self.weights,
            "command": self.command(),
            "error": error,
        }
        with replacing(self.folder / RUN_FILE) as partial:
            partial.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str]) -> None:
    """The command line; exit code 2 when a system could not be evaluated."""
    args = _parse(argv)
    names = [Path(config).stem.removesuffix("_expedited") for config in args.configs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"each system has a folder of its own, got two configs for {name}")
    if not args.report_only:
        runs = []
        for config, name in zip(args.configs, names, strict=True):
            weights = load_config(config, args.opts).MODEL.WEIGHTS  # what is mistyped shows here
            folder, opts = args.output / name, tuple(args.opts)
            runs.append(_SystemRun(config, _further(config), folder, opts, weights))
        for number, run in enumerate(runs, start=1):
            print(f"\n== {number} of {len(runs)}: {run.folder.name} ==\n", flush=True)
            run.folder.mkdir(parents=True, exist_ok=True)
            # Whatever ends the comparison, an earlier one is not shown in its place.
            run.record("the comparison did not come to its end")
            _run_apart(run)
    elif not args.output.is_dir():
        raise FileNotFoundError(f"{args.output} does not exist: run without --report-only first")
    systems = [read_system(args.output / name) for name in names]
    page = args.output / "report.html"
    write_page(systems, page)
    failed = [system for system in systems if system.error is not None]
    print(f"\n{len(systems) - len(failed)} of {len(systems)} systems evaluated: {page}")
    for system in failed:
        print(f"error: {system.name}: {system.error}", file=sys.stderr)
    if failed:
        raise SystemExit(2)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="expedite-d2 demo",
        description="Compare every system with its baseline, and show all of them on one page.",
    )
    parser.add_argument(
        "configs",
        nargs="*",
        default=list(CONFIGS),
        metavar="CONFIG",
        help="expedited configs, compared also with X_half.yaml where it lies beside "
        "X_expedited.yaml; default: one of each family, on the embedded scenes",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("output/demo"), help="default: %(default)s"
    )
    parser.add_argument(
        "--report-only",
        action="store_true",
        help="evaluate nothing: write the page again from the comparisons that are there",
    )
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="settings that override every config; the last option",
    )
    return parser.parse_args(argv)


def _further(config: str) -> tuple[str, ...]:
    """The config of half of the multiply-adds that lies beside an expedited one, if it does."""
    stem = Path(config).stem
    name = f"{stem.removesuffix('_expedited')}_half.yaml"
    if not stem.endswith("_expedited") or not find_config(config).with_name(name).is_file():
        return ()
    return (str(Path(config).with_name(name)),)


def _run_apart(run: _SystemRun) -> None:
    """Compare in a process of its own, which may also be killed for its memory."""
    process = multiprocessing.get_context("spawn").Process(target=_compare, args=(run,))
    process.start()
    try:
        process.join()
    finally:
        process.kill()
    if process.exitcode not in (0, _FAILED):
        run.record(f"the comparison ended with exit code {process.exitcode}")


def _compare(run: _SystemRun) -> None:
    try:
        setup_logger()
        cfg = load_config(run.config, (*run.opts, "OUTPUT_DIR", str(run.folder)))
        cfg.freeze()
        # It logs the whole config; that is in log.txt and config.yaml.
        with contextlib.redirect_stdout(io.StringIO()):
            default_setup(cfg, argparse.Namespace(eval_only=True))
        further = further_configs(cfg, run.config, run.further, run.opts)
        compare(cfg, further, run.command())
        run.record(None)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        sentence = sentence_of(error)
        if sentence is None:
            traceback.print_exc()
            print(UNFORESEEN, file=sys.stderr)
            sentence = f"unforeseen {type(error).__name__}: {error}"
        run.record(sentence)
        raise SystemExit(_FAILED) from None
