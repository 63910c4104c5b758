"""Fits the detail maps of an expedited encoder (see `reducers.correction`) by ridge regression."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from expedite_d2.adapters.hourglass import ATTRIBUTE
from expedite_d2.adapters.override import first_of
from expedite_d2.ops.observe import ObservedOperator
from expedite_d2.ops.token_reconstruct import token_reconstruct
from expedite_d2.reducers import Correction, Points, Reduction
from expedite_d2.reducers.correction import attach_correction, fingerprint

# The penalty, as a share of the mean squared detail.
RIDGE = 0.01


class Regression:
    """Sums of a ridge regression of rows y on rows x, and on a constant that is not penalised."""

    def __init__(self) -> None:
        self.products: Tensor | float = 0.0
        self.targets: Tensor | float = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Adds rows x (N, D) and y (N, C)."""
        x = torch.cat([x.float(), x.new_ones(len(x), 1, dtype=torch.float32)], dim=1)
        self.products = self.products + (x.T @ x).double()
        self.targets = self.targets + (x.T @ y.float()).double()

    def solve(self) -> tuple[Tensor, Tensor]:
        """Returns the matrix (C, D) and the constant (C,)."""
        assert isinstance(self.products, Tensor) and isinstance(self.targets, Tensor)
        penalty = torch.full_like(self.products.diagonal(), RIDGE)
        penalty *= self.products.diagonal()[:-1].mean()
        penalty[-1] = 0.0
        solution = torch.linalg.solve(self.products + penalty.diag(), self.targets)
        return solution[:-1].T, solution[-1]


class Subject:
    """An expedited encoder as the fit sees it.

    Args:
        encoder: expedited, a third party's or this project's own.

    Attributes:
        encoder: the module that holds the settings and the maps.
        blocks: its blocks.
        numbers: those whose outputs are reconstructed, in order.
    """

    def __init__(self, encoder: Any) -> None:
        changed = [module for module in encoder.modules() if ATTRIBUTE in vars(module)]
        self.encoder: Any = changed[0] if changed else encoder
        self._hourglass = vars(self.encoder).get(ATTRIBUTE)
        if self._hourglass is None:
            self.blocks = encoder.reducible_blocks()
            self.numbers = sorted(encoder.read_outs())
        else:
            self.blocks = self._hourglass.family.blocks(self.encoder)
            self.numbers = sorted(set(self._hourglass.span) & set(self._hourglass.full))

    @property
    def reduction(self) -> Reduction:
        """The settings; with the same steps they may be set."""
        return self.encoder.reduction

    @reduction.setter
    def reduction(self, reduction: Reduction) -> None:
        self.encoder.reduction = reduction
        if self._hourglass is not None:  # an encoder of this project does it by itself
            attach_correction(self.encoder, reduction.correction)

    def tokens(self, out: Tensor) -> Tensor:
        """Returns a block's output at full resolution without prefixes, (tokens, C)."""
        if self._hourglass is not None:
            layout = Points(out.new_ones(out.shape[:2]))
            out = self._hourglass.family.tokens.split(self.encoder, out, layout)[1]
        return out.flatten(0, -2)

    @contextmanager
    def plain(self) -> Iterator[None]:
        """A context in which the encoder runs on all tokens."""
        if self._hourglass is None:
            reduction, self.encoder.reduction = self.encoder.reduction, None
            try:
                yield
            finally:
                self.encoder.reduction = reduction
            return
        for override in self._hourglass.overrides:
            override.active = False
        try:
            yield
        finally:
            for override in self._hourglass.overrides:
                override.active = True

    @contextmanager
    def outputs(self, numbers: Sequence[int]) -> Iterator[dict[int, list[Tensor]]]:
        """A context that keeps the outputs of blocks by their numbers, one for each pass."""
        kept: dict[int, list[Tensor]] = {number: [] for number in numbers}

        def keep(number: int, module: nn.Module, args: Any, out: Any) -> None:
            kept[number].append(first_of(out))

        hooks = [self.blocks[n].register_forward_hook(partial(keep, n)) for n in numbers]
        try:
            yield kept
        finally:
            for hook in hooks:
                hook.remove()

    def read(self, run: Callable[[], object]) -> list[int]:
        """Returns the blocks whose reconstructed outputs are read, and the last, in order.

        The next block goes on with the reduced tokens: whatever is computed from the reconstructed
        ones, somebody reads.
        """
        with self.outputs(self.numbers) as outputs, _Readers(outputs) as readers:
            run()
        return sorted({*readers.read, self.numbers[-1]})


class _Readers(TorchFunctionMode):
    """Notes which of some tensors are arguments of a computation."""

    def __init__(self, tensors: dict[int, list[Tensor]]) -> None:
        super().__init__()
        self.tensors = tensors
        self.read: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") != "__get__":  # of an attribute, such as the shape
            given = {id(leaf) for leaf in tree_leaves((args, kwargs or {}))}
            for number, tensors in self.tensors.items():
                if any(id(tensor) in given for tensor in tensors):
                    self.read.add(number)
        return func(*args, **(kwargs or {}))


class DetailMaps:
    """Collects, image by image, what the maps of an encoder are fitted to.

    Args:
        subject: the encoder, without a correction.
        numbers: the read-outs, by their blocks.
    """

    def __init__(self, subject: Subject, numbers: Sequence[int]) -> None:
        self.subject = subject
        self.regressions = {number: Regression() for number in numbers}
        self.images = 0

    def add(self, run: Callable[[], object]) -> None:
        """Runs the model on an image, plain and expedited, and adds the tokens of the encoder.

        The encoder may run several times on an image, such as once for each sliding window.
        """
        subject = self.subject
        operator = torch.ops.expedite_d2.token_reconstruct.default
        observed = ObservedOperator(operator, lambda call, out: (call, out))
        with subject.plain(), subject.outputs(list(self.regressions)) as full:
            run()
        with observed:
            run()
        undone = [(call, out) for call, out in observed.kept if call["tokens"] is not None]
        places = [step.at for step in subject.reduction.steps]
        steps = {number: sum(at <= number for at in places) for number in subject.numbers}
        passes = len(full[subject.numbers[-1]])
        if len(undone) != passes * sum(steps.values()):  # an image too small to be reduced
            return
        for turn in range(passes):
            for number, count in steps.items():
                calls, undone = undone[:count], undone[count:]
                if number in self.regressions:
                    self._add(number, calls, subject.tokens(full[number][turn]))
        self.images += 1

    def _add(self, number: int, calls: list[tuple[dict[str, Any], Tensor]], full: Tensor) -> None:
        """Adds one read-out: the calls undo its steps, the last one first."""
        details: list[Tensor] = []
        for call, _ in calls:
            at = (call["indices"], call["weights"])
            detail = call["tokens"] - token_reconstruct(call["centres"], *at)
            details = [detail, *(token_reconstruct(other, *at) for other in details)]
        rows = torch.cat([detail.flatten(0, -2) for detail in details], dim=1)
        residual = calls[-1][1].flatten(0, -2)
        self.regressions[number].add(rows, full.float() - residual.float())

    def solve(self) -> Correction:
        """Returns the maps."""
        maps = {}
        for number, regression in self.regressions.items():
            matrix, constant = regression.solve()
            maps[number] = (torch.stack(matrix.split(len(constant), dim=1)), constant)
        weights = fingerprint(self.subject.encoder)
        assert weights is not None  # images were run
        return Correction(maps, weights)
