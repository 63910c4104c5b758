"""What tests of several parts share."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

# Before torch is imported. Workers of pytest-xdist share the cores: threads of one would only wait
# for those of another, as would the processes that inductor starts to compile in.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


@pytest.fixture
def unchanged_logger() -> Iterator[None]:
    """The benchmarks' commands silence the package's messages in their process: here, in ours."""
    logger = logging.getLogger("expedite_d2")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(scope="module")
def mask2former_swin() -> Iterator[ModuleType]:
    """Mask2Former's file of its Swin, with `D2SwinTransformer` registered for as long."""
    pytest.importorskip("detectron2", reason="needs the real Detectron2")
    from expedite_d2.d2 import BACKBONE_REGISTRY, PROVIDER

    if PROVIDER != "detectron2":
        pytest.skip("the stand-in is forced")
    root = os.environ.get("MASK2FORMER_ROOT")
    if not root:
        pytest.skip("MASK2FORMER_ROOT does not point to a clone of Mask2Former")
    # The file alone: the package wants its compiled operator, and registers its data sets.
    name = "mask2former.modeling.backbone.swin"
    spec = importlib.util.spec_from_file_location(
        name, Path(root, *name.split(".")).with_suffix(".py")
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    yield module
    BACKBONE_REGISTRY._obj_map.pop("D2SwinTransformer")
    del sys.modules[name]
