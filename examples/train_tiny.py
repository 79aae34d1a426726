"""Train the bundled tiny checkpoint: LLaDA's architecture on five small tasks, on a CPU.

    python examples/train_tiny.py --minutes 55 --out boe_vllm/assets/tiny-llada

Masked-diffusion training as in LLaDA's fine-tuning: prompt + canvas, the answer padded with EOS
to the canvas, a share t ~ U(0, 1) of the canvas masked, cross-entropy at the masked positions.
The learning rate follows `--steps`, or the elapsed share of `--minutes` where no `--steps` is
given; with `--steps` a run is a function of its arguments, interrupted (`--resume`) or not.
`--evaluate` skips training and measures the checkpoint in `--out`.

Shapes: B sequences, L positions (prompt + canvas), G canvas positions, D width, V vocabulary.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_files import EOS_ID, MASK_ID, encode, save_atomically, write_card, write_model_files
from tiny_model import Muon, TinyLLaDA
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from boe_vllm.lab.tasks import TASKS, Item, Task

# Sequences per optimiser step. Tasks that share a prompt length share a micro-batch.
MIXTURE = {
    ("sudoku6", "sudoku6-few"): 16,
    ("sudoku4",): 8,
    ("countdown",): 32,
    ("addition",): 32,
}


def batches(task: Task, size: int, *, seed: int) -> Iterator[Tensor]:
    """Batches of equal prompt length, `[size, L]` int64: no padding but the canvas's EOS."""
    waiting = defaultdict(list)
    for item in task.stream(seed=seed):
        rows = waiting[len(item.prompt)]
        answer = encode(item.answer)
        rows.append(encode(item.prompt) + answer + [EOS_ID] * (task.gen_length - len(answer)))
        if len(rows) == size:
            yield torch.tensor(rows)
            rows.clear()


def mixture(text: str) -> dict[tuple[str, ...], int]:
    """`MIXTURE` with other sizes: `countdown=96,addition=64` names each group by its first task."""
    sizes = {group[0]: size for group, size in MIXTURE.items()}
    for entry in text.split(","):
        name, _, size = entry.partition("=")
        if name not in sizes or not size.isdigit():
            raise argparse.ArgumentTypeError(f"expected TASK=SIZE of {list(sizes)}, got {entry!r}")
        sizes[name] = int(size)
    return {group: sizes[group[0]] for group in MIXTURE}


def micro_batches(
    seed: int, groups: dict[tuple[str, ...], int]
) -> Iterator[list[tuple[Tensor, int]]]:
    """For each optimiser step, its micro-batches `[B, L]` with their canvas lengths."""
    streams = [
        ([batches(TASKS[name], size, seed=seed) for name in names], TASKS[names[0]].gen_length)
        for names, size in groups.items()
    ]
    while True:
        yield [(torch.cat([next(s) for s in group]), length) for group, length in streams]


def hide(tokens_BL: Tensor, length: int, rng: torch.Generator) -> Tensor:
    """Which canvas positions to mask, `[B, length]` bool, at least one in each sequence."""
    batch = len(tokens_BL)
    # Stratified in t: one sample in each of B equal intervals of (0, 1).
    t_B = (torch.arange(batch) + torch.rand(batch, generator=rng)) / batch
    hidden_BG = torch.rand(batch, length, generator=rng) < t_B[:, None]
    hidden_BG[torch.arange(batch), torch.randint(length, (batch,), generator=rng)] = True
    return hidden_BG


def gradients(model: TinyLLaDA, tokens_BL: Tensor, hidden_BG: Tensor) -> tuple[float, list[Tensor]]:
    """Mean cross-entropy in nats at the masked positions, and its gradients."""
    length = hidden_BG.shape[1]
    canvas_BG = tokens_BL[:, -length:]
    state_BL = tokens_BL.clone()
    state_BL[:, -length:][hidden_BG] = MASK_ID
    loss = cross_entropy(model(state_BL, canvas=length)[hidden_BG], canvas_BG[hidden_BG])
    return loss.item(), list(torch.autograd.grad(loss, list(model.parameters())))


