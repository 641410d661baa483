"""Tiny random checkpoints of many architectures, for tests and for ``docs/hf-models.md``: configurations as data, one builder.

Widths are as small as each architecture allows; every kind of layer that a family mixes occurs at least once.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch

_PLAIN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_GROUPED = {**_PLAIN, "num_key_value_heads": 2}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}

#: name → (model_type, settings)
ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 200}),
    "gpt_neo": (
        "gpt_neo",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 16,
            "max_position_embeddings": 256,
        },
    ),
    "gpt_neox": ("gpt_neox", _PLAIN),
    "gptj": ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8, "n_positions": 256}),
    "opt": ("opt", {**_PLAIN, "ffn_dim": 48, "max_position_embeddings": 256, "word_embed_proj_dim": 32}),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 2}),
    "llama": ("llama", _GROUPED),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": 32}),
    "gemma3": (
        "gemma3_text",
        {**_GROUPED, "head_dim": 8, "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "llama4": (
        "llama4_text",
        {
            **_GROUPED,
            "head_dim": 8,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 32,
            "intermediate_size_mlp": 48,
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **_GROUPED,
            "num_key_value_heads": 4,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
        },
    ),
    "xlnet": ("xlnet", {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48}),
    "mamba": ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4}),
    "falcon_mamba": ("falcon_mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4}),
    "mamba2": (
        "mamba2",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 4,
            "head_dim": 16,
            "n_groups": 1,
            "chunk_size": 16,
        },
    ),
    "jamba": (
        "jamba",
        {
            **_GROUPED,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
    "bamba": ("bamba", {**_GROUPED, **_MAMBA2, "attn_layer_indices": [1]}),
    "zamba": (
        "zamba",
        {
            **_GROUPED,
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "mamba_d_state": 8,
            "n_mamba_heads": 2,
            "mamba_dt_rank": 4,
            "attention_hidden_size": 64,
            "attention_head_dim": 16,
        },
    ),
    "zamba2": (
        "zamba2",
        {
            **_GROUPED,
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "mamba_d_state": 8,
            "n_mamba_heads": 4,
            "mamba_headdim": 16,
            "mamba_ngroups": 1,
            "chunk_size": 16,
            "num_mem_blocks": 1,
            "attention_hidden_size": 64,
            "attention_head_dim": 16,
            "adapter_rank": 4,
        },
    ),
    "falcon_h1": ("falcon_h1", {**_GROUPED, **_MAMBA2, "mamba_d_ssm": 64}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **_GROUPED,
            **_MAMBA2,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "shared_intermediate_size": 16,
        },
    ),
    "nemotron_h": (
        "nemotron_h",
        {
            **_GROUPED,
            "head_dim": 8,
            "layers_block_type": ["mamba", "attention"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 16,
        },
    ),
    "lfm2": ("lfm2", {**_GROUPED, "layer_types": ["conv", "full_attention"], "block_multiple_of": 16}),
    "qwen3_next": (
        "qwen3_next",
        {
            **_GROUPED,
            **_DELTA,
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "olmo_hybrid": (
        "olmo_hybrid",
        {**_GROUPED, **_DELTA, "num_key_value_heads": 4, "layer_types": ["linear_attention", "full_attention"]},
    ),
    "minimax": (
        "minimax",
        {
            **_GROUPED,
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "block_size": 16,
        },
    ),
    "xlstm": ("xlstm", {"hidden_size": 128, "num_hidden_layers": 2, "num_heads": 2, "chunk_size": 16}),
    "rwkv": ("rwkv", {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32}),
    "recurrent_gemma": (
        "recurrent_gemma",
        {
            **_PLAIN,
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "lru_width": 32,
            "attention_window_size": 32,
            "block_types": ["recurrent", "recurrent", "attention"],
        },
    ),
}


def build(name: str, vocab_size: int = 256, seed: int = 0, **settings: Any) -> Any:
    """A tiny model of this family with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, own = ZOO[name]
    # Published weights use their past; drawn with the usual width 0.02, these would hardly, and a lost state would not be seen.
    settings = {"initializer_range": 0.2, **settings}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(kind, **{**own, "vocab_size": vocab_size, **ids, **settings})
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def write(name: str, folder: Path, vocab_size: int = 256, seed: int = 0, **settings: Any) -> Path:
    """The folder of such a checkpoint, as ``save_pretrained`` writes it."""
    model = build(name, vocab_size, seed, **settings)
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)
    return folder


_WORDS = ["the old house stood on a hill and nobody had lived there since winter came early that year"] * 4


def byte_level(vocab_size: int = 300, prefix_space: bool = False, normalizer: Any = None) -> Any:
    """A trained byte-level BPE, as GPT-2 has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    if normalizer is not None:
        made.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    made.train_from_iterator(
        _WORDS,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return made


def sentencepiece_like(kind: str = "bpe", fallback: bool = True) -> Any:
    """A BPE or Unigram with "▁" for spaces, a space before the text, and byte fallback, as Llama 2 has."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    special = ["<unk>", "<s>", "</s>"]
    octets = [f"<0x{i:02X}>" for i in range(256)] if fallback else []
    if kind == "unigram":
        words = ["▁the", "▁old", "▁house", "▁a", "▁", "e", "t", "h", "o", "▁▁"]
        pieces = [(w, -5.0 - i) for i, w in enumerate(special + octets + words)]
        made = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=fallback))
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        made.add_special_tokens(special)
    else:
        made = Tokenizer(models.BPE(byte_fallback=fallback, unk_token="<unk>", fuse_unk=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.train_from_iterator(
            _WORDS,
            trainers.BpeTrainer(vocab_size=340, special_tokens=special, initial_alphabet=["▁"], show_progress=False),
        )
        vocabulary = made.get_vocab()
        merges = [tuple(m) for m in __import__("json").loads(made.to_str())["model"]["merges"]]
        for octet in octets:
            vocabulary[octet] = len(vocabulary)
        made = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=fallback, unk_token="<unk>", fuse_unk=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.add_special_tokens(special)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def write_with_tokenizer(name: str, folder: Path, tokenizer: Any, bos: str | None = None, **settings: Any) -> Path:
    """A checkpoint whose vocabulary is that of ``tokenizer``, which lies beside it."""
    from transformers import PreTrainedTokenizerFast

    write(name, folder, tokenizer.get_vocab_size(), **settings)
    names = {"bos_token": bos} if bos else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder
