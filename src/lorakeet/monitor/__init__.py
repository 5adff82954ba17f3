"""Watching a run: everything here reads events and never touches a tensor."""
