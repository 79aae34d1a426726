"""Shared set-up of the tests."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_CI_ENV", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
for folder in (Path(__file__).parent, *sorted(Path(__file__).parent.glob("*/"))):
    sys.path.append(str(folder))  # tests share helpers across folders


@pytest.fixture(scope="session")
def shared_server():
    """One server for the tests that query for nothing but a server."""
    from server import serving

    with serving("--sampler", "boe", "--sampler-config", '{"rho": 0.25}') as url:
        yield url
