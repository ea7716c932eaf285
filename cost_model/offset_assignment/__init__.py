"""Offset assignment (dynamic storage allocation): where buffers with known lifetimes lie in one arena."""
