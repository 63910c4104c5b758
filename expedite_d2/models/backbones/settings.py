"""Settings that every backbone reads alike."""

from __future__ import annotations

from typing import Any

from expedite_d2.hourglass import Reduction


def reduction_from_config(cfg: Any) -> Reduction | None:
    """What ``MODEL.EXPEDITE`` asks for; None where it is not enabled."""
    expedite = cfg.MODEL.EXPEDITE
    if not expedite.ENABLED:
        return None
    return Reduction(
        alpha=expedite.ALPHA,
        clusters=tuple(expedite.CLUSTERS),
        iterations=expedite.ITERATIONS,
        neighbourhood=expedite.NEIGHBOURHOOD,
        topk=expedite.TOPK,
        temperature=expedite.TEMPERATURE,
        reconstruction=expedite.RECONSTRUCTION,
    )
