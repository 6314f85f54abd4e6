"""What a job gets and gives, whoever wrote it."""
