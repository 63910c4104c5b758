"""Real Mask2Former on real Detectron2: its checkpoints give its logits and its results."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from official_cases import official_names

import expedite_d2.d2.modeling  # noqa: F401 (registers the architectures)
from expedite_d2.d2 import MetadataCatalog, build_model
from expedite_d2.d2.checkpoint import load_weights
from expedite_d2.d2.checkpoint.convert import convert
from expedite_d2.d2.config import load_config

TINY = Path(__file__).parents[2] / "d2/modeling/mask2former_tiny.yaml"


def build(*opts, seed=0):
    torch.manual_seed(seed)
    return build_model(load_config(TINY, opts)).eval()


OFFICIAL = """
import pickle, sys, types
# The compiled operator is not needed: Mask2Former falls back on its own PyTorch code.
sys.modules["MultiScaleDeformableAttention"] = types.ModuleType("MultiScaleDeformableAttention")
import torch
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.projects.deeplab import add_deeplab_config
from mask2former import add_maskformer2_config

root, out, overrides = sys.argv[1], sys.argv[2], sys.argv[3:]
cfg = get_cfg()
add_deeplab_config(cfg)
add_maskformer2_config(cfg)
folder = root + "/configs/coco/panoptic-segmentation/swin/"
cfg.merge_from_file(folder + "maskformer2_swin_large_IN21k_384_bs16_100ep.yaml")
torch.manual_seed(0)
cfg.MODEL.DEVICE = "cpu"
shapes = {k: tuple(v.shape) for k, v in build_model(cfg).state_dict().items()}
cfg.merge_from_list(overrides)
MetadataCatalog.get("mask2former_tiny").thing_dataset_id_to_contiguous_id = {10: 0, 20: 1, 30: 2}
model = build_model(cfg).eval()
for parameter in model.parameters():
    parameter.data += 0.05 * torch.randn_like(parameter)
model.sem_seg_head.predictor.class_embed.bias.data[5] -= 2  # or random weights find no object
state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
with open(out + "/model_final.pkl", "wb") as file:
    pickle.dump({"model": state, "__author__": "test"}, file)
results = {"shapes": shapes}
with torch.no_grad():
    for height, width in [(64, 96), (160, 128)]:
        images = torch.randn(2, 3, height, width)
        logits = model.sem_seg_head(model.backbone(images))
        results[height] = images, logits["pred_logits"], logits["pred_masks"]
    image = torch.randint(0, 256, (3, 50, 70)).to(torch.uint8)
    result = model([{"image": image, "height": 75, "width": 105}])[0]
instances = result["instances"]
results["image"] = image
results["sem_seg"] = result["sem_seg"]
results["panoptic_seg"] = result["panoptic_seg"]
results["instances"] = instances.scores, instances.pred_classes, instances.pred_masks
# Weights of this project's, exported under the official names.
model.load_state_dict(torch.load(out + "/exported.pth", weights_only=True)["model"], strict=True)
with torch.no_grad():
    logits = model.sem_seg_head(model.backbone(results[64][0]))
results["exported"] = logits["pred_logits"], logits["pred_masks"]
torch.save(results, out + "/results.pth")
"""


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A tiny real Mask2Former under real Detectron2: its checkpoint, logits and results."""
    if importlib.util.find_spec("detectron2") is None:
        pytest.skip("Detectron2 is not installed")
    root = os.environ.get("MASK2FORMER_ROOT")
    if not root:
        pytest.skip("MASK2FORMER_ROOT does not point to a clone of Mask2Former")
    folder = tmp_path_factory.mktemp("official")
    tiny = load_config(TINY, ["MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD", 0.0])
    keys = [f"MODEL.SWIN.{k}" for k in ("EMBED_DIM", "DEPTHS", "NUM_HEADS", "WINDOW_SIZE")]
    keys += [f"MODEL.SEM_SEG_HEAD.{k}" for k in
             ("NUM_CLASSES", "CONVS_DIM", "MASK_DIM", "TRANSFORMER_ENC_LAYERS")]  # fmt: skip
    keys += [f"MODEL.MASK_FORMER.{k}" for k in
             ("HIDDEN_DIM", "NUM_OBJECT_QUERIES", "NHEADS", "DIM_FEEDFORWARD", "DEC_LAYERS",
              "TEST.OBJECT_MASK_THRESHOLD")]  # fmt: skip
    torch.save(build(seed=1).state_dict(), folder / "whole.pth")
    convert(folder / "whole.pth", folder / "exported.pth", official=True)
    overrides = ["DATASETS.TRAIN", "('mask2former_tiny',)", "TEST.DETECTIONS_PER_IMAGE", "30"]
    for key in keys:
        value = tiny
        for part in key.split("."):
            value = value[part]
        overrides += [key, str(value)]
    command = [sys.executable, "-W", "ignore", "-c", OFFICIAL, root, str(folder), *overrides]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.detectron2
def test_real_mask2former_has_the_committed_names(official):
    results = torch.load(official / "results.pth", weights_only=True)
    assert results["shapes"] == official_names()


@pytest.mark.detectron2
def test_real_mask2former_gives_the_same_logits(official):
    model = build()
    load_weights(model, official / "model_final.pkl")
    results = torch.load(official / "results.pth", weights_only=True)
    for height in (64, 160):
        images, classes, masks = results[height]
        with torch.no_grad():
            our_classes, our_masks = model.logits(images)
        torch.testing.assert_close(our_classes, classes, rtol=0, atol=1e-3)
        torch.testing.assert_close(our_masks, masks, rtol=0, atol=1e-3)


@pytest.mark.detectron2
def test_real_mask2former_loads_an_official_export_strictly(official):
    model = build()
    load_weights(model, official / "exported.pth")
    results = torch.load(official / "results.pth", weights_only=True)
    with torch.no_grad():
        logits = model.logits(results[64][0])
    for ours, theirs in zip(logits, results["exported"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


@pytest.mark.detectron2
def test_real_mask2former_gives_the_same_results(official):
    catalog = MetadataCatalog.get("mask2former_tiny")
    catalog.thing_dataset_id_to_contiguous_id = {10: 0, 20: 1, 30: 2}
    opts = ["MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD", 0.0, "TEST.DETECTIONS_PER_IMAGE", 30]
    model = build(*opts)
    load_weights(model, official / "model_final.pkl")
    expected = torch.load(official / "results.pth", weights_only=True)
    with torch.no_grad():
        result = model([{"image": expected["image"], "height": 75, "width": 105}])[0]
    torch.testing.assert_close(result["sem_seg"], expected["sem_seg"], rtol=0, atol=1e-3)
    ids, segments = expected["panoptic_seg"]
    assert segments and result["panoptic_seg"][1] == segments
    assert (result["panoptic_seg"][0] == ids).float().mean() > 0.999
    scores, classes, masks = expected["instances"]
    assert len(scores) > 5
    order, ours = scores.argsort(), result["instances"].scores.argsort()
    torch.testing.assert_close(result["instances"].scores[ours], scores[order], rtol=0, atol=1e-3)
    assert torch.equal(result["instances"].pred_classes[ours], classes[order])
    assert (result["instances"].pred_masks[ours] == masks[order]).float().mean() > 0.999
