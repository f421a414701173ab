"""Data: reads text or prepared tokens, and makes token sequences for training and validation."""
