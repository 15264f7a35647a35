"""gRPC and OpenAI HTTP: validation, tokenization, formats."""
