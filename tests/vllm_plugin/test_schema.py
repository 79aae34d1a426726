"""What the server's own OpenAPI schema allows never makes it fail.

`BOE_VLLM_SCHEMA_EXAMPLES` sets the number of requests per endpoint.
"""

import os

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import boe_vllm

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

EXAMPLES = int(os.environ.get("BOE_VLLM_SCHEMA_EXAMPLES", "25"))
PATHS = ("/v1/completions", "/v1/chat/completions")
MODEL = boe_vllm.tiny_model_path()
CONTROL = {"prompt": "A:1+2=", "max_tokens": 6, "temperature": 0}
SMALL = {"max_tokens": 4, "max_completion_tokens": 4, "n": 1, "model": MODEL}
ASKED = {
    "/v1/completions": {"model": MODEL, "prompt": "A:1+2=", "max_tokens": 4},
    "/v1/chat/completions": {
        "model": MODEL,
        "messages": [{"role": "user", "content": "A:1+2="}],
        "max_tokens": 4,
        "chat_template": "{{ messages[0]['content'] }}",
    },
}


def control(url):
    body = CONTROL | {"model": MODEL}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]


def narrowed(body: dict, asked: dict, data) -> dict:
    """`body` with the right model and no hour-long canvas; in three cases of four, no more than
    three of its fields on top of a good request, since a body with all of them is never served."""
    if data.draw(st.integers(0, 3)):
        fields = st.sampled_from(sorted(body))
        kept = data.draw(st.sets(fields, max_size=3)) if body else ()
        body = asked | {k: body[k] for k in kept}
    return body | {k: v for k, v in SMALL.items() if k in ("model", "max_tokens") or k in body}


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_no_request_of_the_schema_breaks_the_server(shared_server, path):
    schema = schemathesis.openapi.from_url(f"{shared_server}/openapi.json")
    strategy = schema[path]["POST"].as_strategy()
    want = control(shared_server)
    counts: dict[int, int] = {}

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy, data=st.data())
    def check(case, data):
        if isinstance(case.body, dict):
            case.body = narrowed(case.body, ASKED[path], data)
        answer = case.call(base_url=shared_server, timeout=120)
        counts[answer.status_code] = counts.get(answer.status_code, 0) + 1
        assert answer.status_code < 500 or answer.status_code == 501, (case.body, answer.text)

    check()
    print(path, counts)
    assert 200 in counts and 400 in counts, "too few cases were served, or refused, to say anything"
    assert control(shared_server) == want
