"""The server from its parts to the official client."""
