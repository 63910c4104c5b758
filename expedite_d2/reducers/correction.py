"""The detail map: what the blocks would have made of what a step took from the tokens.

A token's own detail d, its difference from the mean that stood for it, passes the reduced blocks
unchanged. A linear map of it, B d + b, stands in for what they would have added. It is fitted to an
encoder by linear algebra on a few unlabelled images (`calibrate`), one for each read-out: a block
whose output is read, or the end of the span.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Non-persistent buffers of an encoder: the maps move with it, and its state dict stays as it is.
_BUFFER = "_expedite_d2_detail_"

# Half types change sums of weights by less.
_TOLERANCE = 1e-2


class DetailMap(NamedTuple):
    """The map of one step at one read-out.

    Attributes:
        weight: B, (C, C).
        bias: (C,), or None.
    """

    weight: Tensor
    bias: Tensor | None

    def of(self, details: Tensor) -> Tensor:
        """Returns B d + b of details (..., C)."""
        bias = None if self.bias is None else self.bias.to(details.dtype)
        return F.linear(details, self.weight.to(details.dtype), bias)


class Correction:
    """The detail maps of an encoder, compared and hashed by their content.

    Attributes:
        maps: of each read-out, by the number of its block: B of each step before it, (K, C, C), and
            b, (C,); float32.
        fingerprint: (tensors,) float64, what the encoder's weights are recognised by.
    """

    def __init__(self, maps: Mapping[int, tuple[Tensor, Tensor]], fingerprint: Tensor) -> None:
        self.maps = {
            number: (weights.detach().float().cpu(), bias.detach().float().cpu())
            for number, (weights, bias) in sorted(maps.items())
        }
        self.fingerprint = fingerprint.detach().double().cpu()

    @cached_property
    def digest(self) -> str:
        """Hexadecimal digits that tell one content from another."""
        digest = hashlib.sha256()
        for name, tensor in self.tensors().items():
            digest.update(f"{name} {tuple(tensor.shape)} ".encode())
            whole = tensor.contiguous()
            digest.update(ctypes.string_at(whole.data_ptr(), whole.nbytes))
        return digest.hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """Returns all tensors by name, as a file has them."""
        named = {"fingerprint": self.fingerprint}
        for number, (weights, bias) in self.maps.items():
            named |= {f"block{number}.weights": weights, f"block{number}.bias": bias}
        return named

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Correction:
        """The inverse of `tensors`.

        Raises:
            ValueError: other names or shapes.
        """
        left = dict(tensors)
        fingerprint = left.pop("fingerprint", torch.empty(0, 0))
        maps: dict[int, tuple[Tensor, Tensor]] = {}
        for name in list(left):
            block, _, kind = name.partition(".")
            number = block.removeprefix("block")
            if kind == "weights" and block != number and number.isdecimal():
                bias = left.pop(f"{block}.bias", torch.empty(0, 0))
                maps[int(number)] = (left.pop(name), bias)
        fits = [w.dim() == 3 and w.shape[1:] == b.shape * 2 for w, b in maps.values()]
        if left or not maps or fingerprint.dim() != 1 or not all(fits):
            raise ValueError(f"these are no detail maps: {', '.join(sorted(tensors)) or 'nothing'}")
        return cls(maps, fingerprint)

    def check_places(self, widths: Mapping[int, int]) -> None:
        """Requires maps of blocks whose outputs are reconstructed, and of their widths.

        Args:
            widths: channels of each of these blocks, by number.

        Raises:
            ValueError: another block or width.
        """
        for number, (_, bias) in self.maps.items():
            if number not in widths:
                raise ValueError(
                    "correction must be for blocks whose outputs are reconstructed, "
                    f"{', '.join(map(str, widths))}, got one for block {number}: calibrate again"
                )
            if len(bias) != widths[number]:
                raise ValueError(
                    f"correction must have the {widths[number]} channels of block {number}, got "
                    f"{len(bias)}: calibrate again"
                )

    def check(self, encoder: nn.Module) -> None:
        """Requires the weights that the maps were fitted to; weights on `meta` pass.

        Raises:
            ValueError: an encoder of other weights.
        """
        theirs = fingerprint(encoder)
        if theirs is None:
            return
        ours = self.fingerprint
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=_TOLERANCE):
            raise ValueError(
                f"the detail maps of these settings were fitted to other weights than those of "
                f"this {type(encoder).__name__}: calibrate again"
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Correction) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Correction(blocks {', '.join(map(str, self.maps))}; {self.digest[:8]})"


def fingerprint(encoder: nn.Module) -> Tensor | None:
    """Returns the mean magnitude of each weight that is not empty, (tensors,) float64.

    None on `meta`.
    """
    state = encoder.state_dict()
    tensors = [state[name].detach() for name in sorted(state)]
    weights = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    if any(weight.is_meta for weight in weights):
        return None
    return torch.tensor([weight.double().abs().mean().item() for weight in weights]).double()


def attach_correction(encoder: nn.Module, correction: Correction | None) -> None:
    """Puts the maps into an encoder, in place of those that are there.

    Weights that are loaded later are checked then, and the maps follow them to their device.
    """
    _fill(encoder, correction)
    hooks: dict[int, Any] = encoder._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if hook is _follow_weights]:
        del hooks[key]
    if correction is not None:
        encoder.register_load_state_dict_post_hook(_follow_weights)


def _fill(encoder: nn.Module, correction: Correction | None) -> None:
    """Makes buffers of the maps, beside the parameters and of their type."""
    for name in [name for name in encoder._buffers if name.startswith(_BUFFER)]:
        delattr(encoder, name)
    if correction is None:
        return
    like = next(encoder.parameters())
    for number, (weights, bias) in correction.maps.items():
        for name, tensor in (("weight", weights), ("bias", bias)):
            held = tensor.to(like.device, like.dtype, copy=True)
            encoder.register_buffer(f"{_BUFFER}{name}{number}", held, persistent=False)


def maps_at(encoder: nn.Module, number: int) -> list[DetailMap] | None:
    """Returns the maps of the steps before a read-out, first to last; None without."""
    weights = getattr(encoder, f"{_BUFFER}weight{number}", None)
    if weights is None:
        return None
    bias = getattr(encoder, f"{_BUFFER}bias{number}")
    return [DetailMap(weight, None if i else bias) for i, weight in enumerate(weights)]


def _follow_weights(encoder: Any, keys: Any) -> None:
    correction = encoder.reduction.correction
    if correction is not None:
        correction.check(encoder)
        _fill(encoder, correction)
