"""From files to encoded samples: readers, schemas, cleaning, encoding, shards, order."""
