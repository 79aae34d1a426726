"""What vLLM's configuration must say for our engine parts to be used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.tokenizers import cached_tokenizer_from_config

from boe_vllm.models import special
from boe_vllm.request.limits import EngineSettings, ServerSettings
from boe_vllm.vllm_plugin import admission

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.input_processor import InputProcessor

logger = init_logger("vllm." + __name__)

SCHEDULER = "boe_vllm.vllm_plugin.scheduler.DiffusionScheduler"
CPU_WORKER = "boe_vllm.vllm_plugin.cpu_worker.DiffusionCPUWorker"
GPU_WORKER = "boe_vllm.vllm_plugin.gpu_worker.DiffusionGPUWorker"

SAFE_FORMATS = ("safetensors", "fastsafetensors", "instanttensor", "runai_streamer", "dummy")

# The engine keeps no key/value cache of vLLM's. An explicit size stops vLLM from reserving most of
# the memory for it, and from refusing to start when that much is not free.
KV_CACHE_BYTES = 1 << 20


class DiffusionEngineConfig:
    """vLLM's hook for settings that follow from the architecture (`MODELS_CONFIG_MAP`).

    A vLLM with `patches/` applied reads the attribute and calls the last two methods; otherwise
    `hooks` does.
    """

    accepts_sampler = True

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Nothing: everything below needs the whole configuration."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Check and complete the configuration of an engine that serves a model of ours.

        Raises:
            ValueError: for a setting that masked diffusion does not support.
        """
        EngineSettings.read(vllm_config.additional_config)
        _refuse_unsupported(vllm_config)
        vllm_config.model_config.hf_config.check_supported()  # --hf-overrides came after loading
        _set_special_tokens(vllm_config)
        _set_weights(vllm_config)
        _set_sampler(vllm_config)
        _set_engine_parts(vllm_config)
        _set_schedule(vllm_config)
        _set_request_defaults(vllm_config)

    @staticmethod
    def admit_request(request: EngineCoreRequest, vllm_config: VllmConfig) -> None:
        """See `admission.admit_request`."""
        admission.admit_request(request, vllm_config)

    @staticmethod
    def check_request(prompt: Any, params: Any, processor: InputProcessor) -> Any:
        """See `admission.resolve_early`."""
        return admission.resolve_early(prompt, params, processor)


