"""A server of its own: its health while its engine does not answer, tools, and what clients see at
its end.

The tests run in their order, and the last one ends the server.
"""

import asyncio
import itertools
import json
import os
import re
import shutil
import signal
import threading
import time
from types import SimpleNamespace

import httpx
import psutil
import pytest
from openai import OpenAI
from server import serving
from vllm.v1.engine.exceptions import EngineDeadError

from boe_vllm.vllm_plugin import watchdog
from boe_vllm.vllm_plugin.watchdog import Watchdog

LONG = {
    "prompt": "A:1+2=",
    "max_tokens": 480,
    "temperature": 0,
    "ignore_eos": True,
    "vllm_xargs": {"block_length": 8},
}
SETTINGS = {"watchdog_interval_s": 0.1, "watchdog_timeout_s": 0.5, "watch": True}
END = "<|endoftext|>"
CHROMIUM = shutil.which("chromium")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install it")


@pytest.fixture(scope="module")
def url():
    tools = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    own = ("--sampler", "confidence", "--additional-config", json.dumps(SETTINGS))
    with serving(*own, *tools) as server:
        yield server


def engine_of(url):
    children = psutil.Process(url.process.pid).children(recursive=True)
    (engine,) = [c for c in children if "EngineCore" in " ".join([c.name(), *c.cmdline()])]
    return engine


def until_health_is(url, status):
    """Ask until it is; the number of questions is bounded, and not their time."""
    for _ in range(3000):
        found = httpx.get(f"{url}/health", timeout=60).status_code
        if found == status:
            return
        time.sleep(0.01)
    raise AssertionError(f"/health stayed {found}")


def test_a_server_whose_engine_takes_no_requests_is_not_healthy(url):
    until_health_is(url, 200)
    engine = engine_of(url)
    engine.send_signal(signal.SIGSTOP)  # it lives, and reads nothing
    try:
        until_health_is(url, 503)
    finally:
        engine.send_signal(signal.SIGCONT)
    until_health_is(url, 200)
    answer = httpx.post(f"{url}/v1/completions", json=LONG | {"max_tokens": 4}, timeout=60)
    assert answer.status_code == 200


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"enum": [1, 2]}},
                "required": ["city", "days"],
            },
        },
    }
    for name in ("weather", "traffic")
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str
)
def test_a_tool_is_called_with_what_its_schema_asks_for(url, choice, stream):
    """In blocks of 16 tokens, so that a call lies in several of them."""
    client = OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
    answer = client.chat.completions.create(
        model=url.model,
        messages=[{"role": "user", "content": "A:1+2="}],
        max_tokens=120,
        temperature=1.0,
        seed=3,
        tools=TOOLS,
        tool_choice=choice,
        stream=stream,
        extra_body={"vllm_xargs": {"policy": "confidence", "block_length": 16}},
    )
    calls = calls_of(answer, stream)
    assert calls
    for name, arguments in calls.values():
        assert name in ("weather", "traffic")
        found = json.loads(arguments)
        assert found["city"] in ("Rome", "Oslo") and found["days"] in (1, 2)


def calls_of(answer, stream):
    """The calls of an answer, by their number: names and arguments."""
    calls = {}
    if stream:
        for chunk in answer:
            for call in chunk.choices[0].delta.tool_calls or () if chunk.choices else ():
                name, arguments = calls.get(call.index, ("", ""))
                function = call.function
                calls[call.index] = (
                    name + (function.name or ""),
                    arguments + (function.arguments or ""),
                )
    else:
        for n, call in enumerate(answer.choices[0].message.tool_calls):
            calls[n] = call.function.name, call.function.arguments
    return calls


