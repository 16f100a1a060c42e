"""Training of language models on text."""
