"""What large maps alone run through: networks in parts, and padding that is not projected."""

from __future__ import annotations

import math

import pytest
import torch
from swin_cases import images, tiny
from torch import Tensor, nn

from expedite_d2.d2.modeling import in_parts as module
from expedite_d2.d2.modeling.backbone import swin_windows
from expedite_d2.d2.modeling.in_parts import in_parts


def test_parts_are_the_whole_at_inference_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = nn.Linear(4, 4), torch.randn(2, 21, 4)
    sizes: list[int] = []

    def run(part: Tensor) -> Tensor:
        sizes.append(part.shape[1])
        return network(part)

    whole = network(x)
    monkeypatch.setattr(module, "_AT_A_TIME", 2 * 8 * 5)
    with torch.no_grad():
        torch.testing.assert_close(in_parts(run, x, hidden=8), whole)
    assert sizes == [5, 5, 5, 5, 1]
    sizes.clear()
    torch.testing.assert_close(in_parts(run, x, hidden=8), whole)
    assert sizes == [21]  # whose gradients keep all of it anyway


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_blocks_in_parts_are_whole_blocks(
    version: int, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(version=version, drop_path_rate=0.5).double().train(training)
    outputs = []
    for numbers in (2**21, 500):
        monkeypatch.setattr(module, "_AT_A_TIME", numbers)
        torch.manual_seed(1)  # of the paths that are dropped in training, each for a whole map
        with torch.no_grad():
            outputs.append(model(images(70, 134).double()))
    for name, value in outputs[0].items():
        torch.testing.assert_close(outputs[1][name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("version", [1, 2])
def test_padding_may_be_projected_or_not(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = tiny(version=version), images(70, 134)
    outputs = []
    with torch.no_grad():
        for much in (0.0, math.inf):
            monkeypatch.setattr(swin_windows, "MUCH_PADDING", much)
            outputs.append(model(x))
    for name, value in outputs[0].items():
        torch.testing.assert_close(outputs[1][name], value, rtol=1e-4, atol=1e-5)
