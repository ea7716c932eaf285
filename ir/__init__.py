"""The intermediate forms: graph, cascade, tile program; the plan and its file."""
