"""Which uses of a plan's buffers are served from the scratchpad: the memory-mapping game."""
