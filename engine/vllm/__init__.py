"""vLLM's worker and model runner, below its scheduler, in the place of an engine."""
