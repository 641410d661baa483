"""What does a checkpoint need, told from its config.json and the headers of its weights alone?

The architecture is built on torch's meta device, where tensors have shapes and no content, and reads ``context`` tokens there: the tensors
of its cache then have the shapes that they would have in earnest. Where an architecture cannot run without content, the keys and values
that its configuration names are counted instead, which is said. Weights count as the headers list them, in the type that is asked for.
"""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdh_bench.errors import CheckpointError
from bdh_bench.models import _hf_files as files
from bdh_bench.models._hf_state import leaves

_LARGEST_HEADER = 100 * 2**20


class Shapes:
    """A checkpoint as far as shapes go."""

    def __init__(self, name: str, revision: str, dtype: torch.dtype) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        raw = files.read_config(name, revision, weights=False)
        where = files.folder_of(name)
        with files.refusals(name), files.quiet():
            config = (
                AutoConfig.for_model(**raw) if where else AutoConfig.from_pretrained(name, revision=revision or None)
            )
            with torch.device("meta"):
                self.module = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        self.dtype, self.remark = dtype, ""
        self._text = config.get_text_config(decoder=True)
        self._listed = header_elements(where) if where else None
        table = getattr(self._text, "max_position_embeddings", None) or getattr(self._text, "n_positions", None)
        learned = any(
            m.num_embeddings in (table, (table or 0) + 2)
            for n, m in self.module.named_modules()
            if isinstance(m, torch.nn.Embedding) and ("pos" in n or n.endswith("wpe"))
        )
        self.max_positions: int | None = int(table) if table and learned else None

    def parameter_count(self) -> int:
        """Unique parameters of the architecture."""
        return sum(p.numel() for p in {id(p): p for p in self.module.parameters()}.values())

    def weights_bytes(self) -> int:
        """In the asked type: of the elements that the headers list, else of the architecture's parameters."""
        elements = self._listed if self._listed is not None else self.parameter_count()
        return elements * self.dtype.itemsize

    @torch.no_grad()
    def state_bytes(self, batch_size: int, context: int) -> int:
        """Bytes of the cache of so many streams after ``context`` tokens."""
        try:
            return self._seen(batch_size, context)
        except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, KeyError):
            self.remark = "state by the keys and values that its config names"
            return self._named(batch_size, context)

    def _seen(self, batch_size: int, context: int) -> int:
        short, longer = (self._cache(batch_size, n) for n in (8, 16))
        if short.keys() != longer.keys():
            raise ValueError("the form of the cache depends on the text")
        if _windowed(self._text):  # such tensors grow, and then stop
            return sum(self._cache(batch_size, context).values())
        return sum(short[path] + (longer[path] - short[path]) * (context - 8) // 8 for path in short)

    def _cache(self, batch_size: int, length: int) -> dict[Any, int]:
        """Bytes of each tensor of the cache after so many tokens."""
        tokens = torch.zeros((batch_size, length), dtype=torch.long, device="meta")
        out = self.module(input_ids=tokens, use_cache=True)
        names = ("past_key_values", "cache_params", "state")
        content = next((value for n in names if (value := getattr(out, n, None)) is not None), None)
        found = {
            path: t for path, t in leaves(content) if isinstance(t, Tensor) and t.is_floating_point() and t.numel()
        }
        if not found:
            raise ValueError("no cache was returned")
        return {path: t.numel() * t.itemsize for path, t in found.items()}

    def _named(self, batch_size: int, context: int) -> int:
        c = self._text
        heads = getattr(c, "num_key_value_heads", None) or getattr(c, "num_attention_heads", None)
        layers = getattr(c, "num_hidden_layers", None)
        if not heads or not layers:
            raise CheckpointError("its config names no keys and values · expected an architecture with a KV cache")
        width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        return int(2 * layers * heads * width * self.dtype.itemsize * batch_size * context)


def _windowed(config: Any) -> bool:
    return any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size"))


def header_elements(folder: Path) -> int | None:
    """Elements of all tensors that the headers of a folder's safetensors list; None where there are no such files."""
    found = sorted(folder.glob("*.safetensors"))
    return sum(_elements(path) for path in found) if found else None


def _elements(path: Path) -> int:
    """Of one file; only its header is read: eight bytes of length, then JSON."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_LARGEST_HEADER, path.stat().st_size):
                raise ValueError(f"a header of {length} bytes")
            header: dict[str, Any] = json.loads(file.read(length))
        return sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise CheckpointError(f"{path.name} has a damaged header: {error}", "copy the checkpoint again") from error
