"""How does lm-eval see one of our models? As a class of its own, registered there under the name ``bdh_bench``.

    --model bdh_bench --model_args spec=bdh@quick,device=cpu,dtype=float32,seed=0,windowing=stop,state_budget=201326592

``spec`` is any model name of bdh-bench (``weights=`` in it for trained ones; quote a value with commas). A model of bytes is an ``LM``,
one with a tokenizer a ``TemplateLM``. Every score comes from the streams that bdh-bench's own tasks use (``tasks/_scoring``): one stream
at a time, nothing padded, nothing truncated.

What comes before a continuation:

* bytes: the start symbol, the context, the continuation, as UTF-8. No space is moved: a byte belongs to the side it was written on.
* tokens: lm-eval's own rule. Trailing spaces of the context go to the continuation, both are encoded together, and the tokens past the
  length of the encoded context are the continuation's. The start symbol comes first only where the context is empty
  (``start=always``: before every context, for tokenizers that put it there themselves).

A model without a start symbol skips the first token of a text with nothing before it. ``generate_until`` is greedy; sampling is
refused. lm-eval's response cache (``use_cache``) names no model, so one whose path lacks this model's fingerprint is refused.

Legend: N tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import LM, TemplateLM
from lm_eval.api.registry import register_model
from numpy.typing import NDArray

from bdh_bench.errors import PositionLimitError, SpecError, UnknownNameError
from bdh_bench.lm_eval.prefixes import DEFAULT_BUDGET_BYTES, PrefixScorer, Request
from bdh_bench.lm_eval.windows import Windowing, score_rolling
from bdh_bench.loading import load_model
from bdh_bench.session import fingerprint
from bdh_bench.sources import source_digest
from bdh_bench.spec import parse_model
from bdh_bench.tasks._scoring import PIECE, Units
from bdh_bench.weights import inspect

_PLAIN_GENERATION = 256  # tokens, where a task does not say
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@dataclass(frozen=True)
class Settings:
    """How a model is scored; what changes a score is in ``label``."""

    windowing: Windowing = field(default_factory=Windowing)
    state_budget: int = DEFAULT_BUDGET_BYTES
    reuse: bool = True
    start: str = "empty"

    def __post_init__(self) -> None:
        if self.start not in ("empty", "always"):
            raise UnknownNameError("start rule", self.start, ("empty", "always"))

    def label(self, model: Any) -> str:
        """The part of a metric's name that says what was read before what."""
        rule = self.start if model.start_symbol is not None else "none"
        start = f",start={rule}" if rule == "none" or (model.tokenizer is not None and rule == "always") else ""
        return self.windowing.label(model) + start


def open_lm(
    spec: str,
    device: str | None = None,
    dtype: str = "float32",
    seed: int = 0,
    train_context: int = 256,
    windowing: str = "stop",
    state_budget: int = DEFAULT_BUDGET_BYTES,
    reuse: bool = True,
    start: str = "empty",
    batch_size: int | str | None = None,
    max_batch_size: int | None = None,
) -> BenchLM:
    """The model called ``spec`` as lm-eval's; random weights are drawn from ``seed``. Raises SpecError and its kinds."""
    if str(batch_size or 1) not in ("1", "auto") or max_batch_size not in (None, 1):
        raise SpecError(f"got batch_size {batch_size} · expected 1: streams of different lengths are never padded")
    settings = settings_of(str(windowing), int(state_budget), start, bool(reuse))
    model = load_model(str(spec), device=device or "cpu", dtype=dtype, seed=int(seed), train_context=int(train_context))
    return wrap(model, settings, str(spec))


def settings_of(windowing: str, state_budget: int, start: str, reuse: bool = True) -> Settings:
    """Settings as they are written. Raises SpecError, UnknownNameError."""
    return Settings(Windowing.parse(windowing), state_budget, reuse, start)


def wrap(model: Any, settings: Settings | None = None, spec: str = "") -> BenchLM:
    """A loaded model as lm-eval's."""
    kind = ByteLM if model.tokenizer is None else TokenLM
    return kind(model, settings or Settings(), spec)


