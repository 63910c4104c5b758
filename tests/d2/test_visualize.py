from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from expedite_d2.d2.visualize import (
    Segment,
    Segmentation,
    depth_disagreement,
    depth_limits,
    disagreement,
    draw_clusters,
    draw_depth,
    draw_disagreement,
    draw_segmentation,
    segmentation_of,
)

METADATA = SimpleNamespace(
    thing_classes=["cat", "dog"],
    thing_colors=[(200, 0, 0), (0, 200, 0)],
    stuff_classes=["cat", "sea", "sky", "dog"],
    stuff_colors=[(200, 0, 0), (0, 90, 90), (0, 0, 200), (0, 200, 0)],
)


def photo(height: int = 60, width: int = 80) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def two_halves(height: int = 60, width: int = 80) -> Segmentation:
    ids = np.ones((height, width), dtype=np.int32)
    ids[:, width // 2 :] = 2
    return Segmentation(ids, (Segment(1, 0, True), Segment(2, 2, False)))


def instances(masks: torch.Tensor, scores: list[float], classes: list[int]) -> SimpleNamespace:
    return SimpleNamespace(
        pred_masks=masks, scores=torch.tensor(scores), pred_classes=torch.tensor(classes)
    )


def test_segmentation_of_prefers_panoptic() -> None:
    ids = torch.tensor([[0, 1], [1, 2]])
    infos = [
        {"id": 1, "category_id": 5, "isthing": True},
        {"id": 2, "category_id": 7, "isthing": False},
    ]
    output = {"panoptic_seg": (ids, infos), "sem_seg": torch.zeros(9, 2, 2)}
    found = segmentation_of(output)
    assert found.ids.tolist() == ids.tolist()
    assert found.segments == (Segment(1, 5, True), Segment(2, 7, False))


def test_segmentation_of_instances_keeps_small_above_large_and_drops_unsure() -> None:
    masks = torch.zeros(3, 4, 4)
    masks[0, 0, 0] = 1
    masks[1] = 1
    masks[2] = 1
    found = segmentation_of({"instances": instances(masks, [0.9, 0.8, 0.2], [1, 0, 0])})
    assert [(s.category_id, round(s.score or 0, 1)) for s in found.segments] == [(0, 0.8), (1, 0.9)]
    assert found.ids[0, 0] == 2
    assert (found.ids.ravel()[1:] == 1).all()


def test_segmentation_of_no_instances_is_empty() -> None:
    found = segmentation_of({"instances": instances(torch.zeros(0, 5, 7), [], [])})
    assert found.ids.shape == (5, 7)
    assert not found.ids.any() and found.segments == ()


def test_segmentation_of_semantic_takes_the_best_class() -> None:
    scores = torch.zeros(3, 2, 2)
    scores[2, 0] = 1.0
    found = segmentation_of({"sem_seg": scores})
    assert found.ids.tolist() == [[3, 3], [1, 1]]
    assert {s.category_id for s in found.segments} == {0, 2}


def test_segmentation_of_nothing_known_names_the_keys() -> None:
    with pytest.raises(ValueError, match="'depth'"):
        segmentation_of({"depth": torch.zeros(2, 2)})


@pytest.mark.parametrize("size", [(60, 80), (1, 1), (3, 200), (301, 57)])
def test_draw_segmentation_keeps_shape_type_and_input(size: tuple[int, int]) -> None:
    image = photo(*size)
    before = image.copy()
    drawn = draw_segmentation(image, two_halves(*size), METADATA)
    assert drawn.shape == image.shape and drawn.dtype == np.uint8
    assert (image == before).all()


def test_draw_segmentation_is_deterministic() -> None:
    first, second = (draw_segmentation(photo(), two_halves(), METADATA) for _ in range(2))
    assert (first == second).all()


def test_draw_segmentation_of_nothing_is_the_image() -> None:
    empty = Segmentation(np.zeros((60, 80), dtype=np.int32), ())
    assert (draw_segmentation(photo(), empty, METADATA) == photo()).all()


def test_draw_segmentation_leaves_uncovered_pixels_alone() -> None:
    ids = np.zeros((60, 80), dtype=np.int32)
    ids[20:40, 20:40] = 1
    drawn = draw_segmentation(photo(), Segmentation(ids, (Segment(1, 0, True),)), labels=False)
    assert (drawn[ids == 0] == photo()[ids == 0]).all()
    assert (drawn[ids == 1] != photo()[ids == 1]).any()


def test_draw_segmentation_uses_the_metadata_colours() -> None:
    grey = np.full((60, 80, 3), 100, dtype=np.uint8)
    drawn = draw_segmentation(grey, two_halves(), METADATA, opacity=1.0, labels=False)
    assert drawn[30, 10].tolist() == [200, 0, 0]
    assert drawn[30, 70].tolist() == [0, 0, 200]


@pytest.mark.parametrize(
    "metadata, segment, colour",
    [
        # stuff_* lists every class: a thing's index is its place there, not among the things.
        (METADATA, Segment(1, 3, True), [0, 200, 0]),
        (SimpleNamespace(thing_colors=[(9, 9, 9), (8, 8, 8)]), Segment(1, 1, True), [8, 8, 8]),
        # Things and stuff are numbered apart.
        (
            SimpleNamespace(thing_colors=[(9, 9, 9), (8, 8, 8)], stuff_colors=[(7, 7, 7)]),
            Segment(1, 1, True),
            [8, 8, 8],
        ),
        (
            SimpleNamespace(thing_colors=[(9, 9, 9), (8, 8, 8)], stuff_colors=[(7, 7, 7)]),
            Segment(1, 0, False),
            [7, 7, 7],
        ),
    ],
)
def test_draw_segmentation_finds_the_class_in_any_metadata(
    metadata: SimpleNamespace, segment: Segment, colour: list[int]
) -> None:
    whole = Segmentation(np.ones((9, 9), dtype=np.int32), (segment,))
    drawn = draw_segmentation(photo(9, 9), whole, metadata, opacity=1.0, labels=False)
    assert drawn[4, 4].tolist() == colour


def test_draw_segmentation_tells_objects_of_a_class_apart() -> None:
    halves = Segmentation(two_halves().ids, (Segment(1, 0, True), Segment(2, 0, True)))
    drawn = draw_segmentation(photo() * 0, halves, METADATA, opacity=1.0, labels=False)
    assert drawn[30, 10].tolist() != drawn[30, 70].tolist()


@pytest.mark.parametrize("metadata", [None, SimpleNamespace(thing_classes=[])])
def test_draw_segmentation_without_metadata_still_draws(metadata: object) -> None:
    drawn = draw_segmentation(photo(200, 300), two_halves(200, 300), metadata)
    assert (drawn != photo(200, 300)).any()


def test_draw_segmentation_writes_labels() -> None:
    plain, labelled = (
        draw_segmentation(photo(200, 300), two_halves(200, 300), METADATA, labels=on)
        for on in (False, True)
    )
    assert (plain != labelled).any()


def test_draw_segmentation_of_another_size_names_both() -> None:
    with pytest.raises(ValueError, match=r"\(60, 80, 3\).*\(50, 80, 3\)"):
        draw_segmentation(photo(50, 80), two_halves(60, 80))


def test_draw_clusters_outlines_clusters_and_windows() -> None:
    clusters = np.arange(16).reshape(4, 4) // 2
    grey = np.full((64, 64, 3), 100, dtype=np.uint8)
    drawn = draw_clusters(grey, clusters, (16.0, 16.0), (2, 2))
    assert drawn.shape == grey.shape and drawn.dtype == np.uint8
    assert drawn[8, 8].tolist() == [100, 100, 100]
    assert drawn[8, 31].tolist() != [100, 100, 100]
    assert drawn[8, 15].tolist() == [100, 100, 100]
    assert drawn[32, 8].min() > 180


def test_draw_clusters_beyond_the_image_and_with_a_fractional_stride() -> None:
    drawn = draw_clusters(photo(50, 70), np.arange(64).reshape(8, 8), (9.3, 11.7), None)
    assert drawn.shape == (50, 70, 3)


def test_disagreement_of_equal_predictions_is_none() -> None:
    assert not disagreement(two_halves(), two_halves()).any()


def test_disagreement_ignores_how_segments_are_numbered() -> None:
    swapped = Segmentation(3 - two_halves().ids, (Segment(2, 0, True), Segment(1, 2, False)))
    assert not disagreement(two_halves(), swapped).any()


def test_disagreement_counts_another_class_and_a_missing_segment() -> None:
    other = Segmentation(two_halves().ids, (Segment(1, 1, True), Segment(2, 2, False)))
    assert disagreement(two_halves(), other)[:, :40].all()
    ids = two_halves().ids.copy()
    ids[ids == 1] = 0
    missing = Segmentation(ids, (Segment(2, 2, False),))
    differs = disagreement(two_halves(), missing)
    assert differs[:, :40].all() and not differs[:, 40:].any()


def test_disagreement_of_a_split_object_is_the_part_below_one_half() -> None:
    whole = Segmentation(np.ones((10, 10), dtype=np.int32), (Segment(1, 0, True),))
    ids = np.ones((10, 10), dtype=np.int32)
    ids[:3] = 2
    split = Segmentation(ids, (Segment(1, 0, True), Segment(2, 0, True)))
    differs = disagreement(whole, split)
    assert differs[:3].all() and not differs[3:].any()


def test_disagreement_of_stuff_is_by_class_alone() -> None:
    ids = np.zeros((10, 10), dtype=np.int32)
    ids[:2] = 1
    small = Segmentation(ids, (Segment(1, 2, False),))
    full = Segmentation(np.ones((10, 10), dtype=np.int32), (Segment(1, 2, False),))
    differs = disagreement(small, full)
    assert not differs[:2].any() and differs[2:].all()


def test_draw_disagreement_colours_only_what_differs() -> None:
    differs = np.zeros((60, 80), dtype=bool)
    differs[:10] = True
    drawn = draw_disagreement(photo(), differs)
    assert drawn.shape == photo().shape and drawn.dtype == np.uint8
    assert (drawn[10:, :, 0] == drawn[10:, :, 2]).all()
    assert (drawn[:10, :, 0] > drawn[:10, :, 2]).all()


def test_depth_limits_leave_out_odd_pixels_and_unknown_ones():
    depth = np.full((20, 50), 10.0, np.float32)
    depth[:, 25:] = 40.0
    depth[0, 0], depth[0, 1], depth[0, 2] = 5000.0, 0.0, np.nan
    assert depth_limits(depth) == pytest.approx((10, 40))
    low, high = depth_limits(depth, torch.full((30, 50), 2.0))
    assert (low, high) == pytest.approx((2, 40))
    assert depth_limits(np.full((2, 2), 3.0)) == pytest.approx((3, 3.03))
    assert depth_limits(np.zeros((2, 2))) == (1, 2)


def test_draw_depth_is_bright_near_dark_far_and_grey_where_unknown():
    depth = torch.tensor([[1.0, 2.0, 4.0, 8.0, 0.0, 100.0]])
    drawn = draw_depth(depth, (1.0, 8.0))
    assert drawn.shape == (1, 6, 3) and drawn.dtype == np.uint8
    brightness = drawn[0, :4].astype(int).sum(axis=1)
    assert (np.diff(brightness) < 0).all()
    assert (drawn[0, 4] == 128).all()
    assert np.array_equal(drawn[0, 5], drawn[0, 3])
    assert np.array_equal(draw_depth(depth), draw_depth(depth, depth_limits(depth)))


def test_depth_disagreement_is_a_matter_of_ratio():
    first, second = np.array([[10.0, 10.0, 10.0]]), torch.tensor([[10.4, 10.6, 9.0]])
    assert depth_disagreement(first, second).tolist() == [[False, True, True]]
    assert depth_disagreement(first, second, ratio=1.2).tolist() == [[False, False, False]]
