"""Do names on the command line mean one thing, and are wrong ones refused with a remedy?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdh_bench.errors import SpecError, UnknownNameError
from bdh_bench.spec import RunSpec, from_toml, parse_bytes, parse_contexts, parse_model, parse_models, to_toml

_DESIGN_EXAMPLE = "bdh,gpt2@25m,mamba:state_size=32,hf:gpt2,hf:./checkpoint,toy:uniform"


def test_the_documented_example_parses_and_prints_itself() -> None:
    assert ",".join(map(str, parse_models(_DESIGN_EXAMPLE))) == _DESIGN_EXAMPLE


def test_parts_of_a_name() -> None:
    spec = parse_model('hf:org/model@main:dtype=bfloat16:prompt="a:b,c"')
    assert (spec.family, spec.name, spec.size) == ("hf", "org/model", "main")
    assert dict(spec.options) == {"dtype": "bfloat16", "prompt": "a:b,c"}
    assert parse_model("toy:copy:period=32").name == "copy"
    assert str(parse_model("bdh@quick")) == "bdh"


@given(
    st.sampled_from(["bdh", "gpt2", "toy:copy", "hf:x/y"]),
    st.sampled_from(["", "@1m", "@25m"]),
    st.dictionaries(
        st.from_regex(r"[a-z_]{1,8}", fullmatch=True),
        st.text(st.characters(codec="ascii", exclude_characters='"', categories=("L", "N", "P")), min_size=1),
    ),
)
def test_canonical_form_is_a_fixed_point(head: str, size: str, options: dict[str, str]) -> None:
    text = head + size + "".join(f':{k}="{v}"' for k, v in options.items())
    spec = parse_model(text)
    assert parse_model(str(spec)) == spec
    assert dict(spec.options) == options


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        "bdh,",
        "bdh,bdh",
        "bdh,bdh@quick",
        "bdh@",
        "bdh@2m",
        "bdh:x=",
        "bdh:x=1:x=2",
        'bdh:x="1',
        "b dh",
        "bdh:copy",
    ],
)
def test_wrong_names_are_refused(text: str) -> None:
    with pytest.raises(SpecError):
        parse_models(text)


def test_unknown_size_offers_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="quick"):
        parse_model("bdh@quik")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("128-8192*2", (128, 256, 512, 1024, 2048, 4096, 8192)), ("512,128", (128, 512)), ("100-1000*3", (100, 300, 900))],
)
def test_contexts(text: str, expected: tuple[int, ...]) -> None:
    assert parse_contexts(text) == expected


@pytest.mark.parametrize("text", ["0", "-5", "128-64*2", "128-256*1", "a", "", "1,,2", "0-8*2"])
def test_wrong_contexts_are_refused(text: str) -> None:
    with pytest.raises(SpecError):
        parse_contexts(text)


def test_a_request_survives_toml(tmp_path: Path) -> None:
    spec = RunSpec(
        ("bdh", 'x:a="q"'), ("long_ppl",), data="path:ü", contexts=(128, 256), seeds=(0, 1), learning_rate=1e-3
    )
    (tmp_path / "s.toml").write_text(to_toml(spec), encoding="utf-8")
    assert from_toml(tmp_path / "s.toml") == spec
    assert from_toml(tmp_path / "s.toml").digest() == spec.digest() != replace(spec, regime="carried").digest()
    assert RunSpec.from_mapping({"models": ["bdh"], "tasks": ["memory"]}).regime == "crop"  # as recorded before regimes
    with pytest.raises(UnknownNameError):
        RunSpec.from_mapping({"modles": ["bdh"]})


def test_sizes_in_bytes_are_read_with_their_unit() -> None:
    assert [parse_bytes(text) for text in ("7", "200KiB", " 2 MiB", "1GiB")] == [7, 204_800, 2**21, 2**30]
    assert RunSpec.from_mapping({"models": ["bdh"], "tasks": [], "split_documents": "4KiB"}).split_documents == 4096
    for wrong in ("", "-1", "2KB", "1.5MiB", "KiB"):
        with pytest.raises(SpecError, match="number of bytes"):
            parse_bytes(wrong)


def test_declarations_are_part_of_the_request() -> None:
    plain = RunSpec(("bdh",), ("long_ppl",))
    assert (plain.equivalence_margin, plain.match) == (0.02, "params")
    assert (
        len({plain.digest(), replace(plain, equivalence_margin=0.01).digest(), replace(plain, match="state").digest()})
        == 3
    )
    for margin in (0.0, -0.02, float("nan"), float("inf")):
        with pytest.raises(SpecError, match="equivalence-margin"):
            RunSpec(("bdh",), ("long_ppl",), equivalence_margin=margin)
