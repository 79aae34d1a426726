"""Background frequencies of tokens: read from a file, or counted from text.

    boe-vllm count-frequencies --tokenizer DIR --corpus FILE... --out FILE

The file is PC-Sampler's (NEUIR/PC-Sampler `utils/calculate_p_baseline.py`): a JSON object with
`num_token`, the tokens of the corpus, and `p_baseline_dict`, token id -> count.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from boe_vllm.base.arrays import FloatArray, IntArray

HOW_TO_GET_ONE = (
    "take the one that PC-Sampler publishes for the model's tokenizer, or count one with "
    "`boe-vllm count-frequencies --tokenizer DIR --corpus FILE... --out FILE`"
)
CHUNK_BYTES = 1 << 20


class FrequencyTable:
    """How often each token occurs in a corpus; a token that never does counts as one occurrence."""

    def __init__(self, counts: dict[int, int], total: int) -> None:
        """Args:
        counts: occurrences by token id, of tokens that occur.
        total: tokens of the corpus.
        """
        counts = {token: count for token, count in counts.items() if count}
        self.largest_token = max(counts, default=-1)
        self._frequency = np.full(self.largest_token + 2, 1.0 / total)
        self._frequency[list(counts)] = np.array(list(counts.values()), np.float64) / total

    def __call__(self, tokens: IntArray) -> FloatArray:
        """[M] frequencies in (0, 1] of the given tokens."""
        # The last entry is that of a token beyond the table.
        return self._frequency[np.minimum(tokens, self.largest_token + 1)]


@functools.cache
def load(path: str) -> FrequencyTable:
    """The table in a file, read once per process.

    Raises:
        ValueError: when there is no such file or it holds something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"frequencies: expected the path of a token frequency table (JSON), got {path!r} "
            f"({error}); {HOW_TO_GET_ONE}"
        ) from None
    try:
        counts = {int(token): int(count) for token, count in content["p_baseline_dict"].items()}
        total = int(content["num_token"])
        ok = total > 0 and all(t >= 0 and 0 <= c <= total for t, c in counts.items())
    except (TypeError, KeyError, ValueError, AttributeError):
        ok = False
    if not ok:
        raise ValueError(
            f'frequencies: expected a JSON object with "num_token" (positive) and '
            f'"p_baseline_dict" (token id -> count, 0 to num_token), got something else in '
            f"{path!r}; {HOW_TO_GET_ONE}"
        )
    return FrequencyTable(counts, total)


def count(tokenizer: Any, texts: Iterable[str]) -> dict[str, Any]:
    """The content of a frequency file for the tokens of the texts, special tokens not added."""
    counts: collections.Counter[int] = collections.Counter()
    for text in texts:
        counts.update(tokenizer.encode(text, add_special_tokens=False).ids)
    return {
        "num_token": counts.total(),
        "p_baseline_dict": {str(token): counts[token] for token in sorted(counts)},
    }


def read_chunks(path: Path) -> Iterator[str]:
    """The text of a file in pieces of whole lines: a large corpus need not fit in memory."""
    with path.open(encoding="utf-8") as file:
        while lines := file.readlines(CHUNK_BYTES):
            yield "".join(lines)


def main(argv: Sequence[str]) -> int:
    """The command `boe-vllm count-frequencies`."""
    parser = argparse.ArgumentParser(
        prog="boe-vllm count-frequencies",
        description="Count the token frequencies that the policy pc needs.",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        metavar="DIR",
        help="the model's folder, or its tokenizer.json",
    )
    parser.add_argument(
        "--corpus", type=Path, nargs="+", required=True, metavar="FILE", help="UTF-8 text"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON to write")
    arguments = parser.parse_args(argv)
    try:
        tokenizer = _load_tokenizer(arguments.tokenizer)
        table = count(tokenizer, _all_chunks(arguments.corpus))
        if not table["num_token"]:
            raise ValueError("--corpus: expected text, got no token; name files that have some")
        arguments.out.write_text(json.dumps(table), encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"boe-vllm count-frequencies: {error}", file=sys.stderr)
        return 1
    different = len(table["p_baseline_dict"])
    print(f"{arguments.out}: {table['num_token']} tokens, {different} different ones")
    return 0


def _load_tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more exact
        raise ValueError(
            f"--tokenizer: expected a folder with a tokenizer.json, or that file, got {path} "
            f"({error}); download the model's tokenizer and name its folder"
        ) from None


def _all_chunks(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        try:
            yield from read_chunks(path)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"--corpus: expected UTF-8 text, got {path} ({error}); convert it"
            ) from None
