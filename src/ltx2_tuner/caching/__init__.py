"""What the cache scripts do: run encoders over items and write cache files."""
