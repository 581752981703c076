"""Features -> ranking -> submission.csv, and what it scores."""
