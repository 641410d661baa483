"""How does an attention model remember a stream without copying it at every token?

A cache behind transformers' unified ``Cache`` over growing or forgetting tensors, so that reading one token costs the attention over the
past and nothing else that grows with it. transformers' own ``DynamicCache`` concatenates, which copies the whole past once per
token and layer.

With ``bits`` a token is kept as codes and scales. All that read it, itself included, read it rounded, so that the numbers do not
depend on how a text was cut. A single token is given the codes themselves to read; for a longer piece a layer's cache is turned
back as a whole.

Source: ``transformers.cache_utils`` (5.x).

Legend: B batch, K key and value heads, S tokens in the cache, D features per head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from bdh_bench.kernels.quantise import Codes, dequantise, quantise, straight_through
from bdh_bench.models._growing import GrowingTensor
from bdh_bench.models._window import WindowTensor

Store = GrowingTensor | WindowTensor


class _Plain:
    """Keys or values (B, K, S, D) as they come."""

    def __init__(self, store: Callable[[], Store]) -> None:
        self.stores = {"": store()}

    @property
    def length(self) -> int:
        return self.stores[""].length

    def append(self, piece: Tensor) -> Tensor:
        return self.stores[""].append(piece)

    def follow(self, other: Any) -> None:
        """Nothing to do: the content carries its own graph."""


class _Coded:
    """The same as codes and scales.

    With gradients on, what was read is kept beside them with its graph, so that gradients flow through a carried state; it is
    no part of the state, and ``detach`` drops it.
    """

    def __init__(self, store: Callable[[], Store], bits: int) -> None:
        self.bits = bits
        self.stores = {".codes": store(), ".scale": store()}
        self._store = store
        self._graph: Store | None = None

    @property
    def length(self) -> int:
        return self.stores[".codes"].length

    def append(self, piece: Tensor) -> Tensor | Codes:
        past = self._read(piece.dtype)
        new = quantise(piece.detach(), self.bits)
        joined = [store.append(part) for store, part in zip(self.stores.values(), new, strict=True)]
        if not torch.is_grad_enabled():
            self._graph = None
            all_of_it = Codes(joined[0], joined[1], self.bits, piece.dtype)
            return all_of_it if piece.shape[2] == 1 else dequantise(*all_of_it)
        if self._graph is None:
            self._graph = self._store()
            self._graph.load(past)
        return self._graph.append(straight_through(piece, dequantise(*new, self.bits, piece.dtype)))

    def follow(self, other: Any) -> None:
        """Take over a copy of the other's graph."""
        if other._graph is not None and other._graph.filled is not None:
            self._graph = self._store()
            self._graph.load(other._graph.filled.clone())

    def _read(self, dtype: torch.dtype) -> Tensor | None:
        """The past unrounded, where it begins a graph; otherwise it is not needed."""
        codes, scale = (store.filled for store in self.stores.values())
        if not torch.is_grad_enabled() or self._graph is not None or codes is None or scale is None:
            return None
        return dequantise(codes, scale, self.bits, dtype)

    def forget_graph(self) -> None:
        self._graph = None


class _Rounding:
    """Remembers nothing: rounds what passes, as a cache would."""

    stores: Mapping[str, Store] = {}
    length = 0

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def append(self, piece: Tensor) -> Tensor:
        return straight_through(piece, dequantise(*quantise(piece.detach(), self.bits), self.bits, piece.dtype))


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer, in the form that transformers calls."""

    is_sliding = False

    def __init__(self, part: Callable[[], Any]) -> None:
        super().__init__()
        self.key, self.value = part(), part()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the first piece brings shape, dtype and device."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
        return self.key.append(key_states), self.value.append(value_states)  # (B, K, S, D) each, or codes

    def get_seq_length(self) -> int:
        return int(self.key.length)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.key.length + query_length, 0

    def get_max_length(self) -> int:
        return -1  # transformers' word for no limit


class KVCache:
    """The memory of an attention model; ``cache`` is what its transformers module is given.

    bits     0 keeps keys and values as they come; 8 or 4 keeps codes and scales
    window   0 keeps every token; else the last window − 1 and the first ``sinks``
    """

    def __init__(self, n_layer: int, bits: int = 0, window: int = 0, sinks: int = 0) -> None:
        self._arguments = (n_layer, bits, window, sinks)

        def store() -> Store:
            return WindowTensor(2, window, sinks) if window else GrowingTensor(2)

        def part() -> _Plain | _Coded:
            return _Coded(store, bits) if bits else _Plain(store)

        self.layers = [_Layer(part) for _ in range(n_layer)]
        self.cache = Cache(layers=list(self.layers))

    def settle(self) -> None:
        """Forget what the next token cannot see; the model calls it when it has read a piece."""
        for store in self._stores().values():
            if isinstance(store, WindowTensor):
                store.settle()

    def tensors(self) -> dict[str, Tensor]:
        """``layer0.key``, ``layer0.value``, … (coded: ``layer0.key.codes``, ``layer0.key.scale``, …): views of the filled parts."""
        return {name: filled for name, store in self._stores().items() if (filled := store.filled) is not None}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over these tensors as the content; a name that is missing means an empty part."""
        for name, store in self._stores().items():
            store.load(tensors.get(name))
        for part in self._parts().values():
            if isinstance(part, _Coded):
                part.forget_graph()

    def fork(self) -> KVCache:
        """An independent copy."""
        copy = KVCache(*self._arguments)
        copy.load({name: tensor.clone() for name, tensor in self.tensors().items()})
        for mine, theirs in zip(self._parts().values(), copy._parts().values(), strict=True):
            theirs.follow(mine)
        return copy

    def _parts(self) -> dict[str, _Plain | _Coded]:
        both = ((i, layer) for i, layer in enumerate(self.layers))
        return {f"layer{i}.{kind}": getattr(layer, kind) for i, layer in both for kind in ("key", "value")}

    def _stores(self) -> dict[str, Store]:
        return {name + end: store for name, part in self._parts().items() for end, store in part.stores.items()}


def rounding_cache(n_layer: int, bits: int) -> Cache:
    """What ``logits`` is given in place of a cache of ``bits``: the same rounding, nothing kept."""
    return Cache(layers=[_Layer(lambda: _Rounding(bits)) for _ in range(n_layer)])
