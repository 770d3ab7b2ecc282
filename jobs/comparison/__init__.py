"""Compare networks: train and test each of them on every category of data with every seed."""
