"""A real, small engine configuration for tests that need no running engine."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from vllm.engine.arg_utils import EngineArgs
from vllm.usage.usage_lib import UsageContext

SMALL = {
    "architectures": ["LLaDAModelLM"],
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig"},
    "model_type": "llada",
    "d_model": 32,
    "n_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "mlp_hidden_size": 64,
    "max_sequence_length": 64,
    "vocab_size": 50,
    "mask_token_id": 49,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


@functools.cache
def small_model() -> str:
    """A folder with the config of a tiny LLaDA, and nothing else."""
    folder = tempfile.mkdtemp(prefix="boe-vllm-small-")
    (Path(folder) / "config.json").write_text(json.dumps(SMALL))
    return folder


def engine_args(**changes: Any) -> EngineArgs:
    """Engine arguments for `small_model`."""
    arguments = {
        "model": small_model(),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_num_seqs": 8,
    }
    return EngineArgs(**(arguments | changes))


def engine_config(**changes: Any) -> Any:
    """The VllmConfig that follows."""
    return engine_args(**changes).create_engine_config(UsageContext.LLM_CLASS)
