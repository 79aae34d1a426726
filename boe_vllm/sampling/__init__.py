"""From logits to tokens: statistics, constraints, draws."""
