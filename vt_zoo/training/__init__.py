"""What trainings of both tasks share."""
