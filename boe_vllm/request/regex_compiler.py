"""A program: from a JSON schema or a regular expression to an automaton over bytes.

It runs as a process of its own, which imports nothing of this package: some expressions take
longer, or more memory, than anybody has, and then it ends and nothing else. It reads one JSON
object from its input, `tree` (below), `whitespace` (a regular expression, or null) and
`memory_bytes`, and writes NumPy's `.npz` of `next_SB` [S, 256] (the last state is dead),
`accepting_S` and `start`. Where that cannot be, it writes the reason to its error output instead.

A tree is `["json", schema]`, `["regex", expression]`, `["text", text]`, `["all", trees]` (one after
the other), `["any", trees]`, or `["many", tree, separator, least, most]` (with null for no most).
"""

import io
import json
import resource
import sys

import numpy as np
from outlines_core import Index, Vocabulary
from outlines_core.json_schema import build_regex_from_schema

MOST_STATES = 20_000
_AFTER_BYTES = 256  # the library's own end of text
# The library loses what may follow a text that could end already, so here none could: each ends
# with a character that is none (U+10FFFF), and whatever it may follow is whole.
_MARK = "\U0010ffff"


def main() -> int:
    """0 once the automaton is written."""
    asked = json.load(sys.stdin)
    memory = asked["memory_bytes"]
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    try:
        file = io.BytesIO()
        np.savez(file, **_automaton(_regex(asked["tree"], asked["whitespace"])))  # type: ignore[arg-type]
    except Exception as error:
        print(" ".join(str(error).split())[:300], file=sys.stderr)
        return 1
    sys.stdout.buffer.write(file.getvalue())
    return 0


def _regex(tree: list, whitespace: str | None) -> str:
    kind, what = tree[:2]
    if kind == "json":
        return f"(?:{build_regex_from_schema(what, whitespace)})"
    if kind == "regex":
        return f"(?:{what})"
    if kind == "text":
        return "".join(c if c.isalnum() else f"\\x{{{ord(c):x}}}" for c in what)
    if kind == "many":
        separator, least, most = tree[2:]
        one = _regex(what, whitespace)
        more = f"(?:{_regex(separator, whitespace)}{one})"
        several = one if most == 1 else f"{one}{more}*"
        return several if least else f"(?:{several})?"
    return "(?:" + ("" if kind == "all" else "|").join(_regex(t, whitespace) for t in what) + ")"


def _automaton(regex: str) -> dict[str, np.ndarray]:
    vocabulary = Vocabulary(_AFTER_BYTES, {bytes([byte]): [byte] for byte in range(256)})
    index = Index(f"(?:{regex}){_MARK}", vocabulary)
    transitions = index.get_transitions()
    finals, start = index.get_final_states(), index.get_initial_state()
    targets = {state for led in transitions.values() for state in led.values()}
    states = sorted({start, *transitions, *targets})
    if len(states) > MOST_STATES:
        raise ValueError(f"it has {len(states)} states, and {MOST_STATES} is the most")
    number = {state: n for n, state in enumerate(states)}
    next_SB = np.full((len(states) + 1, 256), len(states), np.int32)
    for state, led in transitions.items():
        for byte, target in led.items():
            if byte != _AFTER_BYTES:
                next_SB[number[state], byte] = number[target]
    marked_S = np.arange(len(states) + 1)
    for byte in _MARK.encode():
        marked_S = next_SB[marked_S, byte]
    accepting_S = np.isin(marked_S, [number[state] for state in finals])
    return {"next_SB": next_SB, "accepting_S": accepting_S, "start": np.array(number[start])}


if __name__ == "__main__":
    sys.exit(main())
