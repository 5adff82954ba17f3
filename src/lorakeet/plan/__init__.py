"""Planning: what fits this machine, predicted from ``config.json`` without torch."""
