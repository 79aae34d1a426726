"""What a request says about the text itself: fixed pieces of it, or the answers to choose from.

Text becomes token ids once, when the request is resolved; lists of token ids are taken as they are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field

from boe_vllm.base import options
from boe_vllm.base.options import shown

if TYPE_CHECKING:
    from boe_vllm.request.resolve import SamplingFields

Encode = Callable[[str], list[int]]

MAX_CHOICES = 64

_TEXT = "text or a list of token ids"


def _checked_pieces(value: Any) -> Any:
    return _each("piece", value, f"{_TEXT}, or a number of masks", number=True)


def _checked_choices(value: Any) -> Any:
    return _each("choice", value, _TEXT)


def _each(what: str, value: Any, expected: str, number: bool = False) -> Any:
    """Check what a list holds piece by piece, so that the error is one sentence about one piece."""
    if not isinstance(value, (list, tuple)):
        return value
    pieces = []
    for n, piece in enumerate(value):
        taken: Any = None
        if isinstance(piece, str):
            taken = _well_formed(piece)
        elif isinstance(piece, (list, tuple)):
            taken = _tokens(piece)
        else:
            taken = number and _whole_number(piece, least=1)
        if not taken:
            raise ValueError(f"{what} {n}: expected {expected}, got {shown(piece)}; correct it")
        pieces.append(taken)
    return pieces


def _well_formed(text: str) -> str | None:
    """The text, unless it holds half a surrogate pair, which JSON can write and UTF-8 cannot."""
    return text if text.encode(errors="ignore").decode() == text else None


def _tokens(piece: list[Any] | tuple[Any, ...]) -> list[int] | None:
    tokens = [_whole_number(token, least=0) for token in piece]
    return None if None in tokens else tokens  # type: ignore[return-value]


def _whole_number(value: Any, least: int) -> int | None:
    try:
        number = operator.index(value)
    except TypeError:
        return None
    return number if number >= least and not isinstance(value, bool) else None


Text = Annotated[str, Field(min_length=1)]
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Template = Annotated[
    list[Text | Annotated[int, Field(ge=1)] | Tokens],
    Field(min_length=1),
    BeforeValidator(_checked_pieces),
]
Choices = Annotated[
    list[Text | Tokens],
    Field(min_length=1, max_length=MAX_CHOICES),
    BeforeValidator(_checked_choices),
]


@options.options
class GivenText:
    """Fields of a request that a server has no defaults for; one of them is set."""

    canvas_template: Template | None = None
    """The canvas piece by piece: text or token ids that stand there, or a number of masks."""
    choices: Choices | None = None
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
                f"{shown(self.canvas_template)}; add one"
            )

    def encoded(self, encode: Encode | None, vocab_size: int) -> GivenText:
        """The same in tokens.

        Args:
            encode: of the model's tokenizer, without special tokens; None if there is none.
            vocab_size: token ids are below it.

        Raises:
            ValueError: for text without a tokenizer, for an unknown token, or for two answers of
                the same tokens.
        """
        fields = {
            name: [_encoded(name, piece, encode, vocab_size) for piece in pieces]
            for name, pieces in self.given().items()
        }
        answers = fields.get("choices")
        if answers and len(set(map(tuple, answers))) < len(answers):
            raise ValueError(
                f"choices: expected answers that differ, got {shown(self.choices)}; remove those "
                f"that are there twice"
            )
        return options.restore(GivenText, {"canvas_template": None, "choices": None} | fields)

    def template(self, mask_token_id: int) -> list[int] | None:
        """Token ids of an encoded template, masks included."""
        if self.canvas_template is None:
            return None
        tokens: list[int] = []
        for piece in self.canvas_template:
            assert not isinstance(piece, str)
            tokens += [mask_token_id] * piece if isinstance(piece, int) else piece
        return tokens

    def places_of_text(self, mask_token_id: int) -> list[int]:
        """Positions of an encoded template that hold its texts, counted from 0."""
        tokens = self.template(mask_token_id) or []
        return [n for n, token in enumerate(tokens) if token != mask_token_id]

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
    def source(self) -> str:
        """The name of the field that is set."""
        return next(iter(self.given()))

    @property
    def length(self) -> int:
        """Tokens of the canvas that follows: the template's, or the longest answer's and an end of
        text. To be asked of encoded text."""
        if self.canvas_template is not None:
            return sum(p if isinstance(p, int) else len(p) for p in self.canvas_template)
        return 1 + max(map(len, self.choices or ()))


GIVEN = frozenset(options.names(GivenText))
"""Names of the fields."""


def split_given_text(fields: Mapping[str, Any]) -> tuple[GivenText | None, dict[str, Any]]:
    """The given text among a request's fields, if there is any, and the other fields.

    Raises:
        ValueError: for an invalid value, by name.
    """
    given = {k: v for k, v in fields.items() if k in GIVEN and v is not None}
    others = {k: v for k, v in fields.items() if k not in GIVEN}
    return options.build(GivenText, given) if given else None, others


# Standard fields that mean nothing where the answers are given -> what asks for nothing.
_NEUTRAL_FOR_CHOICES: dict[str, Any] = {
    "logprobs": None,
    "min_tokens": 0,
    "logit_bias": {},
    "allowed_token_ids": None,
    "bad_words": (),
}


def check_choices(
    given: GivenText, infill: int, sampling: SamplingFields, mask_token_id: int
) -> None:
    """Refuse what means nothing beside answers.

    Args:
        given: encoded, with answers.
        infill: masks of the prompt that the request wants written.
        sampling: its standard fields.
        mask_token_id: which may stand in no answer.

    Raises:
        ValueError: naming the field.
    """
    for name, neutral in _NEUTRAL_FOR_CHOICES.items():
        value = getattr(sampling, name)
        if value != neutral and not (neutral is not None and not value):
            raise ValueError(
                f"{name}: expected none beside choices, got {shown(value)}; remove one of them"
            )
    if infill or any(mask_token_id in answer for answer in given.answers() or []):
        raise ValueError(
            "choices: expected no masks in the prompt and the answers, got some; remove them"
        )


def _encoded(name: str, piece: Any, encode: Encode | None, vocab_size: int) -> Any:
    if isinstance(piece, int):
        return piece
    if isinstance(piece, str) and encode is None:
        raise ValueError(
            f"{name}: expected token ids where the server has no tokenizer, got {shown(piece)}; "
            f"send lists of token ids"
        )
    tokens = encode(piece) if encode is not None and isinstance(piece, str) else piece
    if not tokens:
        raise ValueError(
            f"{name}: expected text of at least one token, got {shown(piece)}; change it"
        )
    if max(tokens) >= vocab_size:
        raise ValueError(
            f"{name}: expected token ids below {vocab_size}, got {max(tokens)}; correct it"
        )
    return tokens
