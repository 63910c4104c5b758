"""Boxes, masks, the objects of an image, and batches of images of different sizes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import masks_to_boxes


class Boxes:
    """Axis-aligned boxes of one image.

    Args:
        tensor: (N, 4), rows (x0, y0, x1, y1) in pixels; kept as float32.
    """

    def __init__(self, tensor: Any) -> None:
        tensor = torch.as_tensor(tensor).to(torch.float32)
        if tensor.numel() == 0:
            tensor = tensor.reshape(-1, 4)
        assert tensor.dim() == 2 and tensor.size(-1) == 4, (
            f"Boxes: expected a tensor of shape (N, 4), got {list(tensor.shape)}"
        )
        self.tensor = tensor

    def clone(self) -> Boxes:
        """A copy that shares no memory."""
        return Boxes(self.tensor.clone())

    def to(self, device: torch.device | str) -> Boxes:
        """The boxes on another device; they stay float32."""
        return Boxes(self.tensor.to(device=device))

    def area(self) -> Tensor:
        """Area of every box, (N,)."""
        return (self.tensor[:, 2:] - self.tensor[:, :2]).prod(dim=1)

    def clip(self, box_size: tuple[int, int]) -> None:
        """Move all corners, in place, into an image of (height, width)."""
        assert torch.isfinite(self.tensor).all(), "Boxes: coordinates must be finite"
        height, width = box_size
        x = self.tensor[:, 0::2].clamp(min=0, max=width)
        y = self.tensor[:, 1::2].clamp(min=0, max=height)
        self.tensor = torch.stack((x[:, 0], y[:, 0], x[:, 1], y[:, 1]), dim=-1)

    def nonempty(self, threshold: float = 0.0) -> Tensor:
        """Which boxes have both sides longer than ``threshold``, (N,) bool."""
        return ((self.tensor[:, 2:] - self.tensor[:, :2]) > threshold).all(dim=1)

    @classmethod
    def cat(cls, boxes_list: Sequence[Boxes]) -> Boxes:
        """All boxes of a list, one after the other."""
        if not boxes_list:
            return cls(torch.empty(0))
        return cls(torch.cat([boxes.tensor for boxes in boxes_list]))

    @property
    def device(self) -> torch.device:
        """Device of the coordinates."""
        return self.tensor.device

    def __getitem__(self, item: Any) -> Boxes:
        if isinstance(item, int):
            return Boxes(self.tensor[item].view(1, -1))
        return Boxes(self.tensor[item])

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.tensor

    def __repr__(self) -> str:
        return f"Boxes({self.tensor})"


class BitMasks:
    """Masks of the objects of one image.

    Args:
        tensor: (N, H, W), anything that can become bool.
    """

    def __init__(self, tensor: Tensor | np.ndarray) -> None:
        self.tensor = torch.as_tensor(tensor).to(torch.bool)
        assert self.tensor.dim() == 3, (
            f"BitMasks: expected a tensor of shape (N, H, W), got {list(self.tensor.shape)}"
        )
        self.image_size = self.tensor.shape[1:]

    def to(self, *args: Any, **kwargs: Any) -> BitMasks:
        """The masks on another device."""
        return BitMasks(self.tensor.to(*args, **kwargs))

    @property
    def device(self) -> torch.device:
        """Device of the masks."""
        return self.tensor.device

    def nonempty(self) -> Tensor:
        """Which masks have a pixel, (N,) bool."""
        return self.tensor.flatten(1).any(dim=1)

    def get_bounding_boxes(self) -> Boxes:
        """Tightest box around every mask, zeros where it is empty; on the CPU, as Detectron2's."""
        boxes = torch.zeros(len(self), 4)
        filled = self.nonempty().cpu()
        # torchvision names the last pixel inside, a box the first one outside.
        boxes[filled] = masks_to_boxes(self.tensor.cpu()[filled]) + torch.tensor([0, 0, 1, 1])
        return Boxes(boxes)

    @staticmethod
    def cat(bitmasks_list: Sequence[BitMasks]) -> BitMasks:
        """All masks of a list, which must be of the same image size."""
        return BitMasks(torch.cat([masks.tensor for masks in bitmasks_list]))

    def __getitem__(self, item: Any) -> BitMasks:
        if isinstance(item, int):
            return BitMasks(self.tensor[item].unsqueeze(0))
        return BitMasks(self.tensor[item])

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.tensor

    def __repr__(self) -> str:
        return f"BitMasks(num_instances={len(self)})"


