"""No module of the package is longer than 300 lines, and no function than 60.

    python scripts/check_sizes.py [FOLDER]

A function's lines are counted from its first decorator to its last line, its docstring included.
Prints each module and function that is too long, and exits with 1 if there is any. Tests, examples
and scripts are exempt.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

MODULE, FUNCTION = 300, 60


def too_long(path: Path) -> Iterator[str]:
    """One line of text for the module, if it is too long, and for each such function in it."""
    text = path.read_text(encoding="utf-8")
    length = len(text.splitlines())
    if length > MODULE:
        yield f"{path}: expected at most {MODULE} lines, got {length}; split it by subject"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            length = (node.end_lineno or start) - start + 1
            if length > FUNCTION:
                yield (
                    f"{path}:{start}: {node.name}: expected at most {FUNCTION} lines, got "
                    f"{length}; divide it"
                )


def main() -> int:
    """0 if nothing is too long."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "boe_vllm"
    found = [line for path in sorted(folder.rglob("*.py")) for line in too_long(path)]
    print("\n".join(found) or f"sizes: nothing in {folder.name} is too long")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
