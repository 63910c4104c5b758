"""The rivals that the benchmarks time beside us: average pooling and token merging."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import tome
from benchmarks.pooling import average_pool, average_pooled
from expedite_d2.reducers import Cluster, Grid, reconstruct
from expedite_d2.tools import count_multiply_adds

timm = pytest.importorskip("timm")


# Average pooling


def test_average_pooling_interpolates_between_the_cells():
    tokens = torch.randn(2, 12, 8, 5)
    low, _, clustering = average_pool(Cluster(0, (4, 4)), tokens, Grid(12, 8), None, True)
    pooled = F.adaptive_avg_pool2d(tokens.permute(0, 3, 1, 2), (4, 4))
    torch.testing.assert_close(low, pooled.permute(0, 2, 3, 1))
    change = torch.randn_like(low)
    raised = F.interpolate(change.permute(0, 3, 1, 2), (12, 8), mode="bilinear")
    expected = tokens + raised.permute(0, 2, 3, 1)
    torch.testing.assert_close(reconstruct(low + change, clustering), expected)


def test_average_pooling_in_windows_has_one_map():
    tokens = torch.randn(1, 7, 9, 3)  # ragged windows of 4
    low, _, clustering = average_pool(Cluster(0, (2, 2)), tokens, Grid(7, 9), (4, 4), True)
    assert low.shape == (1, 4, 5, 3)
    torch.testing.assert_close(low[:, 0, 0], tokens[:, :2, :2].mean((1, 2)))
    torch.testing.assert_close(reconstruct(low, clustering), tokens)
    torch.testing.assert_close(clustering.weights.sum(-1), torch.ones(1, 7, 9))


def test_average_pooling_is_undone():
    before = Cluster.reduce
    with average_pooled():
        assert Cluster.reduce is average_pool
    assert Cluster.reduce is before


# Token merging


@pytest.fixture(scope="module")
def vit() -> Any:
    torch.manual_seed(0)
    sizes = {"img_size": 64, "embed_dim": 24, "depth": 3, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, global_pool="", **sizes).eval()


@torch.inference_mode()
def test_merging_nothing_changes_nothing(vit: Any):
    images = torch.randn(2, 3, 64, 64)
    expected = vit(images)
    with tome.merging(vit, [0, 0, 0]):
        torch.testing.assert_close(vit(images), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vit(images), expected)
    assert all("forward" not in vars(block) for block in vit.blocks)


@torch.inference_mode()
def test_merging_gives_every_token_a_value(vit: Any):
    with tome.merging(vit, [3, 3, 2]):
        out = vit(torch.randn(2, 3, 64, 64))
    assert out.shape == (2, 17, 24) and out.isfinite().all()
    # Eight of sixteen patches have become part of another one.
    assert [len(one.unique(dim=0)) for one in out] == [9, 9]


@torch.inference_mode()
def test_merging_equal_tokens_is_exact(vit: Any):
    """Proportional attention: what is equal may be merged without a loss."""
    patch = torch.randn(1, 3, 16, 16)
    images = patch.repeat(1, 1, 4, 4)
    positions = vit.pos_embed.data
    vit.pos_embed.data = torch.zeros_like(positions)
    try:
        expected = vit(images)
        with tome.merging(vit, [5, 3, 0]):
            torch.testing.assert_close(vit(images), expected, rtol=1e-3, atol=1e-4)
    finally:
        vit.pos_embed.data = positions


def test_matching_leaves_prefixes_and_finds_the_nearest():
    metric = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.8, 0.6]]])
    src, kept, dst = tome.matching(metric, 1, prefixes=1)
    # Even tokens 0 (a prefix), 2, 4; odd tokens 1, 3: token 4 and token 3 have the cosine 0.96.
    assert (src.tolist(), kept.tolist(), dst.tolist()) == ([[2]], [[0, 1]], [[1]])
    x = torch.arange(5.0).view(1, 5, 1)
    state = tome.Merged(torch.tensor([1.0, 1, 1, 3, 1]).view(1, 5, 1), torch.arange(5)[None])
    merged, after = tome.merge(x, state, (src, kept, dst))
    assert merged.flatten().tolist() == [0, 2, 1, pytest.approx((3 * 3 + 4) / 4)]
    assert after.size.flatten().tolist() == [1, 1, 1, 4]
    assert after.source.tolist() == [[0, 2, 1, 3, 3]]


def test_multiplyadds_of_blocks_are_those_that_are_counted(vit: Any):
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = vit.blocks

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            x = images.flatten(1).view(1, 17, 24)
            for block in self.blocks:
                x = block(x)
            return x

    images = torch.empty(1, 3, 8, 17, device="meta")
    counted = count_multiply_adds(Blocks().to("meta"), images).by_operator()
    products = sum(counted[name] for name in counted if name != "aten.native_layer_norm")
    assert tome.block_multiplyadds(vit, 17, [0, 0, 0]) == products


def test_schedule_keeps_to_its_budget(vit: Any):
    whole = tome.block_multiplyadds(vit, 17, [0, 0, 0])
    schedule = tome.equal_schedule(vit, 17, 0.7 * whole)
    assert tome.block_multiplyadds(vit, 17, schedule) <= 0.7 * whole
    fewer = list(schedule)
    fewer[schedule.index(max(schedule))] -= 1
    assert tome.block_multiplyadds(vit, 17, fewer) > 0.65 * whole
    with pytest.raises(ValueError, match="cannot go down to"):
        tome.equal_schedule(vit, 17, 0.1 * whole)