@torch.no_grad()
def decode(model: TinyLLaDA, items: list[Item], task: Task, *, per_step: int) -> list[str]:
    """Greedy confidence decoding: the `per_step` most confident positions at each step."""
    by_length = defaultdict(list)
    for index, item in enumerate(items):
        by_length[len(item.prompt)].append(index)
    texts = [""] * len(items)
    for indices in by_length.values():
        state_BL = torch.tensor(
            [encode(items[i].prompt) + [MASK_ID] * task.gen_length for i in indices]
        )
        canvas_BG = state_BL[:, -task.gen_length :]
        while (canvas_BG == MASK_ID).any():
            logits = model(state_BL, canvas=task.gen_length)
            logits[..., MASK_ID] = -torch.inf
            confidence_BG, tokens_BG = logits.softmax(-1).max(-1)
            confidence_BG[canvas_BG != MASK_ID] = -1
            left = int((canvas_BG[0] == MASK_ID).sum())
            chosen = confidence_BG.topk(min(per_step, left), dim=1).indices
            canvas_BG.scatter_(1, chosen, tokens_BG.gather(1, chosen))
        for row, index in enumerate(indices):
            ids = canvas_BG[row].tolist()
            ids = ids[: ids.index(EOS_ID)] if EOS_ID in ids else ids
            texts[index] = bytes(i for i in ids if i < 256).decode(errors="replace")
    return texts


