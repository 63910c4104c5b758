"""``expedite-d2 VERB``, also ``python -m expedite_d2 VERB``: the package's one command."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from expedite_d2.errors import cli
from expedite_d2.tools import command_line

# Each verb, the module whose ``main`` it runs, and what it does. A module is imported when its verb
# is asked for: the project's modules need more than torch.
VERBS = {
    "describe": ("expedite_d2.d2.comparison.describe", "tokens and multiply-adds, block by block"),
    "cost": ("expedite_d2.d2.comparison.cost", "multiply-adds of a config, without weights"),
    "calibrate": ("expedite_d2.d2.engine.calibrate", "measure settings on a few unlabelled images"),
    "tune": ("expedite_d2.d2.engine.tune", "find the best settings on a few unlabelled images"),
    "predict": ("expedite_d2.d2.engine.predict", "draw predictions on images"),
    "demo": ("expedite_d2.d2.comparison.demo", "compare every system, and show all on one page"),
    "convert": ("expedite_d2.d2.checkpoint.convert", "a training checkpoint as a file to ship"),
    "scenes": ("expedite_d2.d2.data.scenes.make", "make the embedded data set"),
}

# Those that also take `--model`, a model of another library instead of a config.
OF_MODELS = ("describe", "cost", "tune")


@cli
def main(argv: Sequence[str] | None = None) -> None:
    """Runs a verb; an error that was raised on purpose is one sentence and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="expedite-d2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Large vision transformers made faster at dense prediction, without training.",
        epilog="verbs:\n"
        + "\n".join(f"  {verb:<11}{purpose}" for verb, (_, purpose) in VERBS.items())
        + "\n\n'expedite-d2 VERB --help' tells more; describe, cost and tune also take --model, a "
        "model of timm or a directory of transformers: 'expedite-d2 cost --model NAME'. Models are "
        "trained, evaluated and compared by train_net.py.",
    )
    parser.add_argument("verb", choices=VERBS, metavar="VERB")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")
    args = parser.parse_args(argv)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    if args.verb in OF_MODELS and any(word.startswith("--model") for word in args.arguments):
        command_line.main(args.verb, args.arguments)
        return
    module, _ = VERBS[args.verb]
    importlib.import_module(module).main(args.arguments)


if __name__ == "__main__":
    main()
