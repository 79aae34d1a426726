"""The diffs in `patches/` apply to the installed vLLM, and the plugin runs on the result."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import vllm
from engine_config import small_model

INSTALLED = Path(vllm.__file__).parent
PATCHES = sorted((Path(__file__).parents[2] / "patches").glob("*.patch"))


def touched(patch: Path) -> list[Path]:
    """The files that a patch changes, relative to the folder that holds the package."""
    lines = patch.read_text(encoding="utf-8").splitlines()
    return [Path(line.removeprefix("+++ b/")) for line in lines if line.startswith("+++ b/")]


def apply(patch: Path, folder: Path) -> None:
    # Outside any repository git takes the paths as they are.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    subprocess.run(["git", "apply", str(patch)], cwd=folder, env=environment, check=True)


def copy_in(path: Path, folder: Path) -> None:
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(INSTALLED.parent / path, folder / path)


def test_there_are_patches():
    assert len(PATCHES) == 3


@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.name)
def test_a_patch_applies_to_the_installed_vllm(patch, tmp_path):
    for path in touched(patch):
        copy_in(path, tmp_path)
    apply(patch, tmp_path)
    for path in touched(patch):
        source = (tmp_path / path).read_text(encoding="utf-8")
        assert source != (INSTALLED.parent / path).read_text(encoding="utf-8")
        compile(source, str(path), "exec")


def link_all_but(original: Path, copy: Path, files: set[Path]) -> None:
    """Mirror a folder by links, down to the given files, which are left out."""
    copy.mkdir()
    for entry in original.iterdir():
        below = {path for path in files if entry in (path, *path.parents)}
        if not below:
            (copy / entry.name).symlink_to(entry)
        elif entry.is_dir():
            link_all_but(entry, copy / entry.name, below)


def test_the_plugin_runs_on_a_patched_vllm(tmp_path):
    files = {path for patch in PATCHES for path in touched(patch)}
    link_all_but(INSTALLED, tmp_path / "vllm", {INSTALLED.parent / path for path in files})
    for path in files:
        copy_in(path, tmp_path)
    for patch in PATCHES:
        apply(patch, tmp_path)
    code = f"""
import vllm, boe_vllm
assert vllm.__file__.startswith({str(tmp_path)!r})
from vllm import EngineArgs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor
from boe_vllm.vllm_plugin.wrapping import is_wrapped
parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
flags = ["--model", {small_model()!r}, "--sampler", "boe", "--sampler-config", '{{"rho": 0.5}}']
args = AsyncEngineArgs.from_cli_args(parser.parse_args(flags))
assert (args.sampler, args.sampler_config) == ("boe", {{"rho": 0.5}})
small = dict(model={small_model()!r}, load_format="dummy", skip_tokenizer_init=True)
config = EngineArgs(**small, sampler="boe", sampler_config={{"rho": 0.5}}).create_engine_config()
assert config.additional_config["sampler_config"]["rho"] == 0.5
wrapped = [EngineArgs.__init__, InputProcessor.process_inputs, AsyncLLM.generate]
assert not any(map(is_wrapped, wrapped))
print("done")
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert run.stdout.endswith("done\n"), run.stderr
