"""What a run says of itself: scores, errors, curves, metrics, loggers."""
