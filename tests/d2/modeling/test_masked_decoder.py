"""Mask2Former's transformer decoder against transformers' own."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.mask2former.modeling_mask2former import Mask2FormerMaskPredictor

import expedite_d2.d2.modeling  # noqa: F401 (registers the architectures)
from expedite_d2.d2 import build_model
from expedite_d2.d2.config import load_config
from expedite_d2.d2.modeling.meta_arch.masked_decoder import (
    MaskedAttention,
    MaskPredictor,
    predict_masks,
)

TINY = Path(__file__).parent / "mask2former_tiny.yaml"


def build():
    torch.manual_seed(0)
    module = build_model(load_config(TINY)).transformer_module.double().eval()
    for name, parameter in module.named_parameters():  # biases start at 0
        nn.init.normal_(parameter, std=0.1 if "bias" in name else 0.2)
    return module


def as_in_transformers(module):
    """The same weights under transformers' and PyTorch's own modules."""
    module = copy.deepcopy(module)
    module.decoder.mask_predictor.__class__ = Mask2FormerMaskPredictor
    for layer in module.decoder.layers:
        layer.cross_attn.__class__ = nn.MultiheadAttention
    return module


def features(module, batch=2, rows=3, columns=5):
    sizes = [(rows * 2**i, columns * 2**i) for i in range(4)]
    channels = [*(conv.in_channels for conv in module.input_projections), 32]
    *maps, full = [
        torch.randn(batch, width, *size, dtype=torch.float64)
        for width, size in zip(channels, sizes, strict=True)
    ]
    return {"multi_scale_features": maps, "mask_features": full}


@pytest.mark.parametrize("train", [False, True])
def test_queries_and_masks_of_all_layers_are_those_of_transformers(train):
    module = build().train(train)
    inputs = features(module)
    ours, theirs = module(**inputs), as_in_transformers(module)(**inputs)
    layers = len(module.decoder.layers) + 1
    assert len(ours.masks_queries_logits) == len(theirs.masks_queries_logits) == layers
    for a, b in zip(
        ours.intermediate_hidden_states, theirs.intermediate_hidden_states, strict=True
    ):
        torch.testing.assert_close(a, b)
    for embeddings, masks in zip(
        ours.masks_queries_logits, theirs.masks_queries_logits, strict=True
    ):
        torch.testing.assert_close(predict_masks(embeddings, inputs["mask_features"]), masks)


def test_next_layer_attends_to_where_the_mask_is():
    module = build()
    inputs = features(module)
    queries = torch.randn(6, 2, module.queries_embedder.embedding_dim, dtype=torch.float64)
    predictor = module.decoder.mask_predictor
    hidden = predictor(queries, inputs["mask_features"], (3, 5))[1]
    _, expected = Mask2FormerMaskPredictor.forward(
        predictor, queries, inputs["mask_features"], (3, 5)
    )
    heads = predictor.num_heads
    assert hidden.any() and not hidden.all()
    assert torch.equal(hidden.repeat_interleave(heads, 0), expected)


def test_gradients_are_those_of_transformers():
    ours = build().train()
    theirs = as_in_transformers(ours)
    inputs = features(ours)
    inputs["mask_features"].requires_grad_()
    embeddings = ours(**inputs).masks_queries_logits
    sum(predict_masks(e, inputs["mask_features"]).square().mean() for e in embeddings).backward()
    gradient, inputs["mask_features"].grad = inputs["mask_features"].grad, None
    sum(mask.square().mean() for mask in theirs(**inputs).masks_queries_logits).backward()
    torch.testing.assert_close(gradient, inputs["mask_features"].grad)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)


class Sizes(TorchDispatchMode):
    """Counts results of a size."""

    def __init__(self, size):
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.bmm.default and result.numel() == self.size:
            self.count += 1
        return result


def test_one_product_at_full_size_is_all_that_inference_takes():
    model = build_model(load_config(TINY)).eval()
    queries = model.transformer_module.queries_embedder.num_embeddings
    with torch.no_grad(), Sizes(queries * 16 * 24) as products:
        model.logits(torch.randn(1, 3, 64, 96))
    assert products.count == 1


def test_state_copies_and_pickles():
    module = build()
    assert list(module.state_dict()) == list(as_in_transformers(module).state_dict())
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(again.decoder.mask_predictor) is MaskPredictor
        assert all(type(layer.cross_attn) is MaskedAttention for layer in again.decoder.layers)