def test_calls_that_a_model_chooses_to_make_are_parsed_from_runs_of_tokens(url):
    """Two calls that lie over several blocks, with masks in them, and a text that is no call. The
    bundled model makes none by itself: a template does."""
    client = OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
    call = ['<tool_call>\n{"name": "weather", "arguments": {"city": "', 6, '"}}\n</tool_call>']
    loose = [tool | {"function": tool["function"] | {"strict": False}} for tool in TOOLS]
    found = {}
    for name, template in (("calls", [*call, "\n", *call]), ("text", ["Hello ", 4])):
        for stream in (False, True):
            found[name, stream] = client.chat.completions.create(
                model=url.model,
                messages=[{"role": "user", "content": "A:1+2="}],
                temperature=0,
                tools=loose,
                tool_choice="auto",
                stream=stream,
                extra_body={
                    "allowed_token_ids": list(range(97, 123)),
                    "vllm_xargs": {"block_length": 16, "canvas_template": json.dumps(template)},
                },
            )
    calls = calls_of(found["calls", False], False)
    assert calls_of(found["calls", True], True) == calls and list(calls) == [0, 1]
    for name, arguments in calls.values():
        assert name == "weather" and re.fullmatch("[a-z]{6}", json.loads(arguments)["city"])
    (message,) = (choice.message for choice in found["text", False].choices)
    pieces = [c.choices[0].delta.content or "" for c in found["text", True] if c.choices]
    assert not message.tool_calls and "".join(pieces) == message.content
    assert message.content.startswith("Hello ")


def test_strict_tools_that_a_model_may_choose_are_refused(url):
    """vLLM asks for free text with calls in it, which is a grammar of neither kind."""
    body = {"messages": [{"role": "user", "content": "A:1+2="}], "tools": TOOLS}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body | {"model": url.model}, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "structured_outputs"


def events_of(url, path, body):
    """The parsed events of a stream."""
    body = {"model": url.model, "stream": True, "temperature": 0, "ignore_eos": True} | body
    with httpx.stream("POST", f"{url}/v1/{path}", json=body, timeout=60) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("samples", [1, 2])
def test_a_stream_may_show_its_canvas_as_it_fills(url, samples):
    """To the end, whose snapshot is the text; the text is that of a stream without."""
    body = {"prompt": "A:1+2=", "max_tokens": 24, "n": samples, "seed": 3}
    body["temperature"] = float(samples - 1)
    plain = events_of(url, "completions", body)
    events = events_of(url, "completions", body | {"vllm_xargs": {"stream_canvas": True}})

    def texts(events):
        found = [""] * samples
        for event in events:
            for choice in event["choices"]:
                found[choice["index"]] += choice["text"]
        return found

    assert texts(events) == texts(plain)
    for index in range(samples):
        seen = [e["canvas"] for e in events if "canvas" in e and e["canvas"]["index"] == index]
        assert seen and not any(seen[-1]["masked"])
        assert "".join(seen[-1]["texts"]).replace(END, "") == texts(plain)[index]
        for before, after in itertools.pairwise(seen):
            assert before["step"] < after["step"]
            assert sum(before["masked"]) > sum(after["masked"])
        first = seen[0]
        assert len(first["tokens"]) == len(first["masked"]) == 24
        named = ("positions", "proposals", "entropy", "confidence", "scores")
        assert len({len(first[name]) for name in named}) == 1
    assert any("boe" in choice for event in events for choice in event["choices"])


def test_only_a_stream_shows_its_canvas(url):
    body = {"model": url.model, "prompt": "A", "vllm_xargs": {"stream_canvas": True}}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "stream_canvas")


def test_the_page_loads_nothing_from_elsewhere(url):
    answer = httpx.get(f"{url}/watch", timeout=60)
    policy = answer.headers["content-security-policy"]
    assert answer.status_code == 200 and "connect-src 'self'" in policy
    assert not re.search(r"https?://|innerHTML|eval\(|@import|url\(", answer.text)


