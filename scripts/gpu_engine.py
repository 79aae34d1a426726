"""vLLM's engine around the denoising loop, checked on a machine that has a GPU and vLLM.

    python scripts/gpu_engine.py > engine.jsonl

Prints one JSON line for each check, with `ok`: facts; the bundled checkpoint through `LLM` in this
process, through an engine in a process of its own, and with a worker in a third, where tokens must
be the `Denoiser`'s on the CPU and on the device, and costs those on the device; LLaDA-8B's widths
with random bfloat16 weights, where a request alone must get its tokens in a batch, and again after
a sleep; `vllm serve` and its answers over HTTP. A check that fails stops no other. Exits with 0 if
all are ok, else with 1.

`scripts/gpu_check.py` checks the core, and needs no vLLM. `--device cpu --small` is for trials with
vLLM's CPU build.
"""

import argparse
import contextlib
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CHECKS = ("facts", "process", "separate", "worker", "server", "large")

PROMPTS = ("12+34=", "7+8=", "305+41=", "A:99+1=", "S4:1030000001000000=", "S4:0000004000020300=")
REQUESTS: tuple[dict[str, Any], ...] = (
    {"policy": "confidence", "tokens_per_step": 4},
    {"policy": "confidence", "block_length": 8, "cache": "dual"},
    {"policy": "boe", "tokens_per_step": 4, "trace": True},
    {"policy": "boe", "preset": "kv", "tokens_per_step": 2},
    {"policy": "joint"},
    {"policy": "joint", "tokens_per_step": 4},
    {"policy": "info-gain", "tokens_per_step": 2},
    {"policy": "boe", "preset": "paper", "cfg_scale": 0.5},
    {"choices": ["46", "15", "346"]},
    {"policy": "boe", "canvas_template": ["4", 3, "."]},
)
"""A request's own fields: every prompt is decoded with each, greedily and with random numbers."""