def evaluate(model: TinyLLaDA, *, n: int, per_step: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """Share of `n` unseen items answered validly, by task and tokens per step."""
    model.eval()
    figures: dict[str, dict[str, float]] = {}
    for name, task in TASKS.items():
        items = task.items(n, seed=0, split="test")
        figures[name] = {}
        for k in per_step:
            texts = decode(model, items, task, per_step=k)
            valid = [task.score(i, text).valid for i, text in zip(items, texts, strict=True)]
            figures[name][str(k)] = round(sum(valid) / n, 3)
        print(f"{name:12s} {figures[name]}", flush=True)
    model.train()
    return figures


def optimisers(model: TinyLLaDA, lr: float) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if ".blocks." in name and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        Muon(matrices, lr=lr, weight_decay=0.05),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(args: argparse.Namespace, model: TinyLLaDA, command: str) -> dict[str, str]:
    """Train `model` in place and leave it with the averaged weights; the facts for the card."""
    averaged = {k: v.clone() for k, v in model.state_dict().items()}
    opts = optimisers(model, args.lr)
    step, spent, history = 0, 0.0, ""
    if args.resume:
        saved = torch.load(args.checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        averaged, step, spent = saved["averaged"], saved["step"], saved["seconds"]
        history = saved.get("history", "")
        for opt, state in zip(opts, saved["opts"], strict=True):
            opt.load_state_dict(state)
    data = micro_batches(args.seed, args.mixture)
    finished = args.steps is not None and step >= args.steps
    if not finished:
        history += f"{command}  # from step {step}\n"
    for _ in tqdm(range(0 if finished else step), desc="data already seen", disable=not step):
        next(data)

    def save(seconds: float) -> None:
        state = {"model": model.state_dict(), "averaged": averaged, "step": step}
        state |= {"seconds": seconds, "opts": [opt.state_dict() for opt in opts]}
        state["history"] = history
        save_atomically(state, args.checkpoint)

    saved_at = time.monotonic()
    began = saved_at - spent
    # One micro-batch per thread, each operation on one thread: a step then has one point where
    # threads wait for each other, not thousands, which matters when cores are shared.
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(args.threads, initializer=torch.set_num_threads, initargs=(1,))
    bar = tqdm(total=args.steps, initial=step, mininterval=10, smoothing=0.05)
    recent: dict[str, float] = {}
    while True:
        spent = time.monotonic() - began
        done = step / args.steps if args.steps else spent / (60 * args.minutes)
        if done >= 1:
            break
        for opt in opts:
            for group in opt.param_groups:
                # Warm-up over 100 steps, then down to zero in a straight line.
                group["lr"] = args.lr * min(1.0, (step + 1) / 100) * min(1.0, 1.1 * (1 - done))
        rng = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        jobs = [
            pool.submit(gradients, model, tokens, hide(tokens, length, rng))
            for tokens, length in next(data)
        ]
        total = None
        for names, job in zip(MIXTURE, jobs, strict=True):
            loss, grads = job.result()
            recent[names[0]] = 0.9 * recent.get(names[0], loss) + 0.1 * loss
            if total is None:
                total = grads
            else:
                torch._foreach_add_(total, grads)
        for p, grad in zip(model.parameters(), total, strict=True):
            p.grad = grad
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        for opt in opts:
            opt.step()
        with torch.no_grad():
            decay = min(0.995, step / (step + 10))
            torch._foreach_lerp_(
                list(averaged.values()), list(model.state_dict().values()), 1 - decay
            )
        step += 1
        bar.update()
        if step % 20 == 0:
            bar.set_postfix({k: f"{v:.3f}" for k, v in recent.items()}, refresh=False)
        if time.monotonic() - saved_at > 60 * args.save_minutes:
            saved_at = time.monotonic()
            save(saved_at - began)
    bar.close()
    pool.shutdown()
    torch.set_num_threads(args.threads)
    if not finished:
        save(spent)
    model.load_state_dict(averaged)
    return {
        "steps": str(step),
        "minutes": f"{spent / 60:.0f}",
        "threads": str(args.threads),
        "history": history,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=55, help="wall-clock budget of training")
    parser.add_argument("--steps", type=int, help="optimiser steps; overrides --minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--mlp", type=int, default=384)
    parser.add_argument(
        "--mixture", type=mixture, default=MIXTURE, metavar="TASK=SIZE,...", help="batch sizes"
    )
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("build/tiny-llada"))
    parser.add_argument("--checkpoint", type=Path, default=Path("build/train_tiny.pt"))
    parser.add_argument("--save-minutes", type=float, default=4)
    parser.add_argument("--resume", action="store_true", help="continue from --checkpoint")
    parser.add_argument("--evaluate", action="store_true", help="only measure the model in --out")
    parser.add_argument("--items", type=int, default=300, help="unseen items per task")
    parser.add_argument("--per-step", type=int, nargs="+", default=[1, 2, 4], help="tokens a step")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    weights_file = args.out / "model.safetensors"
    if args.evaluate:
        model = TinyLLaDA(**json.loads((args.out / "config.json").read_text()))
        weights = load_file(weights_file)
        model.load_state_dict({k.removeprefix("model."): v for k, v in weights.items()})
    else:
        model = TinyLLaDA(
            d_model=args.d_model,
            n_layers=args.layers,
            n_heads=args.heads,
            mlp_hidden_size=args.mlp,
        )
        facts = train(args, model, command_of(parser, args))
        write_model_files(args.out, model.config)
        weights = {f"model.{k}": v.contiguous() for k, v in model.state_dict().items()}
        save_file(weights, weights_file, metadata={"format": "pt", **facts})
        weights_file.chmod(0o644)
    valid = evaluate(model, n=args.items, per_step=tuple(args.per_step))
    with safe_open(weights_file, "pt") as file:
        facts = file.metadata()
    write_card(args.out, facts, valid, args.items)
    print(json.dumps({"steps": int(facts["steps"]), "minutes": facts["minutes"], "valid": valid}))


def command_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """The command line of this run, without what belongs to one machine."""
    words = ["python examples/train_tiny.py"]
    budget = "steps" if args.steps else "minutes"
    for name in (budget, "seed", "d_model", "layers", "heads", "mlp", "lr", "threads"):
        value = getattr(args, name)
        if name in (budget, "seed") or value != parser.get_default(name):
            words.append(f"--{name.replace('_', '-')} {value:g}")
    if args.mixture != MIXTURE:
        sizes = (f"{group[0]}={size}" for group, size in args.mixture.items())
        words.append(f"--mixture {','.join(sizes)}")
    return " ".join(words + ["--resume"] * args.resume)


if __name__ == "__main__":
    main()
