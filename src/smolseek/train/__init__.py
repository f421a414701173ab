"""Training: the loop, the loss, the optimizer and the load balancing of experts."""
