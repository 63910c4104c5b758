"""Large vision transformers made faster at dense prediction, without fine-tuning.

Importing the package puts its backbones and meta-architectures into Detectron2's registries.
"""

from __future__ import annotations

from expedite_d2 import models
from expedite_d2.hourglass import Clustering, Reduction, reconstruct, reduce
from expedite_d2.patch import clustering_of, expedite, restore

__version__ = "0.1.0"

__all__ = [
    "Clustering",
    "Reduction",
    "clustering_of",
    "expedite",
    "models",
    "reconstruct",
    "reduce",
    "restore",
]
