"""Models and text for machines without a model hub: real ones out of packages, and tiny stand-ins."""
