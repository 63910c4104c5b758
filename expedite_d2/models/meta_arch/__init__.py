"""Meta-architectures, registered in Detectron2's ``META_ARCH_REGISTRY``."""

from expedite_d2.models.meta_arch.dpt import ExpediteDPT
from expedite_d2.models.meta_arch.htc import ExpediteHTC
from expedite_d2.models.meta_arch.mask2former import ExpediteMask2Former
from expedite_d2.models.meta_arch.panoptic_fpn import ExpeditePanopticFPN
from expedite_d2.models.meta_arch.segmenter import ExpediteSegmenter

__all__ = [
    "ExpediteDPT",
    "ExpediteHTC",
    "ExpeditePanopticFPN",
    "ExpediteMask2Former",
    "ExpediteSegmenter",
]
