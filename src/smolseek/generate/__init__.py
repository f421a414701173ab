"""Text generation: tokens in, tokens out."""
