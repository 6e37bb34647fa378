"""Figures of the vLLM paper, measured here: one file each, and what they have in common."""
