from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expedite_d2.d2.comparison.compare import build_models
from expedite_d2.d2.comparison.examples import Example, choose_examples, draw_panels, run_example
from expedite_d2.d2.comparison.settings import expedite_settings
from expedite_d2.d2.config import load_config
from expedite_d2.ops.observe import ObservedOperator
from expedite_d2.reducers import Correction, Merge, Merging
from expedite_d2.reducers.correction import fingerprint

MODELS = Path(__file__).parents[1] / "modeling"
TASKS = "MODEL.MASK_FORMER.TEST"
MERGE = ["MODEL.EXPEDITE.METHOD", "merge", "MODEL.EXPEDITE.MERGE_AT", [1, 2]]
MERGE += ["MODEL.EXPEDITE.KEEP", 0.75, "MODEL.EXPEDITE.ROUNDS", 1]


def look(name: str, opts: list[Any], height: int = 64, width: int = 80) -> Example:
    torch.manual_seed(0)
    cfg = load_config(MODELS / f"{name}_tiny.yaml", opts)
    baseline, model = build_models(cfg)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    item = {"image": image, "height": height, "width": width}
    return run_example(baseline, {"half": (model, expedite_settings(cfg))}, item, "RGB")


def test_examples_are_spread_and_rich_but_not_the_extreme() -> None:
    records: list[dict] = [{"segments_info": [{}] * (n % 10)} for n in range(60)]
    records[5]["segments_info"] = [{}] * 500
    assert choose_examples(records) == [9, 39, 59]
    assert choose_examples(records) == choose_examples(records)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_examples_of_a_small_data_set_are_all_of_it(count: int) -> None:
    assert choose_examples([{} for _ in range(count)]) == list(range(count))


@pytest.mark.parametrize("reconstruction", ["residual", "replace"])
def test_merged_tokens_are_followed_through_all_merges(
    reconstruction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[np.ndarray] = []
    reduce = Merge.reduce

    def recorded(self: Merge, *args: Any) -> Any:
        kept, layout, undo = reduce(self, *args)
        assert isinstance(undo, Merging) and undo.places is not None
        places.append(undo.places[0].numpy())
        return kept, layout, undo

    monkeypatch.setattr(Merge, "reduce", recorded)
    opts = [*MERGE, "MODEL.EXPEDITE.RECONSTRUCTION", reconstruction]
    (seen,) = look("segmenter", opts).settings
    first, second = places
    assert seen.name == "half" and seen.step == "merge" and seen.groups is not None
    assert seen.groups.groups.ravel().tolist() == second[first].tolist()
    # The tokens of the sequence lie row by row, and here they cover the image exactly.
    rows, columns = seen.groups.groups.shape
    assert rows * 80 == columns * 64 and seen.groups.tokens == (rows, columns)
    assert seen.groups.window is None


def test_detail_maps_do_not_change_which_tokens_are_merged(tmp_path: Path) -> None:
    (plain,) = look("segmenter", MERGE).settings
    cfg = load_config(MODELS / "segmenter_tiny.yaml", [*MERGE, "MODEL.EXPEDITE.ENABLED", True])
    torch.manual_seed(0)
    _, model = build_models(cfg)
    (number,) = model.backbone.read_outs()
    width = model.backbone.vit.embed_dim
    maps = {number: (torch.randn(2, width, width), torch.zeros(width))}
    correction = Correction(maps, fingerprint(model.backbone.vit))
    replace(model.backbone.reduction, correction=correction).save(tmp_path / "maps.yaml")
    opts = ["MODEL.EXPEDITE.SETTINGS", str(tmp_path / "maps.yaml")]
    (seen,) = look("segmenter", opts).settings
    assert plain.groups is not None and seen.groups is not None
    assert np.array_equal(seen.groups.groups, plain.groups.groups)
    assert not np.array_equal(seen.prediction.ids, plain.prediction.ids)  # type: ignore[union-attr]


def test_clusters_are_the_nearest_centres_and_reach_over_the_edge() -> None:
    opts = ["MODEL.EXPEDITE.ALPHA", 2, "MODEL.EXPEDITE.CLUSTERS", [2, 2]]
    opts += [w for task in ("PANOPTIC", "INSTANCE") for w in (f"{TASKS}.{task}_ON", False)]
    operator = torch.ops.expedite_d2.token_reduce.default
    with ObservedOperator(operator, lambda call, out: (call["window"], out[2])) as observed:
        (seen,) = look("mask2former", opts, 64, 70).settings
    ((window, indices),) = observed.kept
    assert seen.step == "cluster" and seen.groups is not None
    assert np.array_equal(seen.groups.groups, indices[0, ..., 0].numpy())
    assert seen.groups.window == tuple(window)
    rows, columns = seen.groups.groups.shape
    assert seen.groups.tokens[0] == rows and columns - 2 < seen.groups.tokens[1] < columns


@pytest.mark.filterwarnings("ignore:.*run.* unreduced")
@pytest.mark.parametrize("opts", [MERGE, ["MODEL.EXPEDITE.CLUSTERS", [9, 9]]])
def test_an_image_on_the_plain_path_has_no_groups(opts: list[Any]) -> None:
    example = look("segmenter", [*opts, "MODEL.EXPEDITE.ALPHA", 1], 4, 4)
    (seen,) = example.settings
    assert seen.groups is None
    ((tokens, *_),) = draw_panels(example, (4, 4), None)
    assert tokens.caption == "input" and np.array_equal(tokens.picture, example.image)


def test_an_image_that_is_seen_in_crops_has_no_groups() -> None:
    opts = [*MERGE, "TEST.SLIDING_WINDOW.ENABLED", True]
    (seen,) = look("segmenter", opts).settings
    assert seen.groups is None
