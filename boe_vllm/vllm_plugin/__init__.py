"""The only core room that imports vLLM: how the engine learns of us, and its parts subclassed."""
