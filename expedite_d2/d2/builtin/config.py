"""Config node with Detectron2's file rules, and constructors that accept a config."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

from fvcore.common.config import CfgNode as _CfgNode
from iopath.common.file_io import g_pathmgr

from expedite_d2.d2.builtin.defaults import DEFAULTS


class CfgNode(_CfgNode):
    """fvcore's config node, which knows ``_BASE_``, with the checks of Detectron2's."""

    def merge_from_file(self, cfg_filename: str, allow_unsafe: bool = True) -> None:
        """Merge a YAML file and its ``_BASE_`` files into this config.

        Args:
            cfg_filename: path of the file.
            allow_unsafe: accept YAML tags that run Python, as official configs use them; a warning
                is logged then. Read a file from elsewhere before merging it.
        """
        if not g_pathmgr.isfile(cfg_filename):
            raise FileNotFoundError(f"config file {cfg_filename} does not exist")
        loaded = type(self)(self.load_yaml_with_base(cfg_filename, allow_unsafe=allow_unsafe))
        version = loaded.get("VERSION", self.VERSION)
        if version != self.VERSION:
            raise ValueError(
                f"{cfg_filename}: config files must be of VERSION {self.VERSION}, got {version}"
            )
        self.merge_from_other_cfg(loaded)


def get_cfg() -> CfgNode:
    """A fresh copy of Detectron2's default config."""
    return CfgNode(copy.deepcopy(DEFAULTS))


def configurable(
    init_func: Callable[..., Any] | None = None,
    *,
    from_config: Callable[..., dict[str, Any]] | None = None,
) -> Callable[..., Any]:
    """Let a constructor or a function also be called with a config.

    On ``__init__``: the class has a classmethod ``from_config(cfg, …)`` that returns the explicit
    arguments; ``Class(cfg, …)`` calls it, ``Class(a=…, b=…)`` does not. On a function:
    ``@configurable(from_config=…)``. Keywords that ``from_config`` does not take override its
    result.
    """
    if init_func is not None:
        if not inspect.isfunction(init_func) or init_func.__name__ != "__init__":
            raise TypeError(f"@configurable without arguments decorates __init__, got {init_func}")

        @functools.wraps(init_func)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            translate = getattr(type(self), "from_config", None)
            if translate is None:
                raise AttributeError(f"{type(self).__name__} needs a classmethod 'from_config'")
            if not inspect.ismethod(translate):
                raise TypeError(f"{type(self).__name__}.from_config must be a classmethod")
            if _has_config(args, kwargs):
                init_func(self, **_explicit_arguments(translate, args, kwargs))
            else:
                init_func(self, *args, **kwargs)

        return init

    if from_config is None:
        return configurable
    translate_call = from_config

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if _has_config(args, kwargs):
                return function(**_explicit_arguments(translate_call, args, kwargs))
            return function(*args, **kwargs)

        call.from_config = translate_call  # type: ignore[attr-defined]
        return call

    return decorate


def _has_config(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return isinstance(args[0] if args else kwargs.get("cfg"), _CfgNode)


def _explicit_arguments(
    from_config: Callable[..., dict[str, Any]], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    parameters = inspect.signature(from_config).parameters
    if next(iter(parameters), None) != "cfg":
        raise TypeError(f"{from_config.__qualname__} must take 'cfg' as its first argument")
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if any(parameter.kind in variadic for parameter in parameters.values()):
        return from_config(*args, **kwargs)
    taken = {name: value for name, value in kwargs.items() if name in parameters}
    overrides = {name: value for name, value in kwargs.items() if name not in parameters}
    return {**from_config(*args, **taken), **overrides}