def _refuse_unsupported(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    model = vllm_config.model_config
    settings: list[tuple[str, Any, Any]] = [
        ("pipeline_parallel_size", parallel.pipeline_parallel_size, 1),
        ("prefill_context_parallel_size", parallel.prefill_context_parallel_size, 1),
        ("speculative_config", vllm_config.speculative_config, None),
        ("lora_config", vllm_config.lora_config, None),
        ("kv_transfer_config", vllm_config.kv_transfer_config, None),
        ("diffusion_config", vllm_config.diffusion_config, None),
        ("quantization", model.quantization, None),
        ("runner", model.runner_type, "generate"),
        ("logits_processors", model.logits_processors or None, None),
    ]
    for name, value, expected in settings:
        if value != expected:
            raise ValueError(
                f"{name}: expected {expected!r} for a masked diffusion model, got {value!r}; "
                f"remove the setting"
            )


def _set_special_tokens(vllm_config: VllmConfig) -> None:
    """Every process reads the ids of mask and ends from the model's config."""
    model = vllm_config.model_config
    tokenizer = None if model.skip_tokenizer_init else cached_tokenizer_from_config(model)
    given = EngineSettings.read(vllm_config.additional_config).mask_token_id
    special.complete(model.hf_config, tokenizer, given)


def _set_weights(vllm_config: VllmConfig) -> None:
    """Weights are read from safetensors and nothing of a checkpoint is executed: vLLM would fall
    back to pickled files, and run a repository's code where `trust_remote_code` is set."""
    model, load = vllm_config.model_config, vllm_config.load_config
    if model.trust_remote_code:
        logger.warning("trust_remote_code is ignored: this model needs no code of its repository.")
        model.trust_remote_code = False
    if load.load_format in ("auto", "hf"):
        load.load_format = "safetensors"
    if load.load_format not in SAFE_FORMATS:
        raise ValueError(
            f"load_format: expected one of {list(SAFE_FORMATS)} for a masked diffusion model, got "
            f"{load.load_format!r}; remove the setting"
        )
    folder = Path(model.model)
    files = sorted(path.name for path in folder.glob("*")) if folder.is_dir() else []
    if files and load.load_format == "safetensors" and not _any_safetensors(files):
        raise ValueError(
            f"checkpoint: expected *.safetensors in {model.model}, got {files}; convert the "
            f"weights, as pickled files are not loaded"
        )


def _any_safetensors(files: list[str]) -> bool:
    return any(name.endswith(".safetensors") for name in files)


def _set_sampler(vllm_config: VllmConfig) -> None:
    """Parse the server's defaults once; every process reads them back from `additional_config`."""
    additional = dict(vllm_config.additional_config)
    config = ServerSettings.read(additional).config
    additional["sampler"] = config.policy
    additional["sampler_config"] = config.as_dict()
    vllm_config.additional_config = additional


def _set_engine_parts(vllm_config: VllmConfig) -> None:
    if current_platform.is_cpu():
        worker = CPU_WORKER
    elif current_platform.is_cuda():
        worker = GPU_WORKER
    else:
        raise ValueError(
            f"device: expected cpu or cuda, got {current_platform.device_type}; "
            f"no kernel of this plugin was made for it"
        )
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    if parallel.worker_cls not in ("auto", worker):
        raise ValueError(
            f"worker_cls: expected 'auto', got {parallel.worker_cls!r}; remove the setting"
        )
    if scheduler.scheduler_cls not in (None, SCHEDULER):
        raise ValueError(
            f"scheduler_cls: expected None, got {scheduler.scheduler_cls!r}; remove the setting"
        )
    parallel.worker_cls = worker
    scheduler.scheduler_cls = SCHEDULER
    # Shapes change from step to step and the backward is our own: nothing to compile or capture.
    vllm_config.model_config.enforce_eager = True
    vllm_config.cache_config.enable_prefix_caching = False
    vllm_config.cache_config.kv_cache_memory_bytes = KV_CACHE_BYTES


def _set_schedule(vllm_config: VllmConfig) -> None:
    scheduler = vllm_config.scheduler_config
    if scheduler.async_scheduling:
        logger.warning("async_scheduling is not supported by masked diffusion decoding; it is off.")
    scheduler.async_scheduling = False  # a step's rows depend on the tokens of the step before
    scheduler.enable_chunked_prefill = False  # a canvas attends to its whole prompt at once
    scheduler.long_prefill_token_threshold = 0
    scheduler.max_num_scheduled_tokens = None
    # One request's rows, prompt and canvas, must always fit into one step.
    max_model_len = vllm_config.model_config.max_model_len
    if scheduler.max_num_batched_tokens < max_model_len:
        logger.info(
            "max_num_batched_tokens raised from %d to %d, the rows of one request of full length.",
            scheduler.max_num_batched_tokens,
            max_model_len,
        )
        scheduler.max_num_batched_tokens = max_model_len


def _set_request_defaults(vllm_config: VllmConfig) -> None:
    """Defaults of requests: ours, and those of a checkpoint's generation_config.json unless they
    are such as we would refuse in a request."""
    model_config = vllm_config.model_config
    defaults = model_config.get_diff_sampling_param()
    changed = model_config.override_generation_config
    for name, neutral in admission.NEUTRAL.items():
        if name in defaults and defaults[name] not in neutral:
            logger.warning(
                "%s=%s of the generation config is not supported by masked diffusion decoding; "
                "it is ignored.",
                name,
                defaults[name],
            )
            changed[name] = neutral[0]
    # Otherwise a request without `max_tokens` has the whole context as its canvas. Of a generation
    # config that the server names itself vLLM would make a limit of it.
    if "max_tokens" not in defaults and model_config.generation_config in ("auto", "vllm"):
        settings = EngineSettings.read(vllm_config.additional_config)
        changed["max_new_tokens"] = settings.default_max_tokens
