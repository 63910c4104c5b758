"""What the command lines of verbs that need a config have in common."""

from __future__ import annotations

import argparse


def config_parser(verb: str, description: str) -> argparse.ArgumentParser:
    """A parser of ``--config-file FILE … [KEY VALUE …]``, for a verb of ``expedite-d2``.

    Args:
        verb: the verb.
        description: what it does, for ``--help``.

    Returns:
        The parser; it gives ``config_file`` and ``opts``, the overrides, which come last.
    """
    parser = argparse.ArgumentParser(prog=f"expedite-d2 {verb}", description=description)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML configuration")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides, at the end"
    )
    return parser
