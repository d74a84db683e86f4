"""What a loaded module of each quantization format looks like, and its dequantized weight."""
