"""The pages of docs/guides: their examples run, on tiny models with random weights."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import segment_anything
import torch
import transformers as hf
from family_cases.plain import CONFIG
from PIL import Image
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)

from expedite_d2 import is_expedited
from expedite_d2.adapters.core import expedited_encoders
from expedite_d2.d2 import PROVIDER
from expedite_d2.reducers import Reduction

ROOT = Path(__file__).parents[1]
GUIDES = ROOT / "docs/guides"
LINES = 60


def seeded(make: Callable[[], Any]) -> Callable[..., Any]:
    """A loader in the place of one that reads weights: whatever it is given, they are the same."""

    def load(*args: Any, **kwargs: Any) -> Any:
        torch.manual_seed(0)
        return make()

    return load


def mask2former() -> Any:
    swin = {"embed_dim": 16, "depths": [1, 1, 6, 1], "num_heads": [1, 2, 2, 4], "window_size": 6}
    stages = {"out_features": ["stage1", "stage2", "stage3", "stage4"], "image_size": 96}
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "num_queries": 5}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2}
    config = hf.Mask2FormerConfig(
        backbone_config=hf.SwinConfig(**swin, **stages), **sizes, **layers
    )
    return hf.Mask2FormerForUniversalSegmentation(config)


def depth_anything() -> Any:
    taps = {"out_indices": [1, 2, 3, 4], "reshape_hidden_states": False}
    config = hf.DepthAnythingConfig(
        backbone_config=hf.Dinov2Config(**{**CONFIG, "image_size": 32}, **taps),
        patch_size=4,
        reassemble_hidden_size=16,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=8,
    )
    return hf.DepthAnythingForDepthEstimation(config)


def sam() -> Any:
    vision = {
        "image_size": 32, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 4,
        "num_attention_heads": 2, "window_size": 6, "global_attn_indexes": [3],
        "output_channels": 16, "num_pos_feats": 8,
    }  # fmt: skip
    prompts = {"hidden_size": 16, "image_size": 32, "patch_size": 4, "mask_input_channels": 4}
    decoder = {"hidden_size": 16, "num_attention_heads": 2, "mlp_dim": 32}
    return hf.SamModel(
        hf.SamConfig(
            vision_config=vision,
            prompt_encoder_config=prompts,
            mask_decoder_config={**decoder, "iou_head_hidden_dim": 16},
        )
    )


def segment_anything_sam() -> Any:
    encoder = ImageEncoderViT(
        32, 4, 3, 16, 4, 2, out_chans=16, window_size=6, global_attn_indexes=(3,), use_rel_pos=True
    )
    transformer = TwoWayTransformer(depth=2, embedding_dim=16, num_heads=2, mlp_dim=32)
    return Sam(
        encoder,
        PromptEncoder(16, (8, 8), (32, 32), 4),
        MaskDecoder(transformer_dim=16, transformer=transformer, iou_head_hidden_dim=16),
    )


def square(name: str, side: int, **settings: Any) -> Any:
    return getattr(hf, name)(size={"height": side, "width": side}, **settings)


def sam_processor() -> Any:
    sizes = {"size": {"longest_edge": 32}, "pad_size": {"height": 32, "width": 32}}
    return hf.SamProcessor(hf.SamImageProcessor(**sizes, mask_size={"longest_edge": 8}))


#: Classes whose `from_pretrained` finds something tiny, for each page.
LOADED: dict[str, dict[str, Callable[[], Any]]] = {
    "mask2former": {
        "Mask2FormerForUniversalSegmentation": mask2former,
        "AutoImageProcessor": functools.partial(square, "Mask2FormerImageProcessor", 96),
    },
    "depth_anything": {
        "DepthAnythingForDepthEstimation": depth_anything,
        "AutoImageProcessor": functools.partial(
            square, "DPTImageProcessor", 32, keep_aspect_ratio=True, ensure_multiple_of=4
        ),
    },
    "export": {"DepthAnythingForDepthEstimation": depth_anything},
    "sam": {"SamModel": sam, "SamProcessor": sam_processor},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The reader's own folder: pictures of two shapes, and a config."""
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "images").mkdir()
    for number in range(17):
        sides = (40, 52) if number % 3 else (64, 40)
        pixels = torch.randint(0, 256, (*sides, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"images/{number:02}.jpg")
    text = (ROOT / "tests/d2/modeling/mask2former_tiny.yaml").read_text("utf-8")
    text = text.replace("../../../configs", str(ROOT / "configs"))
    text = text.replace("PANOPTIC_ON: True", "PANOPTIC_ON: False")  # needs a data set's metadata
    few = "EXPEDITE: {ALPHA: 3, CLUSTERS: [3, 3]}"  # for six blocks and windows of 4x4
    text = text.replace("\nMODEL:\n", f"\nMODEL:\n  {few}\n")
    (tmp_path / "your.yaml").write_text(text, "utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def links(text: str) -> list[str]:
    """The files that a page leads to; not what follows a subscript in an example."""
    return re.findall(r"\[[^\]\"]+\]\(([^)#]+)", text)


def examples(page: str) -> list[str]:
    return re.findall("```python\n(.*?)```", (GUIDES / f"{page}.md").read_text("utf-8"), re.DOTALL)


def run(page: str, detectron2: str = r"\g<0>") -> dict[str, Any]:
    """Runs the examples of a page, one after another, and returns their names.

    Args:
        page: name of the page.
        detectron2: package in the place of those of Detectron2.
    """
    names: dict[str, Any] = {"__name__": page}
    found = examples(page)
    assert found
    for number, text in enumerate(found):
        text = re.sub(r"\bdetectron2\.\w+(?= import)", detectron2, text)
        exec(compile(text, f"{page}.md, example {number}", "exec"), names)
    return names


@pytest.fixture
def names(request: pytest.FixtureRequest, folder: Path, monkeypatch: Any) -> dict[str, Any]:
    """The names of a page's examples, after they ran."""
    page = request.param
    for name, make in LOADED.get(page, {}).items():
        monkeypatch.setattr(getattr(hf, name), "from_pretrained", seeded(make))
    registry = segment_anything.sam_model_registry
    monkeypatch.setitem(registry, "vit_h", seeded(segment_anything_sam))
    # The package has a function of the module's name.
    monkeypatch.setattr(sys.modules["expedite_d2.tools.tune"], "SHARES", (0.7, 0.5))
    return run(page)


@pytest.mark.parametrize("page", sorted(path.stem for path in GUIDES.glob("*.md")))
def test_pages_are_short_and_their_links_lead_somewhere(page: str) -> None:
    text = (GUIDES / f"{page}.md").read_text("utf-8")
    assert len(text.splitlines()) <= LINES
    for target in links(text):
        assert (GUIDES / target).exists(), target


def test_index_has_every_page() -> None:
    docs = ROOT / "docs"
    pages = {str(path.relative_to(docs)) for path in docs.rglob("*.md")}
    assert set(links((docs / "README.md").read_text("utf-8"))) == pages - {"README.md"}


@pytest.mark.parametrize("names", ["mask2former"], indirect=True)
def test_mask2former(names: dict[str, Any]) -> None:
    settings, model = names["settings"], names["model"]
    assert settings.cluster.temperature > 0
    assert expedited_encoders(model)["model.pixel_level_module.encoder.swin"].reduction == settings
    assert names["fast"].shape == names["plain"].shape
    assert not torch.equal(names["fast"], names["plain"])
    with torch.no_grad():  # with the weights that the detail maps were measured on
        again = model(**names["images"][16]).masks_queries_logits
    assert torch.equal(again, names["fast"])


@pytest.mark.parametrize("names", ["depth_anything"], indirect=True)
def test_depth_anything(names: dict[str, Any]) -> None:
    shapes = {tuple(image["pixel_values"].shape[-2:]) for image in names["images"]}
    assert len(shapes) == 2 and all(h != w for h, w in shapes)
    assert names["depth"].shape == (4, *names["size"])
    tuning = names["tuning"]
    assert tuning.row.error <= 0.02
    assert Reduction.load("depth.yaml") == tuning.best
    assert next(iter(expedited_encoders(names["model"]).values())).reduction == tuning.best


@pytest.mark.parametrize("names", ["export"], indirect=True)
def test_export(names: dict[str, Any]) -> None:
    images = torch.cat([names["images"], -names["images"][:1]])
    (found,) = names["session"].run(["depth"], {"pixel_values": images.numpy()})
    with torch.no_grad():
        expected = names["model"](images).predicted_depth
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-5)
    assert is_expedited(names["model"]) and names["depth"].shape == (2, 32, 32)


@pytest.mark.parametrize("names", ["sam"], indirect=True)
def test_sam(names: dict[str, Any]) -> None:
    assert is_expedited(names["model"]) and is_expedited(names["sam"])
    assert names["out"].pred_masks.isfinite().all()
    assert names["masks"].shape == (3, *names["picture"].size[::-1])
    assert names["sam"].image_encoder.reduction.cluster.temperature > 0


@pytest.mark.parametrize("names", ["which_setting"], indirect=True)
def test_which_setting(names: dict[str, Any]) -> None:
    assert not is_expedited(names["model"])


def check_detectron2(names: dict[str, Any]) -> None:
    loaded = names["model"].backbone.reduction
    assert loaded == names["settings"] and loaded == Reduction.load("settings.yaml")


def test_detectron2_without_it(folder: Path) -> None:
    check_detectron2(run("detectron2", "expedite_d2.d2"))


@pytest.mark.detectron2
def test_detectron2(folder: Path) -> None:
    if PROVIDER != "detectron2":
        pytest.skip("needs the real Detectron2")
    check_detectron2(run("detectron2"))
