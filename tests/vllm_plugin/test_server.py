"""A real HTTP server and the real openai client."""

import asyncio
import json
import math
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import jsonschema
import pytest
from openai import AsyncOpenAI, BadRequestError, InternalServerError, OpenAI
from prometheus_client.parser import text_string_to_metric_families

import boe_vllm
from boe_vllm.lab.tasks import get_task

MODEL = boe_vllm.tiny_model_path()
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def url(shared_server):
    return shared_server


@pytest.fixture
def client(url):
    return OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)


def query(
    client, prompt="A:1+2=", *, max_tokens=16, stream=False, fields=None, extra=None, **settings
):
    settings.setdefault("temperature", 0.0)
    return client.completions.create(
        model=MODEL,
        prompt=prompt,
        max_tokens=max_tokens,
        stream=stream,
        extra_body={"vllm_xargs": fields or {}} | (extra or {}),
        **settings,
    )


def sudoku(seed=0):
    task = get_task("sudoku6")
    (item,) = task.items(1, seed=seed, split="test")
    return dict(prompt=item.prompt, max_tokens=task.gen_length, fields={"block_length": 36})


def test_a_completion_says_what_it_cost(client):
    request = sudoku()
    request["fields"]["tokens_per_step"] = 1
    answer = query(client, **request)
    assert len(answer.choices[0].text) == 36
    assert answer.usage.completion_tokens == 36
    assert answer.kv_transfer_params["boe"]["policy"] == "boe"
    assert answer.kv_transfer_params["boe"]["denoising_steps"] == 36
    for commit in ("rounds", "drafts"):
        bounded = sudoku()
        bounded["fields"]["commit"] = commit  # the bound decides
        adaptive = query(client, **bounded)
        assert adaptive.kv_transfer_params["boe"]["denoising_steps"] < 36


def test_streamed_pieces_make_the_same_text(client):
    whole = query(client, **sudoku()).choices[0].text
    pieces = [
        chunk.choices[0].text for chunk in query(client, stream=True, **sudoku()) if chunk.choices
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
        return query(client, **request, seed=n, temperature=float(n % 2))

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
        for _ in query(client, fields=fields, stream=stream) or ():
            pass
    assert query(client).choices[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    "body, message",
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": "A:" + "1+" * 400}, "max|length"),
        ({"prompt": [1, 2, 99999]}, "token|vocab"),
        ({"max_tokens": 0}, "max_tokens|at least 1"),
        ({"max_tokens": 4000}, "max_tokens|maximum"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"repetition_penalty": 1.5}, "repetition_penalty"),
        ({"echo": True, "logprobs": 1}, "prompt_logprobs"),
        ({"use_beam_search": True, "n": 2}, "use_beam_search"),
        ({"structured_outputs": {"regex": "[0-9]{9}"}}, "max_tokens: expected at least 9"),
        ({"structured_outputs": {"regex": "[0-9"}}, "structured_outputs: .*regex that a finite"),
        ({"structured_outputs": {"json": {"not": {}}}}, "no 'not' in a schema"),
        (
            {"structured_outputs": {"grammar": "root ::= ("}},
            "structured_outputs: .*can be read, got",
        ),
        (
            {"structured_outputs": {"grammar": 'root ::= "a" b'}},
            "structured_outputs: .* grammar tha",
        ),
        ({"structured_outputs": {"regex": "a+"}, "bad_words": ["aa"]}, "bad_words: expected none"),
        (
            {"structured_outputs": {"regex": "a+"}, "allowed_token_ids": [49]},
            "structured_outputs: .* that no canvas can satisfy",
        ),
        ({"logit_bias": {"99999": 3}}, "logit_bias"),
        ({"allowed_token_ids": [51], "bad_words": ["3"]}, "allowed_token_ids"),
        ({"vllm_xargs": {"choices": ["1", "2"], "policy": "boe"}}, "choices"),
        ({"vllm_xargs": {"choices": ["1", "2"]}, "logprobs": 1}, "logprobs"),
        ({"vllm_xargs": {"canvas_template": ["no mask"]}}, "canvas_template"),
        ({"vllm_xargs": {"steps": 10**9}}, "steps"),
        ({"allowed_token_ids": [264]}, "allowed_token_ids"),
        ({"vllm_xargs": {"canvas_template": "[" * 100_000}}, "canvas_template"),
        ({"vllm_xargs": {"choices": '{"a":' * 500 + "1" + "}" * 500}}, "choices"),
        ({"vllm_xargs": {"canvas_template": "[" + "9" * 5000 + "]"}}, "canvas_template"),
        ({"vllm_xargs": {"canvas_template": '["x", {"y": 1}]'}}, "piece 1: expected text"),
        ({"vllm_xargs": {"boe_vllm": "{}"}}, "unknown field 'boe_vllm'"),
        ({"min_tokens": 8, "vllm_xargs": {"gen_length": 4}}, "min_tokens"),
        ({"min_tokens": 2, "vllm_xargs": {"choices": '["1"]'}}, "min_tokens"),
        ({"priority": 10**30}, "priority"),
        ({"logprobs": 10**6}, "logprobs"),
    ],
    ids=lambda v: str(v)[:24],
)
def test_a_bad_request_is_a_400(url, body, message):
    full = {"model": MODEL, "prompt": "A:1+2=", "max_tokens": 8, "temperature": 0} | body
    answer = httpx.post(f"{url}/v1/completions", json=full, timeout=60)
    assert answer.status_code == 400, answer.text
    assert re.search(message, answer.json()["error"]["message"])


