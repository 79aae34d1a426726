"""The plugin reaches vLLM through its own entry points, and says so when it cannot."""

import json
import os
import pickle
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from engine_config import SMALL, engine_args, engine_config, small_model
from families import FAMILIES, make
from transformers import AutoConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.model_executor.models.registry import ModelRegistry
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.input_processor import InputProcessor

import boe_vllm
from boe_vllm import cli
from boe_vllm.models.llada import LLaDAConfig
from boe_vllm.vllm_plugin import plugin, versions, wrapping

LLADA_8B = Path(__file__).parents[1] / "llada_8b"


def run_python(code: str, **env: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}
    )


@pytest.fixture(scope="module", autouse=True)
def registered():
    plugin.register()


# ---- packaging -----------------------------------------------------------------------------------


def test_vllm_finds_the_entry_point():
    (found,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "boe_vllm"]
    assert found.load() is plugin.register


def test_importing_the_package_is_cheap():
    code = (
        "import sys; import boe_vllm;"
        "print(*{name.partition('.')[0] for name in sys.modules} & "
        "{'torch', 'vllm', 'transformers', 'pydantic', 'numpy', 'prometheus_client'})"
    )
    run = run_python(code)
    assert run.returncode == 0 and run.stdout.split() == []


def test_the_core_works_without_the_extras():
    """vLLM is one of them, and brings some of the others. What the core requires may bring tqdm, so
    that stays."""
    extras = (
        "vllm prometheus_client matplotlib rich reasoning_gym math_verify mauve lm_eval openai "
        "pytest hypothesis schemathesis triton outlines_core xgrammar jsonschema fastapi"
    )
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({extras.split()!r}));"
        f"sys.path.insert(0, {str(Path(__file__).parents[2] / 'scripts')!r});"
        "import check_core; check_core.import_rooms()"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_the_bundled_model_is_where_the_package_says():
    path = Path(boe_vllm.tiny_model_path())
    assert path.is_absolute()
    assert AutoConfig.from_pretrained(path).architectures == ["LLaDAModelLM"]


def test_an_unknown_command_is_refused(capsys):
    assert cli.main(["nope"]) == 2
    assert "expected one of ['bench'" in (text := capsys.readouterr().err)
    assert "got 'nope'" in text


# ---- registration --------------------------------------------------------------------------------


def test_registering_twice_changes_nothing():
    before = (EngineArgs.__init__, EngineArgs.add_cli_args, InputProcessor.process_inputs)
    plugin.register()
    assert before == (EngineArgs.__init__, EngineArgs.add_cli_args, InputProcessor.process_inputs)
    assert "LLaDAModelLM" in ModelRegistry.get_supported_archs()
    assert "LLaDAModelLM" in MODELS_CONFIG_MAP


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0.0", "dev"])
def test_another_vllm_is_refused_by_version(monkeypatch, version):
    monkeypatch.setattr(versions, "installed", lambda: version)
    with pytest.raises(
        RuntimeError, match=f"got vLLM {version}; install .* {versions.ALLOW_UNTESTED}"
    ):
        plugin.register()
    monkeypatch.setenv(versions.ALLOW_UNTESTED, "1")
    plugin.register()


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.33.0"])
def test_a_supported_vllm_is_accepted(monkeypatch, version):
    monkeypatch.setattr(versions, "installed", lambda: version)
    versions.check()


def test_a_callable_that_is_not_as_expected_is_not_wrapped():
    class Changed:
        def process_inputs(self, request): ...

    for name in ("process_inputs", "generate"):
        with pytest.raises(RuntimeError, match=rf"vLLM .*: expected .*Changed\.{name} with"):
            wrapping.wrap(Changed, name, {"prompt"}, lambda original: original)


# ---- the checkpoint's config ---------------------------------------------------------------------


def test_llada_8b_loads_without_remote_code():
    config = AutoConfig.from_pretrained(LLADA_8B)
    assert type(config) is LLaDAConfig
    assert config.auto_map  # it is there, and nobody followed it
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (
        4096,
        32,
        12288,
    )
    assert (config.num_attention_heads, config.num_key_value_heads) == (32, 32)
    assert (config.max_position_embeddings, config.rope_theta) == (4096, 500000.0)
    assert (config.mask_token_id, config.eos_token_id, config.eot_token_id) == (
        126336,
        126081,
        126348,
    )
    assert not config.tie_word_embeddings


def test_a_config_survives_saving_and_pickling(tmp_path):
    config = AutoConfig.from_pretrained(LLADA_8B)
    config.update({"n_layers": 2})
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).num_hidden_layers == 2
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()


