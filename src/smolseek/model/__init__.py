"""The architecture: attention, experts, and the transformer made of them. No torch.distributed in here."""
