"""The constraints of a request that has any, on its empty canvas."""

from __future__ import annotations

from boe_vllm.models.special import SpecialTokens
from boe_vllm.request.resolved import ResolvedRequest
from boe_vllm.sampling.canvas_constraints import CanvasConstraints, frontier_on_canvas
from boe_vllm.sampling.constraints import TokenConstraints
from boe_vllm.sampling.frontier import FrontierGrammar
from boe_vllm.sampling.prefix import PrefixMatchers


def constraints_of(
    params: ResolvedRequest,
    prompt_len: int,
    special: SpecialTokens,
    matchers: PrefixMatchers | None,
) -> CanvasConstraints:
    """What may be written where.

    Args:
        params: what the request asked for.
        prompt_len: where its canvas begins.
        special: ids of the mask and of the ends of text.
        matchers: the parser of grammars that are read from left to right, where there is one.

    Raises:
        ValueError: for a grammar that nobody here can read.
    """
    constraints, frame = params.constraints or TokenConstraints(), params.config.frame
    read = constraints.prefix_grammar is not None
    return CanvasConstraints(
        constraints,
        prompt_len,
        never=special.eos if frame.logits_eos_inf else None,
        discounted=tuple(sorted(special.late)) if frame.confidence_eos_eot_inf else (),
        length=params.plan.gen_length,
        end=params.max_tokens or params.plan.gen_length,
        frontier=_frontier_of(params, constraints, special, matchers) if read else None,
    )


def _frontier_of(
    params: ResolvedRequest,
    constraints: TokenConstraints,
    special: SpecialTokens,
    matchers: PrefixMatchers | None,
) -> FrontierGrammar:
    if matchers is None:
        raise ValueError(
            "structured_outputs: expected a grammar with a finite automaton where there is no "
            "parser, got one without; send a schema or an expression"
        )
    return frontier_on_canvas(
        constraints,
        matchers,
        length=params.plan.gen_length,
        end=params.max_tokens or params.plan.gen_length,
        mask_token_id=special.mask,
        eos_token_id=special.eos,
    )
