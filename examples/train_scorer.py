"""Train a small causal language model on a task's texts: a scorer for `boe-vllm eval --table 4`.

    python examples/train_scorer.py --task sudoku6-few --out runs/scorer

It stands in for GPT-2 large where there is none: the same class of `transformers`, the tokenizer of
the task's bundled model, and prompt and answer of training items as text. Its perplexities compare
policies on that task and mean nothing beside those of another scorer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import boe_vllm
from boe_vllm.lab.tasks import TASKS, TEXT_TASKS
from boe_vllm.lab.tasks.stories import Stories
from boe_vllm.models.build import load_tokenizer, read_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=[*TASKS, *TEXT_TASKS], default="sudoku6-few")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    task = (TASKS | TEXT_TASKS)[args.task]
    stories = isinstance(task, Stories)
    model_path = boe_vllm.tiny_text_model_path() if stories else boe_vllm.tiny_model_path()
    tokenizer = load_tokenizer(model_path, read_config(model_path))
    config = GPT2Config(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        n_positions=1024,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.steps)
    stream = task.stream(seed=args.seed)
    start = time.perf_counter()
    for step in range(args.steps):
        loss = batch_loss(model, tokenizer, itertools.islice(stream, args.batch))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: {loss.item():.4f} nats a token", flush=True)
    model.eval()
    with torch.no_grad():
        loss = batch_loss(model, tokenizer, task.items(200, seed=args.seed))
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    line = {"task": args.task, "steps": args.steps, "seconds": time.perf_counter() - start}
    line |= {"test_nats_per_token": loss.item(), "test_perplexity": math.exp(loss.item())}
    print(json.dumps(line))


def batch_loss(model, tokenizer, items) -> torch.Tensor:
    """Mean loss of the answers' tokens and the end of text, given the prompts; nats."""
    rows, labels = [], []
    for item in items:
        prompt, answer = (
            tokenizer.encode(text, add_special_tokens=False) for text in (item.prompt, item.answer)
        )
        rows.append([tokenizer.bos_token_id, *prompt, *answer, tokenizer.eos_token_id])
        labels.append([-100] * (1 + len(prompt)) + [*answer, tokenizer.eos_token_id])
    longest = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.eos_token_id] * (longest - len(row)) for row in rows])
    targets = torch.tensor([row + [-100] * (longest - len(row)) for row in labels])
    # Padding stands behind everything that counts, where causal attention does not look.
    return model(ids, labels=targets).loss


if __name__ == "__main__":
    main()
