"""Names of a Swin's weights: official ones for those of transformers."""

from __future__ import annotations

import torch
from torch import Tensor


def official_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a backbone of transformers' (5.10 to 5.x) under official names."""
    renamed = {}
    for name, value in state.items():
        name = name.removeprefix("swin.").removeprefix("model.").removeprefix("encoder.")
        if name.startswith("hidden_states_norms."):
            _, stage, part = name.split(".")  # "stage1", or MaskFormer's 0
            number = int(stage.removeprefix("stage")) - stage.startswith("stage")
            name = f"norm{number}.{part}"
        for theirs, ours in (
            ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
            ("embeddings.norm", "patch_embed.norm"),
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
            ("attention.output.dense", "attention.proj"),
            ("attention.o_proj", "attention.proj"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
            ("attention.self.", "attention."),
            ("attention.relative_position_bias.", "attention."),
            ("continuous_position_bias_mlp", "cpb_mlp"),
            ("attention.query.", "attention.q_proj."),
            ("attention.key.", "attention.k_proj."),
            ("attention.value.", "attention.v_proj."),
            ("attention.", "attn."),
        ):
            name = name.replace(theirs, ours)
        if "relative_position_index" not in name and not name.startswith("layernorm."):
            renamed[name] = value
    for name in [n for n in renamed if ".q_proj." in n]:
        parts = {x: renamed.pop(name.replace("q_proj", f"{x}_proj"), None) for x in "qkv"}
        if parts["k"] is None:  # the second version's keys have no bias
            for x in "qv":
                renamed[name.replace("q_proj.bias", f"{x}_bias")] = parts[x]
        else:
            renamed[name.replace("q_proj", "qkv")] = torch.cat(list(parts.values()))
    return renamed
