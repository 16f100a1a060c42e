"""Losses, per utterance, that say which ones could not be computed."""
