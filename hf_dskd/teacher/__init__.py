"""Where the teacher's last hidden states come from."""
