"""Models: loading them, scoring tokens with them, and the methods that train them."""
