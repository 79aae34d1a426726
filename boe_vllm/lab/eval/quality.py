"""Text as a distribution (Table 4): MAUVE, generative perplexity, entropy.

- **MAUVE** (Pillutla 2021) by `mauve-text` with its defaults, on features as its own featuriser
  takes them: the scorer's last hidden state at a text's last token, up to 1024 tokens.
- **Generative perplexity**: `exp` of the scorer's mean negative log-likelihood of the continuation,
  given its prompt; end-of-text tokens do not count.
- **Entropy**: of the distribution of token ids within one continuation (unigram), nats, mean over
  items; the decoder's own tokens, without end of text.

The scorer is any causal language model that `transformers` loads from a path (the paper: GPT-2
large).
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

MAX_TOKENS = 1024


class Scorer:
    """A causal language model that judges text."""

    def __init__(self, path: str) -> None:
        """Load it.

        Raises:
            ValueError: when there is no such model.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path)
            model = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True)
            self._model = model.eval()
        except (OSError, ValueError) as error:
            raise ValueError(
                f"--scorer: expected the path of a causal language model, got {path!r} ({error}); "
                f"download one, such as gpt2-large, and name its folder"
            ) from None
        if torch.cuda.is_available():
            self._model.to("cuda")
        self._start = self._tokenizer.bos_token_id
        if self._start is None:
            self._start = self._tokenizer.eos_token_id
        self._special = set(self._tokenizer.all_special_ids)

    @torch.no_grad()
    def judge(self, prompt: str, text: str) -> tuple[np.ndarray, float, int]:
        """One text after its prompt.

        Returns:
            [D] features of both together; the summed negative log-likelihood of `text`, nats; and
            its number of tokens. Of both numbers, ends of text count for neither.
        """
        before, after = (
            self._tokenizer.encode(part, add_special_tokens=False) for part in (prompt, text)
        )
        while after and after[-1] in self._special:
            after.pop()
        start = [] if self._start is None else [self._start]
        tokens = (start + before + after)[:MAX_TOKENS]
        # The first token of all has nothing before it that could predict it.
        first = max(1, len(start) + len(before))
        ids = torch.tensor([tokens], device=self._model.device)
        out = self._model(ids, output_hidden_states=True)
        features = out.hidden_states[-1][0, -1].float().cpu().numpy()
        logprobs = torch.log_softmax(out.logits[0, first - 1 : -1].float(), -1)
        own = ids[0, first:]
        counted = [place for place, token in enumerate(own.tolist()) if token not in self._special]
        loss = -logprobs[counted, own[counted]].sum().item()
        return features, loss, len(counted)


def unigram_entropy(tokens: Sequence[int] | Sequence[str]) -> float:
    """Entropy of the distribution of the values in a sequence, nats."""
    counts = collections.Counter(tokens)
    total = len(tokens)
    return -sum(n / total * math.log(n / total) for n in counts.values()) if total else 0.0


def measure(
    scorer: Scorer,
    items: Sequence[Mapping[str, Any]],
    references: np.ndarray,
    *,
    end_of_text: Sequence[int],
    seed: int,
) -> dict[str, float | int]:
    """The three numbers of one cell.

    Args:
        scorer: of text.
        items: with `prompt`, `text` and `token_ids`.
        references: [N, D] features of the reference texts.
        end_of_text: token ids of the decoder that do not count for the entropy.
        seed: of MAUVE's clustering.
    """
    import mauve

    judged = [scorer.judge(item["prompt"], item["text"]) for item in items]
    features = np.stack([entry[0] for entry in judged])
    loss, tokens = (sum(entry[k] for entry in judged) for k in (1, 2))
    skipped = set(end_of_text)
    entropies = [
        unigram_entropy([t for t in item["token_ids"] if t not in skipped]) for item in items
    ]
    result = mauve.compute_mauve(
        p_features=references, q_features=features, seed=seed, verbose=False
    )
    return {
        "n": len(items),
        "mauve": float(result.mauve),
        "perplexity": math.exp(loss / tokens) if tokens else math.nan,
        "entropy": float(np.mean(entropies)),
    }