@pytest.mark.parametrize("stream", [False, True])
def test_a_min_tokens_that_the_canvas_cannot_hold_is_a_400_and_the_engine_lives(
    url, client, stream
):
    """It once ended the engine's input thread, and with it every later request."""
    for fields, body in (
        ({"canvas_template": '["abc", 2]'}, {"max_tokens": 16, "min_tokens": 10}),
        ({"canvas_template": '["abc", 2]'}, {"max_tokens": 16, "min_tokens": 6, "n": 2}),
        ({"gen_length": 8}, {"max_tokens": 16, "min_tokens": 9}),
    ):
        body = {"model": MODEL, "prompt": "x", "stream": stream, "vllm_xargs": fields} | body
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == "min_tokens"
        assert query(client, max_tokens=4).choices[0].finish_reason in ("stop", "length")
    for name, value in (("rho", 2), ("nope", 1), ("canvas_template", "[0]"), ("steps", "x")):
        body = {"model": MODEL, "prompt": "x", "stream": stream, "vllm_xargs": {name: value}}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)


def test_a_chat_without_max_tokens_has_the_servers_default(client):
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "A:1+2="}],
        temperature=0.0,
        extra_body={"ignore_eos": True, "vllm_xargs": {"policy": "threshold"}},
    )
    assert answer.usage.completion_tokens == 256


def test_a_refused_echo_is_named(client):
    with pytest.raises(BadRequestError, match="echo"):
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "A:1+2="}],
            max_tokens=4,
            extra_body={"echo": True},
        )


DIGITS = {str(d): 48 + d for d in range(10)}
"""The bundled tokenizer's ids of digits: a token is a byte."""


def test_openais_fields_hold_on_a_canvas(client):
    """On a prompt whose answer is 3."""

    def text(**settings):
        extra = {
            k: settings.pop(k)
            for k in ("allowed_token_ids", "bad_words", "min_tokens")
            if k in settings
        }
        choice = client.completions.create(
            model=MODEL,
            prompt="A:1+2=",
            max_tokens=8,
            **({"temperature": 0.0} | settings),
            extra_body=extra,
        ).choices[0]
        return choice.text

    greedy = text()
    assert "3" in greedy and len(greedy) < 8
    assert text(logit_bias={str(DIGITS["7"]): 100}) == "7" * 8
    assert set(text(allowed_token_ids=[DIGITS["1"], DIGITS["9"]])) <= {"1", "9"}
    assert "3" not in text(bad_words=["3"])
    assert "2=" not in text(bad_words=["2="])
    assert len(text(min_tokens=8)) == 8
    assert text(stop=["="]) == greedy.partition("=")[0]
    assert text(temperature=1.0, seed=5, top_p=1e-6) == greedy


def test_echo_n_and_usage(client):
    plain = query(client, max_tokens=8)
    echo = query(client, max_tokens=8, echo=True)
    assert echo.choices[0].text == "A:1+2=" + plain.choices[0].text
    assert echo.usage == plain.usage
    assert plain.usage.prompt_tokens == 6
    three = query(client, max_tokens=8, n=3, temperature=1.0, seed=1)
    assert len(three.choices) == 3
    whole = query(client, max_tokens=8, logprobs=2).choices[0]
    assert "".join(whole.logprobs.tokens[:-1]) == plain.choices[0].text  # the last one is EOS
    assert max(whole.logprobs.token_logprobs) <= 0 and len(whole.logprobs.top_logprobs[0]) <= 3