CANVAS, SEED = 16, 5
LLADA_8B = {
    "architectures": ["LLaDAModelLM"],
    "model_type": "llada",
    "d_model": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 32,
    "mlp_hidden_size": 12288,
    "max_sequence_length": 4096,
    "vocab_size": 126464,
    "mask_token_id": 126336,
    "eos_token_id": 126081,
    "pad_token_id": 126081,
}
SMALL = {"d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 128}
SMALL |= {"max_sequence_length": 256, "vocab_size": 600, "mask_token_id": 599}
SMALL |= {"eos_token_id": 598, "pad_token_id": 598}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options; reading them needs nothing but Python."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes for trials on a CPU")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=CHECKS, metavar="CHECK")
    parser.add_argument(
        "--budget", type=float, default=600.0, help="seconds after which no check begins"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """0 if every check is ok."""
    args = parse(arguments)
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # the lines are on stdout
    try:
        from boe_vllm.lab.gpu.report import Report
    except ImportError as error:
        print(json.dumps({"check": "imports", "ok": False, "error": str(error)}))
        return 1
    report = Report(args.budget)
    checks: dict[str, Callable[..., None]] = {
        "facts": check_facts,
        "process": check_process,
        "separate": check_separate,
        "worker": check_worker,
        "server": check_server,
        "large": check_large,
    }
    for name in args.only:
        if report.time_left(name):
            with report.guard(name):
                checks[name](report, args.device, args.small)
    report.line("all", ok=report.passed, seconds=report.seconds)
    return 0 if report.passed else 1


# ---- checks --------------------------------------------------------------------------------------


def check_facts(report: Any, device: str, small: bool) -> None:
    """What is installed, and what vLLM takes the machine for."""
    import torch
    import vllm
    from vllm.platforms import current_platform

    from boe_vllm.lab.bench.machine import machine_name
    from boe_vllm.lab.gpu.facts import xformers_state

    report.line(
        "facts",
        ok=current_platform.device_type == device,
        device=machine_name(torch.device(device)),
        torch=torch.__version__,
        vllm=vllm.__version__,
        platform=type(current_platform).__name__,
        kernels=kernels(),
        xformers=xformers_state() if device == "cuda" else None,
    )


def kernels() -> bool:
    """Whether vLLM's own compiled kernels are there; nothing here uses them."""
    import importlib.util

    names = ("_C", "_C_stable_libtorch")
    specs = [importlib.util.find_spec(f"vllm.{name}") for name in names]
    return any(spec is not None and str(spec.origin).endswith(".so") for spec in specs)


def check_process(report: Any, device: str, small: bool) -> None:
    """The engine in this process: its worker, its memory, and its answers."""
    with engine(report, "process", own_process=False) as llm:
        core = llm.llm_engine.engine_core.engine_core
        worker = core.model_executor.driver_worker.worker
        runner = worker.model_runner
        report.line(
            "worker",
            ok=runner.device.type == device and not runner.loop.canvases,
            worker=type(worker).__name__,
            runner=type(runner).__name__,
            scheduler=type(core.scheduler).__name__,
            device=str(runner.device),
            blocks=llm.llm_engine.vllm_config.cache_config.num_gpu_blocks,
            rows=llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens,
        )
        compare(report, "process", llm, device, small)


def check_separate(report: Any, device: str, small: bool) -> None:
    """The engine in a process of its own, as a server has it."""
    expect(device, small=True)
    with engine(report, "separate", own_process=True) as llm:
        compare(report, "separate", llm, device, small=True)


def check_worker(report: Any, device: str, small: bool) -> None:
    """The worker in a process of its own too, as each of several GPUs has one."""
    expect(device, small=True)
    backend = {"distributed_executor_backend": "mp"}
    with engine(report, "worker", own_process=True, **backend) as llm:
        compare(report, "worker", llm, device, small=True)


def check_server(report: Any, device: str, small: bool) -> None:
    """`vllm serve`: answers to requests that come together, a refusal, counters, and its end."""
    import boe_vllm

    model = boe_vllm.tiny_model_path()
    wanted = [w.text for fields in REQUESTS[:6] for w in expected("cpu", fields, 0.0)]
    with serving(model) as (url, process, seconds):
        report.line("up", seconds=seconds)
        body = {"model": model, "max_tokens": CANVAS, "temperature": 0}
        bodies = [
            body | {"prompt": prompt, "vllm_xargs": fields}
            for fields in REQUESTS[:6]
            for prompt in PROMPTS
        ]
        with ThreadPoolExecutor(len(bodies)) as threads:
            found = list(threads.map(lambda b: fetch(f"{url}/v1/completions", b), bodies))
        texts = [answer["choices"][0]["text"] for answer in found]
        wrong = sum(text != other for text, other in zip(texts, wanted, strict=True))
        report.line("answers", ok=not wrong, engine="server", requests=len(bodies), wrong=wrong)
        bad = bodies[0] | {"vllm_xargs": {"policy": "nope"}}
        status, message = refusal(f"{url}/v1/completions", bad)
        report.line("refusal", ok=status == 400 and "policy" in message, status=status)
        text = urllib.request.urlopen(f"{url}/metrics", timeout=30).read().decode()
        names = {line.split("{")[0] for line in text.splitlines() if line.startswith("boe:")}
        report.line("metrics", ok=bool(names), names=len(names))
        process.terminate()
        report.line("end", ok=process.wait(60) == 0, code=process.returncode)


def check_large(report: Any, device: str, small: bool) -> None:
    """Warm-up, memory and time of a step at LLaDA-8B's widths, and a sleep."""
    config = LLADA_8B | (SMALL if small else {})
    longest, prompt, canvas, block = (128, 20, 36, 12) if small else (2048, 224, 128, 32)
    many = 4 if small else 8
    prompts = [[(7 * n + k) % 500 + 3 for k in range(prompt)] for n in range(many)]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        settings = dict(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=longest,
            max_num_batched_tokens=4 * longest,
            gpu_memory_utilization=0.5,
            enable_sleep_mode=device == "cuda",
        )
        with engine(report, "large", own_process=False, **settings) as llm:
            worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
            report.line("memory", **memory(worker.model_runner, device))
            for policy in ("confidence", "joint", "boe"):
                fields = {"policy": policy, "tokens_per_step": 4, "block_length": block}
                with report.guard("large", policy=policy):
                    time_steps(report, llm, fields, prompts, canvas)
            if device == "cuda":
                with report.guard("sleep"):
                    sleep(report, llm, fields, prompts[:1], canvas)


def time_steps(
    report: Any, llm: Any, fields: dict[str, Any], prompts: list[list[int]], canvas: int
) -> None:
    """Milliseconds of a step of all prompts together, and whether the first is the same alone."""
    alone = answers(llm, fields, 0.0, prompts[:1], canvas)
    start = time.perf_counter()
    together = answers(llm, fields, 0.0, prompts, canvas)
    seconds = time.perf_counter() - start
    same = tokens(alone) == tokens(together)[:1]
    steps = max(cost(answer)["denoising_steps"] for answer in together)
    report.line(
        "large",
        ok=same and all(len(t) == canvas for t in tokens(together)),
        policy=fields["policy"],
        requests=len(prompts),
        alone_equals_batch=same,
        steps=steps,
        ms_step=seconds / steps * 1e3,
    )


def sleep(
    report: Any, llm: Any, fields: dict[str, Any], prompts: list[list[int]], canvas: int
) -> None:
    """Memory that a sleeping engine gives back, and whether it decodes the same once awake."""
    before = tokens(answers(llm, fields, 0.0, prompts, canvas))
    used = [memory_used()]
    start = time.perf_counter()
    for go in (lambda: llm.sleep(level=1), llm.wake_up):
        go()
        used.append(memory_used())
    seconds = time.perf_counter() - start
    same = tokens(answers(llm, fields, 0.0, prompts, canvas)) == before
    report.line(
        "sleep",
        ok=same and used[1] < used[0],
        same_tokens=same,
        seconds=seconds,
        gib_before_asleep_awake=[size / 2**30 for size in used],
    )


# ---- parts ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def engine(report: Any, check: str, *, own_process: bool, **settings: Any) -> Iterator[Any]:
    """vLLM's engine, on the bundled checkpoint unless `settings` say otherwise."""
    import boe_vllm

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(own_process))
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    start = time.perf_counter()
    model = settings.pop("model", boe_vllm.tiny_model_path())
    limits = {"max_num_seqs": 8, "max_num_batched_tokens": 2048, "gpu_memory_utilization": 0.3}
    llm = LLM(model, sampler="boe", seed=0, **(limits | settings))
    report.line("start", engine=check, seconds=time.perf_counter() - start)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        if not own_process:
            del llm
            cleanup_dist_env_and_memory()
            gc.collect()


