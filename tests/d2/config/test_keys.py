"""Every key is obeyed, refused, or listed as one that nothing here reads."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

import expedite_d2.d2
from expedite_d2.d2 import (
    BACKBONE_REGISTRY,
    Backbone,
    CfgNode,
    ShapeSpec,
    build_backbone,
    build_model,
)
from expedite_d2.d2.config import load_config
from expedite_d2.d2.config.keys import KEYS, UNREAD_KEYS
from expedite_d2.d2.modeling.backbone import ExpeditedSwinTransformer
from expedite_d2.d2.modeling.backbone.expedited import SwinTransformer, ViT

D2 = Path(expedite_d2.d2.__file__).parent
MODELS = Path(__file__).parents[1] / "modeling"


class Reads(ast.NodeVisitor):
    """Dotted keys that a module takes from ``cfg``, also through names that it gives to nodes."""

    def __init__(self, module: ast.Module) -> None:
        self.keys: set[str] = set()
        self.nodes: dict[str, set[str]] = defaultdict(set, {"cfg": {""}})
        names = -1
        while names < (names := sum(map(len, self.nodes.values()))):  # names of named nodes
            self.visit(module)

    def paths(self, node: ast.AST) -> set[str]:
        """What an expression may be below ``cfg``; nothing if it is something else."""
        known = self.nodes.get(ast.unparse(node), set())
        match node:
            case ast.Attribute(value, name) | ast.Subscript(value, ast.Constant(str(name))):
                return known | {f"{path}.{name}".lstrip(".") for path in self.paths(value)}
        return known

    def visit_Assign(self, assign: ast.Assign) -> None:
        for target in assign.targets:
            pairs = [(target, assign.value)]
            if isinstance(target, ast.Tuple) and isinstance(assign.value, ast.Tuple):
                pairs = list(zip(target.elts, assign.value.elts, strict=True))
            for name, value in pairs:
                if not ast.unparse(name).startswith("cfg"):
                    self.nodes[ast.unparse(name)] |= self.paths(value)
        self.generic_visit(assign)

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, (ast.Attribute, ast.Subscript)):
            self.keys |= self.paths(node)
        # setting(cfg, "A.B")
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setting":
            if isinstance(node.args[1], ast.Constant):  # else from a list of keys
                self.keys.add(node.args[1].value)
        super().visit(node)


def keys_read() -> set[str]:
    files = [path for path in D2.rglob("*.py") if "config" not in path.relative_to(D2).parts]
    return set().union(*(Reads(ast.parse(path.read_text())).keys for path in files))


READ = keys_read()


def test_keys_that_nothing_reads_are_known_as_such() -> None:
    assert {key.name for key in UNREAD_KEYS} & READ == set()
    assert all(key.reason for key in UNREAD_KEYS)


@pytest.mark.parametrize("name", sorted({key.name for key in KEYS} - READ))
def test_key_that_is_not_obeyed_is_refused(name: str) -> None:
    """The same value as ever is accepted, another is not."""
    cfg = load_config(MODELS / "mask2former_tiny.yaml")
    *parents, leaf = name.split(".")
    node = cfg
    for parent in parents:
        node = node[parent]
    node[leaf] = f"other {node[leaf]}" if isinstance(node[leaf], str) else node[leaf] + 1
    with pytest.raises(ValueError, match=f"^{name} must be .*, got "):
        build_model(cfg)


def test_both_decoders_of_mask2former_have_the_heads_of_one_key() -> None:
    """As in Mask2Former, whose pixel decoder does not read the key that is named after it."""
    cfg = load_config(MODELS / "mask2former_tiny.yaml", ["MODEL.MASK_FORMER.NHEADS", 2])
    model = build_model(cfg)
    assert model.pixel_decoder.encoder.layers[0].self_attn.n_heads == 2
    assert model.transformer_module.decoder.layers[0].self_attn.num_heads == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("WINDOW_SIZE", 3),
        ("WINDOW_BLOCKS", [0]),
        ("USE_REL_POS", True),
        ("PRETRAIN_IMG_SIZE", 64),
    ],
)
def test_keys_of_detectron2s_vit_are_refused_by_ours(key: str, value: object) -> None:
    cfg = load_config(MODELS / "segmenter_tiny.yaml", [f"MODEL.VIT.{key}", value])
    with pytest.raises(ValueError, match=f"MODEL.VIT.{key} must be .* for ExpeditedViT, which has"):
        build_backbone(cfg)


@pytest.mark.parametrize(
    ("builder", "key", "value"),
    [
        (ViT, "MODEL.VIT.NAME", "vit_tiny_patch16_224"),
        (ViT, "MODEL.VIT.DROP_RATE", 0.1),
        (ViT, "MODEL.VIT.ATTN_DROP_RATE", 0.1),
        (ViT, "MODEL.VIT.POS_INTERPOLATION", "bilinear"),
        (ViT, "MODEL.VIT.OUT_BLOCKS", [0]),
        (SwinTransformer, "MODEL.SWIN.VERSION", 2),
        (SwinTransformer, "MODEL.SWIN.PRETRAINED_WINDOW_SIZES", [2, 2, 2, 2]),
    ],
)
def test_keys_of_ours_are_refused_by_detectron2s_backbones(
    builder: Callable[[CfgNode, ShapeSpec], Backbone], key: str, value: object
) -> None:
    cfg = load_config(MODELS / "detector_tiny.yaml", [key, value])
    message = f"{key} must be .* for Detectron2's {builder.__name__}, which has no such setting"
    with pytest.raises(ValueError, match=message):
        builder(cfg, ShapeSpec(channels=3))


def test_enabled_is_refused_by_a_backbone_that_does_not_read_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = {"Plain": lambda cfg, shape: ExpeditedSwinTransformer()}
    monkeypatch.setattr(BACKBONE_REGISTRY, "_obj_map", {**dict(BACKBONE_REGISTRY), **plain})
    opts = ["MODEL.META_ARCHITECTURE", "ExpeditedHTC", "MODEL.EXPEDITE.ENABLED", True]
    opts += ["MODEL.BACKBONE.NAME", "Plain"]
    with pytest.raises(ValueError, match="ENABLED must be False for Plain, which does not read it"):
        build_model(load_config(MODELS / "detector_tiny.yaml", opts))
