"""Fill a data set from a source that never ends: a watched folder, an object store's prefix, or a Kafka topic."""
