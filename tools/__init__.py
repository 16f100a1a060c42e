"""One-off commands; nothing imports them."""
