"""Training loops: of any model, and of a recogniser; optimiser and schedules."""
