"""Models that leave the house: merged, read back by a fresh process, compared, then kept."""
