"""`boe-vllm watch`: one request under several policies, as it is decoded.

In a terminal the canvases fill side by side; elsewhere their ends are printed. The same can be kept
as a page, a figure, or JSON.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from boe_vllm import TINY
from boe_vllm.lab.eval.cells import DEFAULT_BLOCK
from boe_vllm.lab.eval.variants import Variant, parse
from boe_vllm.lab.pictures.packages import require
from boe_vllm.lab.pictures.trajectory import Recording, read
from boe_vllm.lab.tasks import FILE_TASKS, TASKS, open_task

if TYPE_CHECKING:
    from boe_vllm.lab.pictures.recorder import Recorder, Request

FIGURES = (".png", ".svg")


def parser() -> argparse.ArgumentParser:
    """All options."""
    made = argparse.ArgumentParser(
        prog="boe-vllm watch",
        description="Watch policies fill the canvas of one request.",
        epilog=f"Tasks: {', '.join(TASKS)}; from files in --data: {', '.join(FILE_TASKS)}.",
    )
    what = made.add_argument_group("what is decoded")
    what.add_argument("--task", metavar="NAME", help="see below")
    what.add_argument("--item", type=int, default=0, metavar="N", help="of the task, from 0")
    what.add_argument("--prompt", metavar="TEXT", help="one's own, instead of a task")
    what.add_argument("--replay", type=Path, metavar="FILE", help="what --json has written")
    what.add_argument("--data", type=Path, metavar="DIR", help="folder of the benchmark files")
    what.add_argument("--seed", type=int, default=0, help="of the task's items, and of randomness")
    how = made.add_argument_group("how")
    how.add_argument("--model", default=TINY, help="a checkpoint's folder; tiny is the bundled one")
    how.add_argument("--device", default="cpu", help="cpu or cuda")
    how.add_argument(
        "--policies",
        default="confidence,boe",
        metavar="A,B,...",
        help="each with settings if wanted, boe:rho=0.5:gate=none (default: %(default)s)",
    )
    how.add_argument("--tokens-per-step", type=int, default=1, metavar="N")
    how.add_argument("--gen-length", type=int, metavar="N", help="canvas (default: the task's own)")
    how.add_argument("--block-length", type=int, metavar="N")
    how.add_argument("--temperature", type=float, default=0.0)
    how.add_argument("--frequencies", type=Path, metavar="FILE", help="token table, for pc")
    how.add_argument(
        "--influence",
        choices=["none", "mask", "kv", "response"],
        help="of positions on each other, one backward per masked position and step, linearised at "
        "the mask embedding, in keys and values, or in attention outputs (default: response with "
        "--html or --json)",
    )
    kept = made.add_argument_group("what is shown and kept")
    kept.add_argument("--delay", type=float, default=0.2, metavar="S", help="between steps")
    kept.add_argument("--html", type=Path, metavar="FILE", help="a self-contained page")
    kept.add_argument("--png", type=Path, metavar="FILE", help="a figure; .svg works too")
    kept.add_argument("--json", type=Path, metavar="FILE", help="the trajectory, for --replay")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 2 for arguments that do not fit, with a line that says why."""
    args = parser().parse_args(argv)
    try:
        check(args)
        require("matplotlib", "rich")
        recording = show(read(args.replay), args) if args.replay else decode(args)
        keep(recording, args)
    except ValueError as error:
        print(f"boe-vllm watch: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def check(args: argparse.Namespace) -> None:
    """Arguments that can be judged without a model.

    Raises:
        ValueError: naming the option, what was expected and what came.
    """
    given = [name for name in ("task", "prompt", "replay") if getattr(args, name) is not None]
    if len(given) != 1:
        raise ValueError(
            f"--task: expected one of --task, --prompt and --replay, got "
            f"{' and '.join('--' + name for name in given) or 'none'}; give exactly one"
        )
    if args.prompt is not None and args.gen_length is None:
        raise ValueError("--gen-length: expected a number with --prompt, got none; say how long")
    for option, least in (
        ("item", 0),
        ("tokens_per_step", 1),
        ("gen_length", 1),
        ("block_length", 1),
        ("temperature", 0),
        ("delay", 0),
    ):
        value = getattr(args, option)
        if value is not None and not value >= least:
            name = option.replace("_", "-")
            raise ValueError(f"--{name}: expected at least {least}, got {value}; change it")
    if args.png is not None and args.png.suffix not in FIGURES:
        raise ValueError(
            f"--png: expected a name that ends in {' or '.join(FIGURES)}, got {args.png}; rename it"
        )
    for option in ("html", "png", "json"):
        path = getattr(args, option)
        if path is not None and path.is_dir():
            raise ValueError(f"--{option}: expected a file, got the folder {path}; name a file")


def variants_of(text: str) -> list[Variant]:
    """The policies of the command line.

    Raises:
        ValueError: for names that are empty or come twice.
    """
    names = [name.strip() for name in text.split(",")]
    if "" in names or len(set(names)) < len(names):
        raise ValueError(f"--policies: expected different names A,B,..., got {text!r}; correct it")
    return [parse(name) for name in names]


def open_recorders(args: argparse.Namespace) -> tuple[Request, list[Recorder]]:
    """The request and one recorder per policy, nothing decoded yet.

    Raises:
        ValueError: for arguments that do not fit the task, the model or a policy.
    """
    variants = variants_of(args.policies)
    task = None if args.task is None else open_task(args.task, args.data)
    length = args.gen_length or (task.gen_length if task else 0)
    block = args.block_length
    if block is None:
        own = task is not None and length == task.gen_length
        block = task.block_length if task is not None and own else min(DEFAULT_BLOCK, length)
    item = None
    if task is not None:
        task.require()
        items = task.items(args.item + 1, seed=args.seed)
        if len(items) <= args.item:
            raise ValueError(
                f"--item: expected less than the task's {len(items)} items, got {args.item}; "
                f"lower it"
            )
        item = items[args.item]
    # Imported only now: torch takes seconds, and a wrong argument should be told before.
    from boe_vllm.denoiser import Denoiser
    from boe_vllm.lab.pictures.recorder import Recorder, Request
    from boe_vllm.request.config import parse_sampler_config

    request = Request(
        prompt=args.prompt if item is None else item.prompt,
        gen_length=length,
        seed=args.seed,
        temperature=args.temperature,
        task=task,
        item=item,
        number=None if item is None else args.item,
    )
    server = {} if args.frequencies is None else {"frequencies": str(args.frequencies)}
    base = parse_sampler_config(server)
    surrogate: Any = args.influence or ("response" if args.html or args.json else "none")
    frame = {"block_length": block, "tokens_per_step": args.tokens_per_step}
    for variant in variants:
        parse_sampler_config(frame | variant.fields, base=base)
    denoiser = Denoiser.from_pretrained(
        args.model, device=args.device, settings={"sampler_config": server}
    )
    return request, [
        Recorder(
            denoiser,
            request,
            label=variant.label,
            fields=frame | variant.fields,
            surrogate=None if surrogate == "none" else surrogate,
        )
        for variant in variants
    ]


def decode(args: argparse.Namespace) -> Recording:
    """Decode the request under all policies, shown step by step in a terminal."""
    from boe_vllm.lab.pictures.recorder import recording

    request, recorders = open_recorders(args)
    frame = 0
    with Screen(args.delay) as screen:
        while not all(recorder.done for recorder in recorders):
            for recorder in recorders:
                if not recorder.done:
                    recorder.step()
            if screen.live:
                screen.show(recording(request, recorders), frame)
            frame += 1
        ended = recording(request, recorders)
        screen.end(ended)
    return ended


def show(recording: Recording, args: argparse.Namespace) -> Recording:
    """Show what was recorded before."""
    with Screen(args.delay) as screen:
        for frame in range(max(len(t.steps) for t in recording.trajectories) * screen.live):
            screen.show(recording, frame)
        screen.end(recording)
    return recording


class Screen:
    """The terminal, or a plain text at the end where there is none."""

    def __init__(self, delay: float) -> None:
        """`delay` seconds between frames."""
        from rich.console import Console
        from rich.live import Live

        self.console = Console()
        self.live = self.console.is_terminal
        self._delay = delay
        self._view = Live(console=self.console, auto_refresh=False)
        self._highest = 0.0

    def __enter__(self) -> Screen:
        if self.live:
            self._view.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self._view.stop()

    def show(self, recording: Recording, frame: int) -> None:
        """One frame; the colours' scale may grow, never shrink."""
        from boe_vllm.lab.pictures.terminal import Scene

        self._highest = max(self._highest, recording.highest_entropy)
        scene = Scene(recording=recording, highest=self._highest)
        self._view.update(scene.render(frame), refresh=True)
        time.sleep(self._delay)

    def end(self, recording: Recording) -> None:
        """The last frame, or all that is printed where there are none."""
        from boe_vllm.lab.pictures.terminal import plain

        if self.live:
            self.show(recording, max(len(t.steps) for t in recording.trajectories))
        else:
            print(plain(recording))


def keep(recording: Recording, args: argparse.Namespace) -> None:
    """Write the files that were asked for, and name them."""
    if args.json is not None:
        recording.write(args.json)
    if args.html is not None:
        from boe_vllm.lab.pictures import page

        page.write(recording, args.html)
    if args.png is not None:
        from boe_vllm.lab.pictures import figure, timeline

        figure.save_as(timeline.draw(recording), args.png)
    for path in (args.json, args.html, args.png):
        if path is not None:
            print(path)
