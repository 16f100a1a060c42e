"""Errors and file helpers that every level of the repository needs."""
