"""The diffusion engine: canvases, the denoising loop, and its place in vLLM."""
