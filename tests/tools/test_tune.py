"""Tuning: what it tries, measures, chooses and leaves behind."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import CASES
from family_cases.case import images
from family_cases.plain import from_transformers
from settings_cases import clustered
from torch import Tensor, nn

from expedite_d2 import expedite, expedited, is_expedited, restore
from expedite_d2.reducers import Cluster, Merge, Reduction
from expedite_d2.tools import describe
from expedite_d2.tools.budget import Costs, Merges
from expedite_d2.tools.latency import Latency
from expedite_d2.tools.outputs import call, checked, distance, outputs_of
from expedite_d2.tools.tune import JUDGES, SHARES, tune
from expedite_d2.tools.tune import _calibrated as calibrated
from expedite_d2.tools.tuning import Row, Tuning, in_words

SIZE = (64, 64)


class Head(nn.Module):
    """A model as transformers has them: takes keywords, and returns more than its result."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.encoder = CASES[kind].make()
        self.head = nn.Linear(16, 3)

    def forward(self, pixel_values: Tensor) -> dict[str, Any]:
        assert not self.training and not torch.is_grad_enabled()
        tokens = self.encoder(pixel_values)
        if not isinstance(tokens, Tensor):
            tokens = tokens["last_feat"].permute(0, 2, 3, 1)
        return {"logits": self.head(tokens), "hidden_states": (1e6 * tokens,)}


def pictures(count: int, size: tuple[int, int] = SIZE) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.rand(1, 3, *size, generator=generator)} for _ in range(count)]


@pytest.fixture(scope="module")
def tuned() -> tuple[Head, list[Any], Tuning]:
    model, given = Head("timm vit").train(), pictures(6)
    return model, given, tune(model, given, budget=0.55, progress=False)


def test_every_kind_of_settings_is_tried_at_every_share(tuned: Any) -> None:
    _, _, tuning = tuned
    kinds = {row.kind for row in tuning.rows}
    assert kinds == {"merges", "merges and groups", "clusters"}
    most = sorted({0.55, *SHARES}, reverse=True)
    merges = sorted((row.share for row in tuning.rows if row.kind == "merges"), reverse=True)
    assert 0 < len(merges) <= len(most)
    for share, budget in zip(merges, most, strict=False):
        assert budget - 0.08 < share <= budget


def test_no_settings_are_tried_twice(tuned: Any) -> None:
    _, _, tuning = tuned
    groups = [row.reduction for row in tuning.rows if row.kind == "merges and groups"]
    assert len(groups) == len(set(groups))
    fours = [reduction for reduction in groups if reduction.steps[0].rounds == 2]
    assert len(fours) == 2  # for 80 to 40 %: such groups leave less than half of this model


