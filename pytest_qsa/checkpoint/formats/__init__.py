"""What each quantization format declares, and how its tensors become numbers."""
