#!/usr/bin/env python
"""Train, evaluate or compare a model from a config, with Detectron2's command line.

python train_net.py --config-file FILE [--num-gpus N] [--resume] [KEY VALUE ...]
python train_net.py --config-file FILE --eval-only [--compare | --profile] [KEY VALUE ...]
python train_net.py --config-file FILE --eval-only --compare-with FILE ... [KEY VALUE ...]
torchrun --nproc-per-node N train_net.py --config-file FILE ...
"""

from __future__ import annotations

import argparse

from expedite_d2.d2 import build_model, default_argument_parser, launch
from expedite_d2.d2.comparison.compare import compare
from expedite_d2.d2.comparison.profile import profile
from expedite_d2.d2.comparison.settings import further_configs
from expedite_d2.d2.engine import build_trained_model, do_test, do_train, setup
from expedite_d2.errors import cli


def main(args: argparse.Namespace) -> None:
    cfg = setup(args)
    if args.compare:
        compare(cfg, further_configs(cfg, args.config_file, args.compare_with, args.opts))
    elif args.profile:
        profile(cfg)
    elif args.eval_only:
        do_test(cfg, build_trained_model(cfg))
    else:
        model = build_model(cfg)
        do_train(cfg, model, resume=args.resume)
        do_test(cfg, model)


@cli
def invoke_main() -> None:
    parser = default_argument_parser()
    parser.add_argument(
        "--compare",
        action="store_true",
        help="with --eval-only: evaluate baseline and expedited side by side on the same images",
    )
    parser.add_argument(
        "--compare-with",
        action="append",
        default=[],
        metavar="FILE",
        help="compare with the settings of this config of the same model, too (may be repeated); "
        "MODEL.EXPEDITE options of the command line apply to those of --config-file alone",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="with --eval-only: write where the time of a few images goes, as a trace and a table",
    )
    args = parser.parse_args()
    args.compare = args.compare or bool(args.compare_with)
    if args.compare and args.profile:
        parser.error("--compare times what --profile would slow: choose one of them")
    for option in ("compare", "profile"):
        if getattr(args, option) and not args.eval_only:
            parser.error(f"--{option} evaluates only: add --eval-only")
    if not args.config_file:
        parser.error("--config-file is required")
    if args.num_machines > 1 and args.dist_url == parser.get_default("dist_url"):
        # The default is this machine itself, where the others would wait for themselves.
        parser.error("--num-machines needs --dist-url tcp://HOST:PORT of the first machine")
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


if __name__ == "__main__":
    invoke_main()
