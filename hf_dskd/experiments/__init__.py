"""What a run needs and how runs compare: memory of a step, settings for a pair, grids of runs."""
