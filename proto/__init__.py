"""The contract: wire messages, plain types, hashing, errors. Imports no torch and no ray."""
