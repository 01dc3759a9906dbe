"""The parts of the report card, and the trials of the driver off the lap."""
