"""What a run says of itself: curves, metrics, loggers."""