@register_model("bdh_bench")
class BenchLM(LM):  # type: ignore[misc]
    """What byte models and tokenised ones share. ``positions``: sha256 of a document → its units, for every document rolled over."""

    def __init__(self, model: Any, settings: Settings, spec: str) -> None:
        super().__init__()
        self.model, self.settings, self.spec = model, settings, spec
        self.scorer = PrefixScorer(model, settings.state_budget, settings.reuse)
        self.positions: dict[str, Units] = {}
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> BenchLM:
        """What lm-eval calls with ``--model_args``. Raises SpecError for an argument that does not exist."""
        extra = {k: v for k, v in (additional_config or {}).items() if v is not None}
        given = {**extra, **arg_dict}
        known = open_lm.__annotations__.keys() - {"return"}
        for name in given:
            if name not in known:
                raise UnknownNameError("model argument", name, known)
        if "spec" not in given:
            raise SpecError("got no spec in --model_args · expected one of 'bdh-bench list models'", "spec=bdh@quick")
        return open_lm(**given)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> BenchLM:
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # -- the three questions -------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """ln p(continuation | context), and whether greedy decoding would write it; contexts that begin alike are read once."""
        encoded = [self._pair(*request.args) for request in requests]
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(encoded)
        for index, scored in self.scorer.score(encoded):
            answers[index] = float(scored.nats.sum()), bool(scored.greedy.all())
            self.cache_hook.add_partial("loglikelihood", requests[index].args, answers[index])
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """ln p(document), every byte paid for once (the first token is skipped by a model without a start symbol)."""
        answers = []
        for request in requests:
            content = str(request.args[0]).encode()
            units = score_rolling(self.model, content, self.settings.windowing)
            self.positions[hashlib.sha256(content).hexdigest()] = units
            answers.append(float(units.bits.astype(np.float64).sum()) * -math.log(2))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answers[-1])
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What greedy decoding writes after each context, up to the first of the strings in ``until``, which is left out."""
        answers = []
        for request in requests:
            context, wanted = request.args[:2]
            answers.append(self._generate(str(context), *_generation(wanted)))
            self.cache_hook.add_partial("generate_until", request.args, answers[-1])
        return answers

    @torch.inference_mode()
    def _generate(self, context: str, until: Sequence[bytes], most: int) -> str:
        ids = self._before(context)
        limit = self.model.max_positions
        if not len(ids):
            raise SpecError("got an empty context for a model without a start symbol · expected at least one token")
        if limit is not None and len(ids) + most - 1 > limit:
            raise PositionLimitError(
                f"{len(ids):,} tokens of context and {most} to write need more than its {limit:,} positions",
                "lower max_gen_toks or use a model with more positions; inputs are never truncated",
            )
        session, written = self.model.session(1), []
        for piece in torch.from_numpy(ids)[None].to(self._device).split(PIECE, 1):
            logits = session.extend(piece)
        text = b""
        for count in range(most):
            written.append(int(logits[0, -1].argmax()))
            longer = self._bytes(written)
            if len(longer) == len(text) and self.model.tokenizer is not None:
                break  # a special token ends the text
            text = longer
            ends = [place for stop in until if (place := text.find(stop)) >= 0]
            if ends:
                text = text[: min(ends)]
                break
            if count + 1 < most:
                logits = session.extend(torch.tensor([written[-1:]], device=self._device))
        return text.decode(errors="replace")

    # -- between text and tokens ---------------------------------------------------------------------------------------

    def _pair(self, context: str, continuation: str) -> Request:
        raise NotImplementedError

    def _before(self, context: str) -> NDArray[np.int64]:
        raise NotImplementedError

    def _bytes(self, ids: Sequence[int]) -> bytes:
        raise NotImplementedError

    def _start(self) -> list[int]:
        return [] if self.model.start_symbol is None else [int(self.model.start_symbol)]

    # -- who is this ---------------------------------------------------------------------------------------------------

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval stores beside its results."""
        path = parse_model(self.spec).option("weights") if self.spec else None
        session, parameter = self.model.session(1), next(iter(self.model.parameters()), None)
        with torch.inference_mode():
            session.extend(torch.zeros(1, 1, dtype=torch.long, device=self._device))
        config = repr(getattr(self.model, "config", None))
        return {
            "model_spec": self.spec,
            "model_num_parameters": self.model.parameter_count(),
            "model_dtype": str(parameter.dtype) if parameter is not None else "",
            "state_dtypes": sorted({str(t.dtype) for t in session.state()}),
            "state_bytes": {str(c): self.model.state_bytes(1, c) for c in (1024, 65_536)},
            "model_sha": inspect(path).digest() if path else "",
            "config_hash": hashlib.sha256(config.encode()).hexdigest(),
            "fingerprint": self.fingerprint,
            "scoring": self.scoring,
            "bdh_bench_version": version("bdh-bench"),
        }

    @property
    def scoring(self) -> str:
        """The part of a metric's name that says how it was read."""
        return self.settings.label(self.model)

    @property
    def fingerprint(self) -> str:
        """Everything that determines a score: weights, options, dtype, device, scoring rule and code."""
        code = source_digest(type(self.model).__module__, __name__)
        parts = (fingerprint(self.model), self._device.type, self.scoring, code)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def cache_path(self, path: str) -> str:
        """``path`` with this model's fingerprint, as ``set_cache_hook`` demands it."""
        return f"{path}.{self.fingerprint[:16]}"

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Refuse a response cache that could hold another model's answers: its keys are method and text only."""
        where = str(getattr(cache_hook.dbdict, "filename", ""))
        if cache_hook.dbdict is not None and self.fingerprint[:16] not in Path(where).name:
            raise SpecError(
                f"got use_cache at {where}, whose name says nothing of this model · expected {self.cache_path('<path>')}",
                "lm-eval's cache would answer with another model's scores; python -m bdh_bench.lm_eval renames it by itself",
            )
        super().set_cache_hook(cache_hook)


