"""The files of a tiny LLaDA checkpoint: config, byte-level tokenizer, model card."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from boe_vllm.lab.tasks import TASKS

# Token id = byte value below 256; LLaDA's special tokens follow.
SPECIAL_TOKENS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|mdm_mask|>",
)
BOS_ID, EOS_ID = 256, 257
MASK_ID = 256 + SPECIAL_TOKENS.index("<|mdm_mask|>")
VOCAB_SIZE = 264  # 262 tokens, padded to a multiple of 8

CHAT_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def encode(text: str) -> list[int]:
    """Token ids of plain text: its bytes."""
    return list(text.encode())


CARD = """\
---
license: apache-2.0
library_name: boe_vllm
tags: [masked-diffusion, llada, sudoku]
---

# tiny-llada

A masked-diffusion language model of {millions:.2f} M parameters with LLaDA's architecture,
config fields, tensor names and special tokens, for tests, the demo and comparisons of decoding
policies. It solves small puzzles, as far as the table says, and knows nothing else.

| task | prompt | answer | canvas |
|---|---|---|---|
{tasks}

Share of {items} unseen items per task whose answer obeys the task's rules, by greedy confidence
decoding in one block (standard error at most 0.03):

| task | {columns} |
|---|{rules}|
{figures}

`boe_vllm.lab.tasks` makes the items and scores the answers; `boe_vllm.tiny_model_path()` is this
folder. Prompts in any other form, longer chains or larger numbers are out of its reach.

**Network.** {layers} layers, width {width}, {heads} heads, SwiGLU of {mlp}, RMSNorm, rotary
positions (theta {theta:g}), bidirectional attention, no biases, untied output, float32. One
token per byte (id = byte value), then LLaDA's six special tokens; `<|endoftext|>` is EOS and
padding, `<|mdm_mask|>` ({mask}) the mask. No token is added to a prompt; the chat template is
LLaDA's, but the model was never trained on chats.

**Training.** {steps} steps, {minutes} minutes of wall time on {threads} CPU threads:

{commands}

Losses as in LLaDA's fine-tuning: answers padded with EOS to the canvas, a share t ~ U(0, 1) of
it masked, cross-entropy at the masked positions. Muon for the blocks' matrices, AdamW for the
rest; the weights are an exponential average. With `--minutes` the learning rate follows the
clock, so another machine takes another number of steps; with `--steps` it follows the steps.
One prompt in 16, by a hash of the prompt, is kept out of the training data, and the test items
are drawn from these.
"""


def write_card(
    out: Path, facts: dict[str, str], valid: dict[str, dict[str, float]], items: int
) -> None:
    """Write the model card: `facts` of training, `valid` shares by task and tokens a step."""
    config = json.loads((out / "config.json").read_text())
    size = sum(w.numel() for w in load_file(out / "model.safetensors").values())
    tasks = []
    for name, task in TASKS.items():
        item = task.items(1, seed=0)[0]
        tasks.append(f"| {name} | `{item.prompt}` | `{item.answer}` | {task.gen_length} |")
    steps = list(next(iter(valid.values())))
    columns = [f"{k} token{'s' * (k != '1')} a step" for k in steps]
    rows = [" | ".join([name, *(f"{v:.3f}" for v in row.values())]) for name, row in valid.items()]
    text = CARD.format(
        millions=size / 1e6,
        tasks="\n".join(tasks),
        items=items,
        columns=" | ".join(columns),
        rules="|".join(["---"] * len(steps)),
        figures="\n".join(f"| {row} |" for row in rows),
        layers=config["n_layers"],
        width=config["d_model"],
        heads=config["n_heads"],
        mlp=config["mlp_hidden_size"],
        theta=config["rope_theta"],
        mask=MASK_ID,
        commands="\n".join(f"    {line}" for line in facts["history"].splitlines()),
        **facts,
    )
    (out / "README.md").write_text(text)


def write_model_files(out: Path, config: dict) -> None:
    """Write LLaDA's config.json, the generation config and the byte-level tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    module, name = "modeling_llada", "LLaDAModelLM"
    full = {
        "architectures": [name],
        "auto_map": {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModel": f"{module}.{name}",
            "AutoModelForCausalLM": f"{module}.{name}",
        },
        "model_type": "llada",
        "activation_type": "silu",
        "alibi": False,
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "block_type": "llama",
        "embedding_dropout": 0.0,
        "embedding_size": VOCAB_SIZE,
        "vocab_size": VOCAB_SIZE,
        "eos_token_id": EOS_ID,
        "pad_token_id": EOS_ID,
        "mask_token_id": MASK_ID,
        "include_bias": False,
        "include_qkv_bias": False,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "max_sequence_length": 512,
        "mlp_ratio": config["mlp_hidden_size"] // config["d_model"],
        "n_kv_heads": config["n_heads"],
        "residual_dropout": 0.0,
        "rope": True,
        "rope_full_precision": True,
        "scale_logits": False,
        "torch_dtype": "float32",
        "use_cache": False,
        "weight_tying": False,
        **config,
    }
    generation = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": EOS_ID}
    write_json(out / "config.json", full)
    write_json(out / "generation_config.json", generation)
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": full["max_sequence_length"],
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "mask_token": "<|mdm_mask|>",
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    tokenizer().save(str(out / "tokenizer.json"))


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def tokenizer() -> Tokenizer:
    """A byte-level tokenizer without merges: every text has an encoding, a token per byte."""
    # GPT-2's byte alphabet: printable bytes stand for themselves, the others from U+0100 on.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    vocab = {chr(b if b in printable else next(others)): b for b in range(256)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    assert made.token_to_id("<|mdm_mask|>") == MASK_ID
    return made


def save_atomically(value: object, path: Path) -> None:
    """`torch.save` that leaves the old file whole if interrupted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    torch.save(value, draft)
    os.replace(draft, path)
