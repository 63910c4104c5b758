"""Expediting models that are not ours: their encoder's last blocks run on clusters of its tokens.

Foreign classes are recognised by their names, so importing this imports no foreign library.
"""

from __future__ import annotations

from expedite_d2.patch.adapter import Adapter
from expedite_d2.patch.core import expedite, restore
from expedite_d2.patch.travel import clustering_of

__all__ = ["Adapter", "clustering_of", "expedite", "restore"]
