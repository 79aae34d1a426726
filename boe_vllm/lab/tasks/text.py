"""Continuation of text (OpenWebText style), judged as a distribution, not item by item."""

from __future__ import annotations

import re

from boe_vllm.lab.tasks.base import Item
from boe_vllm.lab.tasks.files import FileTask, Record

PROMPT_WORDS = 64
_WORDS = re.compile(rf"\s*(?:\S+\s+){{{PROMPT_WORDS}}}")


class Text(FileTask):
    """`text.jsonl`: `text`, and perhaps `prompt`, its beginning; else its first 64 words are."""

    name = "text"
    file_name = "text.jsonl"
    fields = {"text": str}
    gen_length, block_length = 1024, 32
    judged = False
    source = "the texts themselves"

    def make_item(self, record: Record) -> Item:
        text = record["text"]
        prompt = record.get("prompt")
        if prompt is None:
            match = _WORDS.match(text)
            if match is None:
                raise ValueError(f"expected a text of more than {PROMPT_WORDS} words, or a prompt")
            prompt = match.group().rstrip()
        if not isinstance(prompt, str) or not prompt or not text.startswith(prompt):
            raise ValueError("expected a prompt that the text starts with")
        if len(prompt) == len(text):
            raise ValueError("expected a text that goes on after its prompt")
        return Item(task=self.name, prompt=prompt, answer=text[len(prompt) :])

    def is_valid(self, item: Item, answer: str) -> bool:
        """Whether it is the text's own continuation; no measure of quality."""
        return answer == item.answer
