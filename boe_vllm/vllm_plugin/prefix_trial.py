"""A program: from a grammar as a request gives it to the text of llguidance's parser, tried once.

It runs as a process of its own, which imports nothing of this package: some grammars end the
process that reads them, by the depth of their rules, and others take more memory or time than
anybody has. It reads one JSON object from its input, `kind`, `text`, `options` (of JSON schemas)
and `limits` (of the parser), and writes one with `text`, or with `refused`, which says why there is
none.
"""

import json
import resource
import sys
import threading

import llguidance

MEMORY_BYTES = 2 << 30
STACK_BYTES = 1 << 20  # less than any thread of a server has


class Bytes:
    """A vocabulary of the bytes."""

    eos_token_id = 256
    bos_token_id = None
    special_token_ids = (256,)
    tokens = (*(bytes([byte]) for byte in range(256)), b"<|end|>")

    def __call__(self, text: str | bytes) -> list[int]:
        """The bytes of a text."""
        return list(text.encode() if isinstance(text, str) else text)


def text_of(asked: dict) -> str:
    """The parser's text of a grammar."""
    kind, text = asked["kind"], asked["text"]
    if kind in ("json", "json_object"):
        schema = text if kind == "json" else '{"type": "object"}'
        return llguidance.LLMatcher.grammar_from_json_schema(schema, defaults=asked["options"])
    if kind in ("grammar", "regex", "choice"):
        return llguidance.grammar_from(kind, text)
    raise ValueError(f"nothing reads a {kind} from left to right")


def tried(asked: dict) -> dict[str, str]:
    """The text, or why there is none."""
    try:
        text = text_of(asked)
    except (ValueError, TypeError, RecursionError) as error:
        return {"refused": str(error)}
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()))
    limits = llguidance.LLParserLimits(**asked["limits"])
    matcher = llguidance.LLMatcher(tokenizer, text, log_level=0, limits=limits)
    matcher.compute_bitmask()
    if matcher.is_error():
        return {"refused": matcher.get_error().splitlines()[0]}
    return {"text": text}


def main() -> int:
    """0 once it is known."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    asked, found = json.load(sys.stdin), []
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=lambda: found.append(tried(asked)))
    thread.start()
    thread.join()
    if not found:
        return 1
    json.dump(found[0], sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
