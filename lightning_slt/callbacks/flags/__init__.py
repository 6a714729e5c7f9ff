"""What is kept and told around a flag: weights, jumps of the schedule, and what has changed."""
