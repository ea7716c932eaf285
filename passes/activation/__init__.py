"""Activation planning: which values of the forward are kept for the backward, recomputed there, or swapped out."""
