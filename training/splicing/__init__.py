"""Utterances put together anew from words of one speaker."""
