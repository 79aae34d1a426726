"""A checkpoint in this process: the denoising loop's network and a tokenizer, without an engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer

import boe_vllm
from boe_vllm.decoding.canvas import SpecialTokens
from boe_vllm.decoding.loop import DenoisingLoop
from boe_vllm.models.build import load_model
from boe_vllm.models.decoder import Decoder
from boe_vllm.models.llada import LLaDAConfig
from boe_vllm.request.config import SamplerConfig
from boe_vllm.request.plan import plan_canvas
from boe_vllm.request.resolved import ResolvedRequest

FILES = ("config.json", "tokenizer.json")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Denoiser:
    """A network with its words."""

    name: str
    model: Decoder
    tokenizer: Tokenizer
    device: torch.device

    @property
    def config(self) -> LLaDAConfig:
        """Of the network."""
        return self.model.config

    def open_loop(self, cache_rows: int) -> DenoisingLoop:
        """A loop as the engine's, without requests.

        Args:
            cache_rows: rows of keys and values that its requests may freeze.
        """
        config = self.config
        assert config.mask_token_id is not None and config.eos_token_id is not None
        late = frozenset(t for t in (config.eos_token_id, config.eot_token_id) if t is not None)
        return DenoisingLoop(
            self.model,
            special=SpecialTokens(mask=config.mask_token_id, eos=config.eos_token_id, late=late),
            device=self.device,
            cache_rows=cache_rows,
        )

    def resolve(
        self,
        config: SamplerConfig,
        *,
        prompt_len: int,
        max_tokens: int,
        temperature: float,
        seed: int,
        top_logprobs: int | None = None,
    ) -> ResolvedRequest:
        """A request as the engine would resolve it.

        Args:
            config: its fields.
            prompt_len: tokens of its prompt.
            max_tokens: tokens of its canvas, before it is rounded up to whole blocks.
            temperature: of its samples; 0 for none.
            seed: of its random numbers.
            top_logprobs: most likely tokens that are reported per position; None for none.

        Raises:
            ValueError: for a canvas that does not fit.
        """
        plan = plan_canvas(
            config,
            prompt_len=prompt_len,
            max_tokens=max_tokens,
            max_model_len=self.config.max_sequence_length,
        )
        return ResolvedRequest(
            config=config,
            plan=plan,
            temperature=temperature,
            seed=seed,
            logprobs=top_logprobs is not None,
            top_logprobs=min(top_logprobs or 0, self.config.vocab_size),
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt."""
        return self.tokenizer.encode(text).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of an answer, without special tokens."""
        return self.tokenizer.decode(list(tokens))

    def word(self, token: int) -> str:
        """The text of one token."""
        return self.tokenizer.decode([token], skip_special_tokens=False)


def load(name: str, device: str = "cpu") -> Denoiser:
    """Open a checkpoint, in the dtype of its config.

    Args:
        name: a folder, or `tiny`, the bundled one.
        device: where the network lives.

    Raises:
        ValueError: for a folder that is no checkpoint.
    """
    folder = Path(boe_vllm.model_path(name)).expanduser()
    for file in FILES:
        if not (folder / file).is_file():
            raise ValueError(
                f"--model: expected a checkpoint's folder or tiny, got {name!r} without {file}; "
                f"name a folder on this machine"
            )
    try:
        model = load_model(folder, device=device)
    except ValueError as error:
        raise ValueError(f"--model: {error}") from error
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return Denoiser(name=name, model=model, tokenizer=tokenizer, device=torch.device(device))
