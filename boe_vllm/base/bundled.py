"""Where the bundled checkpoints lie, and what a command line calls them."""

from pathlib import Path

TINY = "tiny"
"""The bundled checkpoint's name on our command lines."""
TINY_TEXT = "tiny-text"
"""That of the bundled checkpoint of text."""


def tiny_model_path() -> str:
    """Absolute path of the bundled checkpoint, a small LLaDA that solves puzzles."""
    return _asset("tiny-llada")


def tiny_text_model_path() -> str:
    """Absolute path of the bundled checkpoint of text, a small MDLM that writes stories."""
    return _asset("tiny-mdlm")


def model_path(name: str) -> str:
    """What a command line's model name stands for: a bundled checkpoint, or itself."""
    bundled = {TINY: tiny_model_path, TINY_TEXT: tiny_text_model_path}
    return bundled[name]() if name in bundled else name


def _asset(name: str) -> str:
    return str(Path(__file__).parents[1].resolve() / "assets" / name)
