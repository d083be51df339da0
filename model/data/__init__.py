"""Text to tokens to batches: shards, tokenizer, byte tables, building, verifying, downloading and loading."""
