"""Large vision transformers made faster at dense prediction, without fine-tuning.

This is the library, which needs torch alone; the Detectron2 project that stands on it is
``expedite_d2.d2``.
"""

from __future__ import annotations

from expedite_d2.adapters import (
    Family,
    families,
    is_expedited,
    register_family,
    restore,
)
from expedite_d2.reducers import (
    Cluster,
    Clustering,
    Merge,
    Reduction,
    clustering_of,
    reconstruct,
    reduce,
)
from expedite_d2.tools.calibrate import calibrate
from expedite_d2.tools.describe import describe
from expedite_d2.tools.expedite import expedite, expedited
from expedite_d2.tools.tune import tune

__version__ = "0.1.0"

__all__ = [
    "Cluster",
    "Clustering",
    "Family",
    "Merge",
    "Reduction",
    "calibrate",
    "clustering_of",
    "describe",
    "expedite",
    "expedited",
    "families",
    "is_expedited",
    "reconstruct",
    "reduce",
    "register_family",
    "restore",
    "tune",
]
