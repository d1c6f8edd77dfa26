"""What the teachers give to the student's loss, and how it gets there."""
