"""From a name to a model, a tokenizer and batches."""
