"""Words that every floor shares: errors, units, records, the recipe, events and the run folder."""
