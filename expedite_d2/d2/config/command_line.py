"""What the command lines of verbs that need a config have in common."""

from __future__ import annotations

import argparse


def config_parser(verb: str, description: str, models: bool = False) -> argparse.ArgumentParser:
    """A parser of ``--config-file FILE … [KEY VALUE …]``, for a verb of ``expedite-d2``.

    Args:
        verb: the verb.
        description: what it does, for ``--help``.
        models: whether the verb also takes a model of another library: see ``tools.command_line``.

    Returns:
        The parser; it gives ``config_file`` and ``opts``, the overrides, which come last.
    """
    instead = "a model of timm, or a directory of transformers, instead of a config"
    parser = argparse.ArgumentParser(
        prog=f"expedite-d2 {verb}",
        description=description,
        epilog=f"expedite-d2 {verb} --model NAME: {instead}" if models else None,
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML configuration")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides, at the end"
    )
    return parser
