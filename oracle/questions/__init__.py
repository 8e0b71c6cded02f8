"""What is asked of a subject: a file a question."""
