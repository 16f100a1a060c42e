"""What a run keeps so that it can go on: checkpoints and the tokenizer."""
