"""Meta-architectures, registered in Detectron2's ``META_ARCH_REGISTRY``."""

from expedite_d2.models.meta_arch.mask2former import ExpediteMask2Former

__all__ = ["ExpediteMask2Former"]
