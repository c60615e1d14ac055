"""What happens to a pair of models in a training, without saying when: that is the trainer."""
