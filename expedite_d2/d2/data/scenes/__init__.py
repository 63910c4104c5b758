"""The embedded data set: procedural scenes with exact masks, classes and metric depth."""

from __future__ import annotations

from expedite_d2.d2.data.scenes.render import STUFF_CLASSES, THING_CLASSES, Scene, render_scene
from expedite_d2.d2.data.scenes.writer import cache_root, ensure_split

__all__ = [
    "STUFF_CLASSES",
    "THING_CLASSES",
    "Scene",
    "cache_root",
    "ensure_split",
    "render_scene",
]
