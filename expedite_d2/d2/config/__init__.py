"""Configuration: the keys, their rules, and how files are loaded."""

from expedite_d2.d2.config.keys import add_expedite_config
from expedite_d2.d2.config.loading import (
    PROJECT,
    WEIGHTS_PREFIX,
    find_config,
    find_weights,
    load_config,
)

__all__ = [
    "PROJECT",
    "WEIGHTS_PREFIX",
    "add_expedite_config",
    "find_config",
    "find_weights",
    "load_config",
]
