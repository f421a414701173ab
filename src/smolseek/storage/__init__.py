"""Models on disk: Hugging Face folders, GGUF files, and checkpoints that survive a crash."""
