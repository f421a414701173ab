"""From one architecture to another: Llama models become DeepSeek models."""
