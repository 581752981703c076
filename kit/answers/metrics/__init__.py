"""What a ranking or a prediction is worth, each number with its definition and its protocol."""