def test_rows_tell_what_the_settings_cost_and_change(tuned: Any) -> None:
    model, given, tuning = tuned
    model.eval()
    judged = given[JUDGES - 1 :: JUDGES]
    for row in tuning.rows[:: len(tuning.rows) // 3]:
        distances = []
        with torch.no_grad():
            for image in judged:
                plain = [model(**image)["logits"]]
                with expedited(model, row.reduction):
                    found = [model(**image)["logits"]]
                distances.append(distance(found, plain))
        assert row.error == pytest.approx(sum(distances) / len(distances), rel=1e-3)
        with expedited(model.encoder, row.reduction):
            told = describe(model.encoder, SIZE)
        assert row.share == pytest.approx(told.reduced_multiply_adds / told.multiply_adds)
        assert row.latency.median > 0 and row.plain.median > 0


def test_the_model_is_left_as_it_was(tuned: Any) -> None:
    model, given, _ = tuned
    assert not is_expedited(model)
    model.train()
    before = Reduction(Cluster(1, (3, 3)))
    expedite(model, before)
    tune(model, given[:3], progress=False)
    assert model.encoder.reduction == before and model.training
    restore(model)


def test_the_best_is_nearest_within_the_budget(tuned: Any) -> None:
    _, _, tuning = tuned
    within = [row for row in tuning.rows if row.share <= 0.55]
    assert tuning.row in within and tuning.row.error == min(row.error for row in within)
    assert tuning.best == tuning.row.reduction


def row(share: float, error: float, milliseconds: float, plain: float = 10.0) -> Row:
    latency, other = Latency.of([milliseconds]), Latency.of([plain])
    return Row(clustered(1, (2, 2)), share, error, latency, other)


ROWS = (row(0.8, 0.01, 8.0), row(0.6, 0.03, 7.0), row(0.5, 0.02, 6.0), row(0.4, 0.09, 9.0))


def test_a_largest_error_takes_the_fastest() -> None:
    assert Tuning("M", "cpu", ROWS, max_error=0.025).row is ROWS[2]
    assert Tuning("M", "cpu", ROWS, max_error=0.015).row is ROWS[0]
    with pytest.raises(ValueError, match="max_error must be at least 0.01, .* got 0.001"):
        _ = Tuning("M", "cpu", ROWS, max_error=0.001).best


def test_the_default_budget_is_that_of_expedite(tmp_path: Path) -> None:
    assert Tuning("M", "cpu", ROWS).row is ROWS[2]
    tuning = Tuning("M", "cpu", ROWS, budget=0.3)
    with pytest.raises(ValueError, match="budget must be at least 0.400, .* got 0.3"):
        _ = tuning.best
    assert len(str(tuning).splitlines()) == 2 + len(ROWS)  # what was measured is told all the same
    tuning.plot(tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")


def test_the_front_leaves_out_what_another_beats() -> None:
    assert Tuning("M", "cpu", ROWS).front == (ROWS[2], ROWS[0])


def test_its_text_is_a_table_with_the_best_marked(tuned: Any) -> None:
    _, _, tuning = tuned
    lines = str(tuning).splitlines()
    assert len(lines) == 2 + len(tuning.rows)
    (best,) = [line for line in lines[2:] if line.startswith("*")]
    assert f"{100 * tuning.row.error:.2f} %" in best
    assert all(len(line) < 110 for line in lines)


def test_the_settings_round_trip_and_the_plot_is_a_picture(tuned: Any, tmp_path: Path) -> None:
    model, given, tuning = tuned
    tuning.save(tmp_path / "best.yaml")
    assert Reduction.load(tmp_path / "best.yaml") == tuning.best
    expedite(model, Reduction.load(tmp_path / "best.yaml"))
    restore(model)
    tuning.plot(tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="must end in .png, .pdf, .svg, got .*front.xyz"):
        tuning.plot(tmp_path / "front.xyz")
    with pytest.raises(OSError, match="must be written to a folder that exists, got .*front.png"):
        tuning.plot(tmp_path / "nowhere" / "front.png")


def test_windows_take_clusters_alone() -> None:
    model = Head("detectron2 vit")
    tuning = tune(model, pictures(3), max_error=0.9, progress=False)
    assert tuning.rows and {row.kind for row in tuning.rows} == {"clusters"}
    assert tuning.best in [row.reduction for row in tuning.rows]


def test_interrupted_it_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["expedite_d2.tools.tune"]
    model, done = Head("timm vit"), []
    whole = module._times

    def times(*args: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(whole(*args))
        return done[-1]

    monkeypatch.setattr(module, "_times", times)
    with pytest.warns(UserWarning, match=r"interrupted after 2 of \d+ settings"):
        tuning = tune(model, pictures(3), progress=False)
    assert len(tuning.rows) == 2 and not is_expedited(model)
    done[:] = [None, None]
    with pytest.raises(KeyboardInterrupt):
        tune(model, pictures(3), progress=False)
    assert not is_expedited(model)


def test_out_of_memory_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Head("timm vit")

    def forward(pixel_values: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(RuntimeError, match="tune ran out of memory on cpu: smaller images"):
        tune(model, pictures(3), progress=False)


@pytest.mark.parametrize(
    ("given", "keywords", "message"),
    [
        ([], {}, "tune needs at least 3 images, got none"),
        (pictures(1), {}, "tune needs at least 3 images, got 1"),
        ("photos", {}, "images must be a list of a model's inputs, got str"),
        (pictures(1)[0], {}, "images must be a list of a model's inputs, got dict"),
        (["a.png"] * 3, {}, "images must each be an input of the model, got the path 'a.png'"),
        ([torch.rand(3, 8, 8)], {}, r"images must each be \(B, 3, H, W\), got .* \[3, 8, 8\]"),
        ([(torch.rand(1, 3, 8, 8), 4)], {}, "got a tuple of 2: such as an image and its labels"),
        ([{"pixel_values": torch.rand(1, 3, 8, 8), "labels": 1}], {}, "without labels, got labels"),
        (pictures(3), {"budget": 1.5}, "budget must be a share between 0 and 1, got 1.5"),
        (pictures(3), {"max_error": float("nan")}, "max_error must be a number .*, got nan"),
        (pictures(3), {"size": ()}, r"size must be two numbers of pixels, got \(\)"),
        (pictures(3), {"outputs": "logits"}, "outputs must be a function .*, got 'logits'"),
        (pictures(3), {"max_error": -1}, "max_error must be a number greater than 0, got -1"),
        (pictures(3), {"budget": 0.01}, r"budget must be at least 0\.\d+, .* got 0.01"),
        (pictures(3), {"budget": 0.5, "max_error": 0.1}, "must not both be given"),
    ],
)
def test_what_cannot_be_tuned_is_a_sentence(given: Any, keywords: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tune(Head("timm vit"), given, progress=False, **keywords)


def test_a_model_without_an_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear holds no encoder"):
        tune(nn.Linear(3, 3), pictures(3), progress=False)


def test_outputs_are_results_before_what_lies_within() -> None:
    model = Head("timm vit").eval()
    with torch.no_grad():
        (found,) = outputs_of(model, model.encoder, pictures(1)[0])
        assert found.shape[-1] == 3
        (chosen,) = outputs_of(
            model, model.encoder, pictures(1)[0], lambda out: out["hidden_states"]
        )
        assert chosen.shape[-1] == 16
        assert torch.equal(call(model, images(*SIZE))["logits"], model(images(*SIZE))["logits"])


def test_a_model_without_a_head_is_judged_by_its_last_hidden_state() -> None:
    model, x = from_transformers("ViTModel", pooling=True), images(24, 24, batch=1)
    with torch.no_grad():
        last, *pooled = outputs_of(model, model, x)
        assert torch.equal(last, model(x).last_hidden_state) and not pooled
        with pytest.raises(ValueError, match="outputs must pick floating point tensors, got none"):
            outputs_of(model, model, x, lambda out: None)


def test_outputs_of_unlike_shapes_are_no_distance_of_zero() -> None:
    boxes, fewer = torch.ones(5, 4), torch.ones(3, 4)
    for found in ([fewer], [], [boxes, fewer]):
        with pytest.raises(ValueError, match=r"whose shapes are .* and plain \[\[5, 4\]\]: pick"):
            distance(found, [boxes])
    scores = torch.ones(2)
    assert distance([2 * scores, fewer], [scores, boxes]) == 1  # what can be compared


def test_prompts_are_no_labels() -> None:
    image = {"pixel_values": torch.rand(1, 3, 8, 8), "input_labels": torch.ones(1, 1, 1)}
    assert list(checked([image])) == [image]


def test_a_budget_is_met_without_maps_where_these_cost_too_much() -> None:
    model, given = CASES["timm vit"].make(), list(images(*SIZE, batch=8).split(1))
    costs, recipe = Costs(model, SIZE), Merges((0.25, 0.5))
    least = costs.least(recipe)
    settings = [calibrated(model, costs, recipe, most, given, None) for most in (least, 0.7)]
    shares = [costs.share(reduction) for reduction in settings]
    assert shares[0] == least and least < shares[1] <= 0.7
    assert settings[0].correction is None and settings[1].correction is not None


def test_distances_are_relative_also_to_nothing() -> None:
    one, none = torch.tensor([3.0, 4.0]), torch.zeros(2)
    assert distance([one, 2 * one], [one, one]) == pytest.approx(0.5**0.5)
    assert distance([one], [none]) == 1 and distance([none], [none]) == 0
    assert distance([one / none], [one]) == math.inf
    with pytest.raises(ValueError, match="outputs of the plain model must be finite"):
        distance([one], [one / none])


def test_merges_are_named_by_their_steps() -> None:
    assert in_words(Reduction(Merge((0, 2), 0.75, rounds=2))) == (
        "merges before 0, 2, keep 0.75, groups of 4"
    )
    assert in_words(clustered(3, (0.5, 0.5))) == "clusters 0.5x0.5 from block 3"
