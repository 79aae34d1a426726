"""A server whose engine dies says so to its clients and exits."""

import contextlib
import signal
import threading

import httpx
import psutil
import pytest
from server import serving

import boe_vllm

MODEL = boe_vllm.tiny_model_path()
BODY = {
    "model": MODEL,
    "prompt": "A:1+2=",
    "max_tokens": 480,
    "temperature": 0,
    "ignore_eos": True,
    "vllm_xargs": {"block_length": 8},
}


@pytest.mark.slow
def test_clients_of_a_killed_engine_get_an_error_and_the_server_exits():
    with serving("--sampler", "boe") as url:
        engines = [
            child
            for child in psutil.Process(url.process.pid).children(recursive=True)
            if "EngineCore" in " ".join([child.name(), *child.cmdline()])
        ]
        assert engines
        waiting = {}

        def wait():
            try:
                waiting["status"] = httpx.post(f"{url}/v1/completions", json=BODY, timeout=120)
            except httpx.HTTPError as error:
                waiting["error"] = error

        thread = threading.Thread(target=wait)
        seen = []
        with contextlib.suppress(httpx.HTTPError):
            with httpx.stream(
                "POST", f"{url}/v1/completions", json=BODY | {"stream": True}, timeout=120
            ) as stream:
                for line in stream.iter_lines():
                    if not line:
                        continue
                    seen.append(line)
                    if len(seen) == 1:
                        thread.start()
                        for engine in engines:
                            engine.send_signal(signal.SIGKILL)
        thread.join(60)
        assert not thread.is_alive()
        # An error event, or a stream that breaks off: never one that looks complete.
        assert not any('"finish_reason":"' in line and "error" not in line for line in seen)
        assert any("error" in line for line in seen) or seen[-1] != "data: [DONE]"
        assert "error" in waiting or waiting["status"].status_code >= 500
        url.process.wait(60)  # vLLM 0.32 then exits by itself; its status is 0 even so
