"""Operations of the model and the loss with their kernels. The `reference.py` of an operation defines it in PyTorch."""
