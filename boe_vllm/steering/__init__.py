"""Steering: what the denoiser can tell a policy beyond the step's own prediction.

A policy yields a `Query` (`step`); the queries of all requests of a batch are solved in shared
passes. One file for each kind, with the query, its result and its solver:

    importance   Token Importance Scores of candidates, by one backward (`response` beside it)
    chain        predictions of some positions once others are written
    coupling     how strongly proposals depend on each other
    lookahead    full forwards over hypothetical next states
    change       how far each prediction has moved since the step before
    likelihood   log-probabilities of given tokens

They share `hypothetical` (rows run again under a supposition) and `guidance` (CFG pairs).
"""
