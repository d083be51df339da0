"""What the benchmark allows a submission."""

SIZE_BUDGET = 16_000_000  # bytes, artifact and code together
SECONDS_BUDGET = 600.0  # for training, and again for evaluation
