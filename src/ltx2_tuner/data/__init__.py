"""Dataset configuration, discovery, buckets, clip extraction, cache files, batches."""
