"""Arithmetic without networks: every operation is a folder of interchangeable backends.

Nothing here imports anything but torch, and what is present of a compiler, Triton and mamba_ssm.
"""
