"""A finished run on the hub: its model card, what is pushed, and the push."""
