"""The command `expedite-d2`."""

from __future__ import annotations

import importlib
from importlib import metadata
from pathlib import Path

import pytest

from expedite_d2.__main__ import VERBS, main

SEGMENTER = "scenes/semantic/segmenter_vit_mini_expedited.yaml"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: expedite-d2 {verb} ")


def test_help_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    for verb, (module, purpose) in VERBS.items():
        assert f"  {verb}" in out and purpose in out
        assert callable(importlib.import_module(module).main)


@pytest.mark.parametrize("words", [[], ["nothing"]])
def test_no_verb_and_an_unknown_one_end_with_code_2(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "VERB" in capsys.readouterr().err


def test_installed_command_is_this_one() -> None:
    (script,) = metadata.entry_points(group="console_scripts", name="expedite-d2")
    assert script.load() is main


def test_describe_lists_the_blocks_of_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    main(["describe", "--config-file", SEGMENTER, "--size", "384", "384", "MODEL.WEIGHTS", ""])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "ExpeditedViT, one image of 384x384"
    blocks = [line.split() for line in lines if line.lstrip().startswith("vit.blocks.")]
    assert [int(block[1]) for block in blocks] == [577] * 12
    assert int(blocks[0][2]) == 577 and int(blocks[-1][2]) < 577


def test_describe_refuses_a_size_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["describe", "--config-file", SEGMENTER, "--size", "0", "384"])
    assert ended.value.code == 2
    assert "size must be two numbers of pixels, got [0, 384]" in capsys.readouterr().err


def test_convert_names_a_file_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(tmp_path / "none.pth"), str(tmp_path / "out.pth")])
    assert ended.value.code == 2 and not list(tmp_path.iterdir())
    assert capsys.readouterr().err.startswith("error: ")
