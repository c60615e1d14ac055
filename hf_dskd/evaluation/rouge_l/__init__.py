"""ROUGE-L as a metric of the library `evaluate`, to be loaded by its path."""
