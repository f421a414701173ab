"""The architecture: attention, experts and the transformer. It does not import torch.distributed."""
