"""Decoding in a notebook: a checkpoint, its tokenizer and the denoising loop, without an engine.

    from boe_vllm import Denoiser

    denoiser = Denoiser.from_pretrained(path)
    (answer,) = denoiser.generate(["12+30="], policy="boe", max_tokens=16)
    answer.text, answer.cost

Tokens are those that vLLM's engine gives for the same request.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from boe_vllm.base.bundled import model_path
from boe_vllm.decoding.loop import DenoisingLoop, StepResult
from boe_vllm.models import special
from boe_vllm.models.build import load_model, load_tokenizer
from boe_vllm.models.contract import DenoisingNetwork
from boe_vllm.models.special import SpecialTokens
from boe_vllm.request.facts import ModelFacts
from boe_vllm.request.limits import EngineSettings, ServerSettings
from boe_vllm.request.resolve import SamplingFields, resolve
from boe_vllm.request.resolved import ResolvedRequest

MAX_ROWS = 8192
"""Rows, prompts and canvases, that are decoded together."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """What came of one prompt."""

    prompt_tokens: list[int]
    tokens: list[int]
    """Written on the canvas, up to the end of text, which is the last one if there is one."""
    text: str
    """Of these tokens, without special ones, up to the first stop string."""
    finish_reason: str
    """ "stop" at an end of text or a stop string, else "length"."""
    cost: dict[str, int]
    """Denoising steps, forwards, backwards and rows of each, of this prompt alone."""
    trace: dict[str, list[Any]] | None
    """With `trace=True`: for every position its step, token, entropy (nats), confidence, score."""
    report: dict[str, Any]
    """All that a server would send, among it `choices` and `infill`."""


class Denoiser:
    """A checkpoint that decodes prompts in this process."""

    def __init__(
        self,
        model: DenoisingNetwork,
        tokenizer: Any,
        *,
        name: str = "model",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Decode with a network.

        Args:
            model: the network, on its device.
            tokenizer: transformers' for it.
            name: for pictures and messages.
            settings: as a server's `additional_config`: limits, and `sampler_config` of requests.

        Raises:
            ValueError: for a setting that is unknown or invalid.
        """
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.server = ServerSettings.read({"default_seed": 0} | dict(settings or {}))
        model.use_attention(self.server.limits.attention_impl)
        config = model.config
        special.complete(config, tokenizer, self.server.limits.mask_token_id)
        self.special = SpecialTokens.of(config)
        self.facts = ModelFacts(
            vocab_size=config.vocab_size,
            max_model_len=config.max_position_embeddings,
            mask_token_id=config.mask_token_id,
            eos_token_id=config.eos_token_id,
            shift=model.shift,
            encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> Denoiser:
        """Open a checkpoint's folder.

        Args:
            path: the folder; "tiny" and "tiny-text" are the bundled ones.
            device: where the network lives. Default: the GPU if there is one, else the CPU.
            dtype: of all weights. Default: the one that the checkpoint names.
            settings: see the class.

        Raises:
            ValueError: for a folder that is no checkpoint of a supported model.
        """
        folder = Path(model_path(str(path))).expanduser()
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = load_model(folder, dtype=dtype, device=device)
        tokenizer = load_tokenizer(folder, model.config)
        return cls(model, tokenizer, name=folder.name, settings=settings)

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        return next(self.model.parameters()).device

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        *,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        progress: bool = False,
        **fields: Any,
    ) -> list[Generation]:
        """Decode some prompts together.

        Args:
            prompts: texts, or lists of token ids.
            max_tokens: length of the canvas, in tokens. Default: `default_max_tokens` (256).
            temperature: 0 writes the most likely token.
            seed: of the n-th prompt is `seed + n`. Default: the setting `default_seed` (0).
            stop: strings that end an answer.
            ignore_eos: write on after an end of text.
            progress: show a bar.
            fields: `policy`, `block_length`, `tokens_per_step`, `trace` and all others that a
                request may have; `boe-vllm fields` lists them. Any standard field of
                `request.resolve.SamplingFields`, such as `top_p`, may be among them.

        Returns:
            One `Generation` per prompt, in their order.

        Raises:
            ValueError: for a field that is unknown or invalid, naming it, or a prompt that does
                not fit.
            RuntimeError: when a request cannot go on, for example as logits are not finite.
        """
        texts: Sequence[str | Sequence[int]] = [prompts] if isinstance(prompts, str) else prompts
        seed = self.server.limits.default_seed if seed is None else seed
        standard = {f.name for f in dataclasses.fields(SamplingFields)} & fields.keys()
        sampling = SamplingFields(
            max_tokens=max_tokens or self.server.limits.default_max_tokens,
            temperature=temperature,
            stop_token_ids=() if ignore_eos else (self.special.eos,),
            **{name: fields.pop(name) for name in standard},
        )
        requests = []
        for n, prompt in enumerate(texts):
            tokens = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
            own = dataclasses.replace(sampling, seed=None if seed is None else seed + n)
            requests.append((tokens, self.resolve(tokens, own, fields)))
        ends = frozenset(sampling.stop_token_ids)
        found: dict[int, Generation] = {}
        for n, answer in self._decode(requests, ends, tuple(stop), progress):
            found[n] = answer
        return [found[n] for n in range(len(requests))]

    def resolve(
        self, prompt: Sequence[int], sampling: SamplingFields, fields: Mapping[str, Any]
    ) -> ResolvedRequest:
        """A request as the engine's admission would resolve it.

        Raises:
            ValueError: for whatever cannot be served, by name.
        """
        return resolve(
            fields, prompt=prompt, sampling=sampling, server=self.server, model=self.facts
        )

    def open_loop(self, cache_rows: int = MAX_ROWS) -> DenoisingLoop:
        """A denoising loop as the engine's, without requests.

        Args:
            cache_rows: rows of keys and values that its requests may freeze.
        """
        limits: EngineSettings = self.server.limits
        return DenoisingLoop(
            self.model,
            special=self.special,
            device=self.device,
            budget_bytes=limits.budget_bytes(self.device.type),
            cache_rows=cache_rows,
            score_grid=limits.score_grid,
        )

    def cut(
        self,
        request: ResolvedRequest,
        sent: Sequence[int],
        ends: Collection[int],
        stop: Sequence[str],
    ) -> tuple[list[int], str, str]:
        """The tokens `sent` so far and their text, cut where the engine would end the request: at
        one of the tokens `ends` or the strings `stop`; and "stop" if it is there, else "length"."""
        tokens, reason = list(sent[: request.max_tokens]), "length"
        # Nothing ends a request before the last text of its template.
        end = next((n for n, t in enumerate(tokens) if t in ends and n >= request.text_end), None)
        if end is not None:
            tokens, reason = tokens[: end + 1], "stop"
        text = self.decode(tokens)
        places = [place for place in map(text.find, stop) if place >= 0]
        if places:
            text, reason = text[: min(places)], "stop"
        return tokens, text, reason

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the tokenizer adds."""
        return list(self.tokenizer.encode(text))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of an answer, without special tokens."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)

    def word(self, token: int) -> str:
        """The text of one token, special or not."""
        return self.tokenizer.decode([token])

    def _decode(
        self,
        requests: Sequence[tuple[list[int], ResolvedRequest]],
        ends: frozenset[int],
        stop: tuple[str, ...],
        progress: bool,
    ) -> Iterator[tuple[int, Generation]]:
        """The answers with their numbers, as they come; at most `MAX_ROWS` rows at a time."""
        from tqdm.auto import tqdm

        loop = self.open_loop()
        waiting = list(range(len(requests)))[::-1]
        running: dict[str, list[int]] = {}
        with tqdm(total=len(requests), disable=not progress, unit="prompt") as bar:
            while waiting or running:
                taken = sum(requests[int(name)][1].rows for name in running)
                while waiting and (not running or taken < MAX_ROWS):
                    tokens, request = requests[waiting[-1]]
                    if running and taken + request.rows > MAX_ROWS:
                        break
                    name = str(waiting.pop())
                    loop.add(name, tokens, request)
                    running[name] = []
                    taken += request.rows
                for name, result in loop.step(list(running)).items():
                    tokens, request = requests[int(name)]
                    running[name] += result.tokens
                    answer = self._answer(tokens, request, running[name], result, ends, stop)
                    if answer is not None:
                        loop.remove(name)
                        del running[name]
                        bar.update()
                        yield int(name), answer

    def _answer(
        self,
        prompt: list[int],
        request: ResolvedRequest,
        sent: list[int],
        result: StepResult,
        ends: frozenset[int],
        stop: tuple[str, ...],
    ) -> Generation | None:
        """What became of a request, if it ends with this step; None if it goes on."""
        if result.error is not None:
            raise RuntimeError(f"prompt {prompt[:8]}...: {result.error}")
        if result.report is None or not (result.tokens or result.done):
            return None
        tokens, text, reason = self.cut(request, sent, ends, stop)
        if reason == "length" and not result.done and len(tokens) < request.max_tokens:
            return None
        report = dict(result.report)
        return Generation(
            prompt_tokens=prompt,
            tokens=tokens,
            text=text,
            finish_reason=reason,
            cost={k: v for k, v in report.items() if isinstance(v, int)},
            trace=report.get("trace"),
            report=report,
        )
