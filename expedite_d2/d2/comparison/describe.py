"""The blocks of a config's encoder, plain and expedited, without weights.

expedite-d2 describe --config-file F [--size H W] [KEY VALUE ...]
"""

from __future__ import annotations

from collections.abc import Sequence

from expedite_d2.d2.comparison.cost import meta_model
from expedite_d2.d2.config import load_config
from expedite_d2.d2.config.command_line import config_parser
from expedite_d2.tools import describe
from expedite_d2.tools.command_line import add_size


def main(argv: Sequence[str]) -> None:
    """Print tokens and multiply-adds of each block."""
    parser = config_parser("describe", "Tokens and multiply-adds, block by block.", models=True)
    add_size(parser)
    args = parser.parse_args(argv)
    print(describe(meta_model(load_config(args.config_file, args.opts)), args.size))
