"""The entry point in `vllm.general_plugins`: tells vLLM about LLaDA.

vLLM calls `register` in every process (API server, engine core, workers), so it is cheap and safe
to repeat. With `hooks`, it is all that touches vLLM's globals.
"""

from boe_vllm.vllm_plugin import hooks, http_server, versions


def register() -> None:
    """Register the config class, the architecture and the engine's wiring, and install the hooks.

    Raises:
        RuntimeError: for a vLLM that this plugin was not made for.
    """
    versions.check()

    from transformers import AutoConfig
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry

    from boe_vllm.models.llada import LLaDAConfig
    from boe_vllm.vllm_plugin.config_hook import LLaDAEngineConfig

    AutoConfig.register(LLaDAConfig.model_type, LLaDAConfig, exist_ok=True)
    # By name: importing the class here would initialise CUDA in processes that later fork.
    network = "boe_vllm.vllm_plugin.network:LLaDAForDiffusion"
    ModelRegistry.register_model(hooks.ARCHITECTURE, network)
    MODELS_CONFIG_MAP[hooks.ARCHITECTURE] = LLaDAEngineConfig
    hooks.install()
    http_server.install()
