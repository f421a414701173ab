"""Converts Llama models to the DeepSeek architecture."""
