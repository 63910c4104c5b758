"""Large vision transformers made faster at dense prediction, without fine-tuning.

Importing the package puts its backbones and meta-architectures into Detectron2's registries.
"""

from __future__ import annotations

from expedite_d2 import models
from expedite_d2.adapters import (
    Family,
    expedite,
    families,
    is_expedited,
    register_family,
    restore,
)
from expedite_d2.reducers import (
    Cluster,
    Clustering,
    Reduction,
    clustering_of,
    reconstruct,
    reduce,
)
from expedite_d2.tools import describe

__version__ = "0.1.0"

__all__ = [
    "Cluster",
    "Clustering",
    "Family",
    "Reduction",
    "clustering_of",
    "describe",
    "expedite",
    "families",
    "is_expedited",
    "models",
    "reconstruct",
    "reduce",
    "register_family",
    "restore",
]
