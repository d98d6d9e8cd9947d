"""The host's side of a launch. Knows no operation."""
