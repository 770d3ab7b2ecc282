"""A trained model behind HTTP: the front that listens, the replicas that segment, the page for people."""
