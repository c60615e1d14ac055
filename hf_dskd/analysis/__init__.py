"""Pictures of a run: what the cross-model attention attends to, and how the losses went."""
