"""Segment images of any number and size with a trained model, in one process or on a Ray cluster."""
