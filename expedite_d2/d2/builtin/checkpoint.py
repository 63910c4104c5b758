"""Reading checkpoints as Detectron2 does."""

from __future__ import annotations

import pickle
from typing import Any

from fvcore.common.checkpoint import Checkpointer
from torch import nn

from expedite_d2.d2.builtin import comm
from expedite_d2.d2.builtin.file_io import PathManager


class DetectionCheckpointer(Checkpointer):
    """fvcore's checkpointer, which also reads model-zoo pickles and saves on rank 0 alone.

    Args:
        model: the model, wrapped for data parallelism or not.
        save_dir: where checkpoints are written and looked for.
        save_to_disk: whether ``save`` writes anything; by default on the main process only.
        checkpointables: what else has a ``state_dict`` to keep, e.g. ``optimizer=…``.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        **checkpointables: Any,
    ) -> None:
        if save_to_disk is None:
            save_to_disk = comm.is_main_process()
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.path_manager = PathManager

    def _load_file(self, filename: str) -> dict[str, Any]:
        if not filename.endswith(".pkl"):
            loaded = super()._load_file(filename)
            return loaded if "model" in loaded else {"model": loaded}
        with open(filename, "rb") as file:
            loaded = pickle.load(file, encoding="latin1")
        if "model" not in loaded or "__author__" not in loaded or "matching_heuristics" in loaded:
            raise ValueError(
                f"{filename} needs Detectron2's name matching: expected a model-zoo pickle with "
                "'model' and '__author__', and without 'matching_heuristics'"
            )
        return loaded
