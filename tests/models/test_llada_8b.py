"""LLaDA-8B's real configuration and widths, two layers of random weights, bfloat16."""

from pathlib import Path

import pytest
import torch
from vllm import LLM, SamplingParams

CONFIG = str(Path(__file__).parents[1] / "llada_8b")


@pytest.mark.slow
def test_a_short_request_is_steered_at_the_real_widths():
    llm = LLM(
        CONFIG,
        sampler="boe",
        sampler_config={"rho": 1.0},
        load_format="dummy",
        hf_overrides={"n_layers": 2},
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_seqs=2,
    )
    config = llm.llm_engine.vllm_config.model_config
    assert config.dtype == torch.bfloat16
    assert (config.hf_config.d_model, config.hf_config.mlp_hidden_size) == (4096, 12288)
    settings = SamplingParams(temperature=0.0, max_tokens=3, detokenize=False, ignore_eos=True)
    (output,) = llm.generate([{"prompt_token_ids": [100, 2000, 30000]}], settings, use_tqdm=False)
    tokens = output.outputs[0].token_ids
    assert len(tokens) == 3 and all(0 <= t < 126464 and t != 126336 for t in tokens)
    cost = output.kv_transfer_params["boe"]
    assert (cost["denoising_steps"], cost["backwards"]) == (3, 2)
