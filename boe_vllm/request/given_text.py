"""What a request says about the text itself: fixed pieces of it, or the answers to choose from.

Text becomes token ids once, at admission; lists of token ids are taken as they are, so a resolved
request reads like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import Field

from boe_vllm.base import options

NonNegative = Annotated[int, Field(ge=0)]
Tokens = Annotated[list[NonNegative], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]
Encode = Callable[[str], list[int]]

MAX_CHOICES = 64


@options.options
class GivenText:
    """Fields of a request that a server has no defaults for."""

    canvas_template: (
        Annotated[list[Text | Annotated[int, Field(ge=1)] | Tokens], Field(min_length=1)] | None
    ) = None
    """The canvas piece by piece: text or token ids that stand there, or a number of masks."""
    choices: Annotated[list[Text | Tokens], Field(min_length=1, max_length=MAX_CHOICES)] | None = (
        None
    )
    """Answers, one of which is the output: the one that the model finds likeliest."""

    def __post_init__(self) -> None:
        if self.canvas_template is None:
            return
        if self.choices is not None:
            raise ValueError(
                "choices: expected no canvas_template beside it, got both; remove one of them"
            )
        if not any(isinstance(piece, int) for piece in self.canvas_template):
            raise ValueError(
                f"canvas_template: expected a number of masks between the texts, got "
                f"{self.canvas_template!r}; add one"
            )

    def encoded(self, encode: Encode | None) -> dict[str, Any]:
        """The fields with token ids for texts.

        Raises:
            ValueError: for text without a tokenizer, or two answers of the same tokens.
        """
        fields: dict[str, Any] = {}
        if self.canvas_template is not None:
            fields["canvas_template"] = [
                _tokens("canvas_template", piece, encode) for piece in self.canvas_template
            ]
        if self.choices is not None:
            answers = [_tokens("choices", answer, encode) for answer in self.choices]
            if len({tuple(answer) for answer in answers}) < len(answers):
                raise ValueError(
                    f"choices: expected answers that differ, got {self.choices!r}; "
                    f"remove those that are there twice"
                )
            fields["choices"] = answers
        return fields

    def template(self, mask_token_id: int) -> list[int] | None:
        """Token ids of an encoded template, masks included."""
        if self.canvas_template is None:
            return None
        tokens: list[int] = []
        for piece in self.canvas_template:
            assert not isinstance(piece, str)
            tokens += [mask_token_id] * piece if isinstance(piece, int) else piece
        return tokens

    def answers(self) -> list[list[int]] | None:
        """Token ids of encoded answers."""
        if self.choices is None:
            return None
        return [list(answer) for answer in self.choices if not isinstance(answer, str)]

    def given(self) -> dict[str, Any]:
        """The fields that are set."""
        values = {name: getattr(self, name) for name in options.names(type(self))}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def length(self) -> int | None:
        """Tokens of the canvas that follows: the template's, or the longest answer's and an end of
        text; None if the given_text says nothing about it. To be asked of encoded given_text."""
        if self.canvas_template is not None:
            return sum(p if isinstance(p, int) else len(p) for p in self.canvas_template)
        if self.choices is not None:
            return 1 + max(map(len, self.choices))
        return None


def split_given_text(fields: Mapping[str, Any]) -> tuple[GivenText, dict[str, Any]]:
    """The given_text among a request's fields, and the other fields.

    Raises:
        ValueError: for an invalid value, by name.
    """
    own = options.names(GivenText)
    given_text = {k: v for k, v in fields.items() if k in own and v is not None}
    return options.build(GivenText, given_text), {k: v for k, v in fields.items() if k not in own}


def _tokens(name: str, piece: Any, encode: Encode | None) -> Any:
    if not isinstance(piece, str):
        return piece
    if encode is None:
        raise ValueError(
            f"{name}: expected token ids where the server has no tokenizer, got {piece!r}; "
            f"send lists of token ids"
        )
    tokens = encode(piece)
    if not tokens:
        raise ValueError(f"{name}: expected text of at least one token, got {piece!r}; change it")
    return tokens
