"""The denoising loop and the state of the requests that it steps."""