class Instances:
    """The objects of one image: fields, all of the same length, that are indexed together.

    Args:
        image_size: (height, width).
        kwargs: fields to begin with.
    """

    _image_size: tuple[int, int]
    _fields: dict[str, Any]

    def __init__(self, image_size: tuple[int, int], **kwargs: Any) -> None:
        self._image_size = image_size
        self._fields = {}
        for name, value in kwargs.items():
            self.set(name, value)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width)."""
        return self._image_size

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            self.set(name, value)

    def __getattr__(self, name: str) -> Any:
        # "_fields" itself is asked for before it exists, by copy and pickle.
        if name == "_fields" or name not in self._fields:
            raise AttributeError(f"Instances: there is no field '{name}'")
        return self._fields[name]

    def set(self, name: str, value: Any) -> None:
        """Set a field; its length must be that of the other fields."""
        if self._fields:
            assert len(value) == len(self), (
                f"Instances: field '{name}' must have {len(self)} entries, got {len(value)}"
            )
        self._fields[name] = value

    def has(self, name: str) -> bool:
        """Whether there is such a field."""
        return name in self._fields

    def remove(self, name: str) -> None:
        """Take a field away."""
        del self._fields[name]

    def get(self, name: str) -> Any:
        """A field by its name."""
        return self._fields[name]

    def get_fields(self) -> dict[str, Any]:
        """All fields by name: the dict itself, not a copy."""
        return self._fields

    def to(self, *args: Any, **kwargs: Any) -> Instances:
        """A copy whose fields were moved by their own ``to``, where they have one."""
        moved = Instances(self._image_size)
        for name, value in self._fields.items():
            moved.set(name, value.to(*args, **kwargs) if hasattr(value, "to") else value)
        return moved

    def __getitem__(self, item: Any) -> Instances:
        if type(item) is int:
            if not -len(self) <= item < len(self):
                raise IndexError(f"Instances: index {item} is out of range for {len(self)} objects")
            # A slice keeps the first axis, also for lists.
            item = slice(item, None, len(self))
        chosen = Instances(self._image_size)
        for name, value in self._fields.items():
            chosen.set(name, value[item])
        return chosen

    def __len__(self) -> int:
        for value in self._fields.values():
            return len(value)
        raise NotImplementedError("Instances: without a field there is no length")

    def __iter__(self) -> Iterator[Instances]:
        raise NotImplementedError("Instances cannot be iterated over, index them")

    @staticmethod
    def cat(instance_lists: Sequence[Instances]) -> Instances:
        """The objects of several ``Instances`` of the same image size and the same fields."""
        assert instance_lists, "Instances.cat: expected at least one element"
        first = instance_lists[0]
        if len(instance_lists) == 1:
            return first
        sizes = {tuple(instances.image_size) for instances in instance_lists}
        assert len(sizes) == 1, f"Instances.cat: expected one image size, got {sorted(sizes)}"
        joined = Instances(first.image_size)
        for name, sample in first.get_fields().items():
            values = [instances.get(name) for instances in instance_lists]
            if isinstance(sample, Tensor):
                joined.set(name, torch.cat(values))
            elif isinstance(sample, list):
                joined.set(name, list(itertools.chain(*values)))
            elif hasattr(type(sample), "cat"):
                joined.set(name, type(sample).cat(values))
            else:
                kind = type(sample).__name__
                raise ValueError(f"Instances.cat: field '{name}' of type {kind} cannot be joined")
        return joined

    def __repr__(self) -> str:
        height, width = self._image_size
        fields = ", ".join(f"{name}: {value}" for name, value in self._fields.items())
        return (
            f"Instances(num_instances={len(self)}, image_height={height}, image_width={width}, "
            f"fields=[{fields}])"
        )


class ImageList:
    """Images of different sizes in one tensor, padded at the right and at the bottom.

    Args:
        tensor: (B, …, H, W).
        image_sizes: (height, width) of every image without its padding.
    """

    def __init__(self, tensor: Tensor, image_sizes: list[tuple[int, int]]) -> None:
        self.tensor = tensor
        self.image_sizes = image_sizes

    def __len__(self) -> int:
        return len(self.image_sizes)

    def __getitem__(self, index: int) -> Tensor:
        height, width = self.image_sizes[index]
        return self.tensor[index, ..., :height, :width]

    def to(self, *args: Any, **kwargs: Any) -> ImageList:
        """The batch on another device or in another type."""
        return ImageList(self.tensor.to(*args, **kwargs), self.image_sizes)

    @property
    def device(self) -> torch.device:
        """Device of the batch."""
        return self.tensor.device

    @staticmethod
    def from_tensors(
        tensors: Sequence[Tensor],
        size_divisibility: int = 0,
        pad_value: float = 0.0,
        padding_constraints: dict[str, int] | None = None,
    ) -> ImageList:
        """Pad images to a common size.

        Args:
            tensors: each (…, H, W), alike but for H and W.
            size_divisibility: make the common height and width multiples of it, if above 1.
            pad_value: value of the padding.
            padding_constraints: ``square_size`` (if above 0, the side of a square to pad to) and
                ``size_divisibility`` (in place of the argument), both optional.
        """
        assert len(tensors) > 0, "ImageList.from_tensors: expected at least one image"
        shapes = {tuple(image.shape[:-2]) for image in tensors}
        assert len(shapes) == 1, (
            f"ImageList.from_tensors: images must agree but for H and W, got {sorted(shapes)}"
        )
        sizes = [(image.shape[-2], image.shape[-1]) for image in tensors]
        height, width = (max(side) for side in zip(*sizes, strict=True))
        constraints = padding_constraints or {}
        if constraints.get("square_size", 0) > 0:
            height = width = constraints["square_size"]
        stride = constraints.get("size_divisibility", size_divisibility)
        if stride > 1:
            height, width = -(-height // stride) * stride, -(-width // stride) * stride
        padded = [
            F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2]), value=pad_value)
            for image in tensors
        ]
        return ImageList(torch.stack(padded), sizes)
