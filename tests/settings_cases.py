"""Settings of tests, in short."""

from __future__ import annotations

from typing import Any

from expedite_d2.reducers import Cluster, Reduction


def clustered(alpha: Any, clusters: Any, mode: Any = "residual", **settings: Any) -> Reduction:
    """Settings of one clustering."""
    return Reduction((Cluster(alpha, clusters, **settings),), mode)
