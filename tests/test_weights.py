"""Are checkpoints interchangeable, and is what cannot be used refused by name, before it does anything?"""

from __future__ import annotations

import json
import os
import pickle
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bdh_bench import load_model, loading
from bdh_bench.conversion import convert
from bdh_bench.errors import CheckpointError, SpecError, UnknownNameError
from bdh_bench.models import bdh, mamba
from bdh_bench.runner.plan import make_plan
from bdh_bench.spec import RunSpec
from bdh_bench.weights import inspect, named_digest, read_weights

_PUBLISHED = {
    "n_layer": 3, "n_embd": 16, "n_head": 2, "mlp_internal_dim_multiplier": 4, "vocab_size": 256, "dropout": 0.1,
}  # fmt: skip
_TOKENS = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))


def _weights(seed: int = 3) -> dict[str, torch.Tensor]:
    """Weights in the published layout, of a size that makes every pass matter."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (256, 16), "encoder": (2, 16, 32), "encoder_v": (2, 16, 32), "decoder": (64, 16)}
    shapes |= {"lm_head": (16, 256)}
    return {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A published checkpoint: model.safetensors and config.json."""
    path = tmp_path / "published"
    path.mkdir()
    save_file(_weights(), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(_PUBLISHED))
    return path


def _logits(name: str) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = load_model(name).logits(_TOKENS)
    return found


# -- the config beside the weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["config.json", "model.json", "model.pt.json"])
@pytest.mark.parametrize("named", ["file", "folder"])
def test_published_weights_need_no_options_beside_their_config(place: str, named: str, tmp_path: Path) -> None:
    torch.save(_weights(), tmp_path / "model.pt")
    (tmp_path / place).write_text(json.dumps({**_PUBLISHED, "author": "somebody"}))
    path = tmp_path if named == "folder" else tmp_path / "model.pt"
    model = load_model(f"bdh:weights={path}")
    assert asdict(model.config) == {**asdict(bdh.Config()), **_PUBLISHED}
    with torch.inference_mode():
        (tmp_path / place).unlink()
        other = load_model(f"bdh:n_layer=3:weights={path}")
        assert torch.equal(model.logits(_TOKENS), other.logits(_TOKENS))
        deeper = load_model(f"bdh:n_layer=4:weights={path}")
        assert (model.logits(_TOKENS) - deeper.logits(_TOKENS)).abs().max() > 1e-2  # the passes matter


def test_an_option_in_the_name_wins_over_the_config(folder: Path) -> None:
    config = load_model(f"bdh:n_layer=5:mode=parallel:weights={folder}").config
    assert (config.n_layer, config.mode, config.n_embd) == (5, "parallel", 16)


def test_without_a_config_the_passes_must_be_said(tmp_path: Path) -> None:
    save_file(_weights(), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"add :n_layer=… or a config\.json beside them"):
        load_model(f"bdh:weights={tmp_path}/w.safetensors")


# -- conversion ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", ["safetensors", "pt"])
def test_published_round_trip(format_: str, folder: Path, tmp_path: Path) -> None:
    done = convert(f"bdh:mode=chunked:weights={folder}", "published", tmp_path / "out", format_)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", f"model.{format_}"]
    assert not done["random"]
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == _PUBLISHED
    tensors = read_weights(tmp_path / "out")
    assert set(tensors) == {*_weights(), "attn.freqs"}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in _weights().items())
    assert torch.equal(_logits(f"bdh:weights={folder}"), _logits(f"bdh:weights={tmp_path}/out"))