def test_masks_in_the_prompt_are_infilled(client):
    answer = query(client, "A:1+<|mdm_mask|>=3", max_tokens=8)
    (run,) = answer.kv_transfer_params["boe"]["infill"]
    assert run["position"] == 4 and len(run["tokens"]) == len(run["text"]) == 1


def test_a_template_holds(client):
    fields = {"canvas_template": ["x=", 2, ";y=", 3, "."]}
    for policy in ("boe", "confidence"):
        text = query(client, fields=fields | {"policy": policy}, max_tokens=1).choices[0].text
        assert text[:2] == "x=" and text[4:7] == ";y=" and text[10:] == "."


def test_nothing_ends_a_request_within_its_given_text(client):
    for body in ({"stop_token_ids": [61]}, {"stop": ["="]}, {"stop": ["a=", "c"]}):
        answer = query(client, fields={"canvas_template": '["a=c", 2]'}, extra=WHOLE | body)
        assert answer.choices[0].text.startswith("a=c")


def test_one_of_the_answers_is_chosen(client):
    answer = query(client, "A:1+2=1+2=", fields={"choices": ["7", "3", "12"]})
    chosen = answer.kv_transfer_params["boe"]["choices"]
    assert answer.choices[0].text == ["7", "3", "12"][chosen["index"]]
    assert chosen["index"] == max(range(3), key=chosen["logprobs"].__getitem__)
    assert answer.choices[0].finish_reason == "stop"


# ---- metrics -------------------------------------------------------------------------------------


WHOLE = {"ignore_eos": True}  # every token of the canvas counts


def scrape(url):
    """Samples by name and labels, without those that say when a series began."""
    samples = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=30).text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("engine", "model_name")}
            samples[sample.name, *sorted(labels.items())] = sample.value
    return samples


def test_metrics_add_up_to_the_reports(url, client):
    before = scrape(url)
    answers = [
        query(client, max_tokens=16, fields={"policy": policy, "tokens_per_step": 2} | own)
        for policy, own in (("boe", {"bypass": "null"}), ("confidence", {}), ("confidence", {}))
    ]
    query(client, max_tokens=1)  # the engine's last step is known once it has made another one
    query(client, max_tokens=1)
    after = scrape(url)

    def grown(name, **labels):
        key = (name, *sorted(labels.items()))
        return after.get(key, 0) - before.get(key, 0)

    reports = [answer.kv_transfer_params["boe"] for answer in answers]
    for name in ("forwards", "backwards", "rows_forward", "rows_backward"):
        assert grown(f"boe:{name}_total") >= sum(report[name] for report in reports) > 0
    steps = sum(report["denoising_steps"] for report in reports[1:])
    assert grown("boe:denoising_steps_total", policy="confidence") == steps
    assert grown("boe:committed_tokens_total") >= 16
    assert grown("boe:tokens_per_step_count") >= steps
    assert grown("boe:remaining_entropy_nats_count") > 0
    for part in ("forward", "queries", "backward", "policy"):
        assert grown("boe:seconds_total", part=part) > 0
    assert after["boe:cache_rows",] > 0 and after["boe:cache_rows_used",] == 0
    assert after["boe:active_requests", ("policy", "confidence")] == 0
    usages = [answer.usage for answer in answers]
    tokens = sum(usage.completion_tokens for usage in usages)
    assert tokens <= grown("vllm:generation_tokens_total") <= tokens + 2
    assert grown("vllm:prompt_tokens_total") == sum(u.prompt_tokens for u in usages) + 12
    assert grown("vllm:time_to_first_token_seconds_count") == 5
    assert grown("vllm:request_queue_time_seconds_count") == 5


