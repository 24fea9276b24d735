"""Image-text shards in, decoded pairs out."""
