"""What lies on disk, read and written: model families, source and packed checkpoints, shards, the manifest."""
