"""Train the bundled model of text: MDLM's architecture on small stories, on a CPU.

    python examples/train_stories.py --steps 2000 --out boe_vllm/assets/tiny-mdlm

The stories come from a grammar whose distribution is known exactly (`boe_vllm.lab.tasks.stories`).
Every sequence is the end of text and the first 127 words of a stream of stories. Of these words k,
uniform in 1 .. 127, are masked, and the loss is the mean cross-entropy at the masked ones: the
negative evidence lower bound of MDLM, in nats a word. No model can come below the entropy of the
source, which is printed beside it. A run is a function of its arguments, interrupted (`--resume`)
or not. `--evaluate` skips training and measures the checkpoint in `--out`.

Shapes: B sequences, L positions, V vocabulary.
"""

import argparse
import itertools
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from story_files import END, LENGTH, MASK, vocabulary, write_card, write_model_files
from story_model import TinyMDLM
from tiny_files import save_atomically
from tiny_model import Muon
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from boe_vllm.lab.tasks.story_grammar import STORIES

VOCAB = vocabulary()
WORDS = list(VOCAB)
WEIGHTS_PREFIX = "backbone."


def batch_of(seed: int, step: int, size: int) -> tuple[Tensor, Tensor]:
    """Sequences `[B, L]` int64 and which positions are masked `[B, L]` bool, of one step."""
    rng = random.Random(f"{seed}/{step}")
    rows, hidden_BL = [], torch.zeros(size, LENGTH, dtype=torch.bool)
    places = range(1, LENGTH)
    for row in range(size):
        words = itertools.islice(STORIES.stream(rng), LENGTH - 1)
        rows.append([VOCAB[END], *(VOCAB[word] for word in words)])
        # Stratified: one sample in each of B equal intervals.
        count = 1 + int((row + rng.random()) / size * (LENGTH - 1))
        hidden_BL[row, rng.sample(places, count)] = True
    return torch.tensor(rows), hidden_BL


def bound(model: TinyMDLM, tokens_BL: Tensor, hidden_BL: Tensor) -> Tensor:
    """The mean over sequences of the mean cross-entropy at their masked positions, nats."""
    state_BL = tokens_BL.masked_fill(hidden_BL, VOCAB[MASK])
    logits = model(state_BL)
    logits[..., VOCAB[MASK]] = -torch.inf  # SUBS: the mask is never predicted
    losses = cross_entropy(logits[hidden_BL], tokens_BL[hidden_BL], reduction="none")
    weights = (1 / hidden_BL.sum(1)).repeat_interleave(hidden_BL.sum(1))
    return (losses * weights).sum() / len(tokens_BL)


def gradients(
    model: TinyMDLM, tokens_BL: Tensor, hidden_BL: Tensor
) -> tuple[float, tuple[Tensor, ...]]:
    """The loss of one micro-batch, and its gradients."""
    loss = bound(model, tokens_BL, hidden_BL)
    return loss.item(), torch.autograd.grad(loss, list(model.parameters()))


@torch.no_grad()
def write_texts(model: TinyMDLM, n: int, *, steps: int, seed: int) -> list[list[str]]:
    """Texts by ancestral sampling: of the masks that are left, an equal share in every step."""
    rng = torch.Generator().manual_seed(seed)
    state_BL = torch.full((n, LENGTH), VOCAB[MASK])
    state_BL[:, 0] = VOCAB[END]
    order_BL = torch.rand(n, LENGTH, generator=rng)
    order_BL[:, 0] = 2.0
    for step in range(steps):
        now_BL = (order_BL >= step / steps) & (order_BL < (step + 1) / steps)
        if not now_BL.any():
            continue
        logits = model(state_BL)[now_BL]
        logits[:, VOCAB[MASK]] = -torch.inf
        state_BL[now_BL] = torch.multinomial(logits.softmax(-1), 1, generator=rng)[:, 0]
    return [[WORDS[token] for token in row] for row in state_BL[:, 1:].tolist()]


