"""Masked diffusion language models in vLLM, steered by Backward-on-Entropy.

Importing this package is cheap: neither torch nor vLLM comes with it. What it does is to see to it
that vLLM's engine arguments know `sampler` and `sampler_config` as soon as vLLM is imported, so
that `LLM(model, sampler="boe")` works whichever of the two is imported first.
"""

from typing import TYPE_CHECKING, Any

from boe_vllm.base.bundled import (
    TINY,
    TINY_TEXT,
    model_path,
    tiny_model_path,
    tiny_text_model_path,
)
from boe_vllm.vllm_plugin import hooks

if TYPE_CHECKING:
    from boe_vllm.denoiser import Denoiser

__version__ = "0.1.0"
__all__ = [
    "TINY",
    "TINY_TEXT",
    "Denoiser",
    "__version__",
    "model_path",
    "tiny_model_path",
    "tiny_text_model_path",
]


def __getattr__(name: str) -> Any:
    """`Denoiser` brings torch and transformers, so it is imported when it is first asked for."""
    if name == "Denoiser":
        from boe_vllm.denoiser import Denoiser

        return Denoiser
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


hooks.install()
