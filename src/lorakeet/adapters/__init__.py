"""Adapters: the LoRA core, where it is attached, merged and kept on disk."""
