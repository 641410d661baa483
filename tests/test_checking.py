"""Does ``bdh-bench check`` say of each law what was found: kept, broken, or nothing to say?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from bdh_bench import checking, laws, load_model
from bdh_bench.errors import PluginError, SpecError, UnknownNameError
from bdh_bench.loading import build
from bdh_bench.models import bdh, llama

_TEMPLATE = (Path(checking.__file__).parent / "templates" / "model.py").read_text(encoding="utf-8")
_SMALL = _TEMPLATE.replace("d_model: int = 128", "d_model: int = 16").replace("def scaled", "def _scaled")


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    path = tmp_path / "theirs.py"
    path.write_text(_SMALL, encoding="utf-8")
    return path


def _edited(path: Path, old: str, new: str) -> Path:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


def test_a_sound_model_from_a_file(theirs: Path) -> None:
    report = checking.check(str(theirs))
    assert report.kept
    assert len(report.findings) == len(laws.LAWS)
    results = {f.law: checking.result_of(f) for f in report.findings}
    assert results["the position limit is refused"] == "does not apply"
    assert [name for name, result in results.items() if result != "kept"] == ["the position limit is refused"]
    assert report.parameters == 256 * 16 + 4 * (4 * 16**2 + 4 * 16)


def test_a_model_that_rounds_is_held_to_its_laws_in_double(cli: Any) -> None:
    code, out, err = cli("check", "llama:d_model=32:n_layer=2:n_head=2:kv_bits=4")
    assert code == 0, out
    assert err.rstrip().endswith("in float64")
    assert checking.check("llama:d_model=32:n_layer=1:n_head=2").dtype == "float32"


def test_what_does_not_apply_is_never_shown_as_kept() -> None:
    rows = {row["law"]: row for row in checking.check("toy:uniform").as_rows()}
    for law in ("one optimiser step lowers the loss", "gradients reach earlier pieces", "detach cuts the graph"):
        assert rows[law]["result"] == "does not apply"
        assert rows[law]["error"] == rows[law]["at most"] == ""
    assert rows["state bytes = formula"]["result"] == "kept"


def test_a_broken_law_ends_with_code_6_and_says_which(theirs: Path, cli: Any) -> None:
    wrong = _edited(theirs, "return batch_size * self.config.n_layer", "return 2 * batch_size * self.config.n_layer")
    code, out, err = cli("check", str(wrong), "--json")
    assert code == 6, err
    answer = json.loads(out)
    assert (answer["schema"], answer["status"]) == ("bdh-bench/check/1", "failed")
    assert answer["data"]["counts"] == {"kept": 17, "broken": 1, "does not apply": 1}
    (broken,) = (law for law in answer["data"]["laws"] if law["result"] == "broken")
    assert (broken["law"], broken["error"], broken["tolerance"]) == ("state bytes = formula", 3 * 4 * 4 * 16, 0)
    (complaint,) = (error["message"] for error in answer["errors"])
    assert complaint == "state bytes = formula: got an error of 7.7e+02 · expected at most 0"


def test_the_table_has_a_row_for_each_law(theirs: Path, cli: Any) -> None:
    raises = _edited(
        theirs, "        x = self.embed(tokens)", "        assert tokens.shape[1] != 1, 'one\\ntoken'\n        x = 0"
    )
    code, out, err = cli("check", str(raises))
    assert code == 6
    head, *rows = out.splitlines()
    assert head.split() == ["law", "result", "error", "at", "most", "detail"]
    assert len(rows) == len(laws.LAWS)
    assert next(row for row in rows if row.startswith("stepwise")).endswith("AssertionError: one token")
    assert f"{sum(' broken ' in row for row in rows)} broken" in err


def test_errors_that_are_no_numbers_are_null_with_a_reason() -> None:
    findings = (laws.Finding("a", float("nan"), 0.0), laws.Finding("b", float("inf"), 0.0, "E: x"))
    report = checking.Report("m", 1, 0.0, findings)
    assert not report.kept
    assert [(law["error"], law["detail"]) for law in report.as_json()["laws"]] == [
        (None, "the error is NaN"),
        (None, "E: x"),
    ]
    json.dumps(report.as_json(), allow_nan=False)


def test_files_that_are_no_model(tmp_path: Path, theirs: Path) -> None:
    with pytest.raises(SpecError, match="no file"):
        checking.check(str(tmp_path / "absent.py"))
    with pytest.raises(PluginError, match="defines no Config"):
        checking.check(str(_edited(theirs, "class Config:", "class Options:")))
    theirs.write_text(_SMALL + "\n(lambda: 1 / 0)()\n")
    with pytest.raises(PluginError, match="cannot be imported: ZeroDivisionError"):
        checking.check(str(theirs))
    with pytest.raises(UnknownNameError, match="known: cpu, cuda"):
        checking.check("toy:uniform", "tpu")


# -- trained weights ----------------------------------------------------------------------------------------------------


def _trained() -> Any:
    """A small bdh that has learned a text by heart, so that its logits are large."""
    model = load_model("bdh:n_layer=2:n_embd=16:n_head=2:mlp_internal_dim_multiplier=8")
    text = torch.arange(97, 123).repeat(4, 4)[:, :65]
    optimiser = torch.optim.AdamW(model.train().parameters(), lr=3e-2)
    for _ in range(60):
        loss = F.cross_entropy(model.logits(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def test_a_trained_checkpoint_keeps_the_laws_in_proportion_to_its_logits(tmp_path: Path) -> None:
    save_file(_trained().state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"n_layer": 2}')
    report = checking.check(f"bdh:weights={tmp_path}")
    assert report.spread > 1.2
    broken = [(f.law, f.error, f.tolerance) for f in report.findings if not f.kept]
    assert not broken
    tolerances = {f.law: f.tolerance for f in report.findings}
    assert tolerances["stepwise = whole text"] == laws.ROUNDING * report.spread
    assert tolerances["state bytes = formula"] == 0
    assert tolerances["gradients reach earlier pieces"] == 1e-3


def test_small_logits_do_not_tighten_or_widen_the_tolerance(theirs: Path) -> None:
    report = checking.check(str(theirs))
    assert 0 < report.spread < 1
    assert {f.tolerance for f in report.findings} == {law.tolerance for law in laws.LAWS}


class _ForgetsInPrefill(llama.Model):
    def advance(self, memory: Any, position: int, tokens: Tensor, keep: Any) -> Tensor:
        if tokens.shape[1] > 1:
            memory.load({})
        return super().advance(memory, position, tokens, keep)


def test_large_logits_do_not_hide_a_forgotten_state() -> None:
    shell: Any = type(sys)("shell")
    shell.Model = _ForgetsInPrefill
    model = build(shell, llama.Config(32, 2, 2), 0).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8)
    assert laws.spread(model) > 5
    broken = {finding.law for finding in laws.check(model) if not finding.kept}
    assert {"pieces of 7, 1, 16 = whole text", "the last logits = the last of all"} <= broken


def test_checking_leaves_the_model_as_it_was() -> None:
    model = load_model("bdh:n_layer=2:n_embd=16:n_head=2:mlp_internal_dim_multiplier=8")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert all(finding.kept for finding in laws.check(model))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert isinstance(model, bdh.Model)