def _to_transformers(model: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    c = model.config
    config = {"model_type": "mamba", "hidden_size": c.d_model, "num_hidden_layers": c.n_layer, "conv_kernel": 4}
    state = model.state_dict()
    return config | {"state_size": c.state_size}, {**state, "lm_head.weight": state["backbone.embeddings.weight"]}


def _config_from_transformers(config: dict[str, Any]) -> mamba.Config:
    if config["model_type"] != "mamba":
        raise ValueError(f"model_type is {config['model_type']}, expected mamba")
    shape = (config["hidden_size"], config["num_hidden_layers"], config["state_size"], config["conv_kernel"])
    return mamba.Config(*shape)


def test_transformers_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command knows two function names and no family; here they are stand-ins."""
    monkeypatch.setattr(mamba, "to_transformers", _to_transformers, raising=False)
    monkeypatch.setattr(mamba, "config_from_transformers", _config_from_transformers, raising=False)
    name = "mamba:d_model=16:n_layer=2:state_size=8"
    done = convert(name, "transformers", tmp_path / "out")
    assert done["random"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert "lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")
    assert load_model(f"mamba:weights={tmp_path}/out").config == load_model(name).config
    assert torch.equal(_logits(name), _logits(f"mamba:weights={tmp_path}/out"))

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for change, says in (
        ({"state_size": 16}, "and its config are not those of a mamba: state_size=16 was asked for"),
        ({"model_type": "gpt2"}, "model_type is gpt2, expected mamba"),
    ):
        (tmp_path / "out" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=says):
            load_model(f"mamba:weights={tmp_path}/out")
    del config["hidden_size"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no 'hidden_size'"):
        load_model(f"mamba:weights={tmp_path}/out")


def test_a_family_without_a_layout_says_which_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bdh_bench.conversion.load_model", lambda *_: pytest.fail("loaded before the refusal"))
    with pytest.raises(SpecError, match="bdh cannot be written as transformers · expected published"):
        convert("bdh", "transformers", tmp_path / "out")
    with pytest.raises(SpecError, match="its file offers none"):
        convert("toy:uniform", "published", tmp_path / "out")
    with pytest.raises(UnknownNameError, match="did you mean 'published'"):
        convert("bdh", "publisched", tmp_path / "out")
    with pytest.raises(UnknownNameError, match="known: pt, safetensors"):
        convert("bdh", "published", tmp_path / "out", "onnx")
    with pytest.raises(SpecError, match="expected safetensors"):
        convert("mamba", "transformers", tmp_path / "out", "pt")
    assert not list(tmp_path.iterdir())


def test_what_the_published_layout_cannot_say_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"decay=0\.01, rope=False"):
        convert(f"bdh:decay=0.01:rope=off:weights={folder}", "published", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_conversion_is_whole_or_absent_and_never_overwrites(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SpecError, match="exists already"):
        convert(f"bdh:weights={folder}", "published", folder)
    monkeypatch.setattr("bdh_bench.conversion.save_file", _full)
    with pytest.raises(SpecError, match="No space left"):
        convert(f"bdh:weights={folder}", "published", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["published"]


def _full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


# -- bad input -----------------------------------------------------------------------------------------------------------


def _without(name: str) -> dict[str, torch.Tensor]:
    return {n: t for n, t in _weights().items() if n != name}


_NAN = torch.full((64, 16), float("nan"))
_OTHER = {"model.embed_tokens.weight": torch.ones(4, 4), "model.norm.weight": torch.ones(4)}

#: What is in the file, and what the message must say of it.
_BAD_TENSORS: dict[str, tuple[dict[str, torch.Tensor], list[str]]] = {
    "another architecture": (_OTHER, ["not those of a bdh", "got model.embed_tokens.weight, model.norm.weight"]),
    "missing": (_without("decoder"), ["missing tensors decoder"]),
    "extra": ({**_weights(), "bias": torch.ones(3)}, ["unexpected bias", "expected tensors like"]),
    "many extra": ({**_weights(), **{f"b{i}": torch.ones(3) for i in range(9)}}, ["b0, b1, b2 and 6 more"]),
    "wrong shape": ({**_weights(), "decoder": torch.ones(32, 16)}, ["decoder is (32, 16), expected (64, 16)"]),
    "wrong kind": ({**_weights(), "decoder": torch.ones(64, 16, dtype=torch.int8)}, ["decoder is (64, 16) of int8"]),
    "nan": ({**_weights(), "decoder": _NAN}, ["NaN or infinite values in decoder"]),
    "infinite": ({**_weights(), "decoder": 1 / torch.zeros(64, 16)}, ["NaN or infinite values in decoder"]),
    "odd rank": ({**_weights(), "encoder": torch.ones(4)}, ["encoder has shape (4,)"]),
    "empty": ({}, ["missing tensors", "got no tensors"]),
}


@pytest.mark.parametrize("case", _BAD_TENSORS)
def test_tensors_that_do_not_fit_are_named(case: str, folder: Path) -> None:
    tensors, says = _BAD_TENSORS[case]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_model(f"bdh:weights={folder}")
    assert all(words in str(caught.value) for words in says), str(caught.value)
    assert " · " in str(caught.value)


def test_missing_and_extra_tensors_of_another_family_are_named(tmp_path: Path) -> None:
    state = load_model("gpt2").state_dict()
    kept = {name: t.clone() for name, t in state.items() if "ln_f" not in name and "lm_head" not in name}
    save_file({**kept, "extra": torch.ones(2)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"missing model.transformer.ln_f.weight, .*; unexpected extra"):
        load_model(f"gpt2:weights={tmp_path}/w.safetensors")


_BAD_CONFIGS = {
    "no json": ("{n_layer: 3", "config.json is no JSON"),
    "a list": ("[3]", "holds a list · expected a JSON object"),
    "binary": ("\ud800", "is no JSON"),
    "code": (json.dumps({**_PUBLISHED, "auto_map": {"AutoModel": "evil.Model"}}), "asks for code from elsewhere"),
    "width": (json.dumps({**_PUBLISHED, "n_embd": 32}), "n_embd=32 was asked for, the tensors have 16"),
    "heads": (json.dumps({**_PUBLISHED, "n_head": 4}), "n_head=4 was asked for, the tensors have 2"),
    "vocabulary": (json.dumps({**_PUBLISHED, "vocab_size": 300}), "vocab_size=300 was asked for"),
    "text": (json.dumps({**_PUBLISHED, "n_layer": "3"}), "n_layer is '3' · expected a value of type int"),
    "truth": (json.dumps({**_PUBLISHED, "n_layer": True}), "n_layer is True · expected a value of type int"),
    "zero": (json.dumps({**_PUBLISHED, "n_layer": 0}), "n_layer=0 · expected at least 1"),
}


@pytest.mark.parametrize("case", _BAD_CONFIGS)
def test_configs_that_cannot_be_believed(case: str, folder: Path) -> None:
    text, says = _BAD_CONFIGS[case]
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(SpecError) as caught:
        load_model(f"bdh:weights={folder}")
    assert says in str(caught.value)


class _Evil:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("suffix", [".bin", ".pkl", ".pickle", ".ckpt", ".pt", ".pth"])
@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickle_is_refused_and_never_run(suffix: str, how: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "ran", tmp_path / f"model{suffix}"
    evil = {**_weights(), "extra": _Evil(mark)}
    if how == "torch":
        torch.save(evil, path)
    else:
        path.write_bytes(pickle.dumps(evil))
    for name in (path, tmp_path):
        with pytest.raises(CheckpointError, match="save_file"):
            load_model(f"bdh:n_layer=3:weights={name}")
    assert not mark.exists()
    torch.load(path, weights_only=False) if how == "torch" else pickle.loads(path.read_bytes())
    assert mark.exists()  # the trap works


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused_without_torch(name: str, share: float, tmp_path: Path) -> None:
    torch.save(_weights(), tmp_path / "model.pt") if name.endswith("pt") else save_file(_weights(), tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    assert inspect(tmp_path / name).path == tmp_path / name
    (tmp_path / name).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=r"is damaged: it is cut short"):
        inspect(tmp_path / name)


@pytest.mark.parametrize("header", [b"[]", b'{"a": 1}', b'{"a": {"data_offsets": [0]}}', b"\xff\xff"])
def test_a_header_that_is_none_is_refused(header: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="damaged"):
        inspect(tmp_path / "w.safetensors")


def test_paths_that_name_no_weights(folder: Path, tmp_path: Path) -> None:
    for path, says in (
        (tmp_path / "absent", "no weights at"),
        (tmp_path / "empty", "holds no weights file"),
        (folder, r"holds 2 weights files \(a.pt, model.safetensors\)"),
        (folder / "config.json", "expected a .safetensors or .pt file"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        torch.save({}, folder / "a.pt")
        with pytest.raises(CheckpointError, match=says):
            load_model(f"bdh:weights={path}")


def test_bad_weights_end_a_run_before_it_begins(folder: Path, tmp_path: Path, cli: Any) -> None:
    save_file(_without("decoder"), folder / "model.safetensors")
    request = ["run", "--models", f"bdh:weights={folder}", "--task", "memory", "--runs", str(tmp_path / "runs")]
    code, _, err = cli(*request)
    assert code == 2
    assert "missing tensors decoder" in err
    assert not (tmp_path / "runs").exists()


def test_other_weights_under_the_same_name_are_other_cells(folder: Path) -> None:
    request = RunSpec((f"bdh:weights={folder}",), ("memory",), contexts=(64,))
    (before,) = make_plan(request).cells
    assert make_plan(request).cells == (before,)
    save_file(_weights(seed=4), folder / "model.safetensors")
    (other,) = make_plan(request).cells
    (folder / "config.json").write_text(json.dumps({**_PUBLISHED, "n_layer": 4}))
    (deeper,) = make_plan(request).cells
    assert len({before.key, other.key, deeper.key}) == 3


def test_the_command_writes_reads_and_warns(folder: Path, tmp_path: Path, cli: Any) -> None:
    code, out, err = cli("convert", f"bdh:weights={folder}", "--to", "published", "--output", str(tmp_path / "a"))
    assert (code, out.strip()) == (0, str(tmp_path / "a" / "model.safetensors"))
    assert "warning" not in err
    small = "bdh:n_layer=1:n_embd=8:n_head=1:mlp_internal_dim_multiplier=2"
    code, out, err = cli("convert", small, "--to", "published", "--output", str(tmp_path / "b"), "--json")
    answer = json.loads(out)
    assert (code, answer["schema"], answer["data"]["random"]) == (0, "bdh-bench/convert/1", True)
    assert "these weights are random" in err
    assert torch.equal(_logits(small), _logits(f"bdh:weights={tmp_path}/b"))
    code, _, err = cli("convert", small, "--to", "published", "--output", str(tmp_path / "b"))
    assert code == 2
    assert "exists already" in err


def test_option_types_are_read_from_real_annotations_too() -> None:
    """A stranger's file need not postpone its annotations."""
    namespace: dict[str, Any] = {}
    exec("import dataclasses\n@dataclasses.dataclass(frozen=True)\nclass Config:\n    width: int = 3\n", namespace)
    module: Any = type(sys)("theirs")
    module.Config = namespace["Config"]
    spec = loading.parse_model("theirs:width=5")
    assert loading.resolve(spec, module, None, 256).width == 5


def test_a_named_folder_is_known_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"one")
    first = named_digest(str(tmp_path))
    assert first == named_digest(f"{tmp_path}/")
    (tmp_path / "model.safetensors").write_bytes(b"other")
    assert named_digest(str(tmp_path)) != first
    assert named_digest("owner/a") != named_digest("owner/b")
