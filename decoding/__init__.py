"""Searchers, scorers and their states: batched, cached, over SpeechBrain's own classes."""
