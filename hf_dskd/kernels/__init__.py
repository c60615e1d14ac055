"""Losses that never hold a matrix of tokens x vocabulary or of queries x keys."""
