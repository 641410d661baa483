"""Does a model write what its own logits say, byte by byte, and can it be stopped anywhere without changing a byte?"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import hf_zoo
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bdh_bench import cli, list_models, load_model
from bdh_bench.errors import PositionLimitError, SessionError, SpecError
from bdh_bench.generation import PIECE, Request, Text, begin, choose
from bdh_bench.session import saved_notes, storage_bytes

_FAMILIES = [
    e.name for e in list_models() if e.defaults.get("kind") in ("transformer", "recurrent")
]  # those with weights
_ALL = [*_FAMILIES, "toy:copy:period=5", "toy:linear_kv:bytes_per_token=24"]
_LIVELY = 4.0  # weights as drawn leave the logits almost flat, and a greedy text would be one byte, many times
_ROUNDING = 2e-3  # of logits so much enlarged; a wrong text moves them by more than 0.1


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def _model(name: str) -> Any:
    """A fresh model whose text varies."""
    model = load_model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(_LIVELY)
    return model


def _begun(name: str, *pieces: bytes) -> Text:
    text = Text.empty(_model(name))
    text.read(pieces)
    return text


def _truth(model: Any, written: bytes) -> torch.Tensor:
    """Logits (T, V) of one full forward over the start symbol and these bytes."""
    with torch.inference_mode():
        logits: torch.Tensor = model.logits(torch.tensor([[model.start_symbol, *written]]))
    return logits[0]


# -- what is written ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [b"", b"x", b"the old house "])
@pytest.mark.parametrize("name", _ALL)
def test_greedy_is_the_argmax_of_the_full_forward(name: str, prompt: bytes) -> None:
    written = bytes(_begun(name, prompt).write(40))
    logits = _truth(_model(name), prompt + written)[len(prompt) : -1]
    short = logits.max(-1).values - logits[range(40), list(written)]
    assert short.max() <= (_ROUNDING if name in _FAMILIES else 0)
    if name in _FAMILIES:
        assert len(set(written)) > 1
        best = logits.topk(2).values
        assert (best[:, 0] - best[:, 1]).median() > 10 * _ROUNDING  # the tolerance seldom lets another byte pass


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_drawn_tokens_follow_the_softmax(temperature: float) -> None:
    logits = torch.tensor([0.0, 2.0, -1.0, 1.0, float("-inf"), 0.5])
    count = 20_000
    drawn = torch.tensor([choose(logits, temperature, 7, position) for position in range(count)])
    expected = (logits.double() / temperature).softmax(0)
    deviation = (expected * (1 - expected) / count).sqrt()
    assert (((drawn.bincount(minlength=6) / count) - expected).abs() <= 4 * deviation).all()
    # neighbours are independent: pairs are as frequent as the product says
    pairs = (drawn[:-1] * 6 + drawn[1:]).bincount(minlength=36).view(6, 6) / (count - 1)
    assert (pairs - expected.outer(expected)).abs().max() < 0.01


def test_a_small_temperature_is_greedy_and_a_forbidden_token_never_comes() -> None:
    logits = torch.tensor([float("-inf"), 1.0, 1.5, -3e38])
    assert {choose(logits, t, 0, p) for t in (0.0, 1e-310, 1e-3) for p in range(50)} == {2}
    assert {choose(logits, 1e6, 0, p) for p in range(200)} == {1, 2}


@pytest.mark.parametrize("name", ["toy:uniform", *_FAMILIES])
def test_the_seed_decides(name: str) -> None:
    first, again, other = (bytes(_begun(name, b"ab").write(30, 1.0, seed)) for seed in (3, 3, 4))
    assert first == again != other
    assert len(set(first)) > 5


def test_the_noise_of_a_position_depends_on_nothing_before_it() -> None:
    whole = bytes(_begun("toy:uniform").write(60, 1.0, 5))
    assert bytes(_begun("toy:uniform", b"a" * 20, b"b" * 20).write(20, 1.0, 5)) == whole[40:]


def test_logits_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(SpecError, match="not finite"):
        next(_begun("toy:nan", b"a").write(1))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(SpecError, match="not finite"):
            choose(torch.tensor([0.0, bad]), 1.0, 0, 0)


def test_a_model_without_a_start_symbol_begins_with_the_prompt() -> None:
    model = load_model("toy:copy:period=2")
    model.start_symbol = None
    text = Text.empty(model)
    with pytest.raises(SpecError, match="start symbol"):
        next(text.write(1))
    with pytest.raises(SessionError, match="nothing was read"):
        text.save("never")
    text.read([b"ab"])
    assert text.session.length == 1
    assert bytes(text.write(5)) == b"ababa"


# -- stop and go on ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("name", _ALL)
def test_a_text_that_was_stopped_goes_on_as_if_it_never_had(name: str, temperature: float, tmp_path: Path) -> None:
    expected = bytes(_begun(name, b"the old ").write(40, temperature, 9))
    for stop in (0, 1, 17):
        text = _begun(name, b"the old ")
        before = bytes(text.write(stop, temperature, 9))
        text.save(tmp_path / "state")
        text = Text.load(_model(name), tmp_path / "state")
        assert before + bytes(text.write(40 - stop, temperature, 9)) == expected
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_a_loaded_text_can_read_on(tmp_path: Path) -> None:
    text = _begun("llama", b"the old ")
    before = bytes(text.write(5))
    text.save(tmp_path / "state")
    text = Text.load(_model("llama"), tmp_path / "state")
    text.read([b" house"])
    assert bytes(text.write(9)) == bytes(_begun("llama", b"the old " + before + b" house").write(9))


def test_saving_between_two_tokens_changes_nothing(tmp_path: Path) -> None:
    written = bytearray()
    text = _begun("mamba", b"the old ")
    for token in text.write(10):
        written.append(token)
        text.save(tmp_path / "state")
    assert bytes(written) == bytes(_begun("mamba", b"the old ").write(10))


def test_a_state_belongs_to_one_model(tmp_path: Path) -> None:
    _begun("llama", b"ab").save(tmp_path / "state")
    for other in ("mamba", "toy:uniform", "llama:rope_theta=500.0"):
        with pytest.raises(SessionError, match="another model"):
            Text.load(load_model(other), tmp_path / "state")
    with pytest.raises(SessionError, match="another model"):
        Text.load(load_model("llama"), tmp_path / "state")  # the same shape, other weights


def _altered(**changes: str | None) -> Callable[[Path], None]:
    """Write the file again with other metadata; None removes an entry."""

    def alter(path: Path) -> None:
        with safe_open(str(path), framework="pt") as file:
            meta = {**file.metadata(), **changes}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        save_file(tensors, str(path), metadata={k: v for k, v in meta.items() if v is not None})

    return alter


_NEXT = "note.next_token"
_DAMAGE = {
    "no next token": (_altered(**{_NEXT: None}), "next token"),
    "a next token outside the vocabulary": (_altered(**{_NEXT: "256"}), "below 256"),
    "a negative next token": (_altered(**{_NEXT: "-1"}), "below 256"),
    "a next token that is no number": (_altered(**{_NEXT: "²"}), "below 256"),
    "no length": (_altered(length=None), "length"),
    "a negative length": (_altered(length="-3"), "length"),
    "no batch": (_altered(batch_size=""), "batch_size"),
    "no stream": (_altered(batch_size="0"), "batch_size"),
    "two streams": (_altered(batch_size="2"), "2 streams"),
    "another format": (_altered(format="pt"), "no saved session"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-3]), "cannot read"),
    "empty": (lambda path: path.write_bytes(b""), "cannot read"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "cannot read"),
    "gone": (lambda path: path.unlink(), "cannot read"),
}


@pytest.mark.parametrize("damage", _DAMAGE)
def test_a_damaged_state_is_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "state"
    _begun("toy:copy:period=5", b"abcdef").save(path)
    act, says = _DAMAGE[damage]
    act(path)
    with pytest.raises(SessionError, match=says):
        Text.load(_model("toy:copy:period=5"), path)


def test_notes_cannot_disturb_a_session_and_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    session = _begun("toy:copy:period=5", b"abcdef").session
    notes = {"length": "99", "fingerprint": "x", "any word": "é\n"}
    session.save(tmp_path / "state", notes)
    assert saved_notes(tmp_path / "state") == notes
    assert _model("toy:copy:period=5").restore(tmp_path / "state").length == session.length
    session.save(tmp_path / "state")
    assert saved_notes(tmp_path / "state") == {}
    (tmp_path / "folder" / "full").mkdir(parents=True)
    for target in (tmp_path / "no" / "state", tmp_path / "state" / "below", tmp_path / "folder"):
        with pytest.raises(SessionError, match="cannot write"):
            session.save(target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "state"]


# -- what is held ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", _ALL)
def test_a_prompt_in_pieces_is_the_prompt(name: str) -> None:
    model = _model(name)
    prompt = bytes(i * i % 251 for i in range(min(model.max_positions or 1200, 1200) - 12))
    whole = _begun(name, prompt)
    written = bytes(whole.write(10))
    for size in (1, 7, PIECE, PIECE + 1):
        text = _begun(name, *(prompt[i : i + size] for i in range(0, len(prompt), size)), b"")
        assert text.session.length == len(prompt)
        assert bytes(text.write(10)) == written
    logits = _truth(model, prompt + written)[len(prompt) : -1]
    assert (logits.max(-1).values - logits[range(10), list(written)]).max() <= _ROUNDING


class _Watched(io.RawIOBase):
    """A file that is much longer than what may be held of it, and knows how far its reader has come."""

    def __init__(self, size: int, session: Any) -> None:
        self.left, self.given, self.session = size, 0, session
        self.held = 0

    def read(self, size: int = -1) -> bytes:
        assert 0 < size <= PIECE
        self.held = max(self.held, self.given - self.session.length)
        size = min(size, self.left)
        self.left -= size
        self.given += size
        return b"a" * size


def test_a_prompt_file_is_never_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    text = Text.empty(load_model("toy:const_state:bytes=64"))
    longest = 0
    extend = text.session.extend

    def watched(tokens: torch.Tensor, keep: Any = "last") -> torch.Tensor:
        nonlocal longest
        longest = max(longest, tokens.shape[1])
        return extend(tokens, keep)

    monkeypatch.setattr(text.session, "extend", watched)
    text.read([b"a" * (3 * PIECE)])  # a caller's own long piece is cut
    assert longest == PIECE

    file = _Watched(200_000, text.session)
    monkeypatch.setattr(Text, "empty", lambda model: text)
    monkeypatch.setattr(Path, "open", lambda path, mode: file)
    text.session.length = 0
    begin(Request("toy:const_state:bytes=64", prompt_file=Path("long")), print)
    assert file.given == 200_000
    assert text.session.length == 200_000
    assert file.held <= 1
    assert longest == PIECE


@pytest.mark.parametrize("name", _FAMILIES)
def test_the_state_after_1000_bytes_is_what_the_formula_says(name: str) -> None:
    model = _model(name)
    text = _begun(name)
    sizes, storages = {}, {}
    for count, _ in enumerate(text.write(min(model.max_positions or 1000, 1000)), 1):
        if count in (10, 100, 1000):
            sizes[count] = text.session.state_bytes
            storages[count] = storage_bytes(text.session.state())
    assert sizes == {count: model.state_bytes(1, count) for count in sizes}
    if model.state_bytes(1, 1) == model.state_bytes(1, 1000):
        assert len(set(sizes.values())) == len(set(storages.values())) == 1
        assert set(sizes) == {10, 100, 1000}


@pytest.mark.parametrize("name", ["bdh", "mamba"])
def test_recurrent_models_are_under_the_constant_rule(name: str) -> None:
    assert _model(name).state_bytes(1, 1) == _model(name).state_bytes(1, 1000)


def test_past_the_last_position_the_text_stays_whole(tmp_path: Path) -> None:
    text = _begun("gpt2:n_embd=32:n_layer=1:n_head=2:max_positions=20", b"abc")
    written: list[int] = []
    with pytest.raises(PositionLimitError):
        written += _collected(text.write(100), written)
    assert len(written) == 17  # 20 positions: the start symbol, 3 bytes, 16 written ones; the 17th is never read
    assert (text.session.length, text.pending) == (20, written[-1])
    with pytest.raises(PositionLimitError):
        text.read([b"more"])
    assert (text.session.length, text.pending) == (20, written[-1])


def _collected(tokens: Iterator[int], into: list[int]) -> list[int]:
    for token in tokens:
        into.append(token)
    return []


# -- the command line --------------------------------------------------------------------------------------------------

Run = Callable[..., tuple[int, bytes, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    """``bdh-bench generate …`` in this process: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, bytes, str]:
        monkeypatch.setattr(sys, "argv", ["bdh-bench", "generate", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capfdbinary.readouterr()
        return int(left.value.code or 0), out, err.decode()

    return call


def test_stdout_is_the_bytes_and_nothing_else(run: Run) -> None:
    assert run("toy:copy:period=3", "--prompt", "abc", "--max-bytes", 7)[:2] == (0, b"abcabca")
    code, out, err = run("toy:uniform", "--temperature", 1, "--seed", 4)
    assert (code, out) == (0, bytes(_begun("toy:uniform").write(256, 1.0, 4)))
    assert len(set(out)) > 100
    assert err == "256 bytes written, state 0 bytes\n"
    assert run("toy:uniform", "--max-bytes", 0)[:2] == (0, b"")
    assert run("toy:copy:period=2", "--prompt", "a\udcff", "--max-bytes", 4)[1] == b"a\xffa\xff"


def test_the_families_under_test_are_those_with_weights() -> None:
    assert {"bdh", "gpt2", "llama", "lstm", "mamba", "mamba2", "linear_attention", "gated_delta"} <= set(_FAMILIES)


@pytest.mark.parametrize("tokenizer", [hf_zoo.byte_level, hf_zoo.sentencepiece_like])
def test_a_checkpoint_with_a_tokenizer_writes_the_bytes_of_its_tokens(
    tokenizer: Callable[[], Any], run: Run, tmp_path: Path
) -> None:
    folder = hf_zoo.write_with_tokenizer("llama", tmp_path / "hf", tokenizer(), initializer_range=0.5)
    name, prompt, state = f"hf:{folder}", b"the old house", tmp_path / "state"
    model = load_model(name)
    ids = model.tokenizer.encode(prompt).ids.tolist()
    first = [] if model.start_symbol is None else [model.start_symbol]
    expected = b""
    while len(expected) < 30:
        with torch.inference_mode():
            ids.append(int(model.logits(torch.tensor([first + ids]))[0, -1].argmax()))
        expected += model.tokenizer.decode(ids[-1:])
    code, out, err = run(name, "--prompt", os.fsdecode(prompt), "--max-bytes", 30)
    assert (code, out) == (0, expected)
    assert err.startswith(f"{len(expected)} bytes written")
    begun = run(name, "--prompt", os.fsdecode(prompt), "--max-bytes", 11, "--save-state", state)[1]
    assert expected.startswith(begun)
    assert expected.startswith(begun + run(name, "--load-state", state, "--max-bytes", 9)[1])


def test_tokens_without_bytes_count_as_well() -> None:
    class Special:
        def encode(self, content: bytes) -> Any:
            raise AssertionError

        def decode(self, ids: Any) -> bytes:
            return b""

    model = load_model("toy:uniform")
    model.tokenizer = Special()
    assert list(Text.empty(model).write_bytes(5)) == [b""] * 5


def test_a_state_on_the_command_line(run: Run, tmp_path: Path) -> None:
    state, prompt = tmp_path / "state file", tmp_path / "prompt"
    prompt.write_bytes(b"the old house" * 90)
    options = ["llama:d_model=16:n_layer=1:n_head=1:vocab_size=256", "--temperature", 1, "--seed", 2]
    whole = run(*options, "--prompt-file", prompt, "--max-bytes", 30)[1]
    code, first, err = run(*options, "--prompt-file", prompt, "--max-bytes", 11, "--save-state", state)
    assert code == 0
    assert f"--load-state '{state}'" in err
    code, second, _ = run(*options, "--load-state", state, "--max-bytes", 9, "--save-state", state)
    code, third, _ = run(*options, "--load-state", state, "--max-bytes", 10)
    assert first + second + third == whole
    options[-1] = 3  # another seed of the noise, the same model
    code, other, _ = run(*options, "--load-state", state, "--max-bytes", 10)
    assert code == 0
    assert other != third
    code, out, err = run("toy:uniform", "--load-state", state)
    assert (code, out) == (2, b"")
    assert "another model" in err


def test_the_position_limit_on_the_command_line(run: Run, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.write_bytes(b"an older state")
    small = "gpt2:n_embd=32:n_layer=1:n_head=2:max_positions=20"
    code, out, err = run(small, "--prompt", "abc", "--save-state", state)
    assert (code, len(out)) == (2, 17)
    assert "this model has 20" in err
    assert state.read_bytes() == b"an older state"
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    code, out, err = run(small, "--prompt", "a" * 40)
    assert (code, out) == (2, b"")


@pytest.mark.parametrize("name", _FAMILIES)
def test_random_weights_are_named_and_the_way_to_trained_ones_works(name: str, run: Run, tmp_path: Path) -> None:
    code, _, err = run(name, "--max-bytes", 1)
    assert code == 0
    assert err.startswith("warning: these weights are random")
    assert f"bdh-bench train {name} " in err
    weights = tmp_path / "weights.safetensors"
    save_file({k: v.clone() for k, v in _model(name).state_dict().items()}, str(weights))
    hint = err.split("then use ")[1].split("\n")[0]
    code, out, err = run(hint.replace("PATH", str(weights)), "--prompt", "the old", "--max-bytes", 20)
    assert (code, out) == (0, bytes(_begun(name, b"the old").write(20)))
    assert "random" not in err


_BAD = [
    (["toy:uniform", "--max-bytes", -1], "--max-bytes -1"),
    (["toy:uniform", "--temperature", -0.5], "--temperature -0.5"),
    (["toy:uniform", "--temperature", "nan"], "--temperature nan"),
    (["toy:uniform", "--temperature", "inf"], "--temperature inf"),
    (["toy:uniform", "--temperature", "warm"], "valid number"),
    (["toy:uniform", "--seed", -1], "--seed -1"),
    (["toy:uniform", "--threads", -1], "--threads -1"),
    (["toy:uniform", "--device", "tpu"], "no device called 'tpu'"),
    (["toy:uniform", "--prompt", "", "--prompt-file", "-"], "one or the other"),
    (["toy:uniform", "--prompt-file", "HERE/none"], "cannot read the prompt"),
    (["toy:uniform", "--prompt-file", "HERE"], "cannot read the prompt"),
    (["toy:uniform", "--load-state", "HERE/none"], "cannot read a session"),
    (["toy:uniform", "--save-state", "HERE/none/state"], "folder that exists"),
    (["toy:uniform", "--save-state", "HERE"], "folder that exists"),
    (["toy:uniform:vocab_size=300"], "300 tokens"),
    (["toy:uniform:vocab_size=100"], "100 tokens"),
    (["toy:nan"], "not finite"),
    (["bhd"], "did you mean 'bdh'"),
    (["llama:weights=HERE/none"], "no weights"),
    (["toy:uniform,toy:copy"], "toy"),
    ([], "argument 'model'"),
]


@pytest.mark.parametrize(("arguments", "says"), _BAD, ids=[" ".join(map(str, a))[:60] for a, _ in _BAD])
def test_bad_input_gives_one_clear_error(arguments: list[object], says: str, run: Run, tmp_path: Path) -> None:
    code, out, err = run(*(str(a).replace("HERE", str(tmp_path)) for a in arguments))
    assert (code, out) == (2, b"")
    assert says in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def _process(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "bdh_bench.cli", "generate", *arguments]
    pipe = subprocess.PIPE
    plain = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}  # it would flush in our place
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=plain)


def test_stdin_is_a_prompt() -> None:
    out, _ = _process("toy:copy:period=700", "--prompt-file", "-", "--max-bytes", "700").communicate(
        bytes(range(175)) * 4
    )
    assert out == bytes(range(175)) * 4


def test_bytes_come_one_by_one_and_a_closed_pipe_is_no_error() -> None:
    """Unflushed, the first byte would come after 5 minutes."""
    process = _process("toy:sleep:seconds=0.3", "--max-bytes", "1000")
    assert process.stdin and process.stdout and process.stderr  # noqa: PT018
    process.stdin.close()
    assert process.stdout.read(1) == b"\0"
    assert process.poll() is None
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == b""
    process.stderr.close()
