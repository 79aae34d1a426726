"""The network as vLLM's model loader makes it, by the name that the plugin registers."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from vllm.logger import init_logger

from boe_vllm.attention import explain_auto
from boe_vllm.models.decoder import Decoder
from boe_vllm.request.limits import EngineSettings
from boe_vllm.vllm_plugin.parallel import ParallelLayers

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# What the rooms below log comes out where vLLM's own messages do, in its format and at its level.
logging.getLogger("boe_vllm").parent = logging.getLogger("vllm")
logger = init_logger("vllm." + __name__)


class DecoderForDiffusion(Decoder):
    """`Decoder` on vLLM's parallel layers, with the methods that vLLM expects of a model."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """As vLLM calls it; `prefix` is for models within models, which this is not."""
        super().__init__(vllm_config.model_config.hf_config, ParallelLayers())
        device, dtype = vllm_config.device_config.device_type, vllm_config.model_config.dtype
        impl = EngineSettings.read(vllm_config.additional_config).attention_impl
        try:
            self.use_attention(impl)
        except ValueError as error:
            raise ValueError(f"attention_impl: {error}") from error
        chosen: str = impl
        reason = "the server's setting"
        if impl == "auto":
            chosen, reason = explain_auto(device, dtype, self.layers[0].head_size)
        logger.info_once("Attention is %s's: %s.", chosen, reason)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """vLLM's name for `embed`."""
        return self.embed(input_ids)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Not used: the diffusion runner calls `run` with a `RowLayout`."""
        raise NotImplementedError(
            "DecoderForDiffusion runs through boe_vllm's diffusion runner; expected a worker of "
            "boe_vllm.vllm_plugin, got vLLM's own; check that the plugin's config hook ran"
        )

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """vLLM's name for `logits`."""
        return self.logits(hidden_states)
