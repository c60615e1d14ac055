"""Small things that every folder uses and that know of none of them."""
