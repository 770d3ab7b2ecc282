"""What a training on Ray consists of: driver, workers, and the events between them."""
