"""Training: the loop, the loss, the optimizer and the balancing of experts."""
