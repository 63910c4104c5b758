"""Regions: proposals, pooling, matching and pasting against torchvision, Detectron2 and by hand."""

from __future__ import annotations

import pytest
import torch
from detector_cases import THINGS, config, image, register
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import AnchorGenerator, RegionProposalNetwork
from torchvision.ops import roi_align

from expedite_d2.d2 import Instances, ShapeSpec
from expedite_d2.d2.modeling.meta_arch.cascade import CascadeHeads, Stage
from expedite_d2.d2.modeling.meta_arch.detection_inference import View, augmented, paste_masks
from expedite_d2.d2.modeling.meta_arch.regions import (
    GroundTruth,
    RegionFeatures,
    RegionProposals,
    Sample,
    Sampling,
    ground_truth,
    mask_targets,
    match_boxes,
    pool_levels,
    thing_ids,
)

SHAPES = {f"p{i}": ShapeSpec(channels=32, stride=2**i) for i in range(2, 7)}


def maps(height, width, channels=32, batch=2):
    torch.manual_seed(1)
    return {
        name: torch.randn(batch, channels, -(-height // s.stride), -(-width // s.stride))
        for name, s in SHAPES.items()
    }


def truth(*boxes, classes=None, size=(64, 64)):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(len(boxes), *size)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = 1
    labels = torch.arange(len(boxes)) % 3 if classes is None else torch.tensor(classes)
    return GroundTruth(boxes, labels, masks)


# --- proposals --------------------------------------------------------------------------------


def test_proposals_and_losses_equal_torchvision():
    cfg = config("ExpeditedHTC", "MODEL.RPN.SMOOTH_L1_BETA", 1 / 9)
    torch.manual_seed(0)
    ours = RegionProposals(cfg, SHAPES)
    theirs = RegionProposalNetwork(
        AnchorGenerator(((8,), (16,), (32,), (64,), (128,)), ((0.5, 1.0, 2.0),) * 5),
        ours.head, 0.7, 0.3, 64, 0.5,
        {"training": 100, "testing": 60}, {"training": 50, "testing": 40}, 0.7,
    )  # fmt: skip
    features, sizes = maps(64, 128), [(64, 128), (60, 100)]
    truths = [truth((3, 4, 20, 30), (40, 10, 90, 60), size=(64, 128)), truth((5, 5, 25, 20))]
    batch = ImageList(torch.zeros(2, 3, 64, 128), sizes)
    for training in (True, False):
        torch.manual_seed(2)
        expected, losses = theirs.train(training)(batch, features, [t._asdict() for t in truths])
        torch.manual_seed(2)
        found, terms = ours.train(training).propose(features, sizes, truths if training else None)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
        if training:
            torch.testing.assert_close(terms["loss_rpn_cls"], losses["loss_objectness"])
            torch.testing.assert_close(terms["loss_rpn_loc"], losses["loss_rpn_box_reg"])


def test_anchors_keep_their_stride_where_maps_were_rounded_up():
    generator = RegionProposals(config("ExpeditedHTC"), SHAPES).anchor_generator
    levels = list(maps(96, 96).values())  # p6 has 2 cells for 1.5
    anchors = generator(None, levels)[0]
    last = anchors[-2 * 2 * 3 :].view(2, 2, 3, 4)
    assert (last[0, 1, :, 0] - last[0, 0, :, 0]).tolist() == [64, 64, 64]
    assert len(anchors) == 3 * (24**2 + 12**2 + 6**2 + 3**2 + 2**2)


# --- pooling ----------------------------------------------------------------------------------


def test_pooling_takes_the_level_of_the_box():
    """Each map holds its stride: a region's mean tells the level it came from."""
    levels = [torch.full((1, 1, 256 // s, 256 // s), float(s)) for s in (4, 8, 16, 32)]
    sides = torch.tensor([10.0, 111.9, 112.0, 223.9, 224.0, 447.0, 448.0, 500.0])
    rois = torch.stack([sides * 0, sides * 0, sides * 0, sides, sides], 1)
    pooled = pool_levels(levels, [4, 8, 16, 32], rois, 1, 1).flatten()
    assert pooled.tolist() == [4, 4, 8, 8, 16, 16, 32, 32]


def test_pooling_adds_the_semantic_map_and_keeps_images_apart():
    levels = list(maps(64, 64).values())[:4]
    semantic = torch.randn(2, 32, 8, 8)
    features = RegionFeatures(levels, [4, 8, 16, 32], semantic, 8)
    boxes = [torch.tensor([[1.0, 2.0, 30.0, 40.0]]), torch.tensor([[8.0, 8.0, 24.0, 24.0]] * 2)]
    pooled = features.pool(boxes, 7, 2)
    rois = torch.cat([torch.tensor([[0.0], [1.0], [1.0]]), torch.cat(boxes)], 1)
    expected = roi_align(levels[0], rois, 7, 1 / 4, 2, aligned=True)
    expected = expected + roi_align(semantic, rois, 7, 1 / 8, 2, aligned=True)
    torch.testing.assert_close(pooled, expected)
    torch.testing.assert_close(features.image(1).pool(boxes[1:], 7, 2), pooled[1:])


def test_pooling_of_no_box():
    features = RegionFeatures(list(maps(64, 64).values())[:4], [4, 8, 16, 32])
    assert features.pool([torch.zeros(0, 4)] * 2, 7, 2).shape == (0, 32, 7, 7)


# --- ground truth and sampling ----------------------------------------------------------------


def test_ground_truth_keeps_things_with_tight_boxes():
    register()
    inputs = image()
    inputs["instances"].gt_masks[1] = False  # cropped away
    (found,) = ground_truth([inputs], thing_ids("detector_tiny", 3), torch.device("cpu"))
    assert found.classes.tolist() == [0, 2]  # THINGS 0 and 4; the background is no thing
    assert found.boxes.tolist() == [[6, 3, 22, 19], [38, 41, 54, 57]]
    assert found.masks.flatten(1).sum(1).tolist() == [256, 256]
    assert THINGS == (0, 2, 4)


def test_ground_truth_needs_instances():
    with pytest.raises(ValueError, match="'instances'"):
        ground_truth([{"image": None}], [0], torch.device("cpu"))
    polygons = Instances((4, 4), gt_classes=torch.tensor([0]), gt_masks=[[0, 0, 1, 1]])
    with pytest.raises(ValueError, match="bitmaps"):
        ground_truth([{"instances": polygons}], [0], torch.device("cpu"))


def test_match_by_hand():
    objects = truth((0, 0, 10, 10), (20, 0, 30, 10))
    boxes = torch.tensor([[0.0, 0, 10, 5], [0, 0, 10, 4], [21, 0, 30, 10], [40, 40, 50, 50]])
    assert match_boxes(boxes, objects, 0.5).tolist() == [0, -1, 1, -1]
    assert match_boxes(boxes, truth(), 0.5).tolist() == [-1] * 4
    assert match_boxes(boxes[:0], objects, 0.5).shape == (0,)


def test_sampling_balances_and_marks_the_truth():
    objects = truth((0, 0, 10, 10), (20, 0, 30, 10))
    proposals = torch.cat([torch.tensor([[0.0, 0, 10, 9]]), torch.rand(50, 4) + 50])
    sample = Sampling(16, 0.25, True).draw(proposals, objects, 0.5)
    assert len(sample.boxes) == 16
    assert (sample.matched >= 0).sum() == 3 and sample.is_truth.sum() == 2
    assert sample.classes(objects, 3).tolist() == [0, 0, 1] + [3] * 13
    none = Sampling(16, 0.25, True).draw(torch.zeros(0, 4), truth(), 0.5)
    assert none.boxes.shape == (0, 4) and none.classes(truth(), 3).shape == (0,)


def test_mask_targets_by_hand():
    objects = truth((0, 0, 32, 64), size=(64, 64))  # the left half
    sample = Sample(
        torch.tensor([[0.0, 0, 64, 64], [32, 0, 64, 64]]), torch.tensor([0, 0]), torch.zeros(2)
    )
    targets = mask_targets([sample], [objects], 4)
    assert targets[0].tolist() == [[1, 1, 0, 0]] * 4
    assert not targets[1].any()
    empty = Sample(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    assert mask_targets([empty], [truth()], 4).shape == (0, 4, 4)


# --- heads ------------------------------------------------------------------------------------


def test_box_losses_equal_torchvision():
    cfg = config("ExpeditedHTC", "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", 1 / 9)
    torch.manual_seed(0)
    weights = (10.0, 10.0, 5.0, 5.0)
    heads = CascadeHeads(cfg, 32, [Stage(0.5, weights, 1.0)])
    objects = [truth((3, 4, 20, 30), (40, 10, 60, 60)), truth((5, 5, 25, 20))]
    samples = [
        Sample(
            torch.tensor([[3.0, 4, 21, 28], [0, 0, 9, 9]]), torch.tensor([0, -1]), torch.zeros(2)
        ),
        Sample(torch.tensor([[6.0, 5, 25, 21]]), torch.tensor([0]), torch.zeros(1)),
    ]  # fmt: skip
    logits, deltas = torch.randn(3, 4), torch.randn(3, 4)
    cls_loss, box_loss = heads._box_losses(0, logits, deltas, samples, objects)
    # torchvision's background comes first, and it has deltas for each class.
    labels = [(s.classes(t, 3) + 1) % 4 for s, t in zip(samples, objects, strict=True)]
    wanted = [t.boxes[s.matched.clamp(min=0)] for s, t in zip(samples, objects, strict=True)]
    targets = BoxCoder(weights).encode(wanted, [s.boxes for s in samples])
    expected = fastrcnn_loss(logits.roll(1, 1), deltas.repeat(1, 4), labels, list(targets))
    torch.testing.assert_close((cls_loss, box_loss), expected)


def test_cascade_scores_are_the_mean_of_its_stages():
    torch.manual_seed(0)
    stages = [Stage(0.5, (10.0, 10.0, 5.0, 5.0), 1.0), Stage(0.6, (20.0, 20.0, 10.0, 10.0), 1.0)]
    heads = CascadeHeads(config("ExpeditedHTC"), 32, stages).eval()
    features = RegionFeatures(list(maps(64, 64).values())[:4], [4, 8, 16, 32])
    proposals = [torch.tensor([[4.0, 4, 30, 40]]), torch.tensor([[0.0, 0, 64, 64], [9, 9, 20, 30]])]
    with torch.no_grad():
        boxes, scores = heads.boxes(features, proposals, [(64, 64)] * 2)
        first, deltas = heads.box_heads[0](features.pool(proposals, 7, 2))
        moved = heads.coders[0].decode_single(deltas, torch.cat(proposals)).clamp(0, 64)
        second, deltas = heads.box_heads[1](features.pool([moved[:1], moved[1:]], 7, 2))
        moved = heads.coders[1].decode_single(deltas, moved).clamp(0, 64)
    torch.testing.assert_close(torch.cat(boxes), moved)
    mean = (first.softmax(1) + second.softmax(1)) / 2
    torch.testing.assert_close(torch.cat(scores), mean[:, :-1])


# --- views ------------------------------------------------------------------------------------


def test_view_and_frame_are_inverse():
    features = RegionFeatures([], [])
    view = View(features, torch.zeros(0, 4), torch.zeros(0, 3), (50, 100), flipped=True)
    boxes = torch.tensor([[10.0, 5.0, 30.0, 25.0]])
    frame = view.to_frame(boxes, 100, 150)
    assert frame.tolist() == [[105, 10, 135, 50]]
    torch.testing.assert_close(view.from_frame(frame, 100, 150), boxes)


def test_augmented_sizes():
    picture = torch.arange(3 * 20 * 40, dtype=torch.uint8).view(3, 20, 40)
    views = list(augmented(picture, (10, 20, 40), 60, True))
    sizes = [tuple(one.shape[1:]) for one, _ in views]
    assert sizes == [(10, 20)] * 2 + [(20, 40)] * 2 + [(30, 60)] * 2
    assert torch.equal(views[2][0], picture) and torch.equal(views[3][0], picture.flip(-1))
    assert [flipped for _, flipped in views] == [False, True] * 3


def test_pasting_equals_bilinear_sampling():
    torch.manual_seed(0)
    probabilities = torch.rand(20, 14, 14)
    corner = torch.rand(20, 2) * 40 - 5
    boxes = torch.cat([corner, corner + 3 + torch.rand(20, 2) * 30], 1)
    pasted = paste_masks(probabilities, boxes, 40, 50)
    y, x = torch.meshgrid(torch.arange(40) + 0.5, torch.arange(50) + 0.5, indexing="ij")
    x0, y0, x1, y1 = boxes[:, :, None, None].unbind(1)
    grid = torch.stack([(x - x0) / (x1 - x0), (y - y0) / (y1 - y0)], -1) * 2 - 1
    sampled = F.grid_sample(probabilities[:, None], grid, align_corners=False)[:, 0]
    sure = (sampled - 0.5).abs() > 1e-5
    assert torch.equal(pasted[sure], (sampled >= 0.5)[sure])


def test_pasting_of_a_full_mask_fills_its_box():
    boxes = torch.tensor([[3.0, 2.0, 11.0, 7.0]])
    pasted = paste_masks(torch.ones(1, 28, 28), boxes, 10, 20)
    expected = torch.zeros(10, 20, dtype=torch.bool)
    expected[2:7, 3:11] = True
    assert torch.equal(pasted[0], expected)


@pytest.mark.detectron2
def test_pooling_and_pasting_equal_detectron2():
    pytest.importorskip("detectron2", reason="needs the real Detectron2")
    from detectron2.layers.mask_ops import paste_masks_in_image
    from detectron2.modeling.poolers import ROIPooler
    from detectron2.structures import Boxes

    levels = list(maps(64, 96).values())[:4]
    torch.manual_seed(0)
    corner = torch.rand(30, 2) * 40
    boxes = torch.cat([corner, corner + 1 + torch.rand(30, 2) * 400], 1)
    theirs = ROIPooler(7, [1 / 4, 1 / 8, 1 / 16, 1 / 32], 2, "ROIAlignV2")
    ours = RegionFeatures(levels, [4, 8, 16, 32]).pool([boxes[:10], boxes[10:]], 7, 2)
    torch.testing.assert_close(ours, theirs(levels, [Boxes(boxes[:10]), Boxes(boxes[10:])]))
    probabilities = torch.rand(30, 28, 28)
    small = torch.cat([corner, corner + 8], 1)
    pasted = paste_masks(probabilities, small, 60, 70)
    differ = pasted != paste_masks_in_image(probabilities, small, (60, 70))
    assert differ.float().mean() < 1e-4
