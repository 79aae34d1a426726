"""Nothing that a checkpoint or a request brings is executed."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_config import SMALL, engine_config
from safetensors.torch import save_file

import boe_vllm

PACKAGE = Path(boe_vllm.__file__).parent
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
UNSAFE_CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen"),
    *("torch.load", "np.load", "numpy.load", "yaml.load", "pd.read_pickle"),
}
SANDBOX = PACKAGE / "lab" / "tasks" / "seccomp.py"
"""Runs programs that models write: in a process of its own, behind a system call filter."""


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def says_no(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def unsafe(node: ast.AST, path: Path) -> bool:
    """Whether a piece of code unpickles, evaluates, or runs what is not ours."""
    if isinstance(node, ast.Import):
        return any(alias.name.partition(".")[0] in UNSAFE_MODULES for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").partition(".")[0] in UNSAFE_MODULES
    if isinstance(node, ast.Call):
        words = {keyword.arg for keyword in node.keywords if not says_no(keyword.value)}
        name = dotted(node.func)
        called = name in UNSAFE_CALLS and path != SANDBOX
        if name == "np.load" and any(
            keyword.arg == "allow_pickle" and says_no(keyword.value) for keyword in node.keywords
        ):
            called = False  # then it reads arrays of numbers only
        return called or bool(words & {"shell", "trust_remote_code", "allow_pickle"})
    return False


def test_no_module_unpickles_or_evaluates():
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if unsafe(node, path)
    ]
    assert found == []


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a config whose repository has code, which writes a file when it is run."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    trap = f"open({str(tmp_path / 'executed')!r}, 'w').close()\n"
    for name in ("configuration_llada.py", "modeling_llada.py", "tokenization_llada.py"):
        (tmp_path / name).write_text(trap)
    return tmp_path


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickled_checkpoint_is_refused(checkpoint, name):
    torch.save({"model.transformer.wte.weight": torch.zeros(2, 2)}, checkpoint / name)
    with pytest.raises(ValueError, match=rf"expected \*\.safetensors in .*{name}.*convert"):
        engine_config(model=str(checkpoint), load_format="auto")


@pytest.mark.parametrize("load_format", ["pt", "npcache", "mistral", "tensorizer"])
def test_a_loader_of_other_formats_is_refused(load_format):
    with pytest.raises(ValueError, match=f"load_format: expected one of .* got '{load_format}'"):
        engine_config(load_format=load_format)


def test_pickled_files_beside_safetensors_are_not_read(checkpoint):
    save_file({"a": torch.zeros(1)}, checkpoint / "model.safetensors")
    torch.save({}, checkpoint / "pytorch_model.bin")
    config = engine_config(model=str(checkpoint), load_format="auto")
    assert config.load_config.load_format == "safetensors"


@pytest.mark.parametrize("trusting", [False, True])
def test_a_repositorys_code_is_never_run(checkpoint, trusting):
    config = engine_config(model=str(checkpoint), trust_remote_code=trusting)
    assert not config.model_config.trust_remote_code
    assert not (checkpoint / "executed").exists()


def test_the_engine_says_what_is_wrong_with_a_pickled_checkpoint(tmp_path):
    """As someone sees it who serves one."""
    folder = tmp_path / "model"
    shutil.copytree(boe_vllm.tiny_model_path(), folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    code = f"import boe_vllm; from vllm import LLM; LLM({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "expected *.safetensors in" in done.stderr and "pytorch_model.bin" in done.stderr
