"""Models of transformers: read by name, their parts, what they compute and what they write."""
