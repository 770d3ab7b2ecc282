"""Serve a trained model over HTTP: the front listens, the replicas segment, and a web page lets people try it."""
