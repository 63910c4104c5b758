"""Tools for any ``torch.nn.Module``, expedited or not; they need torch alone."""

from expedite_d2.tools.cost import MultiplyAdds, count_multiply_adds, on_meta

__all__ = ["MultiplyAdds", "count_multiply_adds", "on_meta"]
