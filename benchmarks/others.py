"""Times whole models of other libraries, plain against expedited, in one run.

    python -m benchmarks.others --models sam dinov3 --dtype float32

Weights are random: they do not change the work. The models are transformers' own classes as they
come: plain, whose encoders run with PyTorch's fused attention, the fastest exact form that they
have (required, not assumed), and expedited by one line, as it is and with `budget=0.5`. In half
types they run under autocast or converted as a whole, whichever is faster for the plain model.
Multiply-adds are those of the part that is timed, heads included; efficiency is the measured
speed-up divided by their ratio.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers
from tabulate import tabulate
from torch import Tensor

from benchmarks.common import DTYPES, Call, Recorder, measure, parser
from benchmarks.models import flattened
from benchmarks.other_models import OTHERS, Other
from expedite_d2 import expedite
from expedite_d2.adapters.registry import find_encoder
from expedite_d2.errors import cli
from expedite_d2.tools.cost import count_multiply_adds

# What each model is expedited with, by the share of the encoder's multiply-adds that it leaves.
SETTINGS: dict[str, dict[str, Any]] = {"70 %": {}, "50 %": {"budget": 0.5}}
# How a model runs in a half type: from float32 weights, or as a whole.
WHOLE, AUTOCAST, CONVERTED = "", "autocast", "whole model"


class Subject:
    """One of the models, plain and expedited on one set of weights.

    Args:
        other: which.
        args: of the command.

    Attributes:
        models: "plain", and each of `SETTINGS`.
        gflops: giga multiply-adds of each for one image, by part.
        parts: "" for the whole, and modules that are timed by themselves.
    """

    def __init__(self, other: Other, args: Any) -> None:
        self.other, self.args = other, args
        self.side = other.side[args.quick]
        self.parts = ("", *other.parts)
        torch.manual_seed(0)
        plain: Any = other.build(args.quick).to(args.device).eval().requires_grad_(False)
        attention = find_encoder(plain)[1].config._attn_implementation
        if attention != "sdpa":
            raise ValueError(f"the plain encoder must have the attention 'sdpa', got {attention!r}")
        held = {id(tensor): tensor for tensor in (*plain.parameters(), *plain.buffers())}
        self.models = {"plain": plain}
        for name, settings in SETTINGS.items():
            self.models[name] = expedite(copy.deepcopy(plain, dict(held)), **settings)
        self.gflops = {name: self._count(model) for name, model in self.models.items()}

    @torch.inference_mode()
    def _count(self, model: Any) -> dict[str, float]:
        """Runs a model for the first time; an output that is not finite is an error."""
        outputs: list[Tensor] = []
        count = count_multiply_adds(
            model,
            call=lambda **inputs: outputs.extend(flattened(model(**inputs))),
            **self.inputs(1),
        )
        if not all(tensor.isfinite().all() for tensor in outputs):
            raise ValueError("an output is not finite")
        return {part: count.total(part) / 1e9 for part in self.parts}

    def inputs(self, batch: int) -> dict[str, Tensor]:
        """Random images, and what goes with them."""
        given = {"pixel_values": torch.randn(batch, 3, self.side, self.side)}
        given |= self.other.inputs(batch)
        return {name: tensor.to(self.args.device) for name, tensor in given.items()}

    def call(self, name: str, part: str, batch: int, dtype: torch.dtype, form: str) -> Call:
        """A call of a model, or of a part of it."""
        model, inputs = self.models[name], self.inputs(batch)
        if part:
            model, inputs = model.get_submodule(part), {"pixel_values": inputs["pixel_values"]}
        if form == CONVERTED:
            inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        device = torch.device(self.args.device).type

        def call() -> Any:
            with torch.autocast(device, dtype, enabled=form == AUTOCAST):
                return model(**inputs)

        return call

    def measure(self, calls: Mapping[str, Call], rounds: int) -> dict[str, dict[str, float]]:
        """Times calls in turn."""
        warmup = 0 if self.args.device == "cpu" else 2  # on a CPU, all have run when counted
        quick = self.args.quick
        return measure(calls, self.args.device, rounds, warmup=warmup, quick=quick)

    def convert(self, dtype: torch.dtype) -> None:
        """Gives the models weights of a type, of which there is one copy."""
        for model in self.models.values():
            model.to(dtype)

    def take(self, batch: int, dtype: torch.dtype) -> str:
        """Makes the models run in an arithmetic in the form that is faster for the plain one.

        Returns:
            The form.
        """
        self.convert(torch.float32)
        if dtype == torch.float32:
            return WHOLE
        milliseconds = {}
        for form in (AUTOCAST, CONVERTED):
            if form == CONVERTED:
                self.convert(dtype)
            call = self.call("plain", "", batch, dtype, form)
            with contextlib.suppress(RuntimeError):  # a class that does not run in this form
                milliseconds[form] = self.measure({form: call}, 1)[form]["median"]
        form = min(milliseconds, key=milliseconds.__getitem__)
        if form == AUTOCAST:
            self.convert(torch.float32)
        return form

    def rows(self, batch: int, dtype: str) -> Iterator[dict[str, Any]]:
        """Measures every part in an arithmetic."""
        form = self.take(batch, DTYPES[dtype])
        for part in self.parts:
            calls = {n: self.call(n, part, batch, DTYPES[dtype], form) for n in self.models}
            times = self.measure(calls, self.args.rounds)
            costs = {name: self.gflops[name][part] for name in self.models}
            yield {"part": part or "model", "form": form, **compared(times, costs)}


def compared(
    times: Mapping[str, Mapping[str, float]], gflops: Mapping[str, float]
) -> dict[str, Any]:
    """What a row says of "plain" and of each expedited model beside it."""
    found: dict[str, dict[str, Any]] = {
        name: {"latency_ms": times[name], "gflops": gflops[name]} for name in times
    }
    plain = found.pop("plain")
    for one in found.values():
        speedup = 1 / one["latency_ms"]["ratio"]
        ratio = plain["gflops"] / one["gflops"]
        one |= {"speedup": speedup, "ratio_of_multiplyadds": ratio, "efficiency": speedup / ratio}
    return {"plain": plain, "expedited": found}


@cli
def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--models", nargs="+", choices=OTHERS, default=list(OTHERS))
    arguments.add_argument("--batch", nargs="+", type=int, default=[1])
    arguments.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    args = arguments.parse_args(argv)
    recorder = Recorder("others", args, transformers=transformers.__version__)
    for name in args.models:
        if recorder.late(name):
            continue
        subject = Subject(OTHERS[name], args)
        for batch, dtype in itertools.product(args.batch, args.dtype):
            job = {"system": name, "size": [subject.side] * 2, "batch": batch, "dtype": dtype}
            if recorder.late(f"{name} batch {batch} {dtype}"):
                continue
            for row in subject.rows(batch, dtype):
                recorder.add({**job, **row})
    recorder.finish(table(recorder.results))


def arithmetic(row: Mapping[str, Any]) -> str:
    """The type of a result, what the models ran in, and their form in it."""
    return ", ".join(filter(None, (row["dtype"], row.get("mode"), row["form"])))


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """One line per settings of a result."""
    rows = [
        {
            "model": OTHERS[row["system"]].title,
            "part": row["part"],
            "size": "x".join(map(str, row["size"])),
            "batch": row["batch"],
            "arithmetic": arithmetic(row),
            "settings": settings,
            "plain ms": row["plain"]["latency_ms"]["median"],
            "expedited ms": one["latency_ms"]["median"],
            "speed-up": one["speedup"],
            "multiply-adds": one["ratio_of_multiplyadds"],
            "efficiency": one["efficiency"],
        }
        for row in results
        for settings, one in row["expedited"].items()
    ]
    return tabulate(rows, headers="keys", floatfmt=".4g")


if __name__ == "__main__":
    main()
