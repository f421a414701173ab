"""Writing with a model: tokens in, tokens out."""
