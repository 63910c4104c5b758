"""One sentence for what was raised on purpose, a traceback for all else."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from expedite_d2.errors import UNFORESEEN, cli, sentence_of


def run(code: str, module: str = "expedite_d2.somewhere") -> Exception:
    """What code raises, as if it stood in a module."""
    names: dict[str, Any] = {"__name__": module}
    try:
        exec(compile(code, "somewhere.py", "exec"), names)
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


ON_PURPOSE = {
    "value": ("raise ValueError('alpha is wrong')", "alpha is wrong"),
    "key": ("raise KeyError('no key X')", "no key X"),
    "loss": ("raise FloatingPointError('the loss is not finite')", "the loss is not finite"),
    "file": ("raise FileNotFoundError('no such checkpoint')", "no such checkpoint"),
    "subclass": (
        "class Corrupt(ValueError): pass\nraise Corrupt('it is truncated')",
        "it is truncated",
    ),
    "wrapped": (
        "try:\n    {}['p7']\nexcept KeyError as error:\n    raise ValueError('no p7') from error",
        "no p7",
    ),
    "in a context": (
        "import contextlib\n"
        "with contextlib.ExitStack():\n"
        "    try:\n"
        "        raise ValueError('inside')\n"
        "    finally:\n"
        "        x = 1",
        "inside",
    ),
    "raised again": (
        "def f():\n    raise ValueError('first')\ntry:\n    f()\nexcept ValueError:\n    raise",
        "first",
    ),
    "by a system call": ("open('/nowhere/x')", "[Errno 2] No such file or directory: '/nowhere/x'"),
}
BY_ACCIDENT = {
    "key": "{}['p7']",
    "key of an ordered one": "import collections\ncollections.OrderedDict().popitem()",
    "index": "[][0]",
    "attribute": "None.shape",
    "type": "len(3)",
    "number": "int('many')",
    "unpacking": "a, b = [1]",
    "strict zip": "list(zip([1], [], strict=True))",
    "text": "b'\\xff'.decode()",
    "JSON": "import json\njson.loads('{')",
    "numpy": "import numpy\nnumpy.zeros(3).reshape(2)",
    "torch": "import torch\ntorch.nn.Dropout(2.0)",
    "torch's own": "import torch\ntorch.zeros(3).view(2)",
    "assertion": "assert False",
    "of another kind": "raise RuntimeError('a bug')",
    "raised again": "try:\n    int('many')\nexcept ValueError as error:\n    raise error",
}


@pytest.mark.parametrize("case", ON_PURPOSE)
def test_what_is_raised_on_purpose_is_a_sentence(case: str) -> None:
    code, sentence = ON_PURPOSE[case]
    for module in ("expedite_d2.somewhere", "__main__", "__mp_main__"):
        assert sentence_of(run(code, module)) == sentence


@pytest.mark.parametrize("case", BY_ACCIDENT)
def test_what_happens_by_accident_is_none(case: str) -> None:
    assert sentence_of(run(BY_ACCIDENT[case])) is None


@pytest.mark.parametrize("module", ["numpy.lib", "expedite_d2_of_others", "detectron2.config"])
def test_what_others_raise_is_none(module: str) -> None:
    assert sentence_of(run("raise ValueError('of theirs')", module)) is None


def test_error_without_a_traceback_is_none() -> None:
    assert sentence_of(ValueError("never raised")) is None


def command(code: str) -> Callable[[], None]:
    @cli
    def main() -> None:
        raise run(code)

    return main


@pytest.mark.parametrize("case", ON_PURPOSE)
def test_cli_turns_a_users_error_into_one_line(
    case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, sentence = ON_PURPOSE[case]
    with pytest.raises(SystemExit) as caught:
        command(code)()
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"


@pytest.mark.parametrize("case", BY_ACCIDENT)
def test_cli_says_where_an_unforeseen_error_is_reported(
    case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = run(BY_ACCIDENT[case])
    with pytest.raises(type(expected)) as caught:
        command(BY_ACCIDENT[case])()
    printed = "".join(traceback.format_exception(caught.value)) + capsys.readouterr().err
    assert printed.startswith("Traceback") and printed.count(UNFORESEEN) == 1
    if sys.version_info >= (3, 11):
        assert printed.endswith(f"{UNFORESEEN}\n")


def test_cli_reports_an_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    @cli
    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        main()
    assert (caught.value.code, capsys.readouterr().err) == (130, "interrupted\n")
