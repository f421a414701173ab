"""What model and loss compute through kernels: one folder an operation, PyTorch's definition in its `reference.py`."""
