"""A training step whose parameters, gradients and optimizer state live in a tier below, and come in as they are used.

Read in this order: ``away`` (a tensor whose memory is elsewhere), ``residency`` (what is here, what is not), ``saved``
(what the forward saves for the backward), ``replay`` (blocks that run again), ``updates`` (the optimizer, one parameter
at a time), ``rehearsal`` and ``spending`` (what a budget allows), ``step`` (all of it together).
"""

from __future__ import annotations

from .step import TrainStep

__all__ = ["TrainStep"]
