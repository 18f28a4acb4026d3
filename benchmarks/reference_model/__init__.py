"""A real mixture-of-experts language model, made of a small dense one without any training."""
