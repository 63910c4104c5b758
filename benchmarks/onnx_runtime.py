"""Times models of other libraries in ONNX Runtime, plain against expedited, in one run.

    python -m benchmarks.onnx_runtime --models depth_anything

Models, settings and multiply-adds are those of `benchmarks.others`; of SAM it is the encoder. Each
is exported to standard operators and translated to ONNX in float32. What ONNX Runtime makes of it
is compared with PyTorch's outputs before it is timed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import transformers
from torch import Tensor, nn

from benchmarks.common import Recorder, difference, parser
from benchmarks.models import flattened
from benchmarks.other_models import OTHERS
from benchmarks.others import Subject, compared, table
from expedite_d2.errors import cli
from expedite_d2.ops import decompositions

# Relative difference of the outputs to PyTorch's.
TOLERANCE = 1e-3


class Images(nn.Module):
    """A model as a function of images alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return tuple(flattened(self.model(pixel_values=pixel_values)))


class Session:
    """A model in ONNX Runtime.

    Args:
        model: the model, of images alone.
        images: of the size that it is made for.
        folder: where its file lies.

    Attributes:
        difference: the relative one (L2) to PyTorch's outputs, the greatest of them.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, images: Tensor, folder: Path) -> None:
        function, file = Images(model).eval(), folder / "model.onnx"
        program = torch.export.export(function, (images,)).run_decompositions(decompositions())
        torch.onnx.export(program, f=file, verbose=False)
        del program
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(file, options, ["CPUExecutionProvider"])
        self.inputs = {self.session.get_inputs()[0].name: images.numpy()}
        pairs = zip(map(torch.from_numpy, self()), function(images), strict=True)
        self.difference = max(difference(found, expected) for found, expected in pairs)
        if not self.difference < TOLERANCE:
            raise ValueError(
                f"outputs of ONNX Runtime and PyTorch must differ by less than {TOLERANCE}, got "
                f"{self.difference}"
            )

    def __call__(self) -> Any:
        return self.session.run(None, self.inputs)


def row_of(subject: Subject) -> dict[str, Any]:
    """Measures a model, or that part of it which takes images alone."""
    part, images = subject.parts[-1], subject.inputs(1)["pixel_values"]
    sessions = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in subject.models.items():
            own = Path(tempfile.mkdtemp(dir=folder))
            sessions[name] = Session(model.get_submodule(part), images, own)
        times = subject.measure(sessions, subject.args.rounds)
    return {
        "part": part or "model",
        "mode": "ONNX Runtime",
        "form": "",
        "differences": {name: session.difference for name, session in sessions.items()},
        **compared(times, {name: cost[part] for name, cost in subject.gflops.items()}),
    }


@cli
def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--models", nargs="+", choices=OTHERS, default=list(OTHERS))
    args = arguments.parse_args(argv)
    versions = {"transformers": transformers.__version__, "onnxruntime": onnxruntime.__version__}
    recorder = Recorder("others", args, **versions)
    for name in args.models:
        if recorder.late(name):
            continue
        subject = Subject(OTHERS[name], args)
        job = {"system": name, "size": [subject.side] * 2, "batch": 1, "dtype": "float32"}
        recorder.add({**job, **row_of(subject)})
    recorder.finish(table(recorder.results))


if __name__ == "__main__":
    main()
