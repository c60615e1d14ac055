"""Pure functions: tensors in, one number per row or per example out. Normalisation is the trainer's business."""
