"""Tools for any ``torch.nn.Module``, expedited or not; they need torch alone."""

from expedite_d2.tools.calibrate import calibrate
from expedite_d2.tools.cost import MultiplyAdds, count_multiply_adds, on_meta
from expedite_d2.tools.describe import Description, describe
from expedite_d2.tools.expedite import expedite, expedited
from expedite_d2.tools.tune import tune
from expedite_d2.tools.tuning import Row, Tuning

__all__ = [
    "Description",
    "MultiplyAdds",
    "Row",
    "Tuning",
    "calibrate",
    "count_multiply_adds",
    "describe",
    "expedite",
    "expedited",
    "on_meta",
    "tune",
]
