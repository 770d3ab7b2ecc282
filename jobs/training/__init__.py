"""Trainings on Ray and in one process: the driver, the workers, and the events that they exchange."""
