"""Do both Mambas go to transformers' folders and back with the same logits, and is what cannot be represented refused?"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bdh_bench.loading import fill
from bdh_bench.models import mamba, mamba2

ONE = mamba.Config(d_model=24, n_layer=2, state_size=5, vocab_size=61)
TWO = mamba2.Config(d_model=24, n_layer=2, state_size=5, head_dim=4, vocab_size=61)
CASES = [
    (mamba, "Mamba", ONE),
    (mamba, "Mamba", replace(ONE, dt_rank=5, expand=3, conv_kernel=3, n_layer=1)),
    (mamba2, "Mamba2", TWO),
    (mamba2, "Mamba2", replace(TWO, n_groups=2, expand=3, conv_kernel=3)),
    (mamba2, "Mamba2", replace(TWO, n_groups=4, head_dim=12, state_size=16, n_layer=1)),
    (mamba2, "Mamba2", replace(TWO, d_model=32, head_dim=0)),
]
EXACT = {"rtol": 0.0, "atol": 1e-5}


def tokens() -> Tensor:
    return torch.randint(61, (2, 70), generator=torch.Generator().manual_seed(0))


def shaken(model: Any) -> Any:
    """Weights away from their initial values, so that no two tensors could be taken for each other."""
    torch.manual_seed(3)
    with torch.no_grad():
        for x in model.parameters():
            x.add_(0.1 * torch.randn_like(x))
    return model.eval()


def classes(family: str) -> tuple[Any, Any]:
    import transformers

    return getattr(transformers, f"{family}Config"), getattr(transformers, f"{family}ForCausalLM")


def ours_from(folder: Path, module: ModuleType) -> Any:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = module.Model(module.config_from_transformers(config))
    fill(model, load_file(folder / "model.safetensors"), str(folder))
    return model.eval()


@pytest.mark.parametrize(("module", "family", "config"), CASES)
@torch.no_grad()
def test_ours_is_read_by_transformers(module: ModuleType, family: str, config: Any, tmp_path: Path) -> None:
    model = shaken(module.Model(config))
    facts, state = module.to_transformers(model)
    (tmp_path / "config.json").write_text(json.dumps(facts), encoding="utf-8")
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    _, theirs = classes(family)
    read, told = theirs.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["unexpected_keys"]
    assert not {*told["missing_keys"]} - {"lm_head.weight"}
    assert type(read).__name__ == facts["architectures"][0]
    torch.testing.assert_close(read(tokens()).logits, model.logits(tokens()), **EXACT)
    again = ours_from(tmp_path, module)
    assert again.config == config
    assert torch.equal(again.logits(tokens()), model.logits(tokens()))


@pytest.mark.parametrize(("module", "family", "config"), CASES)
@torch.no_grad()
def test_theirs_is_read_by_ours(module: ModuleType, family: str, config: Any, tmp_path: Path) -> None:
    facts, _ = module.to_transformers(module.Model(config))
    settings, theirs = classes(family)
    written = shaken(theirs(settings(**{k: v for k, v in facts.items() if k != "architectures"})))
    written.save_pretrained(tmp_path)
    ours = ours_from(tmp_path, module)
    assert ours.config == config
    torch.testing.assert_close(ours.logits(tokens()), written(tokens()).logits, **EXACT)


@pytest.mark.parametrize(("module", "family", "config"), [CASES[0], CASES[2]])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_bias", True),
        ("use_conv_bias", False),
        ("hidden_act", "gelu"),
        ("layer_norm_epsilon", 1e-6),
        ("residual_in_fp32", False),
        ("tie_word_embeddings", False),
        ("model_type", "bamba"),
    ],
)
def test_what_we_cannot_be_is_refused(module: ModuleType, family: str, config: Any, field: str, value: Any) -> None:
    facts, _ = module.to_transformers(module.Model(config))
    assert module.config_from_transformers(facts) == config
    with pytest.raises(ValueError, match=field):
        module.config_from_transformers({**facts, field: value})


def test_a_field_left_out_has_the_published_default() -> None:
    facts, _ = mamba2.to_transformers(mamba2.Model(TWO))
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        mamba2.config_from_transformers({k: v for k, v in facts.items() if k != "tie_word_embeddings"})
    assert mamba.config_from_transformers({"model_type": "mamba"}).d_model == 768
    assert mamba2.config_from_transformers({"model_type": "mamba2", "tie_word_embeddings": True}).n_groups == 8


@pytest.mark.parametrize("limit", [(0.001, math.inf), (0.0, 0.1)])
def test_clamped_steps_and_odd_heads_are_refused(limit: tuple[float, float]) -> None:
    facts, _ = mamba2.to_transformers(mamba2.Model(TWO))
    with pytest.raises(ValueError, match="time_step_limit"):
        mamba2.config_from_transformers({**facts, "time_step_limit": limit})
    with pytest.raises(ValueError, match="num_heads"):
        mamba2.config_from_transformers({**facts, "num_heads": 7})