@torch.no_grad()
def evaluate(model: TinyMDLM, *, n: int) -> dict[str, float]:
    """The bound on unseen texts, and what the source says of `n` sampled ones."""
    model.eval()
    bounds = [bound(model, *batch_of(-1, step, 64)).item() for step in range(max(1, n // 16))]
    texts = write_texts(model, n, steps=LENGTH, seed=0)
    valid = [STORIES.log_likelihood(text) > -torch.inf for text in texts]
    model.train()
    figures = {"bound": sum(bounds) / len(bounds), "valid": sum(valid) / n}
    figures["entropy"] = float(STORIES.entropies(LENGTH - 1).mean())
    return {name: round(value, 4) for name, value in figures.items()}


def optimisers(model: TinyMDLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest."""
    matrices = [
        p
        for name, p in model.named_parameters()
        if name.startswith("blocks.") and p.ndim == 2 and "adaLN" not in name
    ]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        Muon(matrices, lr=lr, weight_decay=0.02),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


class Training:
    """A model on its way: everything that a checkpoint of the training holds."""

    def __init__(self, model: TinyMDLM, args: argparse.Namespace, command: str) -> None:
        self.model, self.args = model, args
        self.averaged = {k: v.clone() for k, v in model.state_dict().items()}
        self.opts = optimisers(model, args.lr)
        self.step, self.seconds, self.history = 0, 0.0, ""
        if args.resume:
            self._load()
        if self.step < args.steps:
            self.history += f"{command}  # from step {self.step}\n"

    def _load(self) -> None:
        saved = torch.load(self.args.checkpoint, weights_only=True)
        self.model.load_state_dict(saved["model"])
        for opt, state in zip(self.opts, saved["opts"], strict=True):
            opt.load_state_dict(state)
        self.averaged, self.step = saved["averaged"], saved["step"]
        self.seconds, self.history = saved["seconds"], saved["history"]

    def save(self) -> None:
        """Write the checkpoint of the training."""
        state = {"model": self.model.state_dict(), "averaged": self.averaged, "step": self.step}
        state |= {"seconds": self.seconds, "history": self.history}
        state["opts"] = [opt.state_dict() for opt in self.opts]
        save_atomically(state, self.args.checkpoint)

    def set_rate(self) -> None:
        """Warm-up over 100 steps, then down to zero in a straight line."""
        left = min(1.0, 1.2 * (1 - self.step / self.args.steps))
        for opt in self.opts:
            for group in opt.param_groups:
                group["lr"] = self.args.lr * min(1.0, (self.step + 1) / 100) * left

    def one_step(self, pool: ThreadPoolExecutor) -> float:
        """One optimiser step; its loss, nats a word."""
        self.set_rate()
        tokens_BL, hidden_BL = batch_of(self.args.seed, self.step, self.args.batch)
        # Every thread takes every so many-th sequence: each has all numbers of masks.
        threads = self.args.threads
        jobs = [
            pool.submit(gradients, self.model, tokens_BL[k::threads], hidden_BL[k::threads])
            for k in range(threads)
        ]
        losses, parts = zip(*(job.result() for job in jobs), strict=True)
        for p, *grads in zip(self.model.parameters(), *parts, strict=True):
            p.grad = torch.stack(grads).mean(0)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for opt in self.opts:
            opt.step()
        decay = min(0.995, self.step / (self.step + 10))
        with torch.no_grad():
            now = list(self.model.state_dict().values())
            torch._foreach_lerp_(list(self.averaged.values()), now, 1 - decay)
        self.step += 1
        return sum(losses) / threads

    def run(self) -> None:
        """Train to the last step, and leave the model with the averaged weights."""
        # One micro-batch per thread, each operation on one thread: threads wait for each other
        # once a step, which matters when cores are shared.
        torch.set_num_threads(1)
        pool = ThreadPoolExecutor(self.args.threads, torch.set_num_threads, initargs=(1,))
        began = saved_at = time.monotonic()
        before, recent = self.seconds, None
        bar = tqdm(total=self.args.steps, initial=self.step, mininterval=10, smoothing=0.05)
        while self.step < self.args.steps:
            loss = self.one_step(pool)
            recent = loss if recent is None else 0.95 * recent + 0.05 * loss
            bar.update()
            bar.set_postfix({"nats a word": f"{recent:.3f}"}, refresh=False)
            self.seconds = before + time.monotonic() - began
            if time.monotonic() - saved_at > 60 * self.args.save_minutes:
                saved_at = time.monotonic()
                self.save()
        bar.close()
        pool.shutdown()
        torch.set_num_threads(self.args.threads)
        self.save()
        self.model.load_state_dict(self.averaged)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--steps", type=int, default=2000, help="optimiser steps")
    made.add_argument("--batch", type=int, default=48, help="sequences a step")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--hidden-dim", type=int, default=128)
    made.add_argument("--blocks", type=int, default=6)
    made.add_argument("--heads", type=int, default=4)
    made.add_argument("--cond-dim", type=int, default=16)
    made.add_argument("--lr", type=float, default=4e-3)
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--out", type=Path, default=Path("build/tiny-mdlm"))
    made.add_argument("--checkpoint", type=Path, default=Path("build/train_stories.pt"))
    made.add_argument("--save-minutes", type=float, default=3)
    made.add_argument("--resume", action="store_true", help="continue from --checkpoint")
    made.add_argument("--evaluate", action="store_true", help="only measure the model in --out")
    made.add_argument("--texts", type=int, default=128, help="texts of the measurement")
    return made


def command_of(args: argparse.Namespace) -> str:
    """The command line of this run, without what belongs to one machine."""
    words = ["python examples/train_stories.py"]
    for name in ("steps", "batch", "seed", "hidden_dim", "blocks", "heads", "cond_dim", "lr"):
        value = getattr(args, name)
        if name in ("steps", "seed") or value != parser().get_default(name):
            words.append(f"--{name.replace('_', '-')} {value:g}")
    return " ".join(words + ["--resume"] * args.resume)


def main() -> None:
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    weights_file = args.out / "model.safetensors"
    if args.evaluate:
        config = json.loads((args.out / "config.json").read_text())
        write_model_files(args.out, config)
        model = TinyMDLM(**config)
        weights = load_file(weights_file)
        model.load_state_dict({k.removeprefix(WEIGHTS_PREFIX): v for k, v in weights.items()})
    else:
        config = {
            "vocab_size": len(VOCAB),
            "hidden_dim": args.hidden_dim,
            "n_blocks": args.blocks,
            "n_heads": args.heads,
            "cond_dim": args.cond_dim,
        }
        model = TinyMDLM(**config)
        training = Training(model, args, command_of(args))
        training.run()
        write_model_files(args.out, config)
        weights = {WEIGHTS_PREFIX + k: v.contiguous() for k, v in model.state_dict().items()}
        facts = {"steps": str(training.step), "minutes": f"{training.seconds / 60:.0f}"}
        facts["history"] = training.history
        save_file(weights, weights_file, metadata={"format": "pt", **facts})
        weights_file.chmod(0o644)
    figures = evaluate(model, n=args.texts)
    with safe_open(weights_file, "pt") as file:
        facts = file.metadata()
    write_card(args.out, facts, figures, args.texts)
    print(json.dumps(facts | figures))


if __name__ == "__main__":
    main()