def test_the_documents_series_exist_and_agree_with_each_other(url, client):
    before = scrape(url)
    for n, policy in enumerate(("boe", "eb", "remdm", "lookum", "boe")):
        fields = {"policy": policy, "tokens_per_step": 1 + n % 2, "block_length": 8}
        query(client, max_tokens=16, fields=fields, temperature=n / 4, seed=n, extra=WHOLE)
    query(client, max_tokens=1)
    after = scrape(url)
    serving = (EXAMPLES.parent / "docs" / "serving.md").read_text()
    names = re.findall(r"boe:\w+", serving)
    assert len(set(names)) == 12
    for name in names:
        samples = [key for key in after if key[0] in (name, f"{name}_count")]
        assert samples, name

    def grown(name):
        return sum(value - before.get(key, 0) for key, value in after.items() if key[0] == name)

    assert grown("boe:committed_tokens_total") == grown("boe:tokens_per_step_sum") >= 5 * 16
    assert grown("boe:denoising_steps_total") == grown("boe:tokens_per_step_count")
    mean_entropy = grown("boe:remaining_entropy_nats_sum") / grown(
        "boe:remaining_entropy_nats_count"
    )
    assert 0 <= mean_entropy <= math.log(264)
    assert grown("boe:rows_forward_total") > grown("boe:forwards_total")
    assert grown("vllm:generation_tokens_total") == 5 * 16 + 1
    for name in ("time_to_first_token", "request_queue_time", "e2e_request_latency"):
        assert grown(f"vllm:{name}_seconds_count") == 6
    # What it waits for first is part of what it waits for in all.
    first, whole = (
        grown(f"vllm:{name}_seconds_sum") for name in ("time_to_first_token", "e2e_request_latency")
    )
    assert 0 < first <= whole


def test_gauges_say_what_runs_now(url, client):
    fields = {"policy": "confidence", "cache": "dual", "block_length": 8}
    seen = threading.Event()

    def keep_it_busy():
        """One request after the other, since a single one may end before a slow scrape begins."""
        while not seen.is_set():
            query(client, max_tokens=400, fields=fields, extra=WHOLE)

    with ThreadPoolExecutor() as pool:
        running = pool.submit(keep_it_busy)
        try:
            for _ in range(200):
                during = scrape(url)
                if during["vllm:num_requests_running",] > 0 or running.done():
                    break
        finally:
            seen.set()
        running.result()
    assert during["vllm:num_requests_running",] == 1
    assert during["boe:active_requests", ("policy", "confidence")] == 1
    assert 0 < during["boe:cache_rows_used",] <= during["boe:cache_rows",]
    after = scrape(url)  # at once: no later step has to say that nothing runs
    assert (
        after["boe:cache_rows_used",] == after["boe:active_requests", ("policy", "confidence")] == 0
    )


def test_the_dashboard_shows_series_that_exist(url):
    names = {key[0] for key in scrape(url)}
    dashboard = json.loads((EXAMPLES / "grafana.json").read_text())
    shown = re.findall(r"(?:boe|vllm):\w+", json.dumps(dashboard))
    assert shown and set(shown) <= names


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
        query(client, max_tokens=2)  # the engine reports when it steps
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


def test_a_failing_request_says_why(client):
    """All allowed tokens run out where a bad word forbids the only one that is left."""
    with pytest.raises(InternalServerError, match="allowed_token_ids, bad_words or min_tokens"):
        client.completions.create(
            model=MODEL,
            prompt="A:1+2=",
            max_tokens=4,
            temperature=0,
            extra_body={"allowed_token_ids": [DIGITS["7"]], "bad_words": ["77"]},
        )
    assert query(client).choices[0].finish_reason in ("stop", "length")


# ---- each sample's report ------------------------------------------------------------------------


def chunks_of(url, path, body):
    """The parsed events of a stream."""
    body = {"model": MODEL, "max_tokens": 6, "stream": True} | body
    with httpx.stream("POST", f"{url}/v1/{path}", json=body, timeout=60) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


SAMPLES = {
    "prompt": ["A:1+<|mdm_mask|>=", "A:2+<|mdm_mask|><|mdm_mask|>="],
    "n": 2,
    "temperature": 1.0,
    "seed": 3,
    "ignore_eos": True,
    "vllm_xargs": {"policy": "confidence"},
}


def test_each_sample_has_its_own_report_in_its_choice(url, client):
    body = {"model": MODEL, "max_tokens": 6} | SAMPLES
    whole = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
    reports = [choice["boe"] for choice in whole["choices"]]
    assert [len(report["infill"][0]["tokens"]) for report in reports] == [1, 1, 2, 2]
    assert [report["denoising_steps"] for report in reports] == [7, 7, 8, 8]
    assert set(whole["kv_transfer_params"]) == {"boe"}
    # What was written into the prompts counts as well.
    assert whole["usage"]["completion_tokens"] == 4 * 6 + 1 + 1 + 2 + 2
    for n in range(2):  # alone, with the seed that vLLM gave the sample
        alone = httpx.post(
            f"{url}/v1/completions",
            json=body | {"prompt": SAMPLES["prompt"][1], "n": 1, "seed": 3 + n},
            timeout=60,
        ).json()["choices"][0]
        assert (alone["boe"], alone["text"]) == (reports[2 + n], whole["choices"][2 + n]["text"])


