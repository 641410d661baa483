"""How many bits does a model need for each byte of a text, read through a live stream?

One code path scores every architecture: tokens go in through ``extend`` in pieces and nothing is padded. The log-softmax is taken in
float64, so that a uniform guess is 8 bits exactly; bits are kept as float32.

Legend: B streams, S scored tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PIECE = 512  # tokens per extend: bounds what is held, changes no score


def bits(logits: Tensor, targets: Tensor) -> NDArray[np.float32]:
    """−log2 p of targets (B, S) under logits (B, S, V), float32 (B, S)."""
    picked = logits.double().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    result: NDArray[np.float32] = (picked / -math.log(2)).float().cpu().numpy()
    return result


@torch.inference_mode()
def score_after(model: Any, contexts: NDArray[np.uint8], targets: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Bits (B, S) of targets (B, S) after the start symbol and contexts (B, c), from an empty state.

    The last context byte is read together with the targets, whose own last byte is never an input.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    start = np.full((len(contexts), 1), model.start_symbol, dtype=np.uint8)
    read = np.concatenate((start, contexts, targets[:, :-1]), axis=1)
    tokens = torch.from_numpy(read).long().to(device)
    split = contexts.shape[1]
    session = model.session(len(contexts))
    for piece in tokens[:, :split].split(PIECE, 1):
        session.extend(piece, keep="last")
    logits = session.extend(tokens[:, split:], keep="all")
    return bits(logits, torch.from_numpy(targets).long().to(device))


@torch.inference_mode()
def score_stream(model: Any, content: bytes) -> Iterator[NDArray[np.float32]]:
    """Bits of every byte of a document, in order, from an empty state; arrays of at most ``PIECE`` bytes.

    What is held depends on the model's state alone, not on the length of the document.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    session = model.session(1)
    before = bytes([model.start_symbol])
    for start in range(0, len(content), PIECE):
        piece = content[start : start + PIECE]
        read = before + piece[:-1]
        before = piece[-1:]
        logits = session.extend(_tokens(read, device), keep="all")
        yield bits(logits, _tokens(piece, device))[0]


def _tokens(data: bytes, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long().unsqueeze(0).to(device)