class ByteLM(BenchLM):
    """A model whose tokens are the bytes of UTF-8."""

    def _pair(self, context: str, continuation: str) -> Request:
        before = self._before(context)
        after = np.frombuffer(continuation.encode(), dtype=np.uint8)
        return _request(before, after)

    def _before(self, context: str) -> NDArray[np.int64]:
        return np.array([*self._start(), *context.encode()], dtype=np.int64)

    def _bytes(self, ids: Sequence[int]) -> bytes:
        return bytes(i for i in ids if i < 256)


class TokenLM(BenchLM, TemplateLM):  # type: ignore[misc]
    """A model with a tokenizer of its own. ``tokenizer`` stays None: lm-eval means another kind of object by it."""

    loglikelihood = BenchLM.loglikelihood

    @property
    def eot_token_id(self) -> int | None:
        return None if self.model.start_symbol is None else int(self.model.start_symbol)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of the text alone; no special token is ever added."""
        ids: list[int] = self.model.tokenizer.encode(string.encode()).ids.tolist()
        return ids

    def _loglikelihood_tokens(self, requests: Iterable[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        pairs = [_request(np.array(before), np.array(after, dtype=np.int64)) for _, before, after in requests]
        answers = dict(self.scorer.score(pairs))
        return [(float(answers[i].nats.sum()), bool(answers[i].greedy.all())) for i in range(len(pairs))]

    def _pair(self, context: str, continuation: str) -> Request:
        if not context:
            return _request(
                np.array(self._start(), dtype=np.int64), np.array(self.tok_encode(continuation), dtype=np.int64)
            )
        before, after = self._encode_pair(context, continuation)
        start = self._start() if self.settings.start == "always" or not before else []
        return _request(np.array([*start, *before], dtype=np.int64), np.array(after, dtype=np.int64))

    def _before(self, context: str) -> NDArray[np.int64]:
        start = self._start() if self.settings.start == "always" or not context else []
        return np.array([*start, *self.tok_encode(context)], dtype=np.int64)

    def _bytes(self, ids: Sequence[int]) -> bytes:
        text: bytes = self.model.tokenizer.decode(ids)
        return text


def _request(before: NDArray[Any], after: NDArray[Any]) -> Request:
    """With nothing before it, the first token of a continuation cannot be predicted: it is context."""
    ids = np.concatenate((before, after)).astype(np.int64)
    return Request(ids, max(1, len(before)))


def _generation(wanted: Mapping[str, Any]) -> tuple[list[bytes], int]:
    """(stop strings, most tokens) of a request. Raises SpecError where it asks for sampling."""
    sampled = wanted.get("do_sample", bool(wanted.get("temperature") or 0.0))
    if sampled or int(wanted.get("num_beams", 1)) != 1:
        raise SpecError(
            f"got generation settings {dict(wanted)} · expected greedy decoding",
            "use do_sample=False: an answer must not depend on a random state",
        )
    until = wanted.get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    most = next((int(wanted[name]) for name in _LENGTHS if wanted.get(name) is not None), _PLAIN_GENERATION)
    if most < 1:
        raise SpecError(f"got max_gen_toks {most} · expected at least 1")
    return [str(stop).encode() for stop in stops if stop], most
