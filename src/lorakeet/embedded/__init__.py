"""What ships with Lorakeet, to try everything offline: the starter model and its data."""
