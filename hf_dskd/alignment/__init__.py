"""Which teacher positions stand for a student position, and back."""