def cases(small: bool) -> Iterator[tuple[dict[str, Any], float]]:
    """Fields and temperatures that are compared."""
    for fields in REQUESTS[: 5 if small else None]:
        for temperature in (0.0,) if small else (0.0, 1.0):
            yield fields, temperature


def compare(report: Any, name: str, llm: Any, device: str, small: bool) -> None:
    """Answers of an engine beside the `Denoiser`'s, on the CPU and on the device."""
    for fields, temperature in cases(small):
        with report.guard("answers", engine=name, fields=fields, temperature=temperature):
            start = time.perf_counter()
            found = answers(llm, fields, temperature)
            seconds = time.perf_counter() - start
            alone = answers(llm, fields, temperature, PROMPTS[:1])
            same: dict[str, Any] = {"alone": tokens(alone) == tokens(found)[:1]}
            for place in sorted({"cpu", device}):
                wanted = expected(place, fields, temperature)
                same[f"tokens_{place}"] = tokens(found) == [w.tokens for w in wanted]
                same[f"costs_{place}"] = list(map(cost, found)) == [w.cost for w in wanted]
            # Where two positions are as sure as each other to within rounding, the CPU may look at
            # one candidate more or fewer, and write the same.
            needed = {k: v for k, v in same.items() if k != "costs_cpu" or device == "cpu"}
            report.line(
                "answers",
                ok=all(needed.values()),
                engine=name,
                fields=fields,
                temperature=temperature,
                **same,
                forwards=sum(cost(answer)["forwards"] for answer in found),
                seconds=seconds,
            )


