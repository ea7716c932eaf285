"""Reading what a compilation left behind: stages, the history of a value, differences, search, a terminal browser."""
