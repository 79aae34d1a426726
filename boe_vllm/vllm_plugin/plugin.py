"""The entry point in `vllm.general_plugins`: tells vLLM about the models that are served.

vLLM calls `register` in every process (API server, engine core, workers), so it is cheap and safe
to repeat. With `hooks`, it is all that touches vLLM's globals.
"""

from boe_vllm.vllm_plugin import hooks, http_server, versions


def register() -> None:
    """Register config classes, architectures and the engine's wiring, and install the hooks.

    Raises:
        RuntimeError: for a vLLM that this plugin was not made for.
    """
    versions.check()

    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry

    from boe_vllm.models.families import FAMILIES, tell_transformers
    from boe_vllm.vllm_plugin.config_hook import DiffusionEngineConfig

    # By name: importing the class here would initialise CUDA in processes that later fork.
    network = "boe_vllm.vllm_plugin.network:DecoderForDiffusion"
    for architecture in FAMILIES:
        ModelRegistry.register_model(architecture, network)
        MODELS_CONFIG_MAP[architecture] = DiffusionEngineConfig
    tell_transformers()
    hooks.install()
    http_server.install()