_expected: dict[str, list[Any]] = {}


def expected(place: str, fields: dict[str, Any], temperature: float) -> list[Any]:
    """What the `Denoiser` makes of every prompt, on the CPU or on the device."""
    import boe_vllm

    key = json.dumps([place, fields, temperature])
    if key not in _expected:
        if place not in _denoisers:
            _denoisers[place] = boe_vllm.Denoiser.from_pretrained("tiny", device=place)
        _expected[key] = _denoisers[place].generate(
            PROMPTS, temperature=temperature, max_tokens=CANVAS, seed=SEED, **fields
        )
    return _expected[key]


_denoisers: dict[str, Any] = {}


def expect(device: str, small: bool) -> None:
    """Decode it now: beside an engine that waits busily it would take ten times as long."""
    for place in sorted({"cpu", device}):
        for fields, temperature in cases(small):
            expected(place, fields, temperature)


def answers(
    llm: Any,
    fields: dict[str, Any],
    temperature: float,
    prompts: Sequence[Any] = PROMPTS,
    canvas: int = CANVAS,
) -> list[Any]:
    """What an engine answers to prompts that come together."""
    from vllm import SamplingParams

    texts = isinstance(prompts[0], str)
    params = [
        SamplingParams(
            temperature=temperature,
            max_tokens=canvas,
            seed=SEED + n,
            extra_args=dict(fields),
            ignore_eos=not texts,
            detokenize=texts,
        )
        for n in range(len(prompts))
    ]
    inputs = list(prompts) if texts else [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(inputs, params, use_tqdm=False)


def tokens(found: Sequence[Any]) -> list[list[int]]:
    """Of each answer."""
    return [list(answer.outputs[0].token_ids) for answer in found]


def cost(answer: Any) -> dict[str, int]:
    """Denoising steps, passes and rows of an answer, as `Generation.cost`."""
    return {k: v for k, v in answer.kv_transfer_params["boe"].items() if isinstance(v, int)}


def memory(runner: Any, device: str) -> dict[str, float]:
    """GiB of the network, of frozen keys and values, and of all that the warm-up took."""
    import torch

    pool = runner.loop.pool.storage
    found = {"network": runner.model_memory_usage, "frozen": pool.numel() * pool.element_size()}
    if device == "cuda":
        found["most"] = torch.cuda.max_memory_reserved()
        found["now"] = torch.cuda.memory_reserved()
    return {f"{name}_gib": size / 2**30 for name, size in found.items()}


def memory_used() -> int:
    """Bytes of the GPU that any process holds."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return total - free


@contextlib.contextmanager
def serving(model: str) -> Iterator[tuple[str, subprocess.Popen, float]]:
    """A server's address, its process, and the seconds that it took to start.

    Raises:
        RuntimeError: with the end of its log, if it does not come up.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]
    command += ["--host", "127.0.0.1", "--port", str(port), "--gpu-memory-utilization", "0.3"]
    command += ["--sampler", "boe", "--max-num-seqs", "8"]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    url, start = f"http://127.0.0.1:{port}", time.perf_counter()
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": paths}
        )
        try:
            while not _answers(f"{url}/health"):
                seconds = time.perf_counter() - start
                if process.poll() is not None or seconds > 200:
                    raise RuntimeError(f"no server: {Path(log.name).read_text()[-3000:]}")
                time.sleep(0.5)
            yield url, process, time.perf_counter() - start
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def fetch(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to a JSON request."""
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())


def refusal(url: str, body: dict[str, Any]) -> tuple[int, str]:
    """Status and text of an answer that is an error."""
    try:
        return 200, json.dumps(fetch(url, body))
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


if __name__ == "__main__":
    sys.exit(main())