@needs_browser
def test_one_watches_canvases_fill_in_a_browser(url):
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    problems = []
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        tab = opened.new_page(viewport={"width": 1200, "height": 800})
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        tab.goto(f"{url}/watch")
        tab.fill("#policies", "confidence, boe")
        tab.fill("#tokens", "24")
        tab.click("#start")
        tab.wait_for_selector("section.policy[data-done] >> nth=1", timeout=60_000)
        panels = tab.locator("section.policy")
        assert panels.count() == 2
        for n in range(2):
            cells = panels.nth(n).locator(".cell")
            assert cells.count() == 24
            written = cells.evaluate_all("all => all.map(e => e.classList.contains('written'))")
            assert all(written)
            assert "forwards" in panels.nth(n).locator(".facts").inner_text()
        panels.nth(0).locator(".cell").nth(3).hover()
        assert "position 3: written" in panels.nth(0).locator(".details").inner_text()
        if folder := os.environ.get("BOE_VLLM_SCREENSHOTS"):
            tab.screenshot(path=f"{folder}/watch.png", full_page=True)
        tab.fill("#policies", "nope")
        tab.click("#start")
        tab.locator("#problem", has_text="policy").wait_for(timeout=60_000)
        tab.route("**/v1/**", behind_a_key)
        tab.fill("#policies", "confidence")
        tab.click("#start")
        tab.locator("#problem", has_text="This server has a key").wait_for(timeout=60_000)
        tab.fill("#key", "secret")
        tab.click("#start")
        tab.wait_for_selector("section.policy[data-done]", timeout=60_000)
        opened.close()
    assert all("400" in problem or "401" in problem for problem in problems), problems


def behind_a_key(route):
    """What vLLM does under `--api-key`."""
    if route.request.headers.get("authorization") == "Bearer secret":
        route.continue_()
    else:
        route.fulfill(status=401, json={"error": "Unauthorized"})


def running(url):
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    found = [line for line in lines if line.startswith("vllm:num_requests_running")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in found)


def test_at_sigterm_clients_are_told_and_the_server_ends(url):
    waiting = {}

    def wait():
        answer = httpx.post(f"{url}/v1/completions", json=LONG, timeout=120)
        waiting["answer"] = answer.status_code, answer.json()

    plain = threading.Thread(target=wait)
    plain.start()
    lines, told = [], False
    with httpx.stream(
        "POST", f"{url}/v1/completions", json=LONG | {"stream": True}, timeout=120
    ) as answer:
        for line in filter(None, answer.iter_lines()):
            lines.append(line)
            if not told and running(url) == 2:
                url.process.send_signal(signal.SIGTERM)
                told = True
    plain.join(120)
    assert url.process.wait(120) == 0
    print(f"\nstreaming client: {lines[-2:]}\nwaiting client: {waiting}")
    error = json.loads(lines[-2].removeprefix("data: "))["error"]
    assert (error["code"], lines[-1]) == (503, "data: [DONE]")
    assert "shutting down" in error["message"]
    status, body = waiting["answer"]
    assert status == 503 and "shutting down" in body["error"]["message"]


# ---- the watchdog by itself ----------------------------------------------------------------------


def test_a_watchdog_is_silent_until_the_late_answer_comes():
    async def scenario():
        answers = [asyncio.Event() for _ in range(3)]
        asked = asyncio.Queue()

        async def ask():
            number = asked.qsize()
            asked.put_nowait(number)
            await answers[number].wait()

        dog = Watchdog(ask, interval=0.0, timeout=0.001)
        running = asyncio.create_task(dog.run())
        answers[0].set()
        while not dog.silent:  # the second question has no answer
            await asyncio.sleep(0)
        assert asked.qsize() == 2
        answers[1].set()
        while asked.qsize() < 3:
            await asyncio.sleep(0)
        running.cancel()

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_watchdog_ends_with_its_engine():
    async def scenario():
        async def ask():
            raise EngineDeadError()

        dog = Watchdog(ask, interval=0.0, timeout=1.0)
        await dog.run()
        assert not dog.silent

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_server_may_do_without_a_watchdog():
    config = SimpleNamespace(additional_config={"watchdog_interval_s": 0})
    assert watchdog.start(SimpleNamespace(vllm_config=config)) is None
