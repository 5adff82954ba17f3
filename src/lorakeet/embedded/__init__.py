"""What ships with Lorakeet so that everything can be tried offline: the starter model and its data."""
