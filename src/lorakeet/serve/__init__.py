"""Answers over HTTP in OpenAI's shapes: one base, many adapters, one worker that owns them."""
