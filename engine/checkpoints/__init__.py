"""Model files on disk: Hugging Face directories, read as they are, and GGUF files, converted to one once."""
