"""Official YAMLs of what this project has and has not: built, or refused by one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from expedite_d2.d2 import PROVIDER, build_model
from expedite_d2.d2.config import load_config
from expedite_d2.d2.data import build_test_loader

BACKBONES = {
    "swin": '{NAME: "D2SwinTransformer"}',
    "resnet": '{NAME: "build_resnet_backbone", FREEZE_AT: 0}',
}
HEAD = """
  SEM_SEG_HEAD:
    NAME: "MaskFormerHead"
    NUM_CLASSES: 40
    CONVS_DIM: 256
    PIXEL_DECODER_NAME: "MSDeformAttnPixelDecoder"
    IN_FEATURES: ["res2", "res3", "res4", "res5"]
    TRANSFORMER_ENC_LAYERS: 6
  MASK_FORMER:
    TRANSFORMER_IN_FEATURE: "multi_scale_pixel_decoder"
    DEC_LAYERS: 10
"""
IMAGES = """
INPUT:
  MIN_SIZE_TRAIN: !!python/object/apply:eval ["[int(x * 0.1 * 2048) for x in range(5, 21)]"]
  COLOR_AUG_SSD: True
  SIZE_DIVISIBILITY: 1024
"""
VIDEO = """
  RESNETS: {STEM_TYPE: "basic", RES5_MULTI_GRID: [1, 1, 1]}
INPUT:
  MIN_SIZE_TRAIN_SAMPLING: "choice_by_clip"
  RANDOM_FLIP: "flip_by_clip"
  AUGMENTATIONS: []
  SAMPLING_FRAME_NUM: 2
  SAMPLING_FRAME_RANGE: 20
  SAMPLING_FRAME_SHUFFLE: False
"""


def write(folder: Path, architecture: str, backbone: str, dataset: str, rest: str) -> Path:
    path = folder / "official.yaml"
    path.write_text(
        f'MODEL:\n  META_ARCHITECTURE: "{architecture}"\n  BACKBONE: {BACKBONES[backbone]}\n'
        f'{HEAD.strip(chr(10))}\n{rest.strip(chr(10))}\nDATASETS:\n  TEST: ("{dataset}",)\n'
    )
    return path


@pytest.mark.parametrize("dataset", ["ytvis_2019_val", "ytvis_2021_val"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_video_segmentation_is_refused_by_its_name(
    backbone: str, dataset: str, tmp_path: Path
) -> None:
    path = write(tmp_path, "VideoMaskFormer", backbone, dataset, VIDEO)
    message = "VideoMaskFormer is for video instance segmentation, which is not part of this proj"
    with pytest.raises(ValueError, match=message):
        load_config(path)


@pytest.mark.parametrize(
    "dataset", ["mapillary_vistas_sem_seg_val", "mapillary_vistas_panoptic_val"]
)
def test_model_for_a_data_set_that_is_not_here_builds(dataset: str, tmp_path: Path) -> None:
    path = write(tmp_path, "MaskFormer", "swin", dataset, IMAGES)
    cfg = load_config(path, ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        assert build_model(cfg).class_predictor.out_features == 41
    with pytest.raises(ValueError, match=f"data set '{dataset}' is not registered; registered are"):
        build_test_loader(cfg, dataset)


@pytest.mark.parametrize(
    ("key", "name", "message"),
    [
        ("MODEL.META_ARCHITECTURE", "MaskFromer", "'MaskFromer' is not in the registry META_ARCH"),
        ("MODEL.META_ARCHITECTURE", "", "'' is not in the registry META_ARCH: it is misspelt"),
        ("MODEL.BACKBONE.NAME", "D2SwinTransfomer", "'D2SwinTransfomer' is not in the registry B"),
        ("MODEL.BACKBONE.NAME", "D2ConvNeXt", "; known are .*ExpeditedSwinTransformer, Expedit"),
        ("MODEL.BACKBONE.NAME", "", "'' is not in the registry BACKBONE"),
    ],
)
def test_name_that_no_registry_knows_is_one_sentence(
    key: str, name: str, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path, "MaskFormer", "swin", "ade20k_sem_seg_val", IMAGES)
    with pytest.raises(ValueError, match=message) as caught:
        build_model(load_config(path, [key, name]))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(PROVIDER == "detectron2", reason="Detectron2 has them")
@pytest.mark.parametrize(
    ("architecture", "missing"),
    [("MaskFormer", "build_resnet_backbone"), ("GeneralizedRCNN", "GeneralizedRCNN")],
)
def test_what_is_detectron2s_own_is_named_as_such(
    architecture: str, missing: str, tmp_path: Path
) -> None:
    path = write(tmp_path, architecture, "resnet", "coco_2017_val", IMAGES)
    with pytest.raises(ValueError, match=f"'{missing}' is not in.* or it is Detectron2's own"):
        build_model(load_config(path))
