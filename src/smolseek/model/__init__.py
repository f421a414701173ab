"""The model architecture: attention, experts and the transformer. This package does not import torch.distributed."""