def test_the_last_chunk_of_each_choice_carries_its_report(url):
    body = {"model": MODEL, "max_tokens": 6} | SAMPLES
    whole = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
    usage = {"stream_options": {"include_usage": True}}
    chunks = chunks_of(url, "completions", SAMPLES | usage)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert all(("boe" in choice) == (choice["finish_reason"] is not None) for choice in choices)
    reports = {choice["index"]: choice["boe"] for choice in choices if "boe" in choice}
    assert reports == {n: choice["boe"] for n, choice in enumerate(whole["choices"])}
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


def test_a_stream_says_which_answer_was_chosen(url):
    chosen = {"n": 3, "temperature": 1.0, "seed": 1, "vllm_xargs": {"choices": '["7", "30"]'}}
    chunks = chunks_of(url, "completions", {"prompt": "A:1+2="} | chosen)
    texts = dict.fromkeys(range(3), "")
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    found = {c["index"]: c["boe"] for chunk in chunks for c in chunk["choices"] if "boe" in c}
    assert texts == {n: ["7", "30"][found[n]["choices"]["index"]] for n in range(3)}


MEAN = {"messages": [{"role": "user", "content": "What does <|mdm_mask|> mean?"}], "seed": 0}


@pytest.mark.parametrize("stream", [False, True])
def test_a_chats_messages_are_written_only_if_it_says_so(url, stream):
    for fields, runs in (({}, 0), ({"infill": "true"}, 1), ({"infill": False}, 0)):
        fields = {"policy": "confidence"} | fields
        body = {"model": MODEL, "max_tokens": 6, "ignore_eos": True, "vllm_xargs": fields} | MEAN
        if stream:
            chunks = chunks_of(url, "chat/completions", body)
            (report,) = [c["boe"] for chunk in chunks for c in chunk["choices"] if "boe" in c]
        else:
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
            report = answer["choices"][0]["boe"]
            assert answer["usage"]["completion_tokens"] == 6 + runs
        assert len(report.get("infill", ())) == runs
        assert report["denoising_steps"] == 6 + runs


def test_masks_of_a_prompt_may_be_left(url):
    body = {"model": MODEL, "prompt": "A:<|mdm_mask|>", "max_tokens": 4, "temperature": 0}
    fields = {"infill": False}
    answer = httpx.post(f"{url}/v1/completions", json=body | {"vllm_xargs": fields}).json()
    assert "infill" not in answer["choices"][0]["boe"]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize("name", ["guided_json", "guided_regex", "guided_choice"])
def test_fields_of_older_clients_are_refused(url, path, name):
    prompt = MEAN if path.startswith("chat") else {"prompt": "A"}
    body = {"model": MODEL, "max_tokens": 4, name: ["a"]} | prompt
    answer = httpx.post(f"{url}/v1/{path}", json=body, timeout=60)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, name)
    assert "structured_outputs" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_field_of_a_response_is_a_400(url, stream):
    body = {"model": MODEL, "input": "A:1+2=", "max_output_tokens": 4, "stream": stream}
    answer = httpx.post(f"{url}/v1/responses", json=body | {"vllm_xargs": {"rho": 7}}, timeout=60)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "rho")
    assert httpx.post(f"{url}/v1/responses", json=body, timeout=60).status_code == 200


# ---- grammars ------------------------------------------------------------------------------------

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer"},
        "member": {"type": "boolean"},
        "level": {"enum": ["low", "mid", "high"]},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
        "home": {
            "type": "object",
            "properties": {
                "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
                "floor": {"type": ["integer", "null"]},
            },
            "required": ["zip", "floor"],
        },
    },
    "required": ["name", "age", "member", "level", "tags", "home"],
}


def as_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


@pytest.mark.parametrize("policy", ["confidence", "boe", "joint"])
def test_json_that_a_schema_asks_for_parses(url, policy):
    """Eight fields with nesting, at temperature 1, in a stream and not, beside free requests."""
    free = {"model": MODEL, "prompt": "A:1+2=", "max_tokens": 8, "seed": 5}
    alone = httpx.post(f"{url}/v1/completions", json=free, timeout=60).json()["choices"][0]["text"]
    body = {
        "model": MODEL,
        "prompt": "A:1+2=",
        "max_tokens": 160,
        "n": 3,
        "seed": 1,
        "temperature": 1.0,
        "response_format": as_format(PERSON),
        "vllm_xargs": {"policy": policy, "tokens_per_step": 8},
    }
    with ThreadPoolExecutor() as pool:
        beside = [pool.submit(httpx.post, f"{url}/v1/completions", json=free) for _ in range(3)]
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120).json()
    choices = answer["choices"]
    for choice in choices:
        jsonschema.validate(json.loads(choice["text"]), PERSON)
        assert choice["boe"]["denoising_steps"] < 160
    for one in beside:
        assert one.result().json()["choices"][0]["text"] == alone
    texts = [""] * 3
    for chunk in chunks_of(url, "completions", body):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in choices]