def test_missing_sizes_follow_from_the_others():
    config = LLaDAConfig(
        d_model=64, n_heads=4, vocab_size=100, mask_token_id=9, eos_token_id=1, pad_token_id=1
    )
    assert (config.n_kv_heads, config.mlp_hidden_size, config.embedding_size) == (4, 256, 100)
    assert config.eot_token_id is None
    assert LLaDAConfig(multi_query_attention=True).n_kv_heads == 1


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"alibi": True}, "alibi: expected False, got True"),
        ({"include_bias": True}, "include_bias: expected False, got True"),
        ({"include_qkv_bias": True}, "include_qkv_bias: expected False, got True"),
        ({"layer_norm_type": "default"}, "layer_norm_type: expected 'rms', got 'default'"),
        ({"block_type": "sequential"}, "block_type: expected 'llama', got 'sequential'"),
        ({"activation_type": "gelu"}, "activation_type: expected 'silu', got 'gelu'"),
        ({"rope": False}, "rope: expected True, got False"),
        ({"n_heads": 30}, r"d_model: expected a multiple of n_heads \(30\), got 4096"),
        ({"n_kv_heads": 5}, r"n_heads: expected a multiple of n_kv_heads \(5\), got 32"),
        ({"mask_token_id": 200000}, "mask_token_id: expected a token id below vocab_size"),
        ({"embedding_size": 100}, "embedding_size: expected at least vocab_size"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_unsupported_variant_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LLaDAConfig(**fields)


# ---- the sampler's way into the engine -----------------------------------------------------------


def parse(*flags: str) -> AsyncEngineArgs:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", small_model(), *flags]))


def test_the_flags_of_vllm_serve():
    args = parse("--sampler", "boe", "--sampler-config", '{"rho": 0.5}')
    assert args.additional_config == {"sampler": "boe", "sampler_config": {"rho": 0.5}}
    dotted = parse("--sampler", "boe", "--sampler-config.rho", "0.5")
    assert dotted.additional_config == args.additional_config
    assert parse().additional_config == {}
    beside = parse("--sampler", "boe", "--additional-config", '{"other": 1}')
    assert beside.additional_config == {"other": 1, "sampler": "boe"}


@pytest.mark.parametrize("text", ["rho=0.5", "[1]"])
def test_a_sampler_config_that_is_no_object_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        parse("--sampler-config", text)
    assert "sampler_config: expected a JSON object" in capsys.readouterr().err


def test_engine_arguments_take_the_sampler():
    for cls in (EngineArgs, AsyncEngineArgs):
        args = cls(model=small_model(), sampler="boe", sampler_config={"rho": 0.5})
        assert args.additional_config == {"sampler": "boe", "sampler_config": {"rho": 0.5}}
    assert EngineArgs(model=small_model()).additional_config == {}
    with pytest.raises(ValueError, match="sampler: given twice"):
        EngineArgs(model=small_model(), sampler="boe", additional_config={"sampler": "random"})


@pytest.mark.parametrize("order", ["import boe_vllm, vllm", "import vllm; import boe_vllm"])
def test_either_import_order_will_do(order):
    code = (
        f"{order}; from vllm import EngineArgs;"
        f"print(EngineArgs(model={small_model()!r}, sampler='boe').additional_config)"
    )
    done = run_python(code)
    assert "{'sampler': 'boe'}" in done.stdout, done.stderr


def test_a_spawned_api_server_knows_the_flags():
    """It gets the parsed arguments pickled, and reads them before any plugin is loaded."""
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    args = parser.parse_args(["--model", small_model(), "--sampler", "boe"])
    code = (
        "import sys, pickle; from vllm.engine.arg_utils import AsyncEngineArgs;"
        f"args = pickle.loads(bytes.fromhex('{pickle.dumps(args).hex()}'));"
        "print(AsyncEngineArgs.from_cli_args(args).additional_config)"
    )
    done = run_python(code)
    assert "{'sampler': 'boe'}" in done.stdout, done.stderr


# ---- the engine's configuration ------------------------------------------------------------------


def test_the_engine_gets_our_parts():
    config = engine_config(max_num_batched_tokens=32, enable_chunked_prefill=True)
    assert config.parallel_config.worker_cls.startswith("boe_vllm.vllm_plugin.cpu_worker.Diff")
    assert config.scheduler_config.get_scheduler_cls().__name__ == "DiffusionScheduler"
    assert config.scheduler_config.max_num_batched_tokens == 64  # one request of full length
    assert not config.scheduler_config.enable_chunked_prefill
    assert not config.scheduler_config.async_scheduling
    assert not config.cache_config.enable_prefix_caching
    assert config.model_config.enforce_eager
    assert config.model_config.max_model_len == 64
    assert not config.model_config.is_diffusion  # vLLM's own diffusion mode
    assert not config.model_config.trust_remote_code


def test_without_a_sampler_llada_uses_confidence():
    assert engine_config().additional_config["sampler"] == "confidence"


def test_the_servers_settings_reach_every_process():
    config = engine_config(sampler="boe", sampler_config={"rho": 0.5})
    restored = pickle.loads(pickle.dumps(config)).additional_config
    assert restored["sampler"] == restored["sampler_config"]["policy"] == "boe"
    assert restored["sampler_config"]["rho"] == 0.5
    json.dumps(restored)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sampler": "nope"}, "policy: expected one of .* got 'nope'"),
        ({"sampler": "boe", "sampler_config": {"rho": 2}}, "rho: .* got 2"),
        ({"additional_config": {"sampler_config": 3}}, "sampler_config: expected a mapping"),
        (
            {"sampler": "boe", "sampler_config": {"policy": "random"}},
            r"sampler: expected the policy of sampler_config \('random'\), got 'boe'",
        ),
        (
            {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"},
            "pipeline_parallel_size: expected 1",
        ),
        ({"hf_overrides": {"alibi": True}}, "alibi: expected False, got True"),
        ({"logits_processors": ["a.b:C"]}, "logits_processors: expected None"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_setting_that_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        engine_config(**changes)


def test_a_mask_that_no_file_names_is_the_servers_to_give(tmp_path):
    made = make("a2d-qwen3")
    made.config.mask_token_id = None
    folder = str(made.save(tmp_path))
    with pytest.raises(ValueError, match="mask_token_id: .*neither config.json nor the tokenizer"):
        engine_config(model=folder)
    config = engine_config(model=folder, additional_config={"mask_token_id": 20})
    assert pickle.loads(pickle.dumps(config)).model_config.hf_config.mask_token_id == 20
    assert config.additional_config["sampler"] == "confidence"


def test_every_family_has_the_engine_parts(tmp_path):
    for family in FAMILIES:
        folder = str(make(family).save(tmp_path))
        config = engine_config(model=folder, hf_overrides={"num_hidden_layers": 2})
        assert config.scheduler_config.scheduler_cls.endswith("DiffusionScheduler")
        assert config.model_config.hf_config.shape().layers == 2


def test_another_model_with_a_sampler_is_refused(tmp_path):
    other = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 50,
    }
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="sampler: expected a masked diffusion .*LlamaForCausalLM"):
        engine_config(model=str(tmp_path), sampler="boe")
    assert engine_args(model=str(tmp_path)).additional_config == {}


def test_defaults_of_the_generation_config_that_we_would_refuse_are_ignored(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"temperature": 0.5, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1})
    )
    config = engine_config(model=str(tmp_path), hf_config_path=str(tmp_path))
    assert config.model_config.get_diff_sampling_param() == {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 20,
        "repetition_penalty": 1.0,
        "max_tokens": 256,
    }


