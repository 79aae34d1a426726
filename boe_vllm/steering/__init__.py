"""Steering: what the denoiser can tell a policy beyond the step's own prediction."""