def test_the_grammar_example_runs(url):
    short = ["--base-url", f"{url}/v1", "--requests", "2", "--policies", "confidence", "eb"]
    command = [sys.executable, str(EXAMPLES / "grammar.py"), *short]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["policy"], line["valid"]) for line in lines] == [("confidence", 2), ("eb", 2)]


def test_the_example_of_companies_runs(url):
    short = ["--base-url", f"{url}/v1", "--seconds", "1", "--clients", "1", "--fields", "4"]
    command = [sys.executable, str(EXAMPLES / "beside_grammars.py"), *short]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["beside"] for line in lines] == ["none", "free", "automaton", "frontier"]
    assert all(line["requests"] > 0 for line in lines) and lines[2]["others"] > 0


def test_other_grammars_hold_too(url):
    def text(**asked):
        body = {"model": MODEL, "prompt": "A:1+2=", "max_tokens": 12, "temperature": 1.0, "seed": 2}
        answer = httpx.post(f"{url}/v1/completions", json=body | asked, timeout=60).json()
        return answer["choices"][0]["text"]

    assert re.fullmatch(
        "[ab]{3}(-[0-9]+)?", text(structured_outputs={"regex": "[ab]{3}(-[0-9]+)?"})
    )
    assert text(structured_outputs={"choice": ["yes", "no (1)"]}) in ("yes", "no (1)")
    assert isinstance(json.loads(text(response_format={"type": "json_object"})), dict)
    template = {"canvas_template": '["ab", 3]'}
    assert text(structured_outputs={"regex": "a[a-z]{4}"}, vllm_xargs=template).startswith("ab")
    assert text(structured_outputs={"regex": "^a+$"}, min_tokens=7).count("a") >= 7


def is_sum(text):
    """Whether the grammar below has it: brackets are taken out from within."""
    plain, inner = r"\d+([+-]\d+)*", None
    while inner != text:
        inner, text = text, re.sub(rf"\({plain}\)", "0", text)
    return re.fullmatch(plain, text) is not None


SUM = 'root ::= term (("+" | "-") term)*\nterm ::= [0-9]+ | "(" root ")"'


@pytest.mark.parametrize("policy", ["confidence", "boe", "eb"])
def test_grammars_without_an_automaton_hold_beside_free_requests(url, policy):
    """A context-free grammar, and a recursive schema with a bound that only a parser follows."""
    free = {"model": MODEL, "prompt": "A:1+2=", "max_tokens": 8, "seed": 5}
    alone = httpx.post(f"{url}/v1/completions", json=free, timeout=60).json()["choices"][0]["text"]
    schema = {
        "type": "object",
        "properties": {
            "of": {"type": "integer", "minimum": 3, "maximum": 77},
            "in": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
        },
        "required": ["of", "in"],
        "additionalProperties": False,
    }
    body = {"model": MODEL, "prompt": "A:1+2=", "max_tokens": 40, "n": 2, "seed": 1, "logprobs": 1}
    body["vllm_xargs"] = {"policy": policy, "tokens_per_step": 4}
    grammars = [{"structured_outputs": {"grammar": SUM}}, {"response_format": as_format(schema)}]
    with ThreadPoolExecutor() as pool:
        beside = [pool.submit(httpx.post, f"{url}/v1/completions", json=free) for _ in range(3)]
        sums, lists = pool.map(
            lambda one: httpx.post(f"{url}/v1/completions", json=body | one, timeout=120).json(),
            grammars,
        )
    for one in beside:
        assert one.result().json()["choices"][0]["text"] == alone
    for choice in sums["choices"]:
        assert is_sum(choice["text"]) and choice["boe"]["denoising_steps"] <= 40
    for choice in lists["choices"]:
        jsonschema.validate(json.loads(choice["text"]), schema)
        assert "".join(choice["logprobs"]["tokens"]).startswith(choice["text"])
    texts = [""] * 2
    for chunk in chunks_of(url, "completions", body | grammars[1]):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in lists["choices"]]
