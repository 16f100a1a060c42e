"""Speech made on the spot: sentences, voices and rooms of a small corpus that needs no download."""
