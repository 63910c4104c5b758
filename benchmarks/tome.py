"""Token merging ("Token Merging: Your ViT But Faster", arXiv 2210.09461) for timm's ViT.

In every block, between attention and MLP, the `r` most similar pairs of tokens of a bipartite soft
matching become their mean, weighted by how many tokens each stands for; attention is proportional
to that number (its logarithm is added to the logits). After the last block each token gets the
value of what it was merged into. Attention goes through scaled_dot_product_attention, the choice
and the merging through a few gathers and scatters: nothing here is slower than it must be in
PyTorch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_ATTRIBUTE = "_tome"


class Merged(NamedTuple):
    """State that accompanies merged tokens.

    Attributes:
        size: (B, N, 1) how many tokens each stands for.
        source: (B, N0) int64, for each of the first tokens the one that it is part of.
    """

    size: Tensor
    source: Tensor


def matching(metric: Tensor, r: int, prefixes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bipartite soft matching of the tokens at even and odd positions.

    Args:
        metric: (B, N, D), whose cosine says how similar tokens are.
        r: pairs to merge.
        prefixes: tokens at the front that are never merged.

    Returns:
        src, kept: (B, r) and (B, ceil(N / 2) - r), the even tokens that are merged and those that
        stay, in their order; dst: (B, r), the odd tokens that `src` are merged into.
    """
    metric = F.normalize(metric.float(), dim=2)
    even, odd = metric[:, ::2], metric[:, 1::2]
    scores = even @ odd.transpose(1, 2)
    scores[:, : (prefixes + 1) // 2] = -torch.inf
    scores[:, :, : prefixes // 2] = -torch.inf
    best, partner = scores.max(2)
    order = best.argsort(1, descending=True)
    src = order[:, :r]
    return src, order[:, r:].sort(1).values, partner.gather(1, src)


def merge(x: Tensor, state: Merged, match: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Merged]:
    """Merge tokens (B, N, C) to (B, N - r, C): those kept at even positions, then the odd ones."""
    src, kept, dst = match

    def put(values: Tensor) -> Tensor:
        even, odd = values[:, ::2], values[:, 1::2]
        width = values.shape[2]
        moved = even.gather(1, src[..., None].expand(-1, -1, width))
        odd = odd.scatter_add(1, dst[..., None].expand(-1, -1, width), moved)
        return torch.cat([even.gather(1, kept[..., None].expand(-1, -1, width)), odd], 1)

    size = put(state.size)
    batch, count = x.shape[:2]
    place = x.new_empty(batch, count, dtype=torch.int64)
    even = place[:, ::2].clone()
    positions = torch.arange(count, device=x.device)
    even.scatter_(1, kept, positions[: kept.shape[1]].expand(batch, -1))
    even.scatter_(1, src, dst + kept.shape[1])
    place[:, ::2] = even
    place[:, 1::2] = positions[kept.shape[1] : kept.shape[1] + count // 2]
    merged = (put(x * state.size) / size).to(x.dtype)
    return merged, Merged(size, place.gather(1, state.source))


class _MergingBlock:
    """The forward of a timm block that merges tokens."""

    def __init__(self, block: Any, r: int, prefixes: int, last: bool) -> None:
        self.block = block
        self.r = r
        self.prefixes = prefixes
        self.last = last

    def __call__(self, x: Tensor) -> Tensor:
        block = self.block
        state: Merged | None = getattr(x, _ATTRIBUTE, None)
        attended, keys = self._attention(block.norm1(x), state)
        x = x + block.drop_path1(block.ls1(attended))
        if state is None:
            batch, count = x.shape[:2]
            source = torch.arange(count, device=x.device).expand(batch, -1)
            state = Merged(torch.ones_like(x[..., :1]), source)
        if self.r:
            x, state = merge(x, state, matching(keys, self.r, self.prefixes))
        x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        if self.last:
            return x.gather(1, state.source[..., None].expand(-1, -1, x.shape[2]))
        setattr(x, _ATTRIBUTE, state)
        return x

    def _attention(self, x: Tensor, state: Merged | None) -> tuple[Tensor, Tensor]:
        """The block's own attention with proportional weights, and its keys' mean over heads."""
        attention = self.block.attn
        batch, count, _ = x.shape
        qkv = attention.qkv(x).view(batch, count, 3, attention.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        query, key = attention.q_norm(query), attention.k_norm(key)
        bias = None
        if state is not None:
            bias = state.size.log().to(query.dtype).view(batch, 1, 1, count)
        out = scaled_dot_product_attention(query, key, value, bias)
        out = out.transpose(1, 2).reshape(batch, count, -1)
        return attention.proj_drop(attention.proj(attention.norm(out))), key.mean(1)


@contextlib.contextmanager
def merging(vit: Any, schedule: Sequence[int]) -> Iterator[None]:
    """A timm VisionTransformer merges `schedule[i]` pairs in block i while this is entered."""
    blocks = list(vit.blocks)
    for i, (block, r) in enumerate(zip(blocks, schedule, strict=True)):
        last = i == len(blocks) - 1
        block.forward = _MergingBlock(block, r, vit.num_prefix_tokens, last)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def block_multiplyadds(vit: Any, tokens: int, schedule: Sequence[int]) -> float:
    """Multiply-adds of all blocks for one image: linear layers, attention, and the matching.

    Args:
        vit: timm's VisionTransformer.
        tokens: that enter the first block, prefixes included.
        schedule: pairs merged in each block.
    """
    total = 0.0
    for block, r in zip(vit.blocks, schedule, strict=True):
        width, heads = vit.embed_dim, block.attn.num_heads
        hidden = block.mlp.fc1.out_features
        total += 4 * tokens * width**2 + 2 * tokens**2 * width
        if r:
            total += (tokens / 2) ** 2 * (width // heads)
        tokens -= r
        total += 2 * tokens * width * hidden
    return total


def equal_schedule(vit: Any, tokens: int, budget: float) -> list[int]:
    """Pairs to merge in each block, as evenly as can be, for at most `budget` multiply-adds.

    Raises:
        ValueError: not even merging as many as possible is cheap enough.
    """
    depth = len(vit.blocks)
    least = vit.num_prefix_tokens

    def schedule(total: int) -> list[int]:
        left, result = tokens, []
        for i in range(depth):
            r = (i + 1) * total // depth - i * total // depth
            r = min(r, max((left - least) // 2, 0))
            left -= r
            result.append(r)
        return result

    for total in range(tokens):
        found = schedule(total)
        if block_multiplyadds(vit, tokens, found) <= budget:
            return found
    raise ValueError(f"token merging cannot go down to {budget / 1e9:.3g} G multiply-adds")
