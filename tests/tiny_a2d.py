"""A Tiny-A2D checkpoint as its authors publish one, but small and random: saved by transformers,
with tokenizer files of its own, a chat template like Qwen3's, and a mask that only the tokenizer
names."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>", "<think>", "</think>"]
TEMPLATE = """{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""


def write_tokenizer(folder: Path) -> Tokenizer:
    """Bytes and the special tokens, with the chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: n for n, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        mask_token="<|mask|>",
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return tokenizer


def write(folder: Path, *, seed: int = 0) -> Path:
    """A checkpoint of 260-odd tokens: bytes and the special ones."""
    tokenizer = write_tokenizer(folder)
    torch.manual_seed(seed)
    config = Qwen3Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=64,
        vocab_size=-(-tokenizer.get_vocab_size() // 64) * 64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.3,
        eos_token_id=tokenizer.token_to_id("<|im_end|>"),
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    fields = json.loads((folder / "config.json").read_text())
    fields |= {"architectures": ["A2DQwen3LMHeadModel"], "model_type": "a2d-qwen3"}
    (folder / "config.json").write_text(json.dumps(fields, indent=2))
    return folder
