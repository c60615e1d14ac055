"""What a model has learnt: likelihood of held-out responses, and what it writes itself."""
