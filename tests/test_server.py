"""A real HTTP server and the real openai client."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from openai import AsyncOpenAI, BadRequestError, OpenAI
from server import serving

import boe_vllm
from boe_vllm.tasks import get_task

MODEL = boe_vllm.tiny_model_path()
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def url():
    with serving("--sampler", "boe", "--sampler-config", '{"rho": 0.25}') as base:
        yield base


@pytest.fixture(scope="module")
def client(url):
    return OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)


def ask(client, prompt="A:1+2=", *, max_tokens=16, stream=False, fields=None, **settings):
    settings.setdefault("temperature", 0.0)
    return client.completions.create(
        model=MODEL,
        prompt=prompt,
        max_tokens=max_tokens,
        stream=stream,
        extra_body={"vllm_xargs": fields or {}},
        **settings,
    )


def sudoku(seed=0):
    task = get_task("sudoku6")
    (item,) = task.items(1, seed=seed, split="test")
    return dict(prompt=item.prompt, max_tokens=task.gen_length, fields={"block_length": 36})


def test_a_completion_says_what_it_cost(client):
    answer = ask(client, **sudoku())
    assert len(answer.choices[0].text) == 36
    assert answer.usage.completion_tokens == 36
    assert answer.kv_transfer_params["boe"]["policy"] == "boe"
    assert answer.kv_transfer_params["boe"]["denoising_steps"] == 36


def test_streamed_pieces_make_the_same_text(client):
    whole = ask(client, **sudoku()).choices[0].text
    pieces = [
        chunk.choices[0].text for chunk in ask(client, stream=True, **sudoku()) if chunk.choices
    ]
    assert "".join(pieces) == whole
    assert len([piece for piece in pieces if piece]) > 1  # finer than the canvas


def test_chat_completions_work(client):
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "A:1+2="}],
        max_tokens=8,
        temperature=0.0,
        extra_body={"vllm_xargs": {"policy": "confidence"}},
    )
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.completion_tokens <= 8


def test_concurrent_requests_equal_the_same_requests_alone(url):
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
    policies = ["boe", "confidence", "random", "entropy"]

    def one(n):
        request = sudoku(n % 5)
        request["fields"] = request["fields"] | {
            "policy": policies[n % 4],
            "tokens_per_step": 1 + n % 5,
        }
        return ask(client, **request, seed=n, temperature=float(n % 2))

    async def run():
        together = await asyncio.gather(*(one(n) for n in range(16)))
        for n in range(16):
            alone = await one(n)
            assert alone.choices[0].text == together[n].choices[0].text

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "fields, name",
    [
        ({"policy": "nope"}, "policy"),
        ({"rho": 2}, "rho"),
        ({"steps": 7, "gen_length": 32, "block_length": 5}, "gen_length"),
        ({"wrong": 1}, "wrong"),
        ({"gen_length": 5000}, "gen_length"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_a_bad_field_is_a_400_that_names_it(client, fields, name, stream):
    with pytest.raises(BadRequestError, match=name):
        for _ in ask(client, fields=fields, stream=stream) or ():
            pass
    assert ask(client).choices[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    "body, message",
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": "A:" + "1+" * 400}, "max|length"),
        ({"prompt": [1, 2, 99999]}, "token|vocab"),
        ({"max_tokens": 0}, "max_tokens|at least 1"),
        ({"max_tokens": 4000}, "max_tokens|maximum"),
        ({"logit_bias": {"5": 3}}, "logit_bias"),
    ],
    ids=lambda v: str(v)[:24],
)
def test_a_bad_request_is_a_400(url, body, message):
    full = {"model": MODEL, "prompt": "A:1+2=", "max_tokens": 8, "temperature": 0} | body
    answer = httpx.post(f"{url}/v1/completions", json=full, timeout=60)
    assert answer.status_code == 400, answer.text
    import re

    assert re.search(message, answer.text)


def test_a_client_that_leaves_frees_its_rows(url, client):
    """Cut a long stream; the running requests go back to none."""
    body = {
        "model": MODEL,
        "prompt": "A:1+2=",
        "max_tokens": 400,
        "stream": True,
        "temperature": 0,
        "ignore_eos": True,
        "vllm_xargs": {"block_length": 8},
    }
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        for line in answer.iter_lines():
            if line.startswith("data:"):
                break
    running = None
    for _ in range(200):
        metrics = httpx.get(f"{url}/metrics", timeout=30).text
        lines = [x for x in metrics.splitlines() if x.startswith("vllm:num_requests_running")]
        running = sum(float(line.rsplit(" ", 1)[1]) for line in lines)
        if running == 0:
            break
        ask(client, max_tokens=2)  # the engine reports when it steps
    assert running == 0


def test_the_client_example_runs(url):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "client.py"), "--base-url", f"{url}/v1"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["requests"] == 16 and result["refused"] == 3
    assert result["stream_equals_plain"] and result["same_after_all"]
