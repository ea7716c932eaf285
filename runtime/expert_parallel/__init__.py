"""Mixture-of-experts models with their experts spread over processes, as a placement says."""

from .model import ExpertParallel, parallelize_experts

__all__ = ["ExpertParallel", "parallelize_experts"]
