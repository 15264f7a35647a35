"""What a model is: configuration, files, digests, tokenizer, chat template. Imports no torch."""
