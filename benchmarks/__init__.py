"""Speed and memory, one command each; reports in benchmarks/reports. Nothing imports them."""
