"""The client: a facade for driver authors, example drivers and hmmctl."""
