"""Feature pyramid on any backbone: torchvision's network under Detectron2's names and contract.

"Feature Pyramid Networks for Object Detection", arXiv 1612.03144.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from expedite_d2.d2.config.keys import setting
from expedite_d2.d2.modeling.backbone.settings import OutputShapes
from expedite_d2.d2.provider import BACKBONE_REGISTRY, Backbone, CfgNode, ShapeSpec
from expedite_d2.reducers import Expeditable

GROUPS = 32  # groups of every GroupNorm, as in Detectron2


def normalisation(name: str, key: str) -> Callable[[int], nn.Module] | None:
    """Returns the layer that a ``NORM`` key names: "" for none, "GN" for GroupNorm.

    Raises:
        ValueError: another name; ``key`` is the config key, for the message.
    """
    if name not in ("", "GN"):
        raise ValueError(f"{key} must be '' or 'GN', got {name!r}")
    return partial(nn.GroupNorm, GROUPS) if name else None


class FeaturePyramid(FeaturePyramidNetwork):
    """Maps of one width at the strides of a backbone's outputs, and one of twice the last.

    Args:
        shapes: channels and stride of the backbone's outputs.
        in_features: names of the outputs to use, by rising stride; each stride is twice the last.
        out_channels: width of every map.
        norm: normalisation after each convolution, "" or "GN".

    Raises:
        ValueError: an output that the backbone does not have, or strides that do not double.
    """

    def __init__(
        self,
        shapes: Mapping[str, ShapeSpec],
        in_features: Sequence[str],
        out_channels: int,
        norm: str = "",
    ) -> None:
        missing = [name for name in in_features if name not in shapes]
        if missing or not in_features:
            raise ValueError(
                f"MODEL.FPN.IN_FEATURES must be outputs of the backbone, {list(shapes)}, "
                f"got {list(in_features)}"
            )
        layer = normalisation(norm, "MODEL.FPN.NORM")
        if layer is not None and out_channels % GROUPS:
            raise ValueError(
                f"MODEL.FPN.OUT_CHANNELS must be a multiple of {GROUPS} (the groups of "
                f"GroupNorm), got {out_channels}"
            )
        strides = [shapes[name].stride or 0 for name in in_features]
        levels = [stride.bit_length() - 1 for stride in strides]
        doubled = [strides[0] * 2**i for i in range(len(strides))]
        if strides != doubled or strides[0] != 2 ** levels[0]:
            raise ValueError(
                "MODEL.FPN.IN_FEATURES must have strides that are powers of two and double from "
                f"one to the next, got {strides}"
            )
        channels = [shapes[name].channels or 0 for name in in_features]
        super().__init__(channels, out_channels, LastLevelMaxPool(), layer)
        self.in_features = list(in_features)
        self.out_channels = out_channels
        names = [f"p{level}" for level in (*levels, levels[-1] + 1)]
        self.strides = dict(zip(names, [*strides, 2 * strides[-1]], strict=True))

    @classmethod
    def from_config(cls, cfg: CfgNode, shapes: Mapping[str, ShapeSpec]) -> FeaturePyramid:
        """Builds the pyramid that ``MODEL.FPN`` describes."""
        fpn = cfg.MODEL.FPN
        if fpn.FUSE_TYPE != "sum":
            raise ValueError(f"MODEL.FPN.FUSE_TYPE must be 'sum', got {fpn.FUSE_TYPE!r}")
        return cls(shapes, fpn.IN_FEATURES, fpn.OUT_CHANNELS, fpn.NORM)

    @property
    def size_divisibility(self) -> int:
        """Largest stride of the backbone's maps, so that each is exactly half of the one before."""
        return max(list(self.strides.values())[:-1])

    def output_shape(self) -> OutputShapes:
        """Channels and stride of each map."""
        return OutputShapes(
            self,
            {
                name: ShapeSpec(channels=self.out_channels, stride=stride)
                for name, stride in self.strides.items()
            },
        )

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        """The backbone's maps (B, C_i, H/s, W/s) -> "p2" … "p6", each (B, C, H/s, W/s)."""
        names = list(self.strides)
        maps = {
            name: features[source]
            for name, source in zip(names[:-1], self.in_features, strict=True)
        }
        pyramid = super().forward(maps)
        # torchvision names the map of its extra block "pool".
        return dict(zip(names, pyramid.values(), strict=True))


class PyramidBackbone(Backbone):
    """A backbone and its feature pyramid, as Detectron2's own meta-architectures expect it."""

    def __init__(self, bottom_up: Backbone, pyramid: FeaturePyramid) -> None:
        super().__init__()
        self.bottom_up = bottom_up
        self.fpn = pyramid

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> "p2" … "p6", each (B, C, H/s, W/s)."""
        return self.fpn(self.bottom_up(images))

    def output_shape(self) -> OutputShapes:
        """Channels and stride of each map."""
        return self.fpn.output_shape()

    @property
    def size_divisibility(self) -> int:
        """Multiple to which Detectron2 pads images: the bottom-up network's or the pyramid's."""
        return max(self.bottom_up.size_divisibility, self.fpn.size_divisibility)

    @property
    def padding_constraints(self) -> dict[str, int]:
        """``size_divisibility`` in the form that Detectron2's ImageList reads."""
        return {"size_divisibility": self.size_divisibility, "square_size": 0}


@BACKBONE_REGISTRY.register()
def build_expedited_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> PyramidBackbone:
    """Builds a feature pyramid on the backbone that ``MODEL.EXPEDITE.BACKBONE`` names.

    A backbone that does not itself read ``MODEL.EXPEDITE`` is built by ``ExpeditedBackbone``.

    Args:
        cfg: the whole config; ``MODEL.FPN`` describes the pyramid.
        input_shape: channels of the images.

    Raises:
        ValueError: no backbone is named, or ``MODEL.FPN`` does not fit it.
    """
    name = setting(cfg, "MODEL.EXPEDITE.BACKBONE")
    if not name:
        raise ValueError(
            "build_expedited_fpn_backbone needs the name of a registered backbone in "
            "MODEL.EXPEDITE.BACKBONE, e.g. ExpeditedSwinTransformer, got ''"
        )
    builder = BACKBONE_REGISTRY.get(name)
    if not (isinstance(builder, type) and issubclass(builder, Expeditable)):
        builder = BACKBONE_REGISTRY.get("ExpeditedBackbone")
    bottom_up = builder(cfg, input_shape)
    return PyramidBackbone(bottom_up, FeaturePyramid.from_config(cfg, bottom_up.output_shape()))
