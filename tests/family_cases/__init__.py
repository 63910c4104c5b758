"""Tiny random encoders of every family, for the tests of what holds of all."""

from __future__ import annotations

from family_cases import decomposed, plain, rotary, swin
from family_cases.case import Case

#: Those that `Case.by_hand` can step through.
SEQUENCES: dict[str, Case] = plain.CASES | rotary.CASES
CASES: dict[str, Case] = SEQUENCES | swin.CASES | decomposed.CASES | rotary.OTHERS
