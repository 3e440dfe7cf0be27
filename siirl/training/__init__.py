"""Training engines: log-probs, values and updates over packed micro-batches."""
