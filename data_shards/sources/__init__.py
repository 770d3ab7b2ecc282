"""Sources that shards are packed from: folders, COCO files, arrays and the built-in coins."""
