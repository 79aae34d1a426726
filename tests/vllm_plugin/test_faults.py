"""What clients see when something breaks: an engine, a worker, a checkpoint, other clients' input.

Run with `-s` to read it in the clients' own words.
"""

import contextlib
import json
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from safetensors.torch import load_file, save_file
from server import serving

import boe_vllm

PROMPT, BROKEN = "A:1+2=", "A:1+Z="
LONG = {
    "prompt": PROMPT,
    "max_tokens": 480,
    "temperature": 0,
    "ignore_eos": True,
    "vllm_xargs": {"block_length": 8},
}
SHORT = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}


def post(url, body):
    """Status and parsed answer."""
    body = {"model": url.model} | body
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    return answer.status_code, answer.json()


def text(url, body):
    status, answer = post(url, body)
    assert status == 200, answer
    return answer["choices"][0]["text"]


def stream(url, body, at_first=lambda: None):
    """Lines of a stream, and what broke it off; calls `at_first` after the first line."""
    body = {"model": url.model, "stream": True} | body
    lines = []
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as answer:
            for line in filter(None, answer.iter_lines()):
                lines.append(line)
                if len(lines) == 1:
                    at_first()
    except httpx.HTTPError as error:
        return lines, error
    return lines, None


def text_of(lines):
    """The text of a stream that came to its end."""
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


# ---- a process dies ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "victim, arguments",
    [("EngineCore", []), ("Worker", ["--tensor-parallel-size", "2"])],
    ids=["engine", "worker"],
)
def test_a_killed_process_fails_its_clients_and_the_server(monkeypatch, victim, arguments):
    if arguments:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with serving("--sampler", "boe", *arguments) as url:
        waiting = {}

        def wait():
            try:
                waiting["answer"] = post(url, LONG)
            except httpx.HTTPError as error:
                waiting["error"] = repr(error)

        thread = threading.Thread(target=wait)

        victims = [
            child
            for child in psutil.Process(url.process.pid).children(recursive=True)
            if victim in " ".join([child.name(), *child.cmdline()])
        ]

        def kill():
            victims[-1].send_signal(signal.SIGSTOP)  # so that the stream cannot end meanwhile
            thread.start()
            victims[-1].send_signal(signal.SIGKILL)

        lines, error = stream(url, LONG, kill)
        thread.join(60)
        assert not thread.is_alive()
        status = url.process.wait(60)
        print(f"\n{victim} killed; streaming client: {lines[1:]} {error!r}")
        print(f"waiting client: {waiting}; exit status {status}")
        # An error event, or a stream that breaks off: never one that looks complete.
        assert not any('"finish_reason":"' in line and "error" not in line for line in lines)
        assert any("error" in line for line in lines) or lines[-1] != "data: [DONE]"
        assert "error" in waiting or waiting["answer"][0] >= 500
        assert status == 1


# ---- a broken checkpoint, and full budgets -------------------------------------------------------


@pytest.fixture(scope="module")
def broken_checkpoint(tmp_path_factory):
    """The bundled checkpoint with no number where the letter Z is embedded."""
    folder = tmp_path_factory.mktemp("broken") / "model"
    shutil.copytree(boe_vllm.tiny_model_path(), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.transformer.wte.weight"][ord("Z")] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


@pytest.fixture(scope="module")
def url(broken_checkpoint):
    # The smallest budget there can be: the rows of one request of full length. A soft write, such
    # as boe's, mixes the embeddings of all tokens, so that it would meet the broken one everywhere.
    arguments = ("--sampler", "joint", "--max-num-batched-tokens", "512")
    with serving(*arguments, model=broken_checkpoint) as server:
        yield server


def test_logits_that_are_not_finite_fail_their_request_alone(url):
    alone = text(url, SHORT)
    with ThreadPoolExecutor() as pool:
        good = [pool.submit(text, url, SHORT | {"max_tokens": 8 + n % 2}) for n in range(6)]
        bad = [pool.submit(post, url, SHORT | {"prompt": BROKEN}) for _ in range(3)]
        cut = pool.submit(stream, url, SHORT | {"prompt": BROKEN})
    assert all(one.result().startswith(alone.rstrip()) for one in good)
    why = "logits are not finite in denoising step 0; check the checkpoint and the dtype"
    for one in bad:
        status, answer = one.result()
        assert status == 500 and why in answer["error"]["message"]
    lines, error = cut.result()
    assert error is None and any(why in line for line in lines)
    print(f"\nnot finite: {status} {answer}\nas a stream: {lines}")
    assert text(url, SHORT) == alone


@pytest.mark.parametrize(
    "fields",
    [{}, {"cache": "dual", "block_length": 32}, {"policy": "confidence", "cfg_scale": 0.5}],
    ids=["rows", "cache", "guidance"],
)
def test_more_than_the_budget_holds_waits_its_turn(url, fields):
    body = LONG | {"max_tokens": 160, "vllm_xargs": {"tokens_per_step": 16} | fields}
    alone = text(url, body)  # 166 rows, 332 under guidance: three fit into 512, or one
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda _: text(url, body), range(12)))
    assert together == [alone] * 12


def test_bad_input_does_not_disturb_a_stream(url):
    alone = text(url, LONG)
    raw = [b"", b"{", b"\xff\xfe", b"[]", b'{"model": 1}', b'{"prompt": null}', b"[" * 5000]
    bad = [{"vllm_xargs": {"policy": "nope"}}, {"max_tokens": 10**6}, {"prompt": [-1]}]
    answers = []

    def send():
        for content in raw:
            headers = {"content-type": "application/json"}
            answers.append(
                httpx.post(
                    f"{url}/v1/completions", content=content, headers=headers, timeout=60
                ).status_code
            )
        answers.extend(post(url, SHORT | body)[0] for body in bad)

    lines, error = stream(url, LONG, send)
    assert error is None and text_of(lines) == alone
    print(f"\nbad input beside a stream: {answers}")
    assert set(answers) <= {400, 404, 422}


def test_a_server_that_is_told_to_stop_ends_well_even_under_load(url):
    """Last of this server's tests."""

    def stop():
        url.process.send_signal(signal.SIGTERM)

    with contextlib.suppress(httpx.HTTPError):
        stream(url, LONG, stop)
    assert url.process.wait(60) == 0
