"""Expert placement: on which devices the experts of each MoE layer lie, and how far from optimal that is."""
