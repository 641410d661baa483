"""Is what a run declares equal really equal, and is each learning rate chosen fairly?"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bdh_bench import load_model, registry, sizing
from bdh_bench.data.corpus import open_corpus
from bdh_bench.errors import BenchError, SpecError, UnknownNameError
from bdh_bench.runner import sweep as sweeping
from bdh_bench.runner.matching import STATE_CONTEXTS, matched_bytes, matched_model, training_flops_per_byte
from bdh_bench.runner.plan import command_line, make_plan
from bdh_bench.runner.recipes import check_training, rate_of, regime_of
from bdh_bench.runner.training import train_model, train_or_load
from bdh_bench.spec import RunSpec, from_toml, parse_model, to_toml
from bdh_bench.training import pilot
from bdh_bench.training.checkpoints import Checkpoint
from bdh_bench.training.recipe import CONTINUED_RATE, CONTINUED_SHARE, Recipe, continued

_SMALL = "bdh:n_layer=2:n_embd=16:n_head=2:mlp_internal_dim_multiplier=4"
_OTHER = "llama:d_model=16:n_layer=2:n_head=2"


def _spec(*models: str, **settings: Any) -> RunSpec:
    return RunSpec(models, ("long_ppl",), train_bytes=16_384, train_context=64, threads=1, **settings)


# -- options that are no part of the architecture ------------------------------------------------------------------------


def test_training_options_on_a_name_win_over_those_of_the_run() -> None:
    spec = _spec(_SMALL, regime="carried", learning_rate=1e-3)
    own = parse_model("bdh:regime=crop:learning_rate=0.5")
    assert (regime_of(own, spec), rate_of(own, spec)) == ("crop", 0.5)
    plain = parse_model("bdh")
    assert (regime_of(plain, spec), rate_of(plain, spec)) == ("carried", 1e-3)
    assert rate_of(plain, replace(spec, learning_rate=0.0)) == registry.find("models", "bdh").defaults["learning_rate"]
    assert str(own.architecture()) == "bdh"
    assert repr(load_model(f"{_SMALL}:regime=carried").config) == repr(load_model(_SMALL).config)


@pytest.mark.parametrize(
    ("settings", "model", "error"),
    [
        ({"regime": "carry"}, "bdh", UnknownNameError),
        ({}, "bdh:regime=carry", UnknownNameError),
        ({}, "bdh:learning_rate=0", SpecError),
        ({}, "bdh:learning_rate=fast", SpecError),
        ({"match": "param"}, "bdh", UnknownNameError),
        ({"match": "wallclock"}, "bdh", SpecError),
        ({"train_seconds": 3.0}, "bdh", SpecError),
    ],
)
def test_impossible_trainings_are_refused(settings: dict[str, Any], model: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        check_training(_spec(model, **settings), (parse_model(model),))
    with pytest.raises(error):
        make_plan(_spec(model, **settings))


def test_a_request_round_trips_with_its_matching(tmp_path: Path) -> None:
    spec = _spec("bdh", "mamba", match="wallclock", train_seconds=2.5)
    (tmp_path / "x.toml").write_text(to_toml(spec))
    assert from_toml(tmp_path / "x.toml") == spec
    assert "--match wallclock" in command_line(spec)
    assert "--train-seconds 2.5" in command_line(spec)


def test_cells_of_a_matched_run_are_not_those_of_another() -> None:
    def key(*models: str, **settings: Any) -> str:
        cells = make_plan(_spec(*models, **settings)).cells
        return next(c.key for c in cells if c.model == "mamba")

    plain, matched = key("bdh", "mamba"), key("bdh", "mamba", match="state")
    assert plain == key("gpt2", "mamba")
    assert len({plain, matched, key("gpt2", "mamba", match="state"), key("bdh", "mamba", match="flops")}) == 4


# -- crop+carried --------------------------------------------------------------------------------------------------------


def test_crop_and_carried_goes_on_from_the_very_checkpoint_of_crop(books: Path) -> None:
    spec = _spec(_SMALL, data=f"path:{books}")
    crop = train_model(spec, lambda *a: None)
    both = train_model(replace(spec, regime="crop+carried"), lambda *a: None)
    first, second = both["stages"]
    assert first["sha256"] == crop["sha256"]
    assert first["reused"]
    assert (second["regime"], both["regime"]) == ("carried", "crop+carried")
    assert second["bytes"] == pytest.approx(CONTINUED_SHARE * crop["bytes"], rel=0.35)  # whole steps of 512 bytes
    assert both["bytes"] == crop["bytes"] + second["bytes"]
    assert both["sha256"] == second["sha256"] != crop["sha256"]
    assert [p[0] for p in both["curve"]] == sorted(p[0] for p in both["curve"])
    assert second["learning_rate"] == pytest.approx(CONTINUED_RATE * crop["learning_rate"])
    again = train_model(replace(spec, regime="crop+carried"), lambda *a: None)
    assert again["reused"]
    assert again["sha256"] == both["sha256"]


def test_the_second_stage_starts_from_trained_weights(books: Path) -> None:
    """Its first loss is near the last one of crop and far from that of random weights."""
    spec = _spec(_SMALL, data=f"path:{books}", regime="crop+carried")
    both = train_model(spec, lambda *a: None)
    first, second = both["stages"]
    assert second["curve"][0][1] < first["curve"][0][1] - 1


def test_another_crop_checkpoint_is_another_second_stage() -> None:
    recipe = Recipe(16_384, 64, 1e-2, 0)
    assert continued(recipe, "a") != continued(recipe, "b")


# -- flops ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("models", [(_SMALL, _OTHER), (_OTHER, _SMALL), ("mamba:d_model=16:n_layer=2", _SMALL)])
def test_equal_flops_are_equal_and_the_reference_keeps_its_bytes(models: tuple[str, str]) -> None:
    spec = _spec(*models, match="flops")
    built = [load_model(name) for name in models]
    given = [matched_bytes(model, spec) for model in built]
    assert given[0] == spec.train_bytes
    spent = [n * training_flops_per_byte(model, 64) for n, model in zip(given, built, strict=True)]
    assert spent[1] == pytest.approx(spent[0], rel=1e-3)
    assert given[1] != spec.train_bytes


def test_training_flops_are_three_times_forward_at_the_mean_context() -> None:
    model = load_model(_OTHER)
    assert training_flops_per_byte(model, 64) == 3 * model.flops_per_token(32)


def test_training_uses_the_matched_bytes(books: Path) -> None:
    spec = _spec(_SMALL, _OTHER, data=f"path:{books}", match="flops")
    model, name = load_model(_OTHER, train_context=64), parse_model(_OTHER)
    report = train_or_load(model, name, spec, 0, open_corpus(spec.data), lambda *a: None)
    assert report["bytes"] == pytest.approx(matched_bytes(model, spec), rel=0.05)
    assert Checkpoint(report["checkpoint"]).weights.is_file()
    assert "/" not in report["checkpoint"]  # a row names a checkpoint, not a place on this machine


# -- state ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba"])
def test_equal_states_are_equal_at_four_training_contexts(family: str) -> None:
    spec = _spec("bdh", family, match="state")
    reference = load_model(matched_model(spec, parse_model("bdh")))
    model = load_model(matched_model(spec, parse_model(family)), train_context=64)
    assert str(matched_model(spec, parse_model("bdh"))) == "bdh"
    context = STATE_CONTEXTS * 64
    assert model.state_bytes(1, context) == pytest.approx(reference.state_bytes(1, context), rel=sizing.STATE_TOLERANCE)


def test_pinned_options_survive_the_matching_and_an_impossible_one_is_refused() -> None:
    spec = _spec("bdh", "mamba", match="state")
    model = load_model(matched_model(spec, parse_model("mamba:state_size=32")))
    assert model.config.state_size == 32
    with pytest.raises(SpecError, match="no shape with a state of"):
        matched_model(spec, parse_model("mamba:d_model=16:n_layer=1"))


# -- wall-clock ----------------------------------------------------------------------------------------------------------


def test_the_pilot_counts_whole_steps_once(books: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10**6))
    monkeypatch.setattr(pilot, "now_s", lambda: float(next(ticks)) / 10)  # every step takes 0.1 s
    model = load_model(_SMALL)
    before = [p.clone() for p in model.parameters()]
    documents = open_corpus(f"path:{books}").part("train")
    checkpoint, recipe = Checkpoint("p" * 64), Recipe(1, 64, 1e-2, 0, batch_bytes=256)
    assert pilot.bytes_in(2.0, model, recipe, documents, checkpoint) == 20 * 256
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    kept = json.loads((checkpoint.folder / "pilot.json").read_text())
    assert kept["bytes"] == 20 * 256
    monkeypatch.setattr(pilot, "now_s", lambda: 1 / 0)
    assert pilot.bytes_in(2.0, model, recipe, documents, checkpoint) == 20 * 256  # a resumed training keeps its budget


def test_wallclock_training_takes_about_the_time_that_was_given(books: Path) -> None:
    spec = _spec(_SMALL, data=f"path:{books}", match="wallclock", train_seconds=1.0)
    report = train_model(spec, lambda *a: None)
    assert 0.2 < report["seconds"] < 5.0  # other work may share the machine
    again = train_model(spec, lambda *a: None)
    assert again["reused"]


# -- learning rates ------------------------------------------------------------------------------------------------------


def _fake(optimum: float, diverges_above: float = math.inf) -> Any:
    def train(spec: RunSpec) -> dict[str, Any]:
        if spec.learning_rate > diverges_above:
            raise BenchError("the loss is nan after 3 steps")
        assert spec.seeds == (sweeping.SEED,)
        bits = 2 + abs(math.log(spec.learning_rate / optimum))
        return {"parameters": 1, "bytes": 2, "seconds": 3.0, "validation_bits_per_byte": bits}

    return train


_GRID = (1e-3, 2e-3, 4e-3, 8e-3)


@pytest.mark.parametrize(
    ("optimum", "tried"),
    [
        (2e-3, 4),
        (8e-3, 5),  # best on the upper edge: one more, which is worse
        (3.2e-2, 7),
        (2.5e-4, 7),
        (1e3, 8),  # never more than four extensions
    ],
)
def test_the_grid_grows_while_the_best_rate_lies_on_its_edge(optimum: float, tried: int) -> None:
    trials = list(sweeping.sweep(RunSpec(("bdh",), ()), _GRID, _fake(optimum)))
    assert len(trials) == tried
    assert [t.extended for t in trials] == [False] * 4 + [True] * (tried - 4)
    (choice,) = sweeping.choices(trials)
    if tried < 8:
        assert choice["learning_rate"] == pytest.approx(optimum)
    assert choice["on_edge"] == (tried == 8)


def test_a_rate_that_diverges_is_a_trial_without_bits() -> None:
    trials = list(sweeping.sweep(RunSpec(("bdh",), ()), _GRID, _fake(4e-3, diverges_above=5e-3)))
    assert sweeping.best(trials).learning_rate == 4e-3
    assert [row["validation_bits_per_byte"] is None for row in sweeping.as_rows(trials)] == [False, False, False, True]
    with pytest.raises(BenchError, match="no rate of the grid"):
        list(sweeping.sweep(RunSpec(("bdh",), ()), _GRID, _fake(4e-3, diverges_above=0)))


@pytest.mark.parametrize(
    "rates", [(1e-3, 2e-3, 4e-3), (0.0, 1.0, 2.0, 3.0), (-1.0, 1.0, 2.0, 3.0), (1.0, 2.0, 3.0, math.inf)]
)
def test_a_poor_grid_is_refused(rates: tuple[float, ...]) -> None:
    with pytest.raises(SpecError, match="at least 4 positive"):
        sweeping.check_grid(rates)


def test_every_family_gets_the_same_grid_and_the_csv_says_where() -> None:
    trials = list(sweeping.sweep(RunSpec(("bdh", "gpt2"), ()), _GRID, _fake(2e-3)))
    assert [t.learning_rate for t in trials] == [*_GRID, *_GRID]
    lines = sweeping.as_csv(trials).splitlines()
    assert lines[0].startswith("# ")
    assert lines[1].startswith("model,parameters,learning_rate,seed,bytes,validation_bits_per_byte,seconds")
    assert len(lines) == 10
