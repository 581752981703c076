"""What goes to Kaggle and what runs there: the build, its checks, and the way up."""
