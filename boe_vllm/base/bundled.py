"""Where the bundled checkpoint lies, and what a command line calls it."""

from pathlib import Path

TINY = "tiny"
"""The bundled checkpoint's name on our command lines."""


def tiny_model_path() -> str:
    """Absolute path of the bundled checkpoint, a small LLaDA that solves puzzles."""
    return str(Path(__file__).parents[1].resolve() / "assets" / "tiny-llada")


def model_path(name: str) -> str:
    """What a command line's model name stands for: the bundled checkpoint, or itself."""
    return tiny_model_path() if name == TINY else name
