"""Benchmarks, evaluation, pictures and tasks; no core room imports it."""
