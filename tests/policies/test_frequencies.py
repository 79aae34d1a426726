"""Token frequencies: the file's format, who may name one, and the command that counts one."""

import json
from pathlib import Path

import numpy as np
import pytest

from boe_vllm import cli
from boe_vllm.policies import frequencies
from boe_vllm.request.config import parse_sampler_config

TABLE = str(Path(__file__).parents[1] / "data" / "frequencies_29.json")
TINY = Path(frequencies.__file__).parents[1] / "assets" / "tiny-llada"


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_frequencies_are_shares_and_unseen_tokens_count_once(tmp_path):
    path = write(
        tmp_path / "t.json", {"num_token": 200, "p_baseline_dict": {"3": 50, "7": 2, "9": 0}}
    )
    table = frequencies.load(path)
    got = table(np.array([3, 7, 9, 0, 8, 5000]))
    assert got.tolist() == [0.25, 0.01, 0.005, 0.005, 0.005, 0.005]
    assert table.largest_token == 7


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        {"num_token": 0, "p_baseline_dict": {}},
        {"num_token": 5, "p_baseline_dict": {"a": 1}},
        {"num_token": 5, "p_baseline_dict": {"1": 6}},
        {"num_token": 5, "p_baseline_dict": {"1": -1}},
        {"num_token": 5, "p_baseline_dict": {"-1": 1}},
        {"num_token": 5, "p_baseline_dict": [1]},
    ],
    ids=str,
)
def test_another_content_is_refused(tmp_path, content):
    path = write(tmp_path / "t.json", content)
    with pytest.raises(ValueError, match=r"frequencies: expected a JSON object with .*count-freq"):
        frequencies.load(path)


def test_a_file_that_is_missing_or_no_json_is_refused(tmp_path):
    for path in (str(tmp_path / "none.json"), str(tmp_path), write(tmp_path / "x", "no json")):
        with pytest.raises(ValueError, match=r"frequencies: expected the path of .*count-freq"):
            frequencies.load(path)
        with pytest.raises(ValueError, match=r"frequencies: expected the path of"):
            parse_sampler_config({"frequencies": path})  # at the server's start, for any policy


def test_pc_without_a_table_says_how_to_get_one():
    with pytest.raises(ValueError, match=r"frequencies: policy 'pc' expected .*boe-vllm count-fre"):
        parse_sampler_config({"policy": "pc"})
    with pytest.raises(ValueError, match=r"frequencies: policy 'pc' expected"):
        parse_sampler_config({"policy": "pc"}, base=parse_sampler_config({}))


def test_only_the_server_may_name_a_file():
    server = parse_sampler_config({"policy": "entropy", "frequencies": TABLE})
    for policy in ("pc", "entropy"):
        with pytest.raises(
            ValueError, match=r"frequencies: expected in the server's own .*request"
        ):
            parse_sampler_config({"policy": policy, "frequencies": TABLE}, base=server)
    request = parse_sampler_config({"policy": "pc", "lambd": 1}, base=server)
    assert (request.settings.frequencies, request.settings.lambd) == (TABLE, 1.0)
    assert parse_sampler_config(request.as_dict()) == request
    assert parse_sampler_config(server.as_dict()) == server
    default = parse_sampler_config({"policy": "pc", "frequencies": TABLE, "alpha": 5})
    assert parse_sampler_config({}, base=default).settings.alpha == 5


def test_the_command_counts_what_the_loader_reads(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(frequencies, "CHUNK_BYTES", 8)  # several chunks
    texts = [write(tmp_path / "a.txt", "1+2=3\n1+1=2\n\nab"), write(tmp_path / "b.txt", "é1\n")]
    out = tmp_path / "out.json"
    command = ["count-frequencies", "--tokenizer", str(TINY), "--corpus", *texts, "--out", str(out)]
    assert cli.main(command) == 0
    counted = "".join(Path(t).read_text() for t in texts).encode()  # the tiny tokenizer is bytes
    want = {str(b): counted.count(bytes([b])) for b in set(counted)}
    assert json.loads(out.read_text()) == {"num_token": len(counted), "p_baseline_dict": want}
    assert capsys.readouterr().out == f"{out}: {len(counted)} tokens, {len(want)} different ones\n"
    table = frequencies.load(str(out))
    assert table(np.array([ord("1")]))[0] == counted.count(b"1") / len(counted)


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    text, out = write(tmp_path / "a.txt", ""), str(tmp_path / "o.json")
    binary = tmp_path / "b.txt"
    binary.write_bytes(b"\xff\xfe")
    for tokenizer, corpus, message in (
        (tmp_path, text, "--tokenizer: expected a folder with a tokenizer.json"),
        (TINY, text, "--corpus: expected text, got no token"),
        (TINY, binary, "--corpus: expected UTF-8 text"),
        (TINY, tmp_path / "none", "No such file"),
    ):
        arguments = ["--tokenizer", str(tokenizer), "--corpus", str(corpus), "--out", out]
        assert cli.main(["count-frequencies", *arguments]) == 1
        assert message in capsys.readouterr().err


def test_a_request_that_names_a_file_is_refused_at_admission():
    pytest.importorskip("vllm")
    from engine_config import engine_config
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams

    from boe_vllm.vllm_plugin.admission import admit

    sampler = {"sampler": "entropy", "sampler_config": {"frequencies": TABLE}}
    server = engine_config(additional_config=sampler)
    asked = SamplingParams(max_tokens=4, extra_args={"policy": "pc", "alpha": "3"})
    settings = admit([1, 2], asked.clone(), server).config.settings
    assert (settings.frequencies, settings.alpha) == (TABLE, 3.0)
    asked.extra_args["frequencies"] = "/etc/passwd"
    with pytest.raises(VLLMValidationError, match=r"frequencies: expected in the server's own"):
        admit([1, 2], asked, server)
