"""This project's own engine: Llama-like models on CPUs and GPUs."""
