"""From a model and prompts to text: settings, the choice of a token, generation, streaming."""
