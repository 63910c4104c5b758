"""Meta-architectures, registered in Detectron2's ``META_ARCH_REGISTRY``."""

from expedite_d2.d2.modeling.meta_arch.dpt import ExpeditedDPT
from expedite_d2.d2.modeling.meta_arch.htc import ExpeditedHTC
from expedite_d2.d2.modeling.meta_arch.mask2former import ExpeditedMask2Former
from expedite_d2.d2.modeling.meta_arch.panoptic_fpn import ExpeditedPanopticFPN
from expedite_d2.d2.modeling.meta_arch.segmenter import ExpeditedSegmenter

__all__ = [
    "ExpeditedDPT",
    "ExpeditedHTC",
    "ExpeditedPanopticFPN",
    "ExpeditedMask2Former",
    "ExpeditedSegmenter",
]
