"""Monocular depth: the metrics of Eigen et al. (arXiv 1406.2283) and of KITTI's benchmark."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from expedite_d2.d2.data.depth import cut, read_depth
from expedite_d2.d2.evaluation.evaluator import ImageEvaluator, Metrics, Results
from expedite_d2.d2.provider import DatasetCatalog, MetadataCatalog

# Shares of height and width that a crop keeps: top, bottom, left, right. Fixed by the papers for
# KITTI's images, and multiplied out and cut to integers in every published evaluation.
_RELATIVE_CROPS = {
    "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
    "eigen": (0.3324324, 0.91351351, 0.0359477, 0.96405229),
}
# In NYUv2 the colours are projected onto the depth camera, which leaves a frame without values.
_NYU_SIZE = (480, 640)
_NYU_CROPS = {
    "nyu": (slice(45, 471), slice(41, 601)),
    "nyu_mirrored": (slice(45, 471), slice(39, 599)),
}


class DepthErrors(NamedTuple):
    """Errors of one image over its valid pixels, d = prediction, t = truth, both in metres.

    Attributes:
        RMSE: root of the mean of (d - t)².
        RMSE_log: root of the mean of (log d - log t)².
        AbsRel: mean of |d - t| / t.
        SqRel: mean of (d - t)² / t.
        d1: share of pixels with max(d / t, t / d) < 1.25.
        d2: the same with 1.25².
        d3: the same with 1.25³.
        SILog: 100 times the standard deviation of log d - log t.
    """

    RMSE: float
    RMSE_log: float
    AbsRel: float
    SqRel: float
    d1: float
    d2: float
    d3: float
    SILog: float


class DepthEvaluator(ImageEvaluator[DepthErrors | None]):
    """RMSE, RMSE_log, AbsRel, SqRel, d1, d2, d3 and SILog, by the usual protocol.

    Every error is taken over the pixels of one image and averaged over the images, as in the public
    evaluations of KITTI's Eigen split and of NYUv2. Pixels count whose truth lies between the
    metadata's ``depth_min`` and ``depth_max`` and inside ``depth_crop`` ("garg", "eigen", "nyu",
    "nyu_mirrored" or "" for all); predictions are clamped to these two depths. RMSE is in metres,
    d1 to d3 are fractions. An image without any such pixel does not count.
    """

    @cached_property
    def metadata(self) -> Any:
        """The data set's metadata."""
        return MetadataCatalog.get(self.dataset_name)

    @cached_property
    def catalog(self) -> dict[str, dict[str, Any]]:
        """The data set by image file, for inputs whose mapper dropped the depth's file name."""
        return {item["file_name"]: item for item in DatasetCatalog.get(self.dataset_name)}

    def measure(self, item: Mapping, output: Mapping) -> DepthErrors | None:
        """Errors of one image; None where no pixel counts."""
        if "depth" not in output:
            raise KeyError(
                f"{type(self).__name__} needs 'depth' in the model's output, got {sorted(output)}: "
                f"the data set {self.dataset_name!r} is for models of monocular depth"
            )
        prediction = output["depth"].detach().float().cpu().numpy()
        truth = self.truth(item)
        valid = np.zeros(truth.shape, dtype=bool)
        valid[crop_window(self.metadata.get("depth_crop", ""), *truth.shape)] = True
        if "crop" in item:
            top, left, *size = item["crop"]
            truth, valid = (cut(array, (top, left), size) for array in (truth, valid))
        if prediction.shape != truth.shape:
            raise ValueError(
                f"depth must have the annotation's size {truth.shape}, got {prediction.shape}"
            )
        low, high = self.metadata.depth_min, self.metadata.depth_max
        valid = valid & (truth > low) & (truth < high)
        if not valid.any():
            return None
        prediction = np.nan_to_num(prediction[valid].astype(np.float64), nan=low, posinf=high)
        return depth_errors(prediction.clip(low, high), truth[valid].astype(np.float64))

    def truth(self, item: Mapping) -> NDArray[np.float32]:
        """(H, W) metres of the whole image, 0 where nothing was measured."""
        source = item
        if "depth_file_name" not in item:
            source = self.catalog.get(item["file_name"], item)
        if "depth_file_name" not in source:
            raise KeyError(f"no depth of {item['file_name']}: its data set has no depth_file_name")
        metadata = self.metadata
        offset = metadata.get("depth_offset")
        return read_depth(source["depth_file_name"], metadata.depth_scale, offset)

    def summarise(self, records: Mapping[Hashable, DepthErrors | None]) -> Results:
        """Average the images' errors."""
        errors = [record for record in records.values() if record is not None]
        metrics: Metrics = dict.fromkeys(DepthErrors._fields)
        if errors:
            means = np.mean(np.array(errors, dtype=np.float64), axis=0)
            metrics = dict(zip(DepthErrors._fields, means.tolist(), strict=True))
        return {"depth": metrics}


def depth_errors(prediction: NDArray[np.floating], truth: NDArray[np.floating]) -> DepthErrors:
    """Errors over some pixels.

    Args:
        prediction: (N,) metres, positive.
        truth: (N,) metres, positive.
    """
    difference = prediction - truth
    log_difference = np.log(prediction) - np.log(truth)
    ratio = np.maximum(prediction / truth, truth / prediction)
    return DepthErrors(
        RMSE=float(np.sqrt(np.mean(difference**2))),
        RMSE_log=float(np.sqrt(np.mean(log_difference**2))),
        AbsRel=float(np.mean(np.abs(difference) / truth)),
        SqRel=float(np.mean(difference**2 / truth)),
        d1=float(np.mean(ratio < 1.25)),
        d2=float(np.mean(ratio < 1.25**2)),
        d3=float(np.mean(ratio < 1.25**3)),
        SILog=float(100 * np.std(log_difference)),
    )


def crop_window(kind: str, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns that a crop of the literature keeps.

    Args:
        kind: "garg" (KITTI, of most papers), "eigen" (KITTI, Eigen's own), "nyu", "nyu_mirrored"
            (of frames that are mirrored left to right) or "" for all.
        height, width: of the whole depth map.

    Raises:
        ValueError: an unknown crop, or NYUv2's on another size than its 480x640.
    """
    if kind == "":
        return slice(height), slice(width)
    if kind in _RELATIVE_CROPS:
        top, bottom, left, right = _RELATIVE_CROPS[kind]
        return (
            slice(int(top * height), int(bottom * height)),
            slice(int(left * width), int(right * width)),
        )
    if kind not in _NYU_CROPS:
        known = ", ".join(repr(name) for name in (*_RELATIVE_CROPS, *_NYU_CROPS))
        raise ValueError(f"depth_crop must be {known} or '', got {kind!r}")
    if (height, width) != _NYU_SIZE:
        raise ValueError(f"depth_crop {kind!r} is for depth maps of 480x640, got {height}x{width}")
    return _NYU_CROPS[kind]
