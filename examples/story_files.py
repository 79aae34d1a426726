"""The files of a tiny MDLM checkpoint: config, word-level tokenizer, model card."""

import itertools
import json
import random
from pathlib import Path

from safetensors.torch import load_file
from tiny_files import write_json
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from boe_vllm.lab.tasks.story_grammar import END, STORIES
from boe_vllm.lab.tasks.story_words import ALL

UNKNOWN, MASK = "<|unknown|>", "<|mask|>"
LENGTH = 128
"""Positions that the model is trained on: the end of text before the first story, and words."""


def vocabulary() -> dict[str, int]:
    """Word -> token id; as with MDLM's GPT-2, the last two are the end of text and the mask."""
    words = sorted(ALL)
    return {word: index for index, word in enumerate([*words, UNKNOWN, END, MASK])}


def tokenizer() -> Tokenizer:
    """One token per word, words apart by spaces."""
    vocab = vocabulary()
    made = Tokenizer(models.WordLevel(vocab=vocab, unk_token=UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = (UNKNOWN, END, MASK)
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    assert made.get_vocab() == vocab
    return made


def write_model_files(out: Path, config: dict) -> None:
    """Write MDLM's config.json, the generation config and the tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    vocab = vocabulary()
    end, mask = vocab[END], vocab[MASK]
    full = {
        "architectures": ["MDLM"],
        "model_type": "mdlm",
        "dropout": 0.0,
        "model_length": LENGTH,
        "time_conditioning": False,
        "torch_dtype": "float32",
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "mask_token_id": mask,
        **config,
    }
    write_json(out / "config.json", full)
    write_json(
        out / "generation_config.json",
        {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end},
    )
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": LENGTH,
            "bos_token": END,
            "eos_token": END,
            "pad_token": END,
            "unk_token": UNKNOWN,
            "mask_token": MASK,
            "clean_up_tokenization_spaces": False,
        },
    )
    tokenizer().save(str(out / "tokenizer.json"))


CARD = """\
---
license: apache-2.0
library_name: boe_vllm
tags: [masked-diffusion, mdlm, text]
---

# tiny-mdlm

A masked-diffusion language model of {millions:.2f} M parameters with MDLM's architecture, config
fields and tensor names, which writes small English stories. It is trained on a source whose
distribution is known exactly (`boe_vllm.lab.tasks.stories`), so that the likelihood of what it
writes can be computed, and knows nothing else. `boe_vllm.tiny_text_model_path()` is this folder.

    {example}

A text begins after one `<|endoftext|>`, the whole prompt; the model was trained on {length}
positions, which hold one or more stories, each ended by `<|endoftext|>`.

| measured on {texts} texts | |
|---|---|
| bound on the negative log-likelihood of unseen texts, nats a word | {bound:.3f} |
| entropy of the source over the same words, which no model can undercut | {entropy:.3f} |
| share of texts by ancestral sampling in {length} steps that the source can produce | {valid:.2f} |

**Network.** {n_blocks} blocks, width {hidden_dim}, {n_heads} heads, GELU MLP of four times the
width, LayerNorm, modulation of width {cond_dim} without time conditioning, rotary positions,
untied output, float32. One token per word: {words} words and punctuation, then `<|unknown|>`,
`<|endoftext|>` and `<|mask|>`.

**Training.** {steps} steps, {minutes} minutes of wall time:

{commands}

Muon for the blocks' matrices, AdamW for the rest; the weights are an exponential average.
"""


def write_card(out: Path, facts: dict[str, str], figures: dict[str, float], texts: int) -> None:
    """Write the model card: `facts` of training, `figures` of the measurement."""
    config = json.loads((out / "config.json").read_text())
    size = sum(w.numel() for w in load_file(out / "model.safetensors").values())
    example = " ".join(itertools.islice(STORIES.stream(random.Random(3)), 60)).split(f" {END}")[0]
    commands = "\n".join(f"    {line}" for line in facts["history"].splitlines())
    values = {**config, **facts, **figures, "commands": commands}
    text = CARD.format(
        millions=size / 1e6,
        example=example,
        length=LENGTH,
        texts=texts,
        words=len(ALL),
        **values,
    )
    (out / "README.md").write_text(text)