def test_a_request_without_max_tokens_has_a_canvas_of_the_servers_default(tmp_path):
    """Otherwise a chat's canvas is the whole context."""

    def default(**changes):
        return engine_config(**changes).model_config.get_diff_sampling_param().get("max_tokens")

    assert default() == 256
    assert default(additional_config={"default_max_tokens": 40}) == 40
    (tmp_path / "generation_config.json").write_text(json.dumps({"max_new_tokens": 50}))
    assert default(generation_config=str(tmp_path)) == 50  # vLLM makes a limit of it
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_k": 5}))
    assert default(generation_config=str(tmp_path)) is None


def test_a_bad_setting_of_the_server_is_refused_by_name():
    for name, value in (
        ("score_grid", 0),
        ("attention_impl", "fast"),
        ("logits_budget_mb", 0),
        ("default_max_tokens", 0),
        ("default_seed", 2**63),
    ):
        with pytest.raises(ValueError, match=f"{name}: "):
            engine_config(additional_config={name: value})


# ---- the workers ---------------------------------------------------------------------------------

SNAPSHOT = """
import sys, torch
def snapshot():
    owners = {"cuda": torch.cuda, "accelerator": torch.accelerator}
    found = {f"{o}.{k}": id(v) for o, owner in owners.items() for k, v in vars(owner).items()}
    return found | {"Event": id(torch.Event), "pin_memory": id(torch.Tensor.pin_memory)}
"""


def test_the_gpu_worker_leaves_torch_as_it_is():
    """vLLM's CPU worker replaces functions of `torch.cuda` for its whole process."""
    code = SNAPSHOT + (
        "import vllm.utils.torch_utils\n"  # which wraps torch.cuda.set_stream for itself
        "before = snapshot()\n"
        "import boe_vllm.vllm_plugin.gpu_worker\n"
        "after = snapshot()\n"
        "print([name for name in before if after[name] != before[name]],"
        "[name for name in sys.modules if name.startswith('vllm.v1.worker.cpu')])"
    )
    done = run_python(code)
    assert done.stdout.splitlines()[-1:] == ["[] []"], done.stdout + done.stderr
