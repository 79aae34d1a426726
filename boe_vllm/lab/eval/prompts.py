"""Items as the engine takes them: plain text, or a conversation in the model's own template."""

from __future__ import annotations

from typing import Any

from boe_vllm.lab.eval.settings import Settings
from boe_vllm.lab.tasks import Item, Task


class Prompts:
    """Item -> what vLLM's `add_request` takes."""

    def __init__(self, settings: Settings, tasks: dict[str, Task]) -> None:
        """Load the tokenizer if a chat template is wanted.

        Raises:
            ValueError: for a model without one.
        """
        self._tasks = tasks
        self._tokenizer = _chat_tokenizer(settings) if settings.chat else None

    def __call__(self, item: Item) -> dict[str, Any]:
        """The prompt's text; for chat models its token ids."""
        if self._tokenizer is None:
            return {"prompt": item.prompt}
        # The template writes the special tokens itself.
        return {
            "prompt_token_ids": self._tokenizer.encode(self.text(item), add_special_tokens=False)
        }

    def text(self, item: Item) -> str:
        """What the model sees, as text."""
        if self._tokenizer is None:
            return item.prompt
        return self._tokenizer.apply_chat_template(
            self._tasks[item.task].messages(item), add_generation_prompt=True, tokenize=False
        )


def _chat_tokenizer(settings: Settings) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings.model_path)
    if not tokenizer.chat_template:
        raise ValueError(
            f"--chat: expected a model with a chat template, got {settings.model!r}, whose "
            f"tokenizer has none; leave --chat out, or add chat_template to its "
            f"tokenizer_config.json"
        )
    return tokenizer
